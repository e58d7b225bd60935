"""Micro-batches: samples laid behind each other without padding, dealt so that each has about as many tokens.

A :data:`MicroBatch` is a dict of tensors:

    input_ids, position_ids [1, N], cu_seqlens [S + 1]   prompts with responses, but for their last tokens, which
                                                         predict nothing
    response_index, response_ids [R]                     the positions that predict response tokens, and these tokens
    response_cu_seqlens [S + 1]                          where each response begins among them
    advantages [S], or [R] where each token has its own
    rollout_logprobs [R]                                 of an engine that has its own
    values, returns [R]                                  of a token critic: before the update, and what to predict
    prompt_ids, prompt_position_ids [1, M],              of a prompt critic: distinct prompts,
    prompt_cu_seqlens [P + 1]
    last_index, outcomes [O]                             where each one's prompt ends among them, and how it came out

The critic's prompts are dealt apart from the policy's samples: an update reads each distinct prompt once, whichever
micro-batches its responses are in. Without samples there is one token of input and nothing to learn.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from sppo.models.packed_attention import cumulative, pack
from sppo.rollout.engine import Sample

MicroBatch = dict[str, Tensor]


def parts_needed(samples: Sequence[Sample], least: int, max_tokens: int | None) -> int:
    """Into how many parts to deal samples, a multiple of ``least``, for none to have more than ``max_tokens``.

    A sample that is longer by itself has a part of its own.
    """
    parts, lengths = least, [length(s) for s in samples]
    if max_tokens is None:
        return parts
    while parts < len(samples) and any(
        len(part) > 1 and sum(lengths[i] for i in part) > max_tokens for part in balance(lengths, parts)
    ):
        parts += least
    return parts


def deal(samples: Sequence[Sample], parts: int, critic: str | None) -> list[MicroBatch]:
    """The micro-batches of an update, with what a ``"prompt"`` or ``"token"`` critic reads."""
    dealt = [[samples[i] for i in part] for part in balance([length(s) for s in samples], parts)]
    batches = [policy_part(part) for part in dealt]
    if critic == "token":
        for batch, part in zip(batches, dealt, strict=True):
            batch |= {"values": _flat([s.value for s in part]), "returns": _flat([s.returns for s in part])}
    if critic == "prompt":
        outcomes: dict[tuple[int, ...], list[float]] = defaultdict(list)
        for s in samples:
            assert s.reward is not None
            outcomes[tuple(s.prompt_ids)].append(s.reward)
        prompts = list(outcomes.items())
        for batch, those in zip(batches, balance([len(prompt) for prompt, _ in prompts], parts), strict=True):
            batch |= critic_part([prompts[i] for i in those])
    return batches


def policy_part(samples: Sequence[Sample]) -> MicroBatch:
    """What the policy reads of these samples."""
    sequences = pack([(s.prompt_ids + s.response_ids)[:-1] for s in samples] or [[0]])
    index: list[int] = []
    start = 0
    for s in samples:
        begin = start + len(s.prompt_ids) - 1
        index += range(begin, begin + len(s.response_ids))
        start = begin + len(s.response_ids)
    batch = {
        "input_ids": sequences.input_ids,
        "position_ids": sequences.position_ids,
        "cu_seqlens": sequences.cu_seqlens,
        "response_index": torch.tensor(index, dtype=torch.long),
        "response_ids": torch.tensor([token for s in samples for token in s.response_ids], dtype=torch.long),
        "response_cu_seqlens": cumulative([len(s.response_ids) for s in samples]),
        "advantages": _flat([s.advantage for s in samples]),
    }
    if len({s.logprobs is None for s in samples}) > 1:
        raise ValueError("the rollout engine gave some samples logprobs and others none; give all of them or none")
    if samples and samples[0].logprobs is not None:
        batch["rollout_logprobs"] = torch.tensor([logprob for s in samples for logprob in s.logprobs or []])
    return batch


def critic_part(prompts: Sequence[tuple[tuple[int, ...], list[float]]]) -> MicroBatch:
    """What a prompt critic reads: each prompt with the outcomes of its responses."""
    packed = pack([prompt for prompt, _ in prompts] or [[0]])
    counts = torch.tensor([len(outcomes) for _, outcomes in prompts], dtype=torch.long)
    ends = packed.cu_seqlens[1:].long()[: len(prompts)] - 1
    return {
        "prompt_ids": packed.input_ids,
        "prompt_position_ids": packed.position_ids,
        "prompt_cu_seqlens": packed.cu_seqlens,
        "last_index": ends.repeat_interleave(counts),
        "outcomes": torch.tensor([outcome for _, outcomes in prompts for outcome in outcomes], dtype=torch.float32),
    }


def balance(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Deal indices over parts of about the same total length: the longest first, to the lightest part."""
    dealt: list[list[int]] = [[] for _ in range(parts)]
    weight = [0] * parts
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        lightest = weight.index(min(weight))
        dealt[lightest].append(i)
        weight[lightest] += lengths[i]
    return dealt


def length(sample: Sample) -> int:
    """Tokens of the prompt and the response."""
    return len(sample.prompt_ids) + len(sample.response_ids)


def _flat(values: Sequence[Tensor | None]) -> Tensor:
    """One after the other, float32: ``[S]`` of S numbers, ``[R]`` of S tensors with R elements in all."""
    tensors = [torch.as_tensor(value, dtype=torch.float32).reshape(-1) for value in values]
    return torch.cat([torch.zeros(0), *tensors])
