"""Algorithms: what turns outcomes and values into advantages, and which policy loss they meet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from sppo.config import SPPOConfig


class Algorithm(Protocol):
    """Chooses the critic, the advantages and the loss.

    Attributes:
        needs_critic: whether a prompt critic is trained beside the policy.
        loss_arguments: keyword arguments of :func:`sppo_kernels.policy_loss`.
    """

    needs_critic: bool
    loss_arguments: dict[str, Any]

    def advantages(self, outcomes: Sequence[float], values: Sequence[float], *, all_equal: bool) -> list[float]:
        """One advantage a sample.

        Args:
            outcomes: rewards in [0, 1] of this process's samples.
            values: the critic's predictions for them, made before the update.
            all_equal: whether every outcome of the rollout, on all processes, is the same.
        """


class SPPO:
    """Sequence-Level PPO (arXiv 2604.08865): ``A = R - V(prompt)``, the same for each token of the response.

    A rollout whose outcomes are all equal says nothing about which response is better: its advantages are 0, where
    ``R - V`` would push every sampled response the same way until the critic has caught up. The critic learns from it
    still.
    """

    needs_critic = True

    def __init__(self, args: SPPOConfig) -> None:
        self.loss_arguments = {
            "ratio_level": args.ratio_level,
            "clip_low": args.epsilon,
            "clip_high": args.epsilon_high,
            "dual_clip": args.dual_clip,
            "aggregation": args.aggregation,
            "kl_coef": args.beta,
        }

    def advantages(self, outcomes: Sequence[float], values: Sequence[float], *, all_equal: bool) -> list[float]:
        """See :class:`Algorithm`."""
        if all_equal:
            return [0.0] * len(outcomes)
        return [outcome - value for outcome, value in zip(outcomes, values, strict=True)]
