"""Triton backend of policy_loss: programs are pieces of sequences, so that none depends on the longest response.

A piece holds the tokens of one sequence in one block of BLOCK tokens. The piece of sequence s in block b has the slot
s + b, which rises by at least one from piece to piece. A few slots have no tokens. Programs find their piece by binary
search in cu_seqlens.

sums launch:    count, sum of logprob - old and of old - rollout of each piece -> sums [len(PIECE_SUMS), slots]
                only where a token needs those of its sequence first
main launch:    sums of the sequence's pieces -> its ratio, weight and length
                every term of every token; gradient out; sums of the piece -> partial [slots, COLUMNS]
last program:   partial -> loss, metrics, 1 / normalizer

All sums have a fixed order. Pieces that fill a block are loaded and stored without a mask, 16 bytes per thread.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton_utils import is_last_program, launch
from ...tuning import Config, Tunable
from .output import METRICS, LossAndGradient
from .settings import MAX_LOG, Settings
from .torch_backend import torch_policy_loss

# Columns of the partial sums. A metric is its column's total over a number of tokens or sequences. The extremes are
# maxima: ratio_min is stored as the largest -ratio. clip_fraction is the sum of the other two clip fractions.
SUMS = (*METRICS, "loss", "tokens", "sequences")
PIECE_SUMS = ("count", "log_ratio", "log_weight")

S_CLIP_FRACTION: tl.constexpr = tl.constexpr(SUMS.index("clip_fraction"))
S_CLIP_FRACTION_LOW: tl.constexpr = tl.constexpr(SUMS.index("clip_fraction_low"))
S_CLIP_FRACTION_HIGH: tl.constexpr = tl.constexpr(SUMS.index("clip_fraction_high"))
S_DUAL_CLIP_FRACTION: tl.constexpr = tl.constexpr(SUMS.index("dual_clip_fraction"))
S_APPROX_KL: tl.constexpr = tl.constexpr(SUMS.index("approx_kl"))
S_KL: tl.constexpr = tl.constexpr(SUMS.index("kl"))
S_RATIO_MEAN: tl.constexpr = tl.constexpr(SUMS.index("ratio_mean"))
S_RATIO_MIN: tl.constexpr = tl.constexpr(SUMS.index("ratio_min"))
S_RATIO_MAX: tl.constexpr = tl.constexpr(SUMS.index("ratio_max"))
S_ROLLOUT_KL: tl.constexpr = tl.constexpr(SUMS.index("rollout_kl"))
S_ROLLOUT_WEIGHT_MEAN: tl.constexpr = tl.constexpr(SUMS.index("rollout_weight_mean"))
S_LOSS: tl.constexpr = tl.constexpr(SUMS.index("loss"))
S_TOKENS: tl.constexpr = tl.constexpr(SUMS.index("tokens"))
S_SEQUENCES: tl.constexpr = tl.constexpr(SUMS.index("sequences"))
P_COUNT: tl.constexpr = tl.constexpr(PIECE_SUMS.index("count"))
P_LOG_RATIO: tl.constexpr = tl.constexpr(PIECE_SUMS.index("log_ratio"))
P_LOG_WEIGHT: tl.constexpr = tl.constexpr(PIECE_SUMS.index("log_weight"))
NUM_METRICS: tl.constexpr = tl.constexpr(len(METRICS))
NUM_SUMS: tl.constexpr = tl.constexpr(len(SUMS))
COLUMNS: tl.constexpr = tl.constexpr(16)  # a row of partial sums is 64 bytes


@triton.jit
def _find_piece(cu_ptr, B, BLOCK: tl.constexpr):
    """Return sequence and block of this program, and start and end of the sequence."""
    slot = tl.program_id(0)
    sequence = 0
    above = B
    while above - sequence > 1:
        middle = (sequence + above) // 2
        starts_above = middle + tl.load(cu_ptr + middle) // BLOCK > slot
        sequence = tl.where(starts_above, sequence, middle)
        above = tl.where(starts_above, middle, above)
    return sequence, slot - sequence, tl.load(cu_ptr + sequence), tl.load(cu_ptr + sequence + 1)


@triton.jit
def _block_of_tokens(block, start, end, BLOCK: tl.constexpr):
    """Return the indices of a block of tokens, which of them are in the sequence, and whether all are."""
    first = block * BLOCK
    index = first.to(tl.int64) + tl.arange(0, BLOCK)
    return index, (index >= start) & (index < end), (first >= start) & (first + BLOCK <= end)


@triton.jit
def _load(ptr, index, inside, keep):
    x = tl.zeros(index.shape, tl.float32)
    if ptr is not None:
        x = tl.where(keep, tl.load(ptr + index, mask=inside, other=0.0).to(tl.float32), x)
    return x


@triton.jit
def _load_tokens(logprob_ptr, old_ptr, advantage_ptr, ref_ptr, rollout_ptr, mask_ptr, index, inside):
    """Load the inputs of unmasked tokens as float32, 0 for the others and for inputs that are None."""
    keep = inside
    if mask_ptr is not None:
        keep &= tl.load(mask_ptr + index, mask=inside, other=0) != 0
    return (
        keep,
        _load(logprob_ptr, index, inside, keep),
        _load(old_ptr, index, inside, keep),
        _load(advantage_ptr, index, inside, keep),
        _load(ref_ptr, index, inside, keep),
        _load(rollout_ptr, index, inside, keep),
    )


@triton.jit
def _limit(weight, floor, cap, CORRECTION: tl.constexpr):
    if CORRECTION == "token_truncate" or CORRECTION == "sequence_truncate":
        limited = tl.minimum(weight, cap)
    else:
        limited = tl.where((weight < floor) | (weight > cap), 0.0, weight)
    return limited


@triton.jit
def _bounded_exp(x, MAX: tl.constexpr):
    return tl.exp(tl.minimum(x, MAX))


@triton.jit(do_not_specialize=["B"])
def policy_loss_sums_kernel(
    logprob_ptr,
    old_ptr,
    mask_ptr,
    cu_ptr,
    rollout_ptr,
    sum_ptr,
    counter_ptr,
    B,
    BLOCK: tl.constexpr,
):
    slot = tl.program_id(0)
    slots = tl.num_programs(0)
    if slot == 0:
        tl.store(counter_ptr, 0)  # of the main launch
    _, block, start, end = _find_piece(cu_ptr, B, BLOCK)
    index, inside, full = _block_of_tokens(block, start, end, BLOCK)
    if full:
        all_inside = tl.full([BLOCK], 1, tl.int1)  # a constant, so that loads are wide
        keep, logprob, old, _a, _r, rollout = _load_tokens(
            logprob_ptr, old_ptr, None, None, rollout_ptr, mask_ptr, index=index, inside=all_inside
        )
    else:
        keep, logprob, old, _a, _r, rollout = _load_tokens(
            logprob_ptr, old_ptr, None, None, rollout_ptr, mask_ptr, index=index, inside=inside
        )
    sum_ptr += slot
    if mask_ptr is not None:
        tl.store(sum_ptr + P_COUNT * slots, tl.sum(keep.to(tl.float32), 0))
    if logprob_ptr is not None:
        tl.store(sum_ptr + P_LOG_RATIO * slots, tl.sum(logprob - old, 0))
    if rollout_ptr is not None:
        tl.store(sum_ptr + P_LOG_WEIGHT * slots, tl.sum(old - rollout, 0))


@triton.jit
def _sum_of_slots(sum_ptr, first, end, AT_ONCE: tl.constexpr):
    total = tl.zeros([AT_ONCE], tl.float32)
    for start in range(first, end, AT_ONCE):
        slot = start + tl.arange(0, AT_ONCE)
        total += tl.load(sum_ptr + slot, mask=slot < end, other=0.0)
    return tl.sum(total, 0)


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
    sum_ptr,
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
    rollout_floor,
    rollout_cap,
    PER_TOKEN: tl.constexpr,
    RATIO_LEVEL: tl.constexpr,
    MEAN_IN_SEQUENCE: tl.constexpr,
    MEAN_OVER_TOKENS: tl.constexpr,
    KL: tl.constexpr,
    OBJECTIVE: tl.constexpr,
    CORRECTION: tl.constexpr,
    WEIGHTS_ARE_SUMMED: tl.constexpr,
    MAX_LOG: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS_AT_ONCE: tl.constexpr,
):
    PER_SEQUENCE_WEIGHT: tl.constexpr = CORRECTION == "sequence_truncate" or CORRECTION == "sequence_mask"
    slot = tl.program_id(0)
    slots = tl.num_programs(0)
    own_advantage_ptr = advantage_ptr if PER_TOKEN else None
    sequence, block, start, end = _find_piece(cu_ptr, B, BLOCK)
    index, inside, full = _block_of_tokens(block, start, end, BLOCK)
    if full:
        all_inside = tl.full([BLOCK], 1, tl.int1)  # a constant, so that loads are wide
        keep, logprob, old, advantage, ref, rollout = _load_tokens(
            logprob_ptr, old_ptr, own_advantage_ptr, ref_ptr, rollout_ptr, mask_ptr, index=index, inside=all_inside
        )
    else:
        keep, logprob, old, advantage, ref, rollout = _load_tokens(
            logprob_ptr, old_ptr, own_advantage_ptr, ref_ptr, rollout_ptr, mask_ptr, index=index, inside=inside
        )
    if not PER_TOKEN:
        advantage += tl.load(advantage_ptr + sequence).to(tl.float32)

    # The sequence: n, its ratio and its rollout weight. What belongs to it is added by its first piece.
    first_slot = sequence + start // BLOCK
    end_slot = sequence + tl.cdiv(end, BLOCK)
    n = (end - start).to(tl.float32)
    if sum_ptr is not None and mask_ptr is not None:
        n = _sum_of_slots(sum_ptr + P_COUNT * slots, first_slot, end_slot, SLOTS_AT_ONCE)
    adds_sequence = (slot == first_slot) & (n > 0.0)
    divisor = tl.maximum(n, 1.0)
    slope = 1.0  # d log ratio / d logprob
    unit = 1.0  # what a token counts in a mean over ratios
    token_weight = 1.0
    if MEAN_IN_SEQUENCE:
        token_weight = 1.0 / divisor
    if RATIO_LEVEL == "token":
        gap = logprob - old
        gap_sum = tl.sum(gap, 0)
        ratio = _bounded_exp(gap, MAX_LOG)
        ratio_sum = tl.sum(tl.where(keep, ratio, 0.0), 0)
        least = tl.max(tl.where(keep, -ratio, float("-inf")), 0)
        greatest = tl.max(tl.where(keep, ratio, float("-inf")), 0)
    else:
        gap_sum = tl.load(sum_ptr + P_LOG_RATIO * slots + slot)
        log_ratio = _sum_of_slots(sum_ptr + P_LOG_RATIO * slots, first_slot, end_slot, SLOTS_AT_ONCE)
        if RATIO_LEVEL == "sequence_mean":
            log_ratio /= divisor
        else:
            slope = divisor
        unit = 1.0 / divisor
        ratio = _bounded_exp(log_ratio, MAX_LOG)
        ratio_sum = tl.where(adds_sequence, ratio, 0.0)
        least = tl.where(n > 0.0, -ratio, float("-inf"))
        greatest = tl.where(n > 0.0, ratio, float("-inf"))
        ratio += tl.zeros([BLOCK], tl.float32)  # of each token
    if mask_ptr is None:
        tokens = tl.maximum(tl.minimum(end, (block + 1) * BLOCK) - tl.maximum(start, block * BLOCK), 0).to(tl.float32)
    else:
        tokens = tl.sum(keep.to(tl.float32), 0)

    weight = 1.0
    weight_sum = tokens
    rollout_gap_sum = 0.0
    if WEIGHTS_ARE_SUMMED:
        rollout_gap_sum = -tl.load(sum_ptr + P_LOG_WEIGHT * slots + slot)
    elif rollout_ptr is not None:
        rollout_gap_sum = tl.sum(rollout - old, 0)
    if CORRECTION == "token_truncate" or CORRECTION == "token_mask":
        weight = _limit(_bounded_exp(old - rollout, MAX_LOG), rollout_floor, rollout_cap, CORRECTION)
        weight_sum = tl.sum(tl.where(keep, weight, 0.0), 0)
    if PER_SEQUENCE_WEIGHT:
        log_weight = _sum_of_slots(sum_ptr + P_LOG_WEIGHT * slots, first_slot, end_slot, SLOTS_AT_ONCE)
        weight = _limit(_bounded_exp(log_weight, MAX_LOG), rollout_floor, rollout_cap, CORRECTION)
        weight_sum = tl.where(adds_sequence, weight, 0.0)

    clipped_ratio = tl.minimum(tl.maximum(ratio, 1.0 - clip_low), 1.0 + clip_high)
    surrogate = tl.maximum(-advantage * ratio, -advantage * clipped_ratio)
    low = ratio < 1.0 - clip_low
    high = ratio > 1.0 + clip_high
    if OBJECTIVE == "clip":
        low &= advantage < 0.0
        high &= advantage > 0.0
    clipped = low | high
    dual_sum = 0.0
    if dual_clip is not None:
        surrogate = tl.where(advantage < 0.0, tl.minimum(surrogate, -advantage * dual_clip), surrogate)
        dual = (advantage < 0.0) & (ratio > dual_clip)
        clipped |= dual
        dual_sum = unit * tl.sum(tl.where(dual & keep, 1.0, 0.0), 0)
    loss = weight * surrogate
    gradient = weight * slope * tl.where(clipped, 0.0, -advantage * ratio)
    if OBJECTIVE == "cispo":
        gradient = -weight * advantage * clipped_ratio
        loss = gradient * logprob
    kl_sum = 0.0
    if ref_ptr is not None:
        d = ref - logprob
        if KL == "k1":
            kl = -d
            kl_slope = 1.0
        elif KL == "k2":
            kl = 0.5 * d * d
            kl_slope = -d
        else:
            e = _bounded_exp(d, MAX_LOG)
            kl = e - 1.0 - d
            kl_slope = 1.0 - e
        kl_sum = tl.sum(kl, 0)  # 0 where masked, like d
        loss += kl_coef * kl
        gradient += kl_coef * kl_slope
    gradient = tl.where(keep, token_weight * gradient, 0.0)
    if full:
        tl.store(gradient_ptr + index, gradient)
    else:
        tl.store(gradient_ptr + index, gradient, mask=inside)

    row_ptr = partial_ptr + slot.to(tl.int64) * COLUMNS
    low_sum = unit * tl.sum(tl.where(low & keep, 1.0, 0.0), 0)
    high_sum = unit * tl.sum(tl.where(high & keep, 1.0, 0.0), 0)
    tl.store(row_ptr + S_CLIP_FRACTION, low_sum + high_sum)
    tl.store(row_ptr + S_CLIP_FRACTION_LOW, low_sum)
    tl.store(row_ptr + S_CLIP_FRACTION_HIGH, high_sum)
    tl.store(row_ptr + S_DUAL_CLIP_FRACTION, dual_sum)
    tl.store(row_ptr + S_APPROX_KL, -gap_sum)
    tl.store(row_ptr + S_KL, kl_sum)
    tl.store(row_ptr + S_RATIO_MEAN, ratio_sum)
    tl.store(row_ptr + S_RATIO_MIN, least)
    tl.store(row_ptr + S_RATIO_MAX, greatest)
    tl.store(row_ptr + S_ROLLOUT_KL, rollout_gap_sum)
    tl.store(row_ptr + S_ROLLOUT_WEIGHT_MEAN, weight_sum)
    tl.store(row_ptr + S_LOSS, token_weight * tl.sum(tl.where(keep, loss, 0.0), 0))
    tl.store(row_ptr + S_TOKENS, tokens)
    tl.store(row_ptr + S_SEQUENCES, tl.where(adds_sequence, 1.0, 0.0))
    if is_last_program(counter_ptr, slots):
        _finish(
            partial_ptr,
            normalizer_ptr,
            loss_ptr,
            metric_ptr,
            scale_ptr,
            SEQUENCE_RATIO=RATIO_LEVEL != "token",
            MEAN_OVER_TOKENS=MEAN_OVER_TOKENS,
            PER_SEQUENCE_WEIGHT=PER_SEQUENCE_WEIGHT,
            AT_ONCE=SLOTS_AT_ONCE,
        )


@triton.jit
def _finish(
    partial_ptr,
    normalizer_ptr,
    loss_ptr,
    metric_ptr,
    scale_ptr,
    SEQUENCE_RATIO: tl.constexpr,
    MEAN_OVER_TOKENS: tl.constexpr,
    PER_SEQUENCE_WEIGHT: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Reduce the partial sums of all slots, AT_ONCE rows at a time."""
    slots = tl.num_programs(0)
    column = tl.arange(0, COLUMNS)
    is_extreme = (column == S_RATIO_MIN) | (column == S_RATIO_MAX)
    neutral = tl.where(is_extreme, float("-inf"), 0.0)[None, :] + tl.zeros([AT_ONCE, COLUMNS], tl.float32)
    rows = neutral
    for first in range(0, slots, AT_ONCE):
        row = first + tl.arange(0, AT_ONCE)
        place = row.to(tl.int64)[:, None] * COLUMNS + column[None, :]
        written = (row < slots)[:, None] & (column < NUM_SUMS)[None, :]
        x = tl.load(partial_ptr + place, mask=written, other=neutral)
        rows = tl.where(is_extreme[None, :], tl.maximum(rows, x), rows + x)
    total = tl.where(is_extreme, tl.max(rows, 0), tl.sum(rows, 0))

    tokens = tl.sum(tl.where(column == S_TOKENS, total, 0.0), 0)
    some = tokens > 0.0
    tokens = tl.maximum(tokens, 1.0)
    # Without a sums launch sequences of masked tokens are counted too, but nothing is divided by their number then.
    sequences = tl.maximum(tl.sum(tl.where(column == S_SEQUENCES, total, 0.0), 0), 1.0)
    if normalizer_ptr is not None:
        scale = 1.0 / tl.load(normalizer_ptr).to(tl.float32)
    elif MEAN_OVER_TOKENS:
        scale = 1.0 / tokens
    else:
        scale = 1.0 / sequences
    tl.store(scale_ptr, scale)
    tl.store(loss_ptr, tl.sum(tl.where(column == S_LOSS, total, 0.0), 0) * scale)
    divisor = tl.zeros([COLUMNS], tl.float32) + tokens
    if SEQUENCE_RATIO:
        divisor = tl.where((column <= S_DUAL_CLIP_FRACTION) | (column == S_RATIO_MEAN), sequences, divisor)
    if PER_SEQUENCE_WEIGHT:
        divisor = tl.where(column == S_ROLLOUT_WEIGHT_MEAN, sequences, divisor)
    metric = tl.where(is_extreme, tl.where(column == S_RATIO_MIN, -total, total), total / divisor)
    is_ratio = is_extreme | (column == S_RATIO_MEAN)
    tl.store(metric_ptr + column, tl.where(is_ratio, tl.where(some, metric, 1.0), metric), mask=column < NUM_METRICS)


