"""Models whose steps are measured: of random weights, as sure of the next token as trained ones, and SmolLM2-135M."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from benchmarks.harness.model_sizes import QWEN

ENTROPY = 0.6  # nats per token at temperature 1; language models have some 0.3 to 1 in their own answers
SMOLLM2 = "smollm2-135m"
Size = dict[str, Any]


class Vocabulary(NamedTuple):
    """A tokenizer, and tokens that make texts which it encodes to the same tokens again.

    Attributes:
        tokenizer: it has a token for the end.
        words: token ids to draw from.
        digits: token ids of the digits 0 and 1.
    """

    tokenizer: PreTrainedTokenizerBase
    words: Sequence[int]
    digits: tuple[int, int]


class Model(Protocol):
    """A policy, its critics and its tokenizer.

    Attributes:
        prompt, response: mean tokens of the prompts and responses that it is trained on.
        bf16: whether it computes in bfloat16 on a CPU too, by autocast over float32 weights.
    """

    @property
    def prompt(self) -> int: ...

    @property
    def response(self) -> int: ...

    @property
    def bf16(self) -> bool: ...

    def load(self) -> None:
        """Read what all policies are copies of; raise ImportError, with the remedy, if a package is missing."""

    def vocabulary(self) -> Vocabulary: ...

    def policy(self, device: torch.device) -> PreTrainedModel:
        """Make a policy in float32, with the same weights each time."""

    def critic(self, policy: PreTrainedModel, small: bool) -> PreTrainedModel | None:
        """Make a critic; None if the trainer shall copy the policy's backbone."""


class RandomModel(NamedTuple):
    """A :class:`Model` of random weights with the sizes ``size``, which are the arguments of Qwen2Config."""

    size: Size
    prompt: int
    response: int
    bf16: bool = False

    def load(self) -> None:
        """Do nothing: weights are made for each policy."""

    def vocabulary(self) -> Vocabulary:
        """Return a vocabulary of numbers."""
        return numbers(self.size["vocab_size"])

    def policy(self, device: torch.device) -> PreTrainedModel:
        """Make a policy by :func:`make_policy`."""
        return make_policy(self.size, device)

    def critic(self, policy: PreTrainedModel, small: bool) -> PreTrainedModel:
        """Make a critic by :func:`make_critic`: the trainer's own copy of 1.5B is initialized on a CPU, slowly."""
        return make_critic(policy, small)


class SmolLM2(NamedTuple):
    """SmolLM2-135M-Instruct, a :class:`Model` with the tokenizer and weights of :mod:`sppo.tasks.smollm2`."""

    prompt: int
    response: int
    bf16: bool = True

    def load(self) -> None:
        """Read the weights, so that no trainer's peak memory includes them."""
        _smollm2()
        _smollm2_critic()

    def vocabulary(self) -> Vocabulary:
        """Return English words: tokens of a space and lower-case letters."""
        _, tokenizer = _smollm2()
        tokens = tokenizer.get_vocab()
        words = sorted(number for token, number in tokens.items() if re.fullmatch("\u0120[a-z]+", token))
        return Vocabulary(tokenizer, words, (tokens["0"], tokens["1"]))

    def policy(self, device: torch.device) -> PreTrainedModel:
        """Copy the model."""
        return copy.deepcopy(_smollm2()[0]).to(device)

    def critic(self, policy: PreTrainedModel, small: bool) -> PreTrainedModel | None:
        """Copy the first 6 of its 30 layers if small."""
        return copy.deepcopy(_smollm2_critic()).to(policy.device) if small else None


@functools.cache
def _smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from sppo.tasks import smollm2

    return smollm2.policy()


@functools.cache
def _smollm2_critic() -> PreTrainedModel:
    from sppo.tasks import smollm2

    return smollm2.critic(layers=6)


_ATTENTION_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 2048}
_QWEN = {"tie_word_embeddings": True, "rms_norm_eps": 1e-6, "max_position_embeddings": 32_768}
MODELS: dict[str, Model] = {
    "tiny": RandomModel(
        {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 512} | _ATTENTION_HEADS,
        32,
        96,
    ),
    "small": RandomModel(
        {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "vocab_size": 8192} | _ATTENTION_HEADS,
        32,
        96,
    ),
    "qwen2.5-0.5b": RandomModel(QWEN["0.5B"] | _QWEN, 128, 1024),
    "qwen2.5-1.5b": RandomModel(QWEN["1.5B"] | _QWEN, 128, 1024),
    SMOLLM2: SmolLM2(32, 48),
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
def entropy_of(policy: PreTrainedModel) -> float:
    """Return the mean entropy in nats of the next token after random ones, at temperature 1."""
    return _entropy(_logits(policy))


def _logits(policy: PreTrainedModel) -> Tensor:
    """Compute the logits after each of 64 random tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, policy.config.vocab_size, (1, 64), generator=generator)
    return policy(input_ids=tokens.to(policy.device), use_cache=False).logits[0].float()


def _entropy(logits: Tensor) -> float:
    return torch.distributions.Categorical(logits=logits).entropy().mean().item()


@functools.cache
def numbers(vocab: int) -> Vocabulary:
    """Make a vocabulary in which each number is a word: token n + 2 is the word n."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {name: i for i, name in enumerate(["<pad>", "<eos>", *map(str, range(vocab - 2))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    return Vocabulary(fast, range(2, vocab), (2, 3))
