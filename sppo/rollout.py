"""Rollout engines: prompts in, sampled completions out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from sppo.attention import use_attention

Prompt = Any
"""Text, or chat messages: a list of ``{"role": ..., "content": ...}``."""


@dataclass
class Sample:
    """A prompt, one completion of it, and what the later stages make of the two.

    Attributes:
        prompt, completion: as the dataset has them: both text, or both chat messages.
        prompt_ids, response_ids: their tokens; the response ends with its end-of-sequence token unless truncated.
        truncated: it reached the limit before an end-of-sequence token.
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


class HFRollout:
    """transformers' ``generate()``, left-padded, in the process that trains.

    The policy's own generation settings (top_p, repetition penalty and the like) are set aside: what is sampled from
    must be the distribution whose log-probabilities are trained. Only its end-of-sequence tokens count besides the
    tokenizer's.

    Args:
        policy: the model that is trained; sampled with the attention implementation it has now.
        tokenizer: with an eos token and a pad token.
        max_completion_length: most tokens of a completion.
        top_p, top_k: 1 and 0 for plain sampling.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_completion_length: int,
        top_p: float = 1.0,
        top_k: int = 0,
    ) -> None:
        self.policy = policy
        self.tokenizer = tokenizer
        self.max_completion_length = max_completion_length
        self.top_p = top_p
        self.top_k = top_k
        self.attention = policy.config._attn_implementation
        self.eos_ids = _eos_ids(policy, tokenizer)

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], *, seed: int, temperature: float, batch_size: int) -> list[Sample]:
        """See :class:`RolloutEngine`. The global random state is left as it was."""
        encoded = [encode(prompt, self.tokenizer) for prompt in prompts]
        device = self.policy.device
        own_settings, self.policy.generation_config = self.policy.generation_config, self._settings(temperature)
        training = self.policy.training
        self.policy.eval()
        try:
            cuda = [device] if device.type == "cuda" else []
            with torch.random.fork_rng(devices=cuda), use_attention(self.policy, self.attention):
                torch.manual_seed(seed)
                responses: list[list[int]] = []
                for start in range(0, len(encoded), batch_size):
                    responses += self._generate_batch(encoded[start : start + batch_size])
        finally:
            self.policy.generation_config = own_settings
            self.policy.train(training)
        texts = self.tokenizer.batch_decode(responses, skip_special_tokens=True)
        return [
            Sample(
                prompt=prompt,
                completion=text if isinstance(prompt, str) else [{"role": "assistant", "content": text}],
                prompt_ids=prompt_ids,
                response_ids=response,
                truncated=response[-1] not in self.eos_ids,
            )
            for prompt, text, prompt_ids, response in zip(prompts, texts, encoded, responses, strict=True)
        ]

    def _generate_batch(self, encoded: list[list[int]]) -> list[list[int]]:
        width = max(map(len, encoded))
        pad = self.tokenizer.pad_token_id
        input_ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in encoded], device=self.policy.device)
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in encoded], device=self.policy.device)
        output = cast(Any, self.policy).generate(input_ids=input_ids, attention_mask=mask)
        return [self._until_eos(row) for row in output[:, width:].tolist()]

    def _until_eos(self, tokens: list[int]) -> list[int]:
        end = next((i for i, token in enumerate(tokens) if token in self.eos_ids), len(tokens) - 1)
        return tokens[: end + 1]

    def _settings(self, temperature: float) -> GenerationConfig:
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_p": self.top_p, "top_k": self.top_k}
        return GenerationConfig(
            max_new_tokens=self.max_completion_length,
            eos_token_id=sorted(self.eos_ids),
            pad_token_id=self.tokenizer.pad_token_id,
            use_cache=True,
            **sampling,
        )


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


def _eos_ids(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    own = policy.generation_config.eos_token_id if policy.generation_config is not None else None
    return {tokenizer.eos_token_id} | set(own if isinstance(own, list) else [] if own is None else [own])
