"""The torch backend of policy_loss: the loss and its gradient in few passes over the tokens.

On a CPU comparisons and ``torch.where`` take several times as long as arithmetic, so clipping is arithmetic: the
sign of an objective less its clipped value tells whether it is clipped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .formulas import kl_estimate, kl_slope, rollout_correction
from .output import METRICS, LossAndGradient
from .segments import Segments
from .settings import MAX_LOG, Settings


def torch_policy_loss(
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
) -> LossAndGradient:
    """Compute the loss and its gradient in float32, or in float64 for float64 log-probabilities; tensors are packed."""
    s = settings
    dtype = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
    segments = Segments(cu_seqlens, None if mask is None else mask != 0, len(logprobs), dtype)
    tokens, sequences, lengths = segments.tokens, segments.sequences, segments.lengths.clamp(min=1)
    # A ratio and an advantage per sequence make one objective per sequence; otherwise there is one per token.
    by_sequence = s.sequence_level and not per_token
    present = segments.lengths > 0 if by_sequence else segments.mask

    def fill_absent(x: Tensor, fill: float = 0.0) -> Tensor:
        return x if present is None else torch.where(present, x, fill)

    log_ratio = segments.difference(logprobs, old_logprobs)
    approx_kl = -segments.token_mean(log_ratio)
    if s.sequence_level:
        log_ratio = segments.sum(log_ratio)
        log_ratio = log_ratio / lengths if s.ratio_level == "sequence_mean" else log_ratio
    ratio, advantages = log_ratio.clamp(max=MAX_LOG).exp_(), advantages.to(dtype)
    if s.sequence_level and per_token:
        ratio = segments.expand(ratio)
    elif not s.sequence_level and not per_token:
        advantages = segments.expand(advantages)
    advantages = fill_absent(advantages)
    if s.objective == "cispo":
        clipped_ratio = ratio.clamp(1 - s.clip_low, 1 + s.clip_high)
        slope = -advantages * clipped_ratio
        objective = -slope * segments.fill_masked(logprobs.to(dtype))
        direction = fill_absent(ratio - clipped_ratio).sign()  # -1 where it is raised, 1 where it is lowered
        side = direction.abs()
    else:
        objective, side = _clip(advantages, ratio, s)
        # d -objective / d log ratio: the objective is A r where it is not clipped, and constant where it is.
        slope = (side - 1 if s.dual_clip is None else side.abs() - 1).mul_(objective)
        direction = advantages.sign()

    correction = rollout_correction(old_logprobs, rollout_logprobs, segments, s)
    weight = segments.expand(1 / lengths) if s.mean_in_sequence and (s.kl_coef or not by_sequence) else None  # [N]
    if by_sequence:
        slope = slope if s.ratio_level == "sequence_sum" else slope / lengths
        gradient = _product(segments.expand(_product(slope, correction.of_sequence)), correction.of_token)
        if correction.of_token is not None:  # a weighted mean over the tokens, which share the objective
            objective = segments.expand(objective / lengths) * segments.fill_masked(correction.of_token)
        total = -_product(objective, correction.of_sequence).sum()
    else:
        rollout_weight = correction.expand(segments)
        total = -_product(objective, weight, rollout_weight).sum()
        gradient = _product(slope, None if s.ratio_level == "sequence_sum" else weight, rollout_weight)

    kl = tokens.new_zeros(())
    if ref_logprobs is not None:
        ref_gap = segments.difference(ref_logprobs, logprobs)
        kl_of_token = kl_estimate(ref_gap, s.kl_estimator)
        kl = segments.token_mean(kl_of_token)
        if s.kl_coef:
            total = total + s.kl_coef * _product(kl_of_token, weight).sum()
            gradient = gradient + s.kl_coef * _product(kl_slope(ref_gap, s.kl_estimator), weight)
    count = tokens if s.mean_over_tokens else sequences
    scale = 1 / (count.clamp(min=1) if normalizer is None else normalizer.to(dtype).squeeze())

    # A unit is what a ratio belongs to: a token, or a sequence, which may have several values.
    units, unit_weight = (sequences, None if by_sequence else weight) if s.sequence_level else (tokens, None)
    units = units.clamp(min=1)
    clipped = side if s.dual_clip is None else side.clamp(min=0)
    num_clipped = _product(clipped, unit_weight).sum()
    high_minus_low = _product(direction.mul_(clipped), unit_weight).sum()
    dual_clipped = tokens.new_zeros(()) if s.dual_clip is None else num_clipped - _product(side, unit_weight).sum()
    lowest, highest = ratio.new_ones(2)
    if ratio.numel():
        lowest, highest = fill_absent(ratio, float("inf")).amin(), fill_absent(ratio).amax()
    is_any = tokens > 0
    metrics = {
        "clip_fraction": num_clipped / units,
        "clip_fraction_low": (num_clipped - high_minus_low) / (2 * units),
        "clip_fraction_high": (num_clipped + high_minus_low) / (2 * units),
        "dual_clip_fraction": dual_clipped / units,
        "approx_kl": approx_kl,
        "kl": kl,
        "ratio_mean": torch.where(is_any, _product(fill_absent(ratio), unit_weight).sum() / units, 1.0),
        "ratio_min": torch.where(is_any, lowest, 1.0),
        "ratio_max": torch.where(is_any, highest, 1.0),
        "rollout_kl": correction.kl,
        "rollout_weight_mean": correction.mean,
    }
    return LossAndGradient(
        loss=total * scale,
        metrics=torch.stack([metrics[name] for name in METRICS]),
        gradient=segments.fill_masked(gradient),
        scale=scale,
    )


def _clip(advantages: Tensor, ratio: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Return the clipped objective, and 1 where clip changed it, -1 where dual clip did, 0 elsewhere."""
    s = settings
    objective = advantages * ratio
    clipped = ratio.clamp(1 - s.clip_low, 1 + s.clip_high).mul_(advantages)
    torch.minimum(clipped, objective, out=clipped)
    if s.dual_clip is not None:
        torch.maximum(clipped, advantages.clamp(max=0).mul_(s.dual_clip), out=clipped)  # changes nothing where A >= 0
    return clipped, objective.sub_(clipped).sign_()


def _product(x: Tensor, *factors: Tensor | None) -> Tensor:
    """Multiply by all factors but None, which stands for 1 and costs no pass."""
    for factor in factors:
        x = x if factor is None else x * factor
    return x
