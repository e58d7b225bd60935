"""Definition of policy_loss on packed tokens: the reference differentiates it, the torch backend adds the gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .output import METRICS, LossAndGradient
from .settings import Settings

# exp of more overflows float32. Only the value is bounded: the gradient of a larger ratio remains that of the ratio.
MAX_LOG = 80.0


class Segments:
    """N packed tokens of B sequences, with a loss mask ``[N]`` or None: sums and means over tokens and sequences."""

    def __init__(self, cu_seqlens: Tensor, mask: Tensor | None, num_tokens: int, dtype: torch.dtype) -> None:
        self.mask, self.num_tokens, self.dtype = mask, num_tokens, dtype
        self.offsets = cu_seqlens.long()
        self.all_lengths = self.offsets.diff()  # [B], masked tokens included
        # [B], unmasked tokens per sequence
        self.lengths = self.all_lengths.to(dtype) if mask is None else self.sum(mask.to(dtype))
        self.tokens = self.lengths.sum()  # [], unmasked tokens
        self.sequences = (self.lengths > 0).sum().to(dtype)  # [], sequences that have unmasked tokens

    def fill_masked(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """Replace masked tokens of ``[N]`` by ``fill``."""
        return x if self.mask is None else torch.where(self.mask, x, fill)

    def difference(self, a: Tensor, b: Tensor) -> Tensor:
        """Return ``a - b`` per token, 0 where masked."""
        return self.fill_masked(a.to(self.dtype) - b.to(self.dtype))

    def sum(self, x: Tensor) -> Tensor:
        """Sum ``[N]`` within each sequence to ``[B]``."""
        return torch.segment_reduce(x, "sum", offsets=self.offsets, initial=0)

    def expand(self, x: Tensor) -> Tensor:
        """Give each token its sequence's value: ``[B]`` to ``[N]``."""
        return torch.repeat_interleave(x, self.all_lengths, output_size=self.num_tokens)

    def total(self, x: Tensor) -> Tensor:
        """Sum over all unmasked tokens."""
        return self.fill_masked(x).sum(dtype=self.dtype)

    def token_mean(self, x: Tensor) -> Tensor:
        """Average over all unmasked tokens; 0 without tokens."""
        return self.total(x) / self.tokens.clamp(min=1)


class Terms(NamedTuple):
    """The loss, and what its gradient with respect to the log-probabilities is computed from."""

    loss: Tensor  # []
    metrics: Tensor  # [len(METRICS)]
    segments: Segments
    advantages: Tensor  # [N]
    clipped: Tensor  # [N] bool, whether the surrogate is constant
    ratio: Tensor  # [N]
    ratio_slope: Tensor | float  # d log ratio_t / d logprob_t, [N]
    rollout_weight: Tensor | float  # [N]
    ref_gap: Tensor | None  # ref - logprob, [N]
    token_weight: Tensor | float  # a_i, [N]
    scale: Tensor  # 1 / normalizer, []


def terms(
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
) -> Terms:
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

    surrogate = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - s.clip_low, 1 + s.clip_high))
    if s.dual_clip is not None:
        bounded = torch.minimum(surrogate, -advantages * s.dual_clip)
        surrogate = torch.where(advantages < 0, bounded, surrogate)

    correction = _rollout_correction(old_logprobs, rollout_logprobs, segments, s)
    loss_of_token = correction.weight * surrogate
    kl, ref_gap = tokens.new_zeros(()), None
    if ref_logprobs is not None:
        ref_gap = segments.difference(ref_logprobs.detach(), logprobs)
        kl_of_token = _kl(ref_gap, s.kl_estimator)
        kl = segments.token_mean(kl_of_token.detach())
        if s.kl_coef:
            loss_of_token = loss_of_token + s.kl_coef * kl_of_token

    token_weight = 1.0 if length_of_token is None else 1 / length_of_token
    count = tokens if s.mean_over_tokens else sequences
    scale = 1 / (count.clamp(min=1) if normalizer is None else normalizer.to(dtype).squeeze())
    loss = segments.total(loss_of_token if length_of_token is None else token_weight * loss_of_token) * scale

    # A unit is what a ratio belongs to: a token, or a sequence (as a mean over its tokens).
    units = sequences if s.sequence_level else tokens
    value = ratio.detach()

    def mean_over_units(x: Tensor) -> Tensor:
        return segments.total(token_weight * x if s.sequence_level else x) / units.clamp(min=1)

    def extreme(fill: float, reduce) -> Tensor:
        unmasked = torch.cat([segments.fill_masked(value, fill), value.new_full((1,), fill)])
        return torch.where(tokens > 0, reduce(unmasked), 1.0)

    low = (advantages < 0) & (value < 1 - s.clip_low)
    high = (advantages > 0) & (value > 1 + s.clip_high)
    clipped, dual_fraction = low | high, tokens.new_zeros(())
    if s.dual_clip is not None:
        dual = (advantages < 0) & (value > s.dual_clip)
        clipped, dual_fraction = clipped | dual, mean_over_units(dual)
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
    return Terms(
        loss=loss,
        metrics=torch.stack([metrics[name] for name in METRICS]),
        segments=segments,
        advantages=advantages,
        clipped=clipped,
        ratio=ratio,
        ratio_slope=ratio_slope,
        rollout_weight=correction.weight,
        ref_gap=ref_gap,
        token_weight=token_weight,
        scale=scale,
    )


