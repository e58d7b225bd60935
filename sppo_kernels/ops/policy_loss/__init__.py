"""policy_loss: the clipped surrogate loss of PPO, GSPO and SPPO, and its gradient with respect to log-probabilities.

For token t of sequence i with d_t = logprob_t - old_t and n tokens in the sequence:

    ratio       token r = exp(d_t)      sequence_mean r = exp(sum d / n)      sequence_sum r = exp(sum d)
    surrogate   max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high));  with dual_clip c and A < 0: min(that, -A c)
                objective="cispo": -A sg[clip(r, 1 - clip_low, 1 + clip_high)] logprob
    loss_t      w * surrogate + kl_coef * kl_t       w: the rollout correction, a constant in the gradient
    loss        sum_i sum_t a_i loss_t / normalizer

    aggregation            a_i      normalizer, unless given
    token-mean             1        tokens
    seq-mean-token-mean    1 / n    sequences that have tokens
    seq-mean-token-sum     1        sequences that have tokens
    any, sequence ratio    1 / n    sequences that have tokens

A sequence ratio is one number per sequence, and so are its terms. Writing them as a mean over tokens allows per-token
KL and, where advantages differ within a sequence, per-token advantages (GSPO-token, arXiv 2507.18071, section 4.3).

Traffic: each input of N elements is read once (twice where a sum over the sequence is needed first), and the gradient
is written once. Forward and gradient are one kernel; backward scales the gradient by one number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._backend import pick_backend
from ..._validation import as_normalizer
from . import op
from .output import METRICS, LossAndGradient, PolicyLossOutput, metrics_dict
from .reference import loss_and_metrics
from .settings import (
    AGGREGATIONS,
    KL_ESTIMATORS,
    OBJECTIVES,
    RATIO_LEVELS,
    ROLLOUT_CORRECTIONS,
    Settings,
    check_tensors,
    check_values,
    has_token_advantages,
)

__all__ = [
    "AGGREGATIONS",
    "KL_ESTIMATORS",
    "METRICS",
    "OBJECTIVES",
    "RATIO_LEVELS",
    "ROLLOUT_CORRECTIONS",
    "PolicyLossOutput",
    "policy_loss",
    "reference",
]


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    objective: str = "clip",
    ratio_level: str = "token",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    aggregation: str = "token-mean",
    normalizer: float | Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    rollout_logprobs: Tensor | None = None,
    rollout_correction: str | None = None,
    rollout_floor: float = 0.0,
    rollout_cap: float = 2.0,
    backend: str | None = None,
) -> PolicyLossOutput:
    """Compute the clipped policy-gradient loss at token or sequence level, with its gradient in the same launch.

    Sources: PPO's clip (arXiv 1707.06347), dual clip (arXiv 1912.09729), sequence_mean (GSPO, arXiv 2507.18071), one
    advantage per sequence (SPPO, arXiv 2604.08865), KL estimators (J. Schulman, "Approximating KL Divergence", 2020),
    truncated importance weights (Ionides, 2008), CISPO (arXiv 2506.13585, equation 4), weights masked on both sides
    (IcePop, arXiv 2510.18855, equation 5).

    Args:
        logprobs: padded ``[B, T]``, or packed ``[N]`` with ``cu_seqlens``; nats, any floating dtype. Differentiated.
        old_logprobs: same shape, of the policy before the update.
        advantages: ``[B]``, one per sequence, or the shape of ``logprobs``, one per token.
        mask: loss mask in the shape of ``logprobs``, nonzero where a token has a loss; None for all tokens.
        cu_seqlens: int32 ``[B + 1]``, the start of each packed sequence, from 0 to N; empty sequences are allowed.
        objective: ``"clip"``, in which a clipped ratio has no gradient, or ``"cispo"``, in which it is a bounded weight
            of the token's log-probability. The latter is for ratios of tokens, without ``dual_clip``.
        ratio_level: ``"token"``, ``"sequence_mean"`` or ``"sequence_sum"``.
        clip_low: the ratio is clipped to ``[1 - clip_low, 1 + clip_high]``; at least 0.
        clip_high: see ``clip_low``; at least 0.
        dual_clip: bound on the ratio for negative advantages, greater than 1; None for no bound. The log-ratio is not
            clamped: that would remove the gradient where a bad sample should be pushed away.
        aggregation: ``"token-mean"``, ``"seq-mean-token-mean"`` or ``"seq-mean-token-sum"``. A sequence-level ratio
            is always averaged over the sequences that have tokens.
        normalizer: replaces the local count of tokens or sequences by that of the complete update, so that
            micro-batches and data-parallel ranks add up to one exact mean; greater than 0.
        ref_logprobs: same shape, of the reference policy, for the KL penalty and its metric.
        kl_coef: weight of the KL penalty, which requires ``ref_logprobs``.
        kl_estimator: ``"k1"``, ``"k2"`` or ``"k3"``.
        rollout_logprobs: same shape, of the engine that sampled.
        rollout_correction: weights by ``exp(old - rollout)``, a constant in the gradient: ``"token_truncate"`` (per
            token, at most ``rollout_cap``), ``"token_mask"`` (per token, 0 where it is outside of ``[rollout_floor,
            rollout_cap]``), ``"sequence_truncate"`` or ``"sequence_mask"`` (the same, of the sequence's product).
        rollout_floor: in ``[0, rollout_cap]``, for the masks. IcePop has 0.5, and 5 for ``rollout_cap``.
        rollout_cap: greater than 0.
        backend: ``"reference"``, ``"torch"``, ``"triton"``, or None for triton on an accelerator and torch elsewhere.

    Returns:
        ``PolicyLossOutput(loss, metrics)``. Fractions and ``ratio_mean`` are means over tokens or over sequences, and
        ``ratio_min`` and ``ratio_max`` extremes of them, according to ``ratio_level``. ``rollout_weight_mean`` is a
        mean over sequences if ``rollout_correction`` is per sequence, and otherwise over tokens. ``approx_kl`` (old -
        new), ``kl`` and ``rollout_kl`` (rollout - old) are means over tokens. Without tokens the loss, its gradient and
        the metrics are 0 and the ratios 1.

    Raises:
        ValueError: a shape or device does not match, or a choice or bound is invalid. Values of ``cu_seqlens`` and of a
            tensor ``normalizer`` are checked on a CPU, and elsewhere under ``SPPO_KERNELS_CHECK=1``.
        TypeError: a tensor has the wrong kind of dtype.
    """
    check_tensors(
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        advantages=advantages,
        mask=mask,
        cu_seqlens=cu_seqlens,
        ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs,
    )
    settings = Settings.validate(
        objective=objective,
        ratio_level=ratio_level,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        aggregation=aggregation,
        ref_logprobs=ref_logprobs,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        rollout_logprobs=rollout_logprobs,
        rollout_correction=rollout_correction,
        rollout_floor=rollout_floor,
        rollout_cap=rollout_cap,
    )
    if normalizer is not None:
        normalizer = as_normalizer(normalizer, logprobs.device)
    backend = pick_backend(backend, logprobs)
    per_token = has_token_advantages(advantages, logprobs, cu_seqlens)
    if cu_seqlens is None:
        # A padded batch consists of packed sequences of equal length whose padding is masked.
        rows, length = logprobs.shape
        cu_seqlens = torch.arange(rows + 1, dtype=torch.int32, device=logprobs.device) * length
    tensors = {
        "logprobs": logprobs,
        "old_logprobs": old_logprobs,
        "advantages": advantages,
        "mask": mask,
        "cu_seqlens": cu_seqlens,
        "normalizer": normalizer,
        "ref_logprobs": ref_logprobs,
        "rollout_logprobs": rollout_logprobs,
    }
    flat: dict[str, Any] = {name: None if x is None else x.reshape(-1) for name, x in tensors.items()}
    if backend == "reference":
        check_values(cu_seqlens, normalizer, logprobs.numel())
        return loss_and_metrics(**flat, per_token=per_token, settings=settings)
    output = LossAndGradient(*op.policy_loss(**flat, per_token=per_token, **settings._asdict(), backend=backend))
    return PolicyLossOutput(output.loss, metrics_dict(output.metrics))


def reference(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, **settings: Any) -> PolicyLossOutput:
    """Definition of ``policy_loss``: plain differentiable PyTorch in float32, or float64 for float64 inputs."""
    return policy_loss(logprobs, old_logprobs, advantages, **settings, backend="reference")
