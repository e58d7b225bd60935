"""Definition of policy_loss on packed tokens, differentiated by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from .formulas import bounded_exp, kl_estimate, rollout_correction
from .output import PolicyLossOutput
from .segments import Segments
from .settings import Settings


def loss_and_metrics(
    *,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor,
    normalizer: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    per_token: bool,
    settings: Settings,
) -> PolicyLossOutput:
    """Compute the loss of packed tokens ``[N]`` in float32, or in float64 for float64 log-probabilities."""
    s = settings
    dtype = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
    segments = Segments(cu_seqlens, None if mask is None else mask != 0, len(logprobs), dtype)
    tokens, sequences = segments.tokens, segments.sequences
    length_of_token = segments.expand(segments.lengths.clamp(min=1)) if s.mean_in_sequence else None

    advantages = advantages.detach().to(dtype)
    advantages = advantages if per_token else segments.expand(advantages)
    log_ratio = segments.difference(logprobs, old_logprobs.detach())
    approx_kl = -segments.token_mean(log_ratio.detach())
    ratio_slope: Tensor | float = 1.0
    if s.sequence_level:
        assert length_of_token is not None
        of_sequence = segments.expand(segments.sum(log_ratio.detach()))
        if s.ratio_level == "sequence_mean":
            of_sequence = of_sequence / length_of_token
        else:
            ratio_slope = length_of_token
        # The value is the sequence's. Each token contributes through its own log-probability, and the mean over the n
        # tokens below divides by n. In all, d ratio / d logprob_t is ratio / n for the mean and ratio for the sum.
        log_ratio = of_sequence + ratio_slope * (log_ratio - log_ratio.detach())
    ratio = bounded_exp(log_ratio)

    clipped_ratio = ratio.clamp(1 - s.clip_low, 1 + s.clip_high)
    surrogate = torch.maximum(-advantages * ratio, -advantages * clipped_ratio)
    if s.objective == "cispo":
        surrogate = -advantages * clipped_ratio.detach() * segments.fill_masked(logprobs.to(dtype))
    if s.dual_clip is not None:
        bounded = torch.minimum(surrogate, -advantages * s.dual_clip)
        surrogate = torch.where(advantages < 0, bounded, surrogate)

    correction = rollout_correction(old_logprobs, rollout_logprobs, segments, s)
    rollout_weight = correction.expand(segments)
    loss_of_token = surrogate if rollout_weight is None else rollout_weight * surrogate
    kl = tokens.new_zeros(())
    if ref_logprobs is not None:
        ref_gap = segments.difference(ref_logprobs.detach(), logprobs)
        kl_of_token = kl_estimate(ref_gap, s.kl_estimator)
        kl = segments.token_mean(kl_of_token.detach())
        if s.kl_coef:
            loss_of_token = loss_of_token + s.kl_coef * kl_of_token

    token_weight = 1.0 if length_of_token is None else 1 / length_of_token
    count = tokens if s.mean_over_tokens else sequences
    scale = 1 / (count.clamp(min=1) if normalizer is None else normalizer.to(dtype).squeeze())
    loss = segments.fill_masked(token_weight * loss_of_token).sum() * scale

    # A unit is what a ratio belongs to: a token, or a sequence (as a mean over its tokens).
    units = sequences if s.sequence_level else tokens
    value = ratio.detach()

    def mean_over_units(x: Tensor) -> Tensor:
        return segments.fill_masked(token_weight * x if s.sequence_level else x).sum(dtype=dtype) / units.clamp(min=1)

    def extreme(fill: float, reduce) -> Tensor:
        unmasked = torch.cat([segments.fill_masked(value, fill), value.new_full((1,), fill)])
        return torch.where(tokens > 0, reduce(unmasked), 1.0)

    low, high = value < 1 - s.clip_low, value > 1 + s.clip_high
    if s.objective == "clip":
        low, high = low & (advantages < 0), high & (advantages > 0)
    dual_fraction = tokens.new_zeros(())
    if s.dual_clip is not None:
        dual_fraction = mean_over_units((advantages < 0) & (value > s.dual_clip))
    clipped_low, clipped_high = mean_over_units(low), mean_over_units(high)
    metrics = {
        "clip_fraction": clipped_low + clipped_high,
        "clip_fraction_low": clipped_low,
        "clip_fraction_high": clipped_high,
        "dual_clip_fraction": dual_fraction,
        "approx_kl": approx_kl,
        "kl": kl,
        "ratio_mean": torch.where(tokens > 0, mean_over_units(value), 1.0),
        "ratio_min": extreme(float("inf"), torch.amin),
        "ratio_max": extreme(-float("inf"), torch.amax),
        "rollout_kl": correction.kl,
        "rollout_weight_mean": correction.mean,
    }
    return PolicyLossOutput(loss, metrics)
