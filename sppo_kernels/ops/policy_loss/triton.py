"""Triton backend of policy_loss: one program per sequence, and the last one to finish reduces their partial sums.

program i:  [pass 1: n, sum of logprob - old, sum of old - rollout]   only where the first token needs them
            pass 2: every term of every token; gradient out; sums in registers
            sums of the sequence -> partial [len(SUMS), B]
last one:   partial -> loss, metrics, 1 / normalizer, in a fixed order
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton_utils import is_last_program, launch
from ...tuning import Config, Tunable
from .output import METRICS, LossAndGradient
from .reference import MAX_LOG, torch_policy_loss
from .settings import Settings

SUMS = (
    "loss",
    "tokens",
    "clipped_low",
    "clipped_high",
    "dual_clipped",
    "log_ratio",
    "kl",
    "ratio",
    "ratio_min",
    "ratio_max",
    "rollout_kl",
    "rollout_weight",
)

# Slots of the partial sums [len(SUMS), B] and of the metrics [len(METRICS)]
S_LOSS: tl.constexpr = tl.constexpr(SUMS.index("loss"))
S_TOKENS: tl.constexpr = tl.constexpr(SUMS.index("tokens"))
S_CLIPPED_LOW: tl.constexpr = tl.constexpr(SUMS.index("clipped_low"))
S_CLIPPED_HIGH: tl.constexpr = tl.constexpr(SUMS.index("clipped_high"))
S_DUAL_CLIPPED: tl.constexpr = tl.constexpr(SUMS.index("dual_clipped"))
S_LOG_RATIO: tl.constexpr = tl.constexpr(SUMS.index("log_ratio"))
S_KL: tl.constexpr = tl.constexpr(SUMS.index("kl"))
S_RATIO: tl.constexpr = tl.constexpr(SUMS.index("ratio"))
S_RATIO_MIN: tl.constexpr = tl.constexpr(SUMS.index("ratio_min"))
S_RATIO_MAX: tl.constexpr = tl.constexpr(SUMS.index("ratio_max"))
S_ROLLOUT_KL: tl.constexpr = tl.constexpr(SUMS.index("rollout_kl"))
S_ROLLOUT_WEIGHT: tl.constexpr = tl.constexpr(SUMS.index("rollout_weight"))
M_CLIP_FRACTION: tl.constexpr = tl.constexpr(METRICS.index("clip_fraction"))
M_CLIP_FRACTION_LOW: tl.constexpr = tl.constexpr(METRICS.index("clip_fraction_low"))
M_CLIP_FRACTION_HIGH: tl.constexpr = tl.constexpr(METRICS.index("clip_fraction_high"))
M_DUAL_CLIP_FRACTION: tl.constexpr = tl.constexpr(METRICS.index("dual_clip_fraction"))
M_APPROX_KL: tl.constexpr = tl.constexpr(METRICS.index("approx_kl"))
M_KL: tl.constexpr = tl.constexpr(METRICS.index("kl"))
M_RATIO_MEAN: tl.constexpr = tl.constexpr(METRICS.index("ratio_mean"))
M_RATIO_MIN: tl.constexpr = tl.constexpr(METRICS.index("ratio_min"))
M_RATIO_MAX: tl.constexpr = tl.constexpr(METRICS.index("ratio_max"))
M_ROLLOUT_KL: tl.constexpr = tl.constexpr(METRICS.index("rollout_kl"))
M_ROLLOUT_WEIGHT_MEAN: tl.constexpr = tl.constexpr(METRICS.index("rollout_weight_mean"))


@triton.jit
def _load(ptr, index, keep):
    return tl.load(ptr + index, mask=keep, other=0.0).to(tl.float32)


@triton.jit
def _bounded_exp(x, MAX: tl.constexpr):
    return tl.exp(tl.minimum(x, MAX))


@triton.jit(do_not_specialize=["B"])
def policy_loss_fwd_bwd_kernel(
    logprob_ptr,
    old_ptr,
    advantage_ptr,
    mask_ptr,
    cu_ptr,
    normalizer_ptr,
    ref_ptr,
    rollout_ptr,
    loss_ptr,
    metric_ptr,
    gradient_ptr,
    scale_ptr,
    partial_ptr,
    counter_ptr,
    B,
    clip_low,
    clip_high,
    dual_clip,
    kl_coef,
    rollout_cap,
    PER_TOKEN: tl.constexpr,
    RATIO_LEVEL: tl.constexpr,
    MEAN_IN_SEQUENCE: tl.constexpr,
    MEAN_OVER_TOKENS: tl.constexpr,
    KL: tl.constexpr,
    CORRECTION: tl.constexpr,
    TWO_PASSES: tl.constexpr,
    MAX_LOG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    start = tl.load(cu_ptr + sequence).to(tl.int64)
    end = tl.load(cu_ptr + sequence + 1).to(tl.int64)
    n = (end - start).to(tl.float32)
    log_ratio_of_sequence = 0.0
    log_weight_of_sequence = 0.0
    if TWO_PASSES:
        count = tl.zeros([BLOCK], tl.float32)
        log_ratio_sum = tl.zeros([BLOCK], tl.float32)
        log_weight_sum = tl.zeros([BLOCK], tl.float32)
        for first in range(start, end, BLOCK):
            index = first + tl.arange(0, BLOCK)
            keep = index < end
            if mask_ptr is not None:
                keep &= tl.load(mask_ptr + index, mask=keep, other=0) != 0
            count += keep.to(tl.float32)
            old = _load(old_ptr, index, keep)
            if RATIO_LEVEL != "token":
                log_ratio_sum += _load(logprob_ptr, index, keep) - old
            if CORRECTION == "sequence_truncate" or CORRECTION == "sequence_mask":
                log_weight_sum += old - _load(rollout_ptr, index, keep)
        n = tl.sum(count, 0)
        log_ratio_of_sequence = tl.sum(log_ratio_sum, 0)
        log_weight_of_sequence = tl.sum(log_weight_sum, 0)
    divisor = tl.maximum(n, 1.0)
    slope = 1.0  # d log ratio / d logprob
    if RATIO_LEVEL == "sequence_mean":
        log_ratio_of_sequence /= divisor
    if RATIO_LEVEL == "sequence_sum":
        slope = divisor
    token_weight = 1.0
    if MEAN_IN_SEQUENCE:
        token_weight = 1.0 / divisor
    unit = 1.0  # what a token counts in a mean over ratios
    if RATIO_LEVEL != "token":
        unit = 1.0 / divisor
    weight_of_sequence = 1.0
    if CORRECTION == "sequence_truncate" or CORRECTION == "sequence_mask":
        weight_of_sequence = _bounded_exp(log_weight_of_sequence, MAX_LOG)
        if CORRECTION == "sequence_truncate":
            weight_of_sequence = tl.minimum(weight_of_sequence, rollout_cap)
        else:
            weight_of_sequence = tl.where(weight_of_sequence > rollout_cap, 0.0, weight_of_sequence)

    loss_sum = tl.zeros([BLOCK], tl.float32)
    token_sum = tl.zeros([BLOCK], tl.float32)
    low_sum = tl.zeros([BLOCK], tl.float32)
    high_sum = tl.zeros([BLOCK], tl.float32)
    dual_sum = tl.zeros([BLOCK], tl.float32)
    gap_sum = tl.zeros([BLOCK], tl.float32)
    kl_sum = tl.zeros([BLOCK], tl.float32)
    ratio_sum = tl.zeros([BLOCK], tl.float32)
    ratio_min = tl.full([BLOCK], float("inf"), tl.float32)
    ratio_max = tl.full([BLOCK], float("-inf"), tl.float32)
    rollout_gap_sum = tl.zeros([BLOCK], tl.float32)
    weight_sum = tl.zeros([BLOCK], tl.float32)
    for first in range(start, end, BLOCK):
        index = first + tl.arange(0, BLOCK)
        inside = index < end
        keep = inside
        if mask_ptr is not None:
            keep &= tl.load(mask_ptr + index, mask=inside, other=0) != 0
        logprob = _load(logprob_ptr, index, keep)
        old = _load(old_ptr, index, keep)
        if PER_TOKEN:
            advantage = _load(advantage_ptr, index, keep)
        else:
            advantage = tl.load(advantage_ptr + sequence).to(tl.float32) + tl.zeros([BLOCK], tl.float32)
        gap = logprob - old
        log_ratio = gap
        if RATIO_LEVEL != "token":
            log_ratio = log_ratio_of_sequence + tl.zeros([BLOCK], tl.float32)
        ratio = _bounded_exp(log_ratio, MAX_LOG)
        clipped_ratio = tl.minimum(tl.maximum(ratio, 1.0 - clip_low), 1.0 + clip_high)
        surrogate = tl.maximum(-advantage * ratio, -advantage * clipped_ratio)
        low = (advantage < 0.0) & (ratio < 1.0 - clip_low)
        high = (advantage > 0.0) & (ratio > 1.0 + clip_high)
        clipped = low | high
        if dual_clip is not None:
            surrogate = tl.where(advantage < 0.0, tl.minimum(surrogate, -advantage * dual_clip), surrogate)
            dual = (advantage < 0.0) & (ratio > dual_clip)
            clipped |= dual
            dual_sum += tl.where(dual & keep, unit, 0.0)
        weight = weight_of_sequence + tl.zeros([BLOCK], tl.float32)
        if rollout_ptr is not None:
            log_weight = old - _load(rollout_ptr, index, keep)
            rollout_gap_sum += tl.where(keep, -log_weight, 0.0)
            if CORRECTION == "token_truncate":
                weight = tl.minimum(_bounded_exp(log_weight, MAX_LOG), rollout_cap)
                weight_sum += tl.where(keep, weight, 0.0)
        loss = weight * surrogate
        gradient = weight * slope * tl.where(clipped, 0.0, -advantage * ratio)
        if ref_ptr is not None:
            d = _load(ref_ptr, index, keep) - logprob
            if KL == "k1":
                kl = -d
                kl_slope = tl.full([BLOCK], 1.0, tl.float32)
            elif KL == "k2":
                kl = 0.5 * d * d
                kl_slope = -d
            else:
                e = _bounded_exp(d, MAX_LOG)
                kl = e - 1.0 - d
                kl_slope = 1.0 - e
            kl_sum += tl.where(keep, kl, 0.0)
            loss += kl_coef * kl
            gradient += kl_coef * kl_slope
        tl.store(gradient_ptr + index, tl.where(keep, token_weight * gradient, 0.0), mask=inside)
        loss_sum += tl.where(keep, token_weight * loss, 0.0)
        token_sum += tl.where(keep, 1.0, 0.0)
        low_sum += tl.where(low & keep, unit, 0.0)
        high_sum += tl.where(high & keep, unit, 0.0)
        gap_sum += tl.where(keep, gap, 0.0)
        ratio_sum += tl.where(keep, unit * ratio, 0.0)
        ratio_min = tl.where(keep, tl.minimum(ratio_min, ratio), ratio_min)
        ratio_max = tl.where(keep, tl.maximum(ratio_max, ratio), ratio_max)

    tokens = tl.sum(token_sum, 0)
    weight_total = tl.sum(weight_sum, 0)
    if CORRECTION == "sequence_truncate" or CORRECTION == "sequence_mask":
        weight_total = tl.where(tokens > 0.0, weight_of_sequence, 0.0)
    partial_ptr += sequence
    tl.store(partial_ptr + S_LOSS * B, tl.sum(loss_sum, 0))
    tl.store(partial_ptr + S_TOKENS * B, tokens)
    tl.store(partial_ptr + S_CLIPPED_LOW * B, tl.sum(low_sum, 0))
    tl.store(partial_ptr + S_CLIPPED_HIGH * B, tl.sum(high_sum, 0))
    tl.store(partial_ptr + S_DUAL_CLIPPED * B, tl.sum(dual_sum, 0))
    tl.store(partial_ptr + S_LOG_RATIO * B, tl.sum(gap_sum, 0))
    tl.store(partial_ptr + S_KL * B, tl.sum(kl_sum, 0))
    tl.store(partial_ptr + S_RATIO * B, tl.sum(ratio_sum, 0))
    tl.store(partial_ptr + S_RATIO_MIN * B, tl.min(ratio_min, 0))
    tl.store(partial_ptr + S_RATIO_MAX * B, tl.max(ratio_max, 0))
    tl.store(partial_ptr + S_ROLLOUT_KL * B, tl.sum(rollout_gap_sum, 0))
    tl.store(partial_ptr + S_ROLLOUT_WEIGHT * B, weight_total)
    if is_last_program(counter_ptr, B):
        _finish(
            partial_ptr - sequence,
            normalizer_ptr,
            loss_ptr,
            metric_ptr,
            scale_ptr,
            B,
            RATIO_LEVEL,
            MEAN_OVER_TOKENS,
            CORRECTION,
            BLOCK,
        )


@triton.jit
def _total(partial_ptr, slot, B, BLOCK: tl.constexpr):
    """Sum one slot of the partial sums over all sequences."""
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, B, BLOCK):
        index = first + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + slot * B + index, mask=index < B, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _finish(
    partial_ptr,
    normalizer_ptr,
    loss_ptr,
    metric_ptr,
    scale_ptr,
    B,
    RATIO_LEVEL: tl.constexpr,
    MEAN_OVER_TOKENS: tl.constexpr,
    CORRECTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tokens = _total(partial_ptr, S_TOKENS, B, BLOCK)
    nonempty = tl.zeros([BLOCK], tl.float32)
    lowest = tl.full([BLOCK], float("inf"), tl.float32)
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    for first in range(0, B, BLOCK):
        index = first + tl.arange(0, BLOCK)
        nonempty += (tl.load(partial_ptr + S_TOKENS * B + index, mask=index < B, other=0.0) > 0.0).to(tl.float32)
        lowest = tl.minimum(lowest, tl.load(partial_ptr + S_RATIO_MIN * B + index, mask=index < B, other=float("inf")))
        highest = tl.maximum(
            highest, tl.load(partial_ptr + S_RATIO_MAX * B + index, mask=index < B, other=float("-inf"))
        )
    sequences = tl.maximum(tl.sum(nonempty, 0), 1.0)
    some = tokens > 0.0
    tokens = tl.maximum(tokens, 1.0)
    if normalizer_ptr is not None:
        scale = 1.0 / tl.load(normalizer_ptr).to(tl.float32)
    elif MEAN_OVER_TOKENS:
        scale = 1.0 / tokens
    else:
        scale = 1.0 / sequences
    units = sequences
    if RATIO_LEVEL == "token":
        units = tokens
    low = _total(partial_ptr, S_CLIPPED_LOW, B, BLOCK) / units
    high = _total(partial_ptr, S_CLIPPED_HIGH, B, BLOCK) / units
    if CORRECTION == "none":
        weight_mean = tl.where(some, 1.0, 0.0)
    elif CORRECTION == "token_truncate":
        weight_mean = _total(partial_ptr, S_ROLLOUT_WEIGHT, B, BLOCK) / tokens
    else:
        weight_mean = _total(partial_ptr, S_ROLLOUT_WEIGHT, B, BLOCK) / sequences
    tl.store(loss_ptr, _total(partial_ptr, S_LOSS, B, BLOCK) * scale)
    tl.store(scale_ptr, scale)
    tl.store(metric_ptr + M_CLIP_FRACTION, low + high)
    tl.store(metric_ptr + M_CLIP_FRACTION_LOW, low)
    tl.store(metric_ptr + M_CLIP_FRACTION_HIGH, high)
    tl.store(metric_ptr + M_DUAL_CLIP_FRACTION, _total(partial_ptr, S_DUAL_CLIPPED, B, BLOCK) / units)
    tl.store(metric_ptr + M_APPROX_KL, -_total(partial_ptr, S_LOG_RATIO, B, BLOCK) / tokens)
    tl.store(metric_ptr + M_KL, _total(partial_ptr, S_KL, B, BLOCK) / tokens)
    tl.store(metric_ptr + M_RATIO_MEAN, tl.where(some, _total(partial_ptr, S_RATIO, B, BLOCK) / units, 1.0))
    tl.store(metric_ptr + M_RATIO_MIN, tl.where(some, tl.min(lowest, 0), 1.0))
    tl.store(metric_ptr + M_RATIO_MAX, tl.where(some, tl.max(highest, 0), 1.0))
    tl.store(metric_ptr + M_ROLLOUT_KL, _total(partial_ptr, S_ROLLOUT_KL, B, BLOCK) / tokens)
    tl.store(metric_ptr + M_ROLLOUT_WEIGHT_MEAN, weight_mean)


# At most two elements per thread: twelve sums and a dozen terms of each fill its registers, and four would spill.
CONFIGS = Tunable("policy_loss", Config(512, 8), Config(256, 4), Config(256, 8))


def triton_policy_loss(
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
    """Compute the loss and its gradient in one launch; tensors are packed."""
    s, num_sequences = settings, cu_seqlens.shape[0] - 1
    if not num_sequences:
        return torch_policy_loss(
            logprobs=logprobs,
            old_logprobs=old_logprobs,
            advantages=advantages,
            mask=mask,
            cu_seqlens=cu_seqlens,
            normalizer=normalizer,
            ref_logprobs=ref_logprobs,
            rollout_logprobs=rollout_logprobs,
            per_token=per_token,
            settings=settings,
        )
    inputs = {
        "logprob_ptr": logprobs,
        "old_ptr": old_logprobs,
        "advantage_ptr": advantages,
        "mask_ptr": mask,
        "cu_ptr": cu_seqlens,
        "normalizer_ptr": normalizer,
        "ref_ptr": ref_logprobs,
        "rollout_ptr": rollout_logprobs,
    }

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=logprobs.device)

    output = LossAndGradient(loss=new(), metrics=new(len(METRICS)), gradient=new(logprobs.shape[0]), scale=new())
    masked_mean = mask is not None and s.mean_in_sequence
    config = CONFIGS.config(logprobs.shape[0] // num_sequences, logprobs.itemsize)
    launch(
        policy_loss_fwd_bwd_kernel,
        (num_sequences,),
        **{name: None if x is None else x.contiguous() for name, x in inputs.items()},
        loss_ptr=output.loss,
        metric_ptr=output.metrics,
        gradient_ptr=output.gradient,
        scale_ptr=output.scale,
        partial_ptr=new(len(SUMS), num_sequences),
        counter_ptr=torch.zeros((), dtype=torch.int32, device=logprobs.device),
        B=num_sequences,
        clip_low=s.clip_low,
        clip_high=s.clip_high,
        dual_clip=s.dual_clip,
        kl_coef=s.kl_coef,
        rollout_cap=s.rollout_cap,
        PER_TOKEN=per_token,
        RATIO_LEVEL=s.ratio_level,
        MEAN_IN_SEQUENCE=s.mean_in_sequence,
        MEAN_OVER_TOKENS=s.mean_over_tokens,
        KL=s.kl_estimator,
        CORRECTION=s.rollout_correction,
        TWO_PASSES=s.sequence_level or masked_mean or s.rollout_correction.startswith("sequence"),
        MAX_LOG=MAX_LOG,
        BLOCK=config.block,
        num_warps=config.num_warps,
    )
    return output
