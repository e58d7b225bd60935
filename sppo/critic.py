"""The prompt critic: an ordinary sequence-classification model with one label, which reads only the prompt."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sppo.attention import NAME, pack, packed_hidden, use_attention
from sppo_kernels import prompt_value_logits

_TOKENS_AT_ONCE = 2**15


def build_critic(
    critic: PreTrainedModel | str | Path | None, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """Make the critic that the user asked for, with a head that has a bias.

    Args:
        critic: None for a copy of the policy's backbone; or a model, or a folder or hub name of one, with a head
            ``score`` of one label. A head that has a bias is kept; one without starts at zero.
        policy: the policy, which lends its backbone.
        tokenizer: the policy's; the critic reads its tokens.

    Raises:
        ValueError: the critic has no such head, too few embeddings, or another tokenizer.
    """
    if critic is None:
        critic = _copy_backbone(policy)
    elif isinstance(critic, (str, Path)):
        _check_tokenizer(str(critic), tokenizer)
        critic = load_critic(critic, policy.dtype)
    rows = embedding_rows(critic)
    if rows < len(tokenizer):
        raise ValueError(
            f"critic has {rows} token embeddings and the policy's tokenizer {len(tokenizer)} tokens; "
            "take a critic of the same vocabulary, or call critic.resize_token_embeddings"
        )
    if head(critic).bias is None:
        set_head(critic, torch.zeros(1))
        nn.init.zeros_(head(critic).weight)
    return critic


def head(critic: PreTrainedModel) -> nn.Linear:
    """The layer that reads the value off a hidden state."""
    layer = getattr(critic, "score", None)
    if not isinstance(layer, nn.Linear) or layer.out_features != 1:
        raise ValueError(
            f"critic={type(critic).__name__} needs a linear head named 'score' with one label; load it with "
            "AutoModelForSequenceClassification.from_pretrained(..., num_labels=1)"
        )
    return layer


def embedding_rows(model: PreTrainedModel) -> int:
    """How many tokens a model knows."""
    return cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0]


def load_critic(folder: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """Read a critic. Transformers' own class has no bias in its head; one that was saved here is put back."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=dtype)
    for file in Path(folder).glob("*.safetensors"):
        if (bias := load_file(file).get("score.bias")) is not None:
            set_head(model, bias)
    return model


def set_head(critic: PreTrainedModel, bias: torch.Tensor) -> None:
    """Give the head of ``critic`` a bias, next to the weight it has."""
    old = head(critic)
    new = nn.Linear(old.in_features, 1, dtype=old.weight.dtype, device=old.weight.device)
    with torch.no_grad():
        new.weight.copy_(old.weight)
        new.bias.copy_(bias)
    critic.score = new


@torch.no_grad()
def set_prior(critic: PreTrainedModel, success_rate: float) -> None:
    """Start an untrained head at a constant: every value is ``success_rate``, in (0, 1). A trained head stays."""
    if not head(critic).weight.any():
        head(critic).bias.fill_(math.log(success_rate / (1 - success_rate)))


@torch.no_grad()
def prompt_values(critic: PreTrainedModel, prompts: list[list[int]]) -> list[float]:
    """P(success) for each prompt; each distinct prompt is read once, packed without padding."""
    distinct = list(dict.fromkeys(map(tuple, prompts)))
    values: dict[tuple[int, ...], float] = {}
    with use_attention(critic, NAME):
        for chunk in _chunks(distinct):
            packed = pack(chunk)
            packed = type(packed)(*(x.to(critic.device) for x in packed))
            hidden = packed_hidden(critic, packed, max(map(len, chunk)))
            last = packed.cu_seqlens[1:].long() - 1
            logits = prompt_value_logits(hidden, head(critic).weight, last, bias=head(critic).bias)
            values |= zip(chunk, logits.sigmoid().tolist(), strict=True)
    return [values[tuple(prompt)] for prompt in prompts]


def _chunks(prompts: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Cut into runs of at most so many tokens (a longer prompt is a run of its own)."""
    chunks: list[list[tuple[int, ...]]] = []
    room = 0
    for prompt in prompts:
        if len(prompt) > room or not chunks:
            chunks.append([])
            room = _TOKENS_AT_ONCE
        chunks[-1].append(prompt)
        room -= len(prompt)
    return chunks


def _copy_backbone(policy: PreTrainedModel) -> PreTrainedModel:
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    try:
        critic = AutoModelForSequenceClassification.from_config(config, dtype=policy.dtype)
        critic.base_model.load_state_dict(policy.base_model.state_dict())
    except (ValueError, RuntimeError, KeyError) as error:
        raise ValueError(
            f"transformers has no sequence classifier with the backbone of {type(policy).__name__}; "
            "pass critic=, a model of AutoModelForSequenceClassification with num_labels=1"
        ) from error
    return critic.to(policy.device)


def _check_tokenizer(folder: str, tokenizer: PreTrainedTokenizerBase) -> None:
    if Path(folder).is_dir() and not Path(folder, "tokenizer_config.json").exists():
        return  # a critic without a tokenizer of its own
    theirs = AutoTokenizer.from_pretrained(folder).get_vocab()
    if any(theirs.get(token) != i for token, i in tokenizer.get_vocab().items()):
        raise ValueError(f"critic={folder!r} was made with another tokenizer than the policy's; take one of the same")
