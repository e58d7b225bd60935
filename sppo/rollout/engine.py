"""The interface of rollout engines: prompts, samples, and what engines share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Prompt = Any
"""Text, chat messages (a list of ``{"role": ..., "content": ...}``), or token ids, as later turns of an episode are."""


class ChatPrompt(list):
    """Chat messages with arguments of the tokenizer's template, such as ``tools`` or ``enable_thinking``.

    Args:
        messages: the messages.
        template_kwargs: the arguments.
    """

    def __init__(self, messages: Sequence[dict[str, Any]], template_kwargs: dict[str, Any]) -> None:
        super().__init__(messages)
        self.template_kwargs = template_kwargs


@dataclass
class Sample:
    """A prompt with one completion, and what the later stages of a rollout add.

    Attributes:
        prompt, completion: both text, or both chat messages, as in the dataset.
        prompt_ids, response_ids: their tokens; the response ends with its end-of-sequence token unless truncated.
        truncated: whether the response reached the limit before an end-of-sequence token.
        mask: whether the policy wrote each response token, at least one of them; None if it wrote all. It does not
            learn from the others, which an environment or a tool added.
        logprobs: log-probabilities of the response tokens, if the engine computes its own; else None. With a support
            they are those over it.
        support: which tokens the sampler kept: a list with the token ids kept for each response token, itself included,
            or a tuple ``(token_ids, offsets)``, where these are ``token_ids[offsets[t]:offsets[t + 1]]`` (a
            ``sppo_kernels.Support``, which every support becomes). No token ids stand for the whole
            vocabulary. None if sampling is not truncated, or the engine cannot tell.
        columns: further columns for the rewards.
        error: why it has no reward, if sampling it failed.
        name: name of the row's prompt, the same in each rollout.
        group: number shared by completions that were sampled together for one prompt.
        reward: None if the completion could not be scored.
        logged: what rewards logged for it, by column of ``completions.jsonl``.
        greedy_reward: reward of the greedy response to the prompt, if the algorithm needs it.
        value: the critic's prediction before the update: 0-d, or ``[T]`` before each token that the policy wrote.
        advantage: 0-d for all response tokens, or ``[T]`` for those that the policy wrote.
        returns: ``[T]``, targets of a token critic.
        drift, trace: see :class:`sppo.RolloutBatch`; if the algorithm tracks drifts.
    """

    prompt: Prompt
    completion: Any
    prompt_ids: list[int]
    response_ids: list[int]
    truncated: bool
    mask: list[bool] | None = None
    logprobs: list[float] | None = None
    support: tuple[Tensor, Tensor] | list[list[int]] | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    name: str = ""
    group: int = 0
    reward: float | None = None
    logged: dict[str, Any] = field(default_factory=dict)
    greedy_reward: float | None = None
    value: Tensor | None = None
    advantage: Tensor | None = None
    returns: Tensor | None = None
    drift: float = 0.0
    trace: tuple[list[int], list[float]] | None = None

    @property
    def policy_positions(self) -> list[int]:
        """Positions in ``response_ids`` of the tokens that the policy wrote."""
        if self.mask is None:
            return list(range(len(self.response_ids)))
        return [position for position, written in enumerate(self.mask) if written]

    @property
    def num_policy_tokens(self) -> int:
        """Number of tokens that the policy wrote."""
        return len(self.response_ids) if self.mask is None else sum(self.mask)

    @property
    def num_turns(self) -> int:
        """Number of parts that the policy wrote without interruption."""
        if self.mask is None:
            return 1
        return sum(written and not before for before, written in zip([False, *self.mask], self.mask, strict=False))


class RolloutEngine(Protocol):
    """Samples completions from the current policy.

    An engine may have an attribute ``on_progress``, a function that it calls with the number of finished completions
    and their total as completions finish, or None. It may also have a method ``skip()``: in a run of several processes,
    one that has no prompts calls it where the others call :meth:`generate`.
    """

    def generate(self, prompts: Sequence[Prompt], *, seed: int, temperature: float, batch_size: int) -> list[Sample]:
        """Sample one completion of each prompt.

        Args:
            prompts: prompts, as in the dataset.
            seed: the same weights, prompts and seed give the same completions.
            temperature: 0 for greedy decoding.
            batch_size: number of completions to generate at once.
        """


def encode(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenize a prompt; chat messages go through the tokenizer's template, up to where the answer begins.

    Token ids are returned as they are.

    Raises:
        ValueError: the prompt has no tokens.
    """
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    elif prompt and isinstance(prompt[0], int):
        ids = list(prompt)
    else:
        settings = prompt.template_kwargs if isinstance(prompt, ChatPrompt) else {}
        messages = list(prompt)
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **settings)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"prompt {prompt!r} has no tokens; remove such rows from the dataset")
    return ids


def rollout_seed(*keys: int) -> int:
    """Derive a 63-bit seed from the run's seed, the rollout's number and the rank; other keys give another seed."""
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0] >> 1)


def eos_tokens(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the tokens that end a response: the tokenizer's, and those of the policy's generation settings."""
    own = policy.generation_config.eos_token_id if policy.generation_config is not None else None
    return {tokenizer.eos_token_id} | set(own if isinstance(own, list) else [] if own is None else [own])


def until_end(tokens: Sequence[int], eos: set[int]) -> list[int]:
    """Return the tokens up to and including the first that ends a response."""
    end = next((i for i, token in enumerate(tokens) if token in eos), len(tokens) - 1)
    return list(tokens[: end + 1])


def make_samples(
    prompts: Sequence[Prompt],
    encoded: Sequence[list[int]],
    responses: Sequence[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    eos: set[int],
    logprobs: Sequence[list[float]] | None = None,
    supports: Sequence[tuple[Tensor, Tensor]] | None = None,
) -> list[Sample]:
    """Make samples from prompts, their tokens and the sampled tokens."""
    texts = tokenizer.batch_decode(list(responses), skip_special_tokens=True)
    return [
        Sample(
            prompt=prompt,
            completion=[{"role": "assistant", "content": text}] if _is_chat(prompt) else text,
            prompt_ids=encoded[i],
            response_ids=responses[i],
            truncated=responses[i][-1] not in eos,
            logprobs=None if logprobs is None else logprobs[i],
            support=None if supports is None else supports[i],
        )
        for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
    ]


def _is_chat(prompt: Prompt) -> bool:
    return not isinstance(prompt, str) and not (prompt and isinstance(prompt[0], int))
