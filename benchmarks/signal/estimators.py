"""Gradient estimators: what each algorithm makes of a prompt's responses.

All estimate the gradient of the expected reward. An estimate is a mean over independent *units*: one response, or a
group of responses to one prompt. A unit's contribution is ``sum_g c_g s_g``, with the responses' scores ``s_g``, the
gradients of their log-probabilities, and coefficients that depend on the rewards of the prompt's responses. A token
critic has an advantage for each token instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sppo_kernels import gae, group_advantages

_SHUFFLES = 8  # of a prompt's responses into groups, so that more of the possible groups take part


@dataclass(frozen=True)
class Estimator:
    """An estimator whose advantages are those of whole responses.

    Attributes:
        coefficients: returns float32 ``[U, G]``, those of U units, given a prompt's index and its rewards ``[G]``.
        responses: generated responses per unit.
        unbiased: whether its mean is the gradient of the expected reward, whatever the rewards are.
    """

    coefficients: Callable[[int, Tensor], Tensor]
    responses: int = 1
    unbiased: bool = True


class TokenEstimator(NamedTuple):
    """An estimator with an advantage for each token, float32 ``[M, G, T]``; see :class:`Estimator`."""

    advantages: Tensor
    unbiased: bool


def with_baseline(baseline: Tensor, responses: int = 1) -> Estimator:
    """Return the estimator ``A = R - b(prompt)``.

    Args:
        baseline: float32 ``[M]``, or ``[M, G]`` if it is another for each response, on which it must not depend.
        responses: generated responses per unit, 2 if the baseline needs one of its own.
    """
    return Estimator(lambda prompt, rewards: (rewards - baseline[prompt]).diag(), responses)


def with_group(size: int, estimator: str) -> Estimator:
    """Return an estimator of :func:`sppo_kernels.group_advantages` with groups of ``size``."""

    def coefficients(prompt: int, rewards: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(prompt)
        count = len(rewards) // size
        orders = [torch.randperm(len(rewards), generator=generator)[: count * size] for _ in range(_SHUFFLES)]
        members = torch.cat(orders).reshape(-1, size)
        groups = torch.arange(len(members)).repeat_interleave(size)
        advantages = group_advantages(rewards[members].flatten(), groups, estimator=estimator).reshape(-1, size)
        return torch.zeros(len(members), len(rewards)).scatter(1, members, advantages / size)

    return Estimator(coefficients, size, unbiased=estimator != "grpo")


def shrunk(success: Tensor, explained: float) -> Tensor:
    """Return the values of a critic that explains a given share of the variance of ``success``, in its shape.

    It is the ideal critic, drawn towards the mean.
    """
    mean = success.mean()
    return mean + (1 - (1 - explained) ** 0.5) * (success - mean)


def shuffled(values: Tensor) -> Tensor:
    """Return the values ``[M, ...]`` of other prompts: the same mean, and no information about the prompt."""
    return values[torch.randperm(len(values), generator=torch.Generator().manual_seed(0))]


def gae_advantages(rewards: Tensor, values: Tensor, mask: Tensor, lam: float) -> Tensor:
    """Compute PPO's advantages ``[B, T]`` with a reward at the end of each response and no discount.

    Args:
        rewards: float32 ``[B]``.
        values: float32 ``[B, T]``, before each token.
        mask: float32 ``[B, T]``.
        lam: lambda of GAE.
    """
    ends = mask.sum(1).long() - 1
    at_end = torch.zeros_like(values).scatter(1, ends[:, None], rewards[:, None])
    return gae(at_end, values * mask, mask.bool(), lam=lam)[0] * mask
