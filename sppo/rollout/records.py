"""What the stages of a rollout pass on to each other and between processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sppo.algorithms import RolloutBatch
from sppo.reporting.meter import Gather
from sppo.rollout.batching import MicroBatch
from sppo.rollout.engine import Sample
from sppo.rollout.prompts import prompt_hash
from sppo.rollout.support import SupportStats

ContextFactory = Callable[[], AbstractContextManager[Any]]


@dataclass
class Update:
    """The micro-batches of one optimizer step, and what they have in common.

    Attributes:
        micro_batches: their number is a multiple of ``gradient_accumulation_steps``; the Trainer counts
            ``micro_batches[i::gradient_accumulation_steps]`` as one.
        max_length: number of tokens of their longest sequence.
        policy_normalizer, critic_normalizer: divisors of their summed losses; this process's share.
        num_tokens: number of response tokens that the policy learns from; this process's share.
        policy_learns, critic_learns: whether the step may change the policy and the critic.
    """

    micro_batches: list[MicroBatch]
    max_length: int
    policy_normalizer: float
    critic_normalizer: float
    num_tokens: float
    policy_learns: bool
    critic_learns: bool


@dataclass
class Progress:
    """State of a run other than its weights, as needed to resume it.

    Attributes:
        updates: optimizer steps begun; together with the settings it determines which prompts come next.
        outcomes, successes: number and sum of the rewards so far.
        generated_tokens: number of tokens of all completions so far, on all processes.
        extra_blocks: how many more blocks of prompts were taken than there were rollouts, because prompts were skipped.
    """

    updates: int = 0
    outcomes: int = 0
    successes: float = 0.0
    generated_tokens: int = 0
    extra_blocks: int = 0

    @property
    def mean_reward(self) -> float:
        """Mean reward of all rollouts so far; 0 before the first."""
        return self.successes / self.outcomes if self.outcomes else 0.0


@dataclass(frozen=True)
class ProcessContext:
    """This process among those of a run, and the contexts that its forwards run in.

    Attributes:
        rank, world_size: number of this process and of processes.
        gather: concatenates lists over processes.
        autocast: makes the precision context of forwards.
        gathered_weights: makes a context in which this process holds all weights, so that it can run a model by itself.
    """

    rank: int = 0
    world_size: int = 1
    gather: Gather = list
    autocast: ContextFactory = nullcontext
    gathered_weights: ContextFactory = nullcontext


@dataclass(frozen=True)
class CompletionStats:
    """Facts about a completion that the metrics of all processes are computed from; ``reward`` is None if it failed."""

    group: int
    num_tokens: int
    num_environment_tokens: int
    num_turns: int | None
    truncated: bool
    reward: float | None
    support: SupportStats | None


@dataclass(frozen=True)
class SampleFacts:
    """Facts about a usable sample that the advantages of all processes are computed from.

    The policy does not learn from a masked one.
    """

    reward: float
    group: int
    prompt_hash: str
    num_tokens: int
    is_masked: bool
    value: Tensor | None = None
    greedy_reward: float | None = None
    drift: float = 0.0
    trace: tuple[list[int], list[float]] | None = None

    @classmethod
    def of(cls, sample: Sample, *, is_masked: bool) -> SampleFacts:
        """Collect the facts of a scored sample."""
        assert sample.reward is not None
        return cls(
            reward=sample.reward,
            group=sample.group,
            prompt_hash=sample.name or prompt_hash(sample.prompt_ids),
            num_tokens=sample.num_policy_tokens,
            is_masked=is_masked,
            value=sample.value,
            greedy_reward=sample.greedy_reward,
            drift=sample.drift,
            trace=sample.trace,
        )


def rollout_batch(facts: Sequence[SampleFacts], mean_reward: float) -> RolloutBatch:
    """Collate the samples of all processes for the algorithm."""
    values = [each.value for each in facts if each.value is not None]
    greedy_rewards = [each.greedy_reward for each in facts if each.greedy_reward is not None]
    traces = [each.trace for each in facts if each.trace is not None]
    return RolloutBatch(
        rewards=torch.tensor([each.reward for each in facts], dtype=torch.float32),
        group_ids=torch.tensor([each.group for each in facts]),
        prompts=[each.prompt_hash for each in facts],
        lengths=torch.tensor([each.num_tokens for each in facts]),
        mean_reward=mean_reward,
        values=_stack(values) if values else None,
        greedy_rewards=torch.tensor(greedy_rewards, dtype=torch.float32) if greedy_rewards else None,
        drifts=torch.tensor([each.drift for each in facts], dtype=torch.float32) if traces else None,
        traces=traces,
    )


def _stack(values: list[Tensor]) -> Tensor:
    """Stack a prompt critic's values to ``[B]``, or a token critic's to ``[B, T]``, padded with 0."""
    return torch.stack(values) if values[0].ndim == 0 else pad_sequence(values, batch_first=True)
