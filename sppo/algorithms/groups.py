"""Algorithms that compare a response with others to the same prompt, and need no critic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from sppo.algorithms.base import Algorithm, RolloutBatch
from sppo_kernels import group_advantages

_READS = ("dynamic_sampling", "overlong_buffer")


class GroupAlgorithm(Algorithm):
    """What algorithms with groups have in common."""

    uses_groups = True
    reads: ClassVar[Sequence[str]] = _READS


class GRPO(GroupAlgorithm):
    """Group Relative Policy Optimization (arXiv 2402.03300): ``A = (R - group mean) / (group std + 1e-6)``.

    ``scale_rewards`` is what the difference is divided by: the standard deviation of the group, of the batch
    (arXiv 2508.08221), or nothing.
    """

    reads = (*_READS, "scale_rewards")
    defaults = Algorithm.defaults | {"num_generations": 8, "scale_rewards": "group"}

    def advantages(self, batch: RolloutBatch) -> Tensor:
        """See :class:`Algorithm`."""
        if self.args.scale_rewards == "group":
            return group_advantages(batch.rewards, batch.group_ids, estimator="grpo")
        centered = group_advantages(batch.rewards, batch.group_ids, estimator="dr_grpo")
        if self.args.scale_rewards == "batch" and len(centered) > 1:
            return centered / (batch.rewards.std() + 1e-6)
        return centered


class DrGRPO(GRPO):
    """GRPO Done Right (arXiv 2503.20783): ``A = R - group mean``, no division by a response's own length."""

    defaults = GRPO.defaults | {"scale_rewards": "none", "aggregation": "seq-mean-token-sum"}

    def normalizer(self, sequences: int, tokens: int) -> float:
        """See :class:`Algorithm`; for a sum over tokens the divisor includes the maximum length, a constant."""
        count = super().normalizer(sequences, tokens)
        sums = self.args.ratio_level == "token" and self.args.aggregation == "seq-mean-token-sum"
        return count * self.args.max_completion_length if sums else count


class DAPO(GRPO):
    """Decoupled clip and dynamic sampling (arXiv 2503.14476): GRPO's advantage, clip 0.2 and 0.28, a mean over tokens.

    Prompts whose responses all have the same reward are replaced by others (``dynamic_sampling``), and the reward of a
    response that is nearly too long is reduced (``overlong_buffer``, by default a fifth of ``max_completion_length``).
    """

    defaults = GRPO.defaults | {"aggregation": "token-mean", "epsilon_high": 0.28, "dynamic_sampling": True}

    def overlong_buffer(self) -> int:
        """See :class:`Algorithm`."""
        buffer = self.args.overlong_buffer
        return self.args.max_completion_length // 5 if buffer is None else buffer


class CISPO(GRPO):
    """Clipped importance weights (arXiv 2506.13585): no token loses its gradient, its weight is bounded instead.

    ``-sg[min(r, 1 + epsilon_high)] A log p`` per token, with GRPO's advantage, in a mean over all tokens. The bound of
    5 is the one that TRL documents for arXiv 2510.13786.
    """

    objective = "cispo"
    defaults = GRPO.defaults | {"aggregation": "token-mean", "epsilon": float("inf"), "epsilon_high": 4.0}


class GSPO(GRPO):
    """Group Sequence Policy Optimization (arXiv 2507.18071): GRPO's advantage, the length-normalized ratio."""

    defaults = GRPO.defaults | {"ratio_level": "sequence_mean", "epsilon": 3e-4, "epsilon_high": 4e-4}


class RLOO(GroupAlgorithm):
    """REINFORCE Leave-One-Out (arXiv 2402.14740): ``A = R - mean of the group's others``, per response."""

    defaults = Algorithm.defaults | {"num_generations": 4, "ratio_level": "sequence_sum"}

    def advantages(self, batch: RolloutBatch) -> Tensor:
        """See :class:`Algorithm`."""
        return group_advantages(batch.rewards, batch.group_ids, estimator="rloo")


class OPO(GroupAlgorithm):
    """On-Policy RL with Optimal baseline (arXiv 2505.23585): ``A = R - sum(l R) / sum(l)`` over a group of lengths l.

    The baseline that minimizes the variance of the gradient if the squared gradient of a response's log-probability
    grows with its length. The paper takes one update per rollout, so that every ratio is 1.
    """

    defaults = Algorithm.defaults | {"num_generations": 8, "aggregation": "seq-mean-token-sum"}

    def advantages(self, batch: RolloutBatch) -> Tensor:
        """See :class:`Algorithm`."""
        _, groups = batch.group_ids.unique(return_inverse=True)
        lengths = batch.lengths.float()
        zeros = torch.zeros(int(groups.max()) + 1)
        baselines = zeros.index_add(0, groups, lengths * batch.rewards) / zeros.index_add(0, groups, lengths)
        return batch.rewards - baselines[groups]