def bounded_exp(x: Tensor) -> Tensor:
    """Compute exp with its value bounded by exp(MAX_LOG); its gradient is that value."""
    return torch.exp(x - (x - x.clamp(max=MAX_LOG)).detach())


def _kl(ref_gap: Tensor, estimator: str) -> Tensor:
    """Estimate KL(policy || reference) per token from ref - logprob."""
    if estimator == "k1":
        return -ref_gap
    if estimator == "k2":
        return ref_gap.square() / 2
    return bounded_exp(ref_gap) - 1 - ref_gap


class _RolloutCorrection(NamedTuple):
    weight: Tensor | float  # [N]
    mean: Tensor  # [], mean weight over tokens, or over sequences
    kl: Tensor  # [], KL(rollout || old)


def _rollout_correction(
    old_logprobs: Tensor, rollout_logprobs: Tensor | None, segments: Segments, settings: Settings
) -> _RolloutCorrection:
    """Compute the importance weights between the rollout engine and the trainer."""
    tokens, one = segments.tokens, (segments.tokens > 0).to(segments.dtype)
    if rollout_logprobs is None:
        return _RolloutCorrection(1.0, one, torch.zeros_like(tokens))
    log_weight = segments.difference(old_logprobs.detach(), rollout_logprobs.detach())
    kl = -segments.token_mean(log_weight)
    if settings.rollout_correction == "none":
        return _RolloutCorrection(1.0, one, kl)
    if settings.rollout_correction == "token_truncate":
        weight = bounded_exp(log_weight).clamp(max=settings.rollout_cap)
        return _RolloutCorrection(weight, segments.token_mean(weight), kl)
    weight = bounded_exp(segments.sum(log_weight))
    if settings.rollout_correction == "sequence_truncate":
        weight = weight.clamp(max=settings.rollout_cap)
    else:
        weight = torch.where(weight > settings.rollout_cap, 0.0, weight)
    mean = torch.where(segments.lengths > 0, weight, 0.0).sum() / segments.sequences.clamp(min=1)
    return _RolloutCorrection(segments.expand(weight), mean, kl)


def torch_policy_loss(*, settings: Settings, **inputs) -> LossAndGradient:
    """Compute the loss of ``terms`` and its gradient by hand (the torch backend)."""
    s, t = settings, terms(settings=settings, **inputs)
    gradient = torch.where(t.clipped, 0.0, -t.advantages * t.ratio) * t.ratio_slope * t.rollout_weight
    if s.kl_coef:
        gradient = gradient + s.kl_coef * _kl_slope(t.ref_gap, s.kl_estimator)
    gradient = t.segments.fill_masked(gradient * t.token_weight)
    return LossAndGradient(loss=t.loss, metrics=t.metrics, gradient=gradient, scale=t.scale)


def _kl_slope(ref_gap: Tensor | None, estimator: str) -> Tensor | float:
    """Differentiate ``_kl`` with respect to the log-probability."""
    assert ref_gap is not None
    if estimator == "k1":
        return 1.0
    return -ref_gap if estimator == "k2" else 1 - bounded_exp(ref_gap)
