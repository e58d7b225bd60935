"""Settings of policy_loss, and the checks of its arguments."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..._validation import (
    check_choice,
    check_device,
    check_floating,
    check_integer,
    check_normalizer_value,
    check_shape,
    check_tensor,
    reject,
    values_are_checked,
)

RATIO_LEVELS = ("token", "sequence_mean", "sequence_sum")
AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum")
KL_ESTIMATORS = ("k1", "k2", "k3")
OBJECTIVES = ("clip", "cispo")
ROLLOUT_CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")

# exp of more overflows float32. Only the value is bounded: the gradient of a larger ratio remains that of the ratio.
MAX_LOG = 80.0


class Settings(NamedTuple):
    """Arguments of ``policy_loss`` that are not tensors, under the names of the registered operation."""

    objective: str
    ratio_level: str
    clip_low: float
    clip_high: float
    dual_clip: float | None
    aggregation: str
    kl_coef: float
    kl_estimator: str
    rollout_correction: str  # "none" for None
    rollout_floor: float
    rollout_cap: float

    @classmethod
    def validate(
        cls,
        *,
        objective: str,
        ratio_level: str,
        clip_low: float,
        clip_high: float,
        dual_clip: float | None,
        aggregation: str,
        ref_logprobs: Tensor | None,
        kl_coef: float,
        kl_estimator: str,
        rollout_logprobs: Tensor | None,
        rollout_correction: str | None,
        rollout_floor: float,
        rollout_cap: float,
    ) -> Settings:
        """Validate the arguments of ``policy_loss`` and build the settings. Raises ValueError."""
        check_choice("objective", objective, OBJECTIVES)
        check_choice("ratio_level", ratio_level, RATIO_LEVELS)
        check_choice("aggregation", aggregation, AGGREGATIONS)
        check_choice("kl_estimator", kl_estimator, KL_ESTIMATORS)
        check_choice("rollout_correction", rollout_correction or "none", ("none", *ROLLOUT_CORRECTIONS))
        for name, value in (("clip_low", clip_low), ("clip_high", clip_high)):
            if not float(value) >= 0:
                reject(name, float(value), "at least 0")
        if dual_clip is not None and not float(dual_clip) > 1:
            reject("dual_clip", float(dual_clip), "greater than 1, or None for no dual clip")
        if dual_clip is not None and float(dual_clip) >= math.exp(MAX_LOG):
            dual_clip = None  # no ratio is larger
        if objective == "cispo" and ratio_level != "token":
            reject("ratio_level", ratio_level, "token when objective is 'cispo'")
        if objective == "cispo" and dual_clip is not None:
            reject("dual_clip", float(dual_clip), "None when objective is 'cispo', whose ratios are all clipped")
        if not float(rollout_cap) > 0:
            reject("rollout_cap", float(rollout_cap), "greater than 0")
        if not 0 <= float(rollout_floor) <= float(rollout_cap):
            reject("rollout_floor", float(rollout_floor), f"in [0, rollout_cap={float(rollout_cap)}]")
        if rollout_floor and not str(rollout_correction).endswith("_mask"):
            reject("rollout_floor", float(rollout_floor), f"0 when rollout_correction is {rollout_correction!r}")
        if kl_coef and ref_logprobs is None:
            reject("ref_logprobs", None, f"given when kl_coef is not 0 (it is {float(kl_coef)})")
        if rollout_correction and rollout_correction != "none" and rollout_logprobs is None:
            reject("rollout_logprobs", None, f"given when rollout_correction is {rollout_correction!r}")
        return cls(
            objective=objective,
            ratio_level=ratio_level,
            clip_low=float(clip_low),
            clip_high=float(clip_high),
            dual_clip=None if dual_clip is None else float(dual_clip),
            aggregation=aggregation,
            kl_coef=float(kl_coef),
            kl_estimator=kl_estimator,
            rollout_correction=rollout_correction or "none",
            rollout_floor=float(rollout_floor),
            rollout_cap=float(rollout_cap),
        )

    @property
    def sequence_level(self) -> bool:
        """Whether the ratio belongs to a sequence."""
        return self.ratio_level != "token"

    @property
    def mean_in_sequence(self) -> bool:
        """Whether a token of a sequence of n tokens has weight 1 / n in the loss."""
        return self.sequence_level or self.aggregation == "seq-mean-token-mean"

    @property
    def mean_over_tokens(self) -> bool:
        """Whether the loss is divided by the number of tokens rather than of sequences."""
        return not self.sequence_level and self.aggregation == "token-mean"


def check_tensors(
    *,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
) -> None:
    """Check dtypes, shapes and devices of the tensors of ``policy_loss``. Raises ValueError or TypeError."""
    same = {"old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "rollout_logprobs": rollout_logprobs}
    check_floating(logprobs=logprobs, advantages=advantages, **same)
    check_integer(cu_seqlens=cu_seqlens)
    check_tensor(mask=mask)
    if cu_seqlens is None and logprobs.ndim != 2:
        reject(
            "logprobs", f"shape {tuple(logprobs.shape)}", "[B, T] (padded), or [N] together with cu_seqlens (packed)"
        )
    if cu_seqlens is not None and logprobs.ndim != 1:
        reject("logprobs", f"shape {tuple(logprobs.shape)}", "[N] when cu_seqlens is given")
    if cu_seqlens is not None and (cu_seqlens.ndim != 1 or not cu_seqlens.numel() or cu_seqlens.dtype != torch.int32):
        reject("cu_seqlens", f"{cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}", "int32 of shape [B + 1]")
    check_shape(logprobs.shape, "the shape of logprobs", mask=mask, **same)
    num_sequences = logprobs.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if advantages.shape not in ((num_sequences,), logprobs.shape):
        want = f"of shape ({num_sequences},), one per sequence, or {tuple(logprobs.shape)}, one per token"
        reject("advantages", f"shape {tuple(advantages.shape)}", want)
    check_device(logprobs.device, advantages=advantages, mask=mask, cu_seqlens=cu_seqlens, **same)


def check_values(cu_seqlens: Tensor, normalizer: Tensor | None, num_tokens: int) -> None:
    """Check that ``cu_seqlens`` rises from 0 to ``num_tokens`` and ``normalizer`` is positive. Reads the values."""
    if normalizer is not None:
        check_normalizer_value(normalizer)
    if not values_are_checked(cu_seqlens):
        return
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != num_tokens or bool((cu_seqlens.diff() < 0).any()):
        reject("cu_seqlens", cu_seqlens.tolist()[:16], f"rising from 0 to the number of tokens, {num_tokens}")


def has_token_advantages(advantages: Tensor, logprobs: Tensor, cu_seqlens: Tensor | None) -> bool:
    """Return whether advantages are per token. Where both readings fit, they are per sequence."""
    return advantages.shape == logprobs.shape and (cu_seqlens is None or advantages.shape[0] != cu_seqlens.shape[0] - 1)
