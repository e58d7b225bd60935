"""Results of policy_loss and the names of its metrics."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

METRICS = (
    "clip_fraction",
    "clip_fraction_low",
    "clip_fraction_high",
    "dual_clip_fraction",
    "approx_kl",
    "kl",
    "ratio_mean",
    "ratio_min",
    "ratio_max",
    "rollout_kl",
    "rollout_weight_mean",
)


class PolicyLossOutput(NamedTuple):
    """Policy loss and its metrics.

    Attributes:
        loss: 0-d float32, differentiable in the log-probabilities.
        metrics: 0-d float32 tensors by name, detached.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


class LossAndGradient(NamedTuple):
    """Output of the registered operation, all float32. The gradient of the loss is ``gradient * scale``."""

    loss: Tensor  # []
    metrics: Tensor  # [len(METRICS)]
    gradient: Tensor  # [N], before normalization
    scale: Tensor  # [], 1 / normalizer


def metrics_dict(metrics: Tensor) -> dict[str, Tensor]:
    """Return the metrics ``[len(METRICS)]`` by name, detached."""
    return dict(zip(METRICS, metrics.detach().unbind(), strict=True))
