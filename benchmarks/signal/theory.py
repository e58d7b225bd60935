"""Predicted second moments of gradient estimators for rewards of 0 and 1, derived in docs/results/signal.md.

A prompt is described by its rate of success and by the mean squared norm of the scores of right and of wrong responses.
These differ much: a wrong response has unlikely tokens, and the less likely a token, the larger its score.
"""

from __future__ import annotations

from collections.abc import Callable
from math import comb
from typing import NamedTuple

import torch
from torch import Tensor


class Facts(NamedTuple):
    """Facts about M prompts, each float32 ``[M]``.

    Attributes:
        success: rates of success p.
        right, wrong: mean squared norms of the scores of right and of wrong responses, F1 and F0.
    """

    success: Tensor
    right: Tensor
    wrong: Tensor

    def moment(self, if_right: Tensor, if_wrong: Tensor) -> Tensor:
        """Return ``E A^2 |s|^2`` ``[M]``, given the mean of ``A^2`` of right and of wrong responses."""
        return self.success * if_right * self.right + (1 - self.success) * if_wrong * self.wrong

    def baseline(self, baseline: Tensor) -> Tensor:
        """Return the second moment with ``A = R - b``."""
        return self.moment((1 - baseline).square(), baseline.square())

    def best_baseline(self) -> Tensor:
        """Return the baseline ``E R |s|^2 / E |s|^2`` ``[M]``, whose second moment is the smallest."""
        right = self.success * self.right
        return right / (right + (1 - self.success) * self.wrong)

    def rloo(self, size: int) -> Tensor:
        """Return the second moment of a response in a group of ``size``, with the mean of the others as baseline."""
        of_mean = self.success * (1 - self.success) / (size - 1)
        return self.moment((1 - self.success).square() + of_mean, self.success.square() + of_mean)

    def grpo(self, size: int) -> Tensor:
        """Return the second moment of a response in a group of ``size`` whose rewards are standardized."""
        square = lambda right, reward: standardized(right, size, reward) ** 2
        return self.moment(self._over_groups(size, 1, square), self._over_groups(size, 0, square))

    def grpo_gain(self, size: int) -> Tensor:
        """Return the factor of each prompt's gradient under GRPO ``[M]``, ``E[A | R = 1] - E[A | R = 0]``."""
        value = lambda right, reward: standardized(right, size, reward)
        return self._over_groups(size, 1, value) - self._over_groups(size, 0, value)

    def _over_groups(self, size: int, reward: int, function: Callable[[int, int], float]) -> Tensor:
        """Return the mean of ``function(right responses of the group, reward)`` over the group's other responses."""
        p = self.success
        return torch.stack(
            [
                comb(size - 1, others) * p**others * (1 - p) ** (size - 1 - others) * function(others + reward, reward)
                for others in range(size)
            ]
        ).sum(0)


def standardized(right: int, size: int, reward: int) -> float:
    """Return GRPO's advantage of a response with ``reward`` in a group with ``right`` right responses."""
    mean = right / size
    std = ((right * (1 - mean) ** 2 + (size - right) * mean**2) / (size - 1)) ** 0.5
    return (reward - mean) / (std + 1e-6)


class Steps(NamedTuple):
    """A walk of independent steps: it succeeds if each step is right.

    Attributes:
        success: rates of success p, float32 ``[M]``; a step is right with probability ``q = p^(1 / T)``.
        horizon: number of steps T.
        right, wrong: mean squared norms of the score of a right and of a wrong step, f1 and f0, float32 ``[M]``.
    """

    success: Tensor
    horizon: int
    right: Tensor
    wrong: Tensor

    @property
    def slip(self) -> Tensor:
        """Probability ``[M]`` that a step is wrong."""
        return 1 - self.success ** (1 / self.horizon)

    def facts(self) -> Facts:
        """Return the facts about whole responses: their steps' squared norms add up."""
        p, steps, slip = self.success, self.horizon, self.slip
        # Wrong steps are in wrong responses only; right ones are in both.
        wrong = (steps * slip * self.wrong + steps * (1 - slip - p) * self.right) / (1 - p)
        return Facts(p, steps * self.right, wrong)

    def ideal_gae(self, lam: float) -> Tensor:
        """Return the second moment ``[M]`` of PPO with the ideal values, ``sum_t E A_t^2 |s_t|^2``.

        The value before step t is ``V_t = q^(T - t)`` if all steps before were right, and 0 otherwise. The advantage of
        a wrong step is ``-V_t``, whatever lambda is; that of a right one is ``V_{t+1} - V_t`` and the later changes of
        the value, which are uncorrelated, times powers of lambda.
        """
        q = self.success.double() ** (1 / self.horizon)
        moment, later = torch.zeros_like(q), torch.zeros_like(q)  # later: if all steps up to t were right
        for t in reversed(range(self.horizon)):
            value, following = q ** (self.horizon - t), q ** (self.horizon - t - 1)
            if_right = (following - value).square() + lam**2 * later
            moment += q**t * (q * if_right * self.right + (1 - q) * value.square() * self.wrong)
            later = q * if_right + (1 - q) * value.square()
        return moment.float()


def fit_steps(norms: Tensor, wrong_steps: Tensor, horizon: int) -> tuple[float, float]:
    """Fit the mean squared norms of right and of wrong steps.

    Args:
        norms: squared norms of the scores of responses, any shape.
        wrong_steps: number of wrong steps of each, same shape.
        horizon: number of steps.

    Returns:
        Least-squares solution of ``norm = right * (horizon - wrong_steps) + wrong * wrong_steps``.
    """
    counts = torch.stack([horizon - wrong_steps.flatten(), wrong_steps.flatten()], 1).double()
    right, wrong = torch.linalg.lstsq(counts, norms.flatten().double()[:, None]).solution[:, 0].tolist()
    return right, wrong
