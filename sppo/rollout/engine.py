"""What every rollout engine takes and makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Prompt = Any
"""Text, or chat messages: a list of ``{"role": ..., "content": ...}``."""


@dataclass
class Sample:
    """A prompt, one completion of it, and what the later stages make of the two.

    Attributes:
        prompt, completion: as the dataset has them: both text, or both chat messages.
        prompt_ids, response_ids: their tokens; the response ends with its end-of-sequence token unless truncated.
        truncated: it reached the limit before an end-of-sequence token.
        logprobs: of the response tokens, by an engine that computes them otherwise than the trainer; else None.
        group: completions sampled together for one prompt share this number.
        reward: None where none could be had.
        greedy_reward: of the greedy response to the prompt, where the algorithm asks for it.
        value: the critic's, before the update: 0-d, or ``[T]`` before each response token.
        advantage: 0-d, of every token of the response; or ``[T]``.
        returns: ``[T]``, what a token critic is to predict.
    """

    prompt: Prompt
    completion: Any
    prompt_ids: list[int]
    response_ids: list[int]
    truncated: bool
    logprobs: list[float] | None = None
    group: int = 0
    reward: float | None = None
    greedy_reward: float | None = None
    value: Tensor | None = None
    advantage: Tensor | None = None
    returns: Tensor | None = None


class RolloutEngine(Protocol):
    """Samples completions from the current policy."""

    def generate(self, prompts: Sequence[Prompt], *, seed: int, temperature: float, batch_size: int) -> list[Sample]:
        """One completion for each prompt.

        Args:
            prompts: as the dataset has them.
            seed: of the sampling: the same weights, prompts and seed give the same completions.
            temperature: 0 for greedy.
            batch_size: completions to work on at once.
        """


def encode(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of a prompt; chat messages go through the tokenizer's template, up to where the answer begins."""
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    else:
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"prompt {prompt!r} has no tokens; leave such rows out of the dataset")
    return ids


def rollout_seed(*keys: int) -> int:
    """A 64-bit seed from the run's seed, the rollout's number and the rank, unlike that of any other such triple."""
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0] >> 1)


def eos_tokens(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """What ends a response: the tokenizer's end-of-sequence token, and those of the policy's generation settings."""
    own = policy.generation_config.eos_token_id if policy.generation_config is not None else None
    return {tokenizer.eos_token_id} | set(own if isinstance(own, list) else [] if own is None else [own])


def until_end(tokens: Sequence[int], eos: set[int]) -> list[int]:
    """The tokens up to the first that ends a response, that one included."""
    end = next((i for i, token in enumerate(tokens) if token in eos), len(tokens) - 1)
    return list(tokens[: end + 1])


def make_samples(
    prompts: Sequence[Prompt],
    encoded: Sequence[list[int]],
    responses: Sequence[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    eos: set[int],
    logprobs: Sequence[list[float]] | None = None,
) -> list[Sample]:
    """Samples of prompts and the tokens that were sampled after them."""
    texts = tokenizer.batch_decode(list(responses), skip_special_tokens=True)
    return [
        Sample(
            prompt=prompt,
            completion=text if isinstance(prompt, str) else [{"role": "assistant", "content": text}],
            prompt_ids=encoded[i],
            response_ids=responses[i],
            truncated=responses[i][-1] not in eos,
            logprobs=None if logprobs is None else logprobs[i],
        )
        for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
    ]
