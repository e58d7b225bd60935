"""Products with a calculator: a task of two turns, which a policy solves only if it learns to call the tool.

    prompt         34*7=
    policy         [34*7]
    calculator     238;
    policy         #238

The initial model imitates a teacher who calls the calculator three times in ten, and otherwise guesses. Only the final
answer is graded.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

# The worker process of rewards imports this module, so torch and datasets are imported only where they are needed.
if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

ALPHABET = "0123456789*=[];#"
MAX_COMPLETION_LENGTH = 20

_CALL = re.compile(r"\[(\d{1,3})\*(\d{1,3})\]\Z")
_ANSWER = re.compile(r"#(\d+)\Z")


class Calculator:
    """Multiplies the numbers of a call ``[a*b]`` (:class:`sppo.rollout.environments.Environment`)."""

    def reset(self, row: dict[str, Any]) -> None:
        """Start an episode with the row's prompt."""

    def step(self, completion: str) -> str | None:
        """Return the product and a semicolon, or None if the turn does not end with a call."""
        call = _CALL.search(completion)
        return None if call is None else f"{int(call[1]) * int(call[2])};"

    def reward(self) -> None:
        """Return None: :func:`reward` grades the answer."""


def reward(completions: Sequence[str], answer: Sequence[str]) -> list[float]:
    """Return 1.0 for a completion that ends in ``#`` and the product, else 0.0."""
    found = [_ANSWER.search(completion) for completion in completions]
    return [float(match is not None and match[1] == truth) for match, truth in zip(found, answer, strict=True)]


def dataset(split: str = "train", size: int = 500, seed: int = 0) -> Dataset:
    """Generate random prompts with their answers; the splits ``"train"`` and ``"test"`` share no prompt.

    Raises:
        ValueError: an unknown split, or a size below 1.
    """
    from datasets import Dataset

    if split not in ("train", "test") or size < 1:
        raise ValueError(f"split must be train or test and size at least 1, got {split!r} and {size}")
    rng = random.Random(f"{split} {seed}")
    pairs = [_pair(rng, split) for _ in range(size)]
    return Dataset.from_dict({"prompt": [f"{a}*{b}=" for a, b in pairs], "answer": [str(a * b) for a, b in pairs]})


def warm_started_model(
    *, calls: float = 0.3, max_steps: int = 600, batch_size: int = 128, seed: int = 0
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Create a model and train it to imitate the teacher on training prompts, or load it from a cache.

    Args:
        calls: how often the teacher calls the calculator.
        max_steps: maximum number of steps.
        batch_size: examples per step.
        seed: seed of weights and examples.

    Returns:
        The model, in float32 on the CPU, and its tokenizer with one token per character.
    """
    from torch import Tensor, tensor
    from torch.nn.functional import cross_entropy

    from sppo.tasks.chain_model import cached, char_tokenizer, imitate, new_model

    settings = {"calls": calls, "max_steps": max_steps, "batch_size": batch_size, "seed": seed}
    tokenizer, rng = char_tokenizer(ALPHABET), random.Random(seed)
    result = tokenizer(";")["input_ids"][0]
    model = new_model(ALPHABET, 64, 2, 5 + MAX_COMPLETION_LENGTH, seed=seed)

    def batch(wanted: float) -> tuple[Tensor, Tensor]:
        """Return tokens ``[B, T]``, and labels of what the teacher wrote, -100 elsewhere."""
        examples = [_example(rng, wanted) for _ in range(batch_size)]
        ids = [[tokenizer(text)["input_ids"] for text, _ in parts] for parts in examples]
        rows = [[token for part in row for token in part] for row in ids]
        labels = [
            [token if written else -100 for part, (_, written) in zip(row, parts, strict=True) for token in part]
            for row, parts in zip(ids, examples, strict=True)
        ]
        width = max(map(len, rows))
        tokens = [row + [0] * (width - len(row)) for row in rows]
        return tensor(tokens), tensor([row + [-100] * (width - len(row)) for row in labels])

    def loss() -> Tensor:
        tokens, labels = (each.to(model.device) for each in batch(calls))
        logits = model(tokens[:, :-1]).logits
        return cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())

    def accuracy() -> float:
        """Return the share of examples with a call whose answer is copied without a mistake."""
        tokens, labels = (each.to(model.device) for each in batch(1.0))
        found = model(tokens[:, :-1]).logits.argmax(-1)
        after_call = tokens[:, :-1].eq(result).cumsum(1) > 0
        wrong = (found != labels[:, 1:]) & (labels[:, 1:] >= 0) & after_call
        return 1 - wrong.any(1).float().mean().item()

    def train() -> None:
        imitate(model, loss=loss, measure=accuracy, accuracy=0.99, max_steps=max_steps, learning_rate=4e-3)

    cached(model, "calculator", settings, train)
    return model, tokenizer


def _pair(rng: random.Random, split: str) -> tuple[int, int]:
    """Draw two numbers; one product in eight belongs to the test split."""
    while True:
        a, b = rng.randrange(10, 100), rng.randrange(2, 10)
        if ((a * 7 + b) % 8 == 0) == (split == "test"):
            return a, b


def _example(rng: random.Random, calls: float) -> list[tuple[str, bool]]:
    """Return the parts of an episode of the teacher, each with whether the teacher wrote it."""
    a, b = _pair(rng, "train")
    prompt = (f"{a}*{b}=", False)
    if rng.random() < calls:
        return [prompt, (f"[{a}*{b}]<eos>", True), (f"{a * b};", False), (f"#{a * b}<eos>", True)]
    return [prompt, (f"#{rng.randrange(20, 900)}<eos>", True)]
