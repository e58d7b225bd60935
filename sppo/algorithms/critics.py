"""Algorithms with a critic: those of SPPO and POISE read the prompt, PPO's each token."""

from __future__ import annotations

import torch
from torch import Tensor

from sppo.algorithms.base import Algorithm, RolloutBatch, response_mask, standardized
from sppo_kernels import gae, whiten


class SPPO(Algorithm):
    """Sequence-Level PPO (arXiv 2604.08865): ``A = R - V(prompt)``, the same for each token of the response.

    ``center_advantages`` subtracts the rollout's mean advantage, ``standardize_advantages`` also divides by the
    standard deviation. The paper does neither.
    """

    critic = "prompt"
    reads = ("center_advantages", "standardize_advantages", "prompt_value_range")
    defaults = Algorithm.defaults | {"dual_clip": 3.0}

    def advantages(self, batch: RolloutBatch) -> Tensor:
        """See :class:`Algorithm`."""
        assert batch.values is not None
        advantages = batch.rewards - batch.values
        if self.args.standardize_advantages:
            return standardized(advantages)
        return advantages - advantages.mean() if self.args.center_advantages else advantages


class POISE(Algorithm):
    """Policy Optimization with Internal State value Estimation (arXiv 2605.07579): ``A = R - V(prompt)``.

    The value is read by one linear layer off the policy's own hidden states at the end of the prompt, which costs no
    second model. The paper's probe also reads the states and entropies of another response to the prompt; here it reads
    the prompt alone, so that one response per prompt is enough and the baseline does not depend on the response.
    """

    critic = "probe"
    rewards_are_probabilities = True
    defaults = Algorithm.defaults | {"aggregation": "token-mean"}

    def advantages(self, batch: RolloutBatch) -> Tensor:
        """See :class:`Algorithm`."""
        assert batch.values is not None
        return batch.rewards - batch.values


class PPO(Algorithm):
    """Token-level PPO (arXiv 1707.06347): a value before each token, GAE (arXiv 1506.02438), whitened advantages.

    The reward comes with the last token. The critic's target is ``advantage + value``; its loss is half the squared
    error of the prediction, or of the prediction clipped to ``cliprange_value`` around the old one; the larger counts.
    """

    critic = "token"
    reads = ("gamma", "lam", "cliprange_value", "overlong_buffer")
    defaults = Algorithm.defaults | {"aggregation": "token-mean"}

    def advantages(self, batch: RolloutBatch) -> Tensor:
        """See :class:`Algorithm`."""
        return whiten(self._gae(batch)[0], response_mask(batch))

    def returns(self, batch: RolloutBatch) -> Tensor:
        """See :class:`Algorithm`."""
        return self._gae(batch)[1]

    def _gae(self, batch: RolloutBatch) -> tuple[Tensor, Tensor]:
        assert batch.values is not None
        rewards = torch.zeros_like(batch.values)
        rewards[torch.arange(len(rewards)), batch.lengths - 1] = batch.rewards
        return gae(rewards, batch.values, response_mask(batch), gamma=self.args.gamma, lam=self.args.lam)
