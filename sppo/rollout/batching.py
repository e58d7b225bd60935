"""Micro-batches: samples packed without padding and balanced by tokens.

A :data:`MicroBatch` is a dict of tensors; N, R, M, K count tokens, S samples, P prompts, O outcomes:

    name                                        shape               contents
    input_ids, position_ids                     [1, N]              prompts with responses, without their last tokens,
                                                                    which predict nothing
    cu_seqlens                                  [S + 1]             where each sequence begins
    response_index, response_ids                [R]                 positions that predict response tokens which the
                                                                    policy wrote; these tokens
    response_cu_seqlens                         [S + 1]             where each response begins among them
    advantages                                  [S] or [R]          one per sample, or one per response token
    rollout_logprobs                            [R]                 if the engine computes its own
    support_ids                                 [K]                 if sampling was truncated: the K token ids that the
                                                                    sampler kept, int32
    support_offsets                             [R + 1]             where those of each response token begin
    values, returns                             [R]                 token critic: values before the update, and targets
    prompt_ids, prompt_position_ids             [1, M]              prompt critic: distinct prompts
    prompt_cu_seqlens                           [P + 1]             where each prompt begins
    last_index, outcomes                        [O]                 where an outcome's prompt ends; its reward

A prompt critic's prompts are distributed separately from the policy's samples: an update reads each distinct prompt
once, whichever micro-batches its responses are in. A micro-batch without samples has one token of input and no loss.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sppo.models.packed_attention import cumulative, pack
from sppo.rollout.engine import Sample
from sppo.rollout.support import pack_supports

MicroBatch = dict[str, Tensor]


@dataclass(frozen=True)
class UpdateSize:
    """Size of an update, on one process or on all.

    Attributes:
        num_sequences, num_tokens: of the responses that the policy learns from.
        num_outcomes: number of rewards, also of masked responses.
        num_micro_batches: number of micro-batches.
    """

    num_sequences: int
    num_tokens: int
    num_outcomes: int
    num_micro_batches: int

    @classmethod
    def of(
        cls, samples: Sequence[Sample], *, num_outcomes: int, multiple_of: int, max_tokens: int | None
    ) -> UpdateSize:
        """Return the size of an update on this process; see :func:`num_micro_batches`."""
        return cls(
            num_sequences=len(samples),
            num_tokens=sum(s.num_policy_tokens for s in samples),
            num_outcomes=num_outcomes,
            num_micro_batches=num_micro_batches(samples, multiple_of, max_tokens),
        )

    def num_units(self, critic: str | None) -> int:
        """Return over how many terms the loss of a critic is a mean."""
        return self.num_tokens if critic == "token" else self.num_outcomes

    @classmethod
    def combine(cls, sizes: Sequence[UpdateSize]) -> UpdateSize:
        """Combine the sizes on all processes: totals, and the largest number of micro-batches, which all then have."""
        return cls(
            num_sequences=sum(size.num_sequences for size in sizes),
            num_tokens=sum(size.num_tokens for size in sizes),
            num_outcomes=sum(size.num_outcomes for size in sizes),
            num_micro_batches=max(size.num_micro_batches for size in sizes),
        )


def num_micro_batches(samples: Sequence[Sample], multiple_of: int, max_tokens: int | None) -> int:
    """Return how many micro-batches samples need, so that none has more than ``max_tokens``.

    A sample that is longer than that gets a micro-batch of its own.

    Args:
        samples: samples of an update.
        multiple_of: the result is a multiple of this.
        max_tokens: None for no limit.
    """
    count, lengths = multiple_of, [length(s) for s in samples]
    if max_tokens is None:
        return count
    while count < len(samples) and any(
        len(part) > 1 and sum(lengths[i] for i in part) > max_tokens for part in balance_by_tokens(lengths, count)
    ):
        count += multiple_of
    return count


def make_micro_batches(
    samples: Sequence[Sample], count: int, critic: str | None, with_masked: Sequence[Sample] | None = None
) -> list[MicroBatch]:
    """Pack the samples of an update into ``count`` micro-batches, with the inputs of its critic.

    Args:
        samples: samples that the policy learns from, with advantages and what a token critic needs.
        count: number of micro-batches.
        critic: ``"prompt"``, ``"token"``, ``"probe"`` or None.
        with_masked: the same and masked samples, if there are any; a prompt critic learns from the rewards of all.
    """
    parts = [[samples[i] for i in part] for part in balance_by_tokens([length(s) for s in samples], count)]
    batches = [pack_policy_batch(part) for part in parts]
    if critic == "token":
        for batch, part in zip(batches, parts, strict=True):
            batch |= {"values": _flat([s.value for s in part]), "returns": _flat([s.returns for s in part])}
    if critic == "prompt":
        outcomes: dict[tuple[int, ...], list[float]] = defaultdict(list)
        for s in samples if with_masked is None else with_masked:
            assert s.reward is not None
            outcomes[tuple(s.prompt_ids)].append(s.reward)
        prompts = list(outcomes.items())
        prompt_parts = balance_by_tokens([len(prompt) for prompt, _ in prompts], count)
        for batch, indices in zip(batches, prompt_parts, strict=True):
            batch |= pack_critic_batch([prompts[i] for i in indices])
    return batches


def pack_policy_batch(samples: Sequence[Sample]) -> MicroBatch:
    """Pack the policy's inputs for some samples."""
    sequences = pack([(s.prompt_ids + s.response_ids)[:-1] for s in samples] or [[0]])
    index: list[int] = []
    start = 0
    positions = [s.policy_positions for s in samples]
    for s, written in zip(samples, positions, strict=True):
        begin = start + len(s.prompt_ids) - 1
        index += [begin + position for position in written]
        start = begin + len(s.response_ids)
    batch = {
        "input_ids": sequences.input_ids,
        "position_ids": sequences.position_ids,
        "cu_seqlens": sequences.cu_seqlens,
        "response_index": torch.tensor(index, dtype=torch.long),
        "response_ids": torch.tensor(_written([s.response_ids for s in samples], positions), dtype=torch.long),
        "response_cu_seqlens": cumulative([len(written) for written in positions]),
        "advantages": _flat([s.advantage for s in samples]),
    }
    if len({s.logprobs is None for s in samples}) > 1:
        raise ValueError(
            "the rollout engine returned logprobs for some samples and not for others; return them for all or for none"
        )
    if samples and samples[0].logprobs is not None:
        batch["rollout_logprobs"] = torch.tensor(_written([s.logprobs or [] for s in samples], positions))
    return batch | pack_supports(samples)


def _written(values: Sequence[Sequence[Any]], positions: Sequence[Sequence[int]]) -> list[Any]:
    """Concatenate the values of the tokens that the policy wrote."""
    return [each[position] for each, written in zip(values, positions, strict=True) for position in written]


def pack_critic_batch(prompts: Sequence[tuple[tuple[int, ...], list[float]]]) -> MicroBatch:
    """Pack a prompt critic's inputs: distinct prompts, each with the outcomes of its responses."""
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


def balance_by_tokens(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Partition indices into parts of similar total length: longest first, each to the lightest part so far."""
    result: list[list[int]] = [[] for _ in range(parts)]
    weight = [0] * parts
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        lightest = weight.index(min(weight))
        result[lightest].append(i)
        weight[lightest] += lengths[i]
    return result


def length(sample: Sample) -> int:
    """Return the number of tokens of prompt and response."""
    return len(sample.prompt_ids) + len(sample.response_ids)


def _flat(values: Sequence[Tensor | None]) -> Tensor:
    """Concatenate as float32: S numbers to ``[S]``, S tensors with R elements in total to ``[R]``."""
    tensors = [torch.as_tensor(value, dtype=torch.float32).reshape(-1) for value in values]
    return torch.cat([torch.zeros(0), *tensors])
