"""Reward models: sequence classifiers with one label that score a prompt with its completion."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


class RewardModel:
    """A reward ``f(prompts, completions)`` by a sequence classifier with one label.

    Chat messages go through the template of the model's own tokenizer; of text, the completion follows the prompt.

    Args:
        model: the classifier, or its folder or hub name. By name it is loaded in ``dtype``, onto the accelerator if
            there is one. A ``PreTrainedModel`` stays where it is.
        tokenizer: its tokenizer; None for that of the model's folder or hub name.
        batch_size: number of completions per forward.
        max_length: longer texts are cut at the front, so that the end of the completion is read. None: no limit.
        sigmoid: apply the logistic function, which brings the score into [0, 1], as a prompt critic requires.
        dtype: precision of a model given by name, as text.

    Raises:
        ValueError: the model has several labels, ``batch_size`` is below 1, or ``dtype`` is unknown.
    """

    def __init__(
        self,
        model: PreTrainedModel | str,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        batch_size: int = 16,
        max_length: int | None = None,
        sigmoid: bool = False,
        dtype: str = "float32",
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"reward model: batch_size must be at least 1, got {batch_size}")
        name = model if isinstance(model, str) else model.config._name_or_path
        if isinstance(model, str):
            model = _load(model, dtype)
        if model.config.num_labels != 1:
            raise ValueError(
                f"reward model {name!r} has {model.config.num_labels} labels; a reward needs a sequence classifier "
                "with one (AutoModelForSequenceClassification, num_labels=1)"
            )
        self.__name__ = Path(name).name or type(model).__name__
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer if tokenizer is not None else AutoTokenizer.from_pretrained(name)
        self.batch_size, self.max_length, self.sigmoid = batch_size, max_length, sigmoid
        self.digest = _digest(name)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
        """Return the score of each completion."""
        encoded = [self._encode(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        scores = [0.0] * len(encoded)
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))  # little padding
        for start in range(0, len(order), self.batch_size):
            indices = order[start : start + self.batch_size]
            values = self._score([encoded[i] for i in indices])
            for i, value in zip(indices, values, strict=True):
                scores[i] = value
        return scores

    def _encode(self, prompt: Any, completion: Any) -> list[int]:
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt + completion)["input_ids"]
        else:
            text = self.tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids if self.max_length is None else ids[-self.max_length :]

    def _score(self, rows: list[list[int]]) -> list[float]:
        width, device = max(map(len, rows)), self.model.device
        # The last token that is no padding is the one that classifiers read.
        pad = self.model.config.get_text_config().pad_token_id
        if pad is None and len(rows) > 1:
            return [value for row in rows for value in self._score([row])]
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        logits = self.model(input_ids=ids, attention_mask=mask).logits[:, 0].float()
        return (logits.sigmoid() if self.sigmoid else logits).tolist()


def _load(name: str, dtype: str) -> PreTrainedModel:
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ValueError(f"reward model {name!r}: dtype must be float32, bfloat16 or float16, got {dtype!r}")
    try:
        model = AutoModelForSequenceClassification.from_pretrained(name, dtype=kind)
    except OSError as error:
        raise ValueError(
            f"reward model {name!r} cannot be loaded ({str(error).splitlines()[0]}); give a folder or a hub name"
        ) from error
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return model if accelerator is None else model.to(accelerator)


def _digest(name: str) -> str:
    """Return a digest of a folder's small files and of the sizes of its others, or of a hub name."""
    digest = hashlib.sha256(name.encode() if not Path(name).is_dir() else b"")
    for file in sorted(Path(name).iterdir()) if Path(name).is_dir() else ():
        if file.is_file():
            digest.update(f"{file.name} {file.stat().st_size}".encode())
            digest.update(file.read_bytes() if file.stat().st_size < 2**20 else b"")
    return digest.hexdigest()[:16]