# Eight tokens per thread amortize the reductions of a program and fill two 16-byte loads of each float32 input. With
# other sizes ptxas spills a register or two on one target or another.
CONFIGS = Tunable("policy_loss", Config(1024, 4), Config(4096, 16))


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
    """Compute the loss and its gradient in one launch, or in two if tokens need sums; tensors are packed."""
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
    # What a sums launch reads, the main launch does not read again.
    weight_of_sequence = s.rollout_correction.startswith("sequence")
    sums_logprobs = s.sequence_level or weight_of_sequence
    has_sums = sums_logprobs or (mask is not None and not s.mean_over_tokens)
    of_tokens = s.rollout_correction.startswith("token")
    weights_are_summed = sums_logprobs and rollout_logprobs is not None and not of_tokens
    reads_rollout = rollout_logprobs is not None and not weights_are_summed
    logprobs, old_logprobs = logprobs.contiguous(), old_logprobs.contiguous()
    advantages, cu_seqlens = advantages.contiguous(), cu_seqlens.contiguous()
    mask, normalizer, ref_logprobs, rollout_logprobs = (
        None if x is None else x.contiguous() for x in (mask, normalizer, ref_logprobs, rollout_logprobs)
    )
    num_tokens = logprobs.shape[0]
    config = CONFIGS.config(num_tokens, logprobs.itemsize)
    slots = num_tokens // config.block + num_sequences

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=logprobs.device)

    output = LossAndGradient(loss=new(), metrics=new(len(METRICS)), gradient=new(num_tokens), scale=new())
    shared = {
        "mask_ptr": mask,
        "cu_ptr": cu_seqlens,
        "sum_ptr": new(len(PIECE_SUMS), slots) if has_sums else None,
        "counter_ptr": (torch.empty if has_sums else torch.zeros)((), dtype=torch.int32, device=logprobs.device),
        "B": num_sequences,
        "BLOCK": config.block,
        "num_warps": config.num_warps,
    }
    if has_sums:
        launch(
            policy_loss_sums_kernel,
            (slots,),
            logprob_ptr=logprobs if s.sequence_level else None,
            old_ptr=old_logprobs if s.sequence_level or weights_are_summed else None,
            rollout_ptr=rollout_logprobs if weights_are_summed else None,
            **shared,
        )
    launch(
        policy_loss_fwd_bwd_kernel,
        (slots,),
        logprob_ptr=logprobs if not s.sequence_level or ref_logprobs is not None else None,
        old_ptr=old_logprobs if not s.sequence_level or reads_rollout else None,
        advantage_ptr=advantages,
        normalizer_ptr=normalizer,
        ref_ptr=ref_logprobs,
        rollout_ptr=rollout_logprobs if reads_rollout else None,
        loss_ptr=output.loss,
        metric_ptr=output.metrics,
        gradient_ptr=output.gradient,
        scale_ptr=output.scale,
        partial_ptr=new(slots, COLUMNS.value),
        clip_low=s.clip_low,
        clip_high=s.clip_high,
        dual_clip=s.dual_clip,
        kl_coef=s.kl_coef,
        rollout_floor=s.rollout_floor,
        rollout_cap=s.rollout_cap,
        PER_TOKEN=per_token,
        RATIO_LEVEL=s.ratio_level,
        MEAN_IN_SEQUENCE=s.mean_in_sequence,
        MEAN_OVER_TOKENS=s.mean_over_tokens,
        KL=s.kl_estimator,
        OBJECTIVE=s.objective,
        CORRECTION=s.rollout_correction,
        WEIGHTS_ARE_SUMMED=weights_are_summed,
        MAX_LOG=MAX_LOG,
        SLOTS_AT_ONCE=max(16, config.block // 8),
        **shared,
    )
    return output
