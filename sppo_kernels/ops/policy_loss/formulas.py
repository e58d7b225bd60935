"""Formulas that the reference and the torch backend of policy_loss share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .segments import Segments
from .settings import MAX_LOG, Settings


def bounded_exp(x: Tensor) -> Tensor:
    """Compute exp with its value bounded by exp(MAX_LOG); its gradient is that value."""
    return torch.exp(x.detach().clamp(max=MAX_LOG) + (x - x.detach()))


def kl_estimate(ref_gap: Tensor, estimator: str) -> Tensor:
    """Estimate KL(policy || reference) per token from ref - logprob."""
    if estimator == "k1":
        return -ref_gap
    if estimator == "k2":
        return ref_gap.square() / 2
    return bounded_exp(ref_gap) - 1 - ref_gap


def kl_slope(ref_gap: Tensor, estimator: str) -> Tensor:
    """Differentiate ``kl_estimate`` with respect to the log-probability."""
    if estimator == "k1":
        return torch.ones_like(ref_gap)
    return -ref_gap if estimator == "k2" else 1 - bounded_exp(ref_gap)


class RolloutCorrection(NamedTuple):
    """Importance weights between the rollout engine and the trainer, and their metrics."""

    of_token: Tensor | None  # weights [N] if they are those of tokens
    of_sequence: Tensor | None  # weights [B] if they are those of sequences
    mean: Tensor  # [], mean weight over tokens, or over sequences
    kl: Tensor  # [], KL(rollout || old)

    def expand(self, segments: Segments) -> Tensor | None:
        """Return the weights ``[N]``, or None if all are 1."""
        return self.of_token if self.of_sequence is None else segments.expand(self.of_sequence)


def rollout_correction(
    old_logprobs: Tensor, rollout_logprobs: Tensor | None, segments: Segments, settings: Settings
) -> RolloutCorrection:
    """Compute the importance weights between the rollout engine and the trainer."""
    tokens, one = segments.tokens, (segments.tokens > 0).to(segments.dtype)
    if rollout_logprobs is None:
        return RolloutCorrection(None, None, one, torch.zeros_like(tokens))
    log_weight = segments.difference(old_logprobs.detach(), rollout_logprobs.detach())
    kl = -segments.token_mean(log_weight)
    if settings.rollout_correction == "none":
        return RolloutCorrection(None, None, one, kl)
    of_tokens = settings.rollout_correction.startswith("token_")
    weight = bounded_exp(log_weight if of_tokens else segments.sum(log_weight))
    if settings.rollout_correction.endswith("_truncate"):
        weight = weight.clamp(max=settings.rollout_cap)
    else:
        outside = (weight < settings.rollout_floor) | (weight > settings.rollout_cap)
        weight = torch.where(outside, 0.0, weight)
    if of_tokens:
        return RolloutCorrection(weight, None, segments.token_mean(segments.fill_masked(weight)), kl)
    mean = torch.where(segments.lengths > 0, weight, 0.0).sum() / segments.sequences.clamp(min=1)
    return RolloutCorrection(None, weight, mean, kl)
