"""Models of random weights that are as sure of the next token as trained ones, and tokenizers for them."""

from __future__ import annotations

import copy
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from benchmarks.harness.model_sizes import QWEN

ENTROPY = 0.6  # nats per token at temperature 1; language models have some 0.3 to 1 in their own answers
Size = dict[str, Any]


class Model(NamedTuple):
    """Sizes of a model, and the mean tokens of the prompts and responses that it is trained on."""

    size: Size
    prompt: int
    response: int


_ATTENTION_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 2048}
_QWEN = {"tie_word_embeddings": True, "rms_norm_eps": 1e-6, "max_position_embeddings": 32_768}
MODELS = {
    "tiny": Model(
        {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 512} | _ATTENTION_HEADS,
        32,
        96,
    ),
    "small": Model(
        {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "vocab_size": 8192} | _ATTENTION_HEADS,
        32,
        96,
    ),
    "qwen2.5-0.5b": Model(QWEN["0.5B"] | _QWEN, 128, 1024),
    "qwen2.5-1.5b": Model(QWEN["1.5B"] | _QWEN, 128, 1024),
}


def make_policy(size: Size, device: torch.device) -> Qwen2ForCausalLM:
    """Make a language model in float32, with the same weights each time."""
    torch.manual_seed(0)
    with device:
        policy = Qwen2ForCausalLM(Qwen2Config(**size, pad_token_id=0, eos_token_id=1, bos_token_id=None))
    sharpen(policy)
    return policy


def make_critic(policy: PreTrainedModel, small: bool) -> PreTrainedModel:
    """Make a classifier like the policy, or with a quarter of its layers."""
    torch.manual_seed(1)
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    if small:
        config.num_hidden_layers = max(1, config.num_hidden_layers // 4)
    with policy.device:
        return AutoModelForSequenceClassification.from_config(config)


@torch.no_grad()
def sharpen(policy: Qwen2ForCausalLM, entropy: float = ENTROPY) -> None:
    """Scale the weight of the last normalization, and thereby all logits, until the mean entropy is ``entropy``.

    The distributions of random weights are otherwise nearly uniform. The scale is found by bisection on random tokens.
    """
    logits = _logits(policy)
    low, high = -8.0, 16.0  # of the scale's logarithm; entropy falls with it
    for _ in range(14):
        middle = (low + high) / 2
        low, high = (middle, high) if _entropy(logits * 2**middle) > entropy else (low, middle)
    policy.model.norm.weight.mul_(2**high)


@torch.no_grad()
def entropy_of(policy: Qwen2ForCausalLM) -> float:
    """Return the mean entropy in nats of the next token after random ones, at temperature 1."""
    return _entropy(_logits(policy))


def _logits(policy: Qwen2ForCausalLM) -> Tensor:
    """Compute the logits after each of 64 random tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, policy.config.vocab_size, (1, 64), generator=generator)
    return policy(input_ids=tokens.to(policy.device), use_cache=False).logits[0].float()


def _entropy(logits: Tensor) -> float:
    return torch.distributions.Categorical(logits=logits).entropy().mean().item()


@functools.cache
def make_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """Make a tokenizer in which each number is a word: token n + 2 is the word n."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {name: i for i, name in enumerate(["<pad>", "<eos>", *map(str, range(vocab - 2))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
