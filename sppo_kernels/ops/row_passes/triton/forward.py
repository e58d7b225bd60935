"""Forward row pass.

A row of logits is read once:

    group of x --> y = cap(x) --> m' = max(m, max y)                a group is some elements of one thread
                                  z  = (y - m') log2(e) / tau       subtracted first: exact where y is large
                                  e  = 2^z
                                  s  = s 2^(m - m') + sum e
                                  t  = 2^(m - m') (t + (m - m') s_old) + sum e z

    logprob = (z[label] - log2 s) ln 2      entropy = (log2 s - t / s) ln 2      t = sum e z: no cancellation at 1e4

Each group has a maximum and sums of its own, so nothing crosses threads in the loop. They are merged after it. A long
row is split over several programs, and the last of them to finish merges their sums in a fixed order. How a row is
split depends on V alone, so the bits of a row do not depend on the other rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...._triton_utils import cdiv, is_last_program, launch
from ....tuning import Config, Tunable
from ..results import CachedRows, RowResults
from .shared import (
    LN_2,
    LOG2_E,
    LOG2_ZERO,
    cache_columns,
    capped,
    columns_of_part,
    is_far,
    launch_shape,
    load_capped,
    offsets,
    split_row,
    strides,
)


@triton.jit
def grouped(BLOCK: tl.constexpr, WIDTH: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the columns of a block as [BLOCK / WIDTH, WIDTH], with the WIDTH columns of a group in one thread.

    They are adjacent where rows are aligned, to be loaded at once. Otherwise the threads' columns are adjacent.
    """
    group = tl.arange(0, BLOCK // WIDTH)[:, None]
    place = tl.arange(0, WIDTH)[None, :]
    return group * WIDTH + place if ALIGNED else place * (BLOCK // WIDTH) + group


@triton.jit
def _rescaled(m, s, t, m_new, c):
    """Return sums s and t for a new maximum, and the maximum, or 0 where nothing is finite so far."""
    base = tl.where(m_new == float("-inf"), 0.0, m_new)
    shift = tl.maximum((m - base) * c, LOG2_ZERO)
    scale = tl.exp2(shift)
    return scale * s, scale * (t + shift * s), base


@triton.jit
def add_groups(y, c, m, s, t):
    """Add y [G, WIDTH] to m, s and t [G]. Also return e, and what was subtracted from y."""
    m_new = tl.maximum(m, tl.max(y, 1))
    s, t, base = _rescaled(m, s, t, m_new, c)
    z = (y - base[:, None]) * c
    e = tl.exp2(z)
    t += tl.sum(e * tl.maximum(z, LOG2_ZERO), 1)
    s += tl.sum(e, 1)
    return m_new, s, t, e, base


@triton.jit
def merged(m, s, t, c):
    """Merge the m, s and t of all groups into three numbers.

    The choices keep the products of ``_rescaled`` apart from the additions. Fused with the first addition of each pair
    of threads, they would be rounded differently in the two, and the threads would not agree on the sum.
    """
    top = tl.max(m, 0)
    s, t, _ = _rescaled(m, s, t, top, c)
    is_empty = m == float("-inf")
    return top, tl.sum(tl.where(is_empty, 0.0, s), 0), tl.sum(tl.where(is_empty, 0.0, t), 0)


@triton.jit
def _store_maxima(word_ptr, y, GROUPS: tl.constexpr):
    """Store the maximum of each group of a block, rounded up to bfloat16: that of group i beside i + GROUPS / 2.

    One thread has both, so that a word is stored without an exchange.
    """
    bits = tl.max(y, 1).to(tl.int32, bitcast=True)
    bits = tl.where(bits > 0, bits + 0xFFFF, bits)  # towards +inf
    low, high = tl.split(tl.trans(tl.reshape(bits, [2, GROUPS // 2])))
    word = ((low >> 16) & 0xFFFF) | (high & -65536)
    tl.store(word_ptr + tl.arange(0, GROUPS // 2), word)


# One program per row and part of its columns. Row counts change between calls, and so does the alignment of results of
# rows that follow cached ones; specializing on them would compile the kernel again.
@triton.jit(
    do_not_specialize=["stride_stat", "stride_factor", "T", "N"],
    do_not_specialize_on_alignment=["label_ptr", "tau_ptr", "logprob_ptr", "entropy_ptr", "stat_ptr"],
)
def selective_logprobs_fwd_kernel(
    x_ptr,
    label_ptr,
    tau_ptr,
    logprob_ptr,
    entropy_ptr,
    stat_ptr,
    partial_ptr,
    counter_ptr,
    prob_ptr,
    factor_ptr,
    maxima_ptr,
    stride_b,
    stride_t,
    stride_v,
    stride_tau,
    stride_stat,
    stride_prob,
    stride_factor,
    stride_maxima,
    T,
    N,
    V,
    softcap,
    ignore_index,
    max_gap,
    HAS_SOFTCAP: tl.constexpr,
    FAR: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) // PARTS
    part = tl.program_id(0) % PARTS
    label = tl.load(label_ptr + row)
    if label == ignore_index:
        if part == 0:
            tl.store(logprob_ptr + row, 0.0)
            tl.store(entropy_ptr + row, 0.0)
            tl.store(stat_ptr + row, 0.0)
            tl.store(stat_ptr + stride_stat + row, 0.0)
        return
    c = LOG2_E / tl.load(tau_ptr + row * stride_tau)
    x_ptr += (row // T) * stride_b + (row % T) * stride_t
    in_range = (label >= 0) & (label < V)
    origin_ptr = x_ptr + tl.where(in_range, label, 0) * stride_v
    origin = 0.0
    if prob_ptr is not None or maxima_ptr is not None:
        # The label's logit is what others are compared with, since it is known before the row is read.
        origin, _ = load_capped(origin_ptr, softcap, HAS_SOFTCAP)
    if prob_ptr is not None:
        prob_ptr += row * stride_prob
    if maxima_ptr is not None:
        maxima_ptr += row * stride_maxima
    columns = grouped(BLOCK, WIDTH, ALIGNED)
    first, whole, last = columns_of_part(V, PARTS, PART, BLOCK)
    m = tl.full([BLOCK // WIDTH], float("-inf"), tl.float32)
    s = tl.zeros([BLOCK // WIDTH], tl.float32)
    t = tl.zeros([BLOCK // WIDTH], tl.float32)
    for start in range(first, whole, BLOCK):
        y, slope = load_capped(x_ptr + offsets(start + columns, stride_v, FAR), softcap, HAS_SOFTCAP)
        if maxima_ptr is not None:
            _store_maxima(maxima_ptr + start // WIDTH // 2, y - origin, BLOCK // WIDTH)
        m, s, t, e, base = add_groups(y, c, m, s, t)
        if prob_ptr is not None:
            p = e * tl.exp2((base - origin) * c)[:, None]
            tl.store(prob_ptr + start + columns, p * slope if HAS_SOFTCAP else p)
    if whole < last:
        mask = whole + columns < last
        x = tl.load(x_ptr + offsets(whole + columns, stride_v, FAR), mask=mask, other=0.0).to(tl.float32)
        y, slope = capped(x, softcap, HAS_SOFTCAP)
        y = tl.where(mask, y, float("-inf"))  # after the cap, which is finite
        if maxima_ptr is not None:
            _store_maxima(maxima_ptr + whole // WIDTH // 2, y - origin, BLOCK // WIDTH)
        m, s, t, e, base = add_groups(y, c, m, s, t)
        if prob_ptr is not None:
            p = e * tl.exp2((base - origin) * c)[:, None]
            tl.store(prob_ptr + whole + columns, p * slope if HAS_SOFTCAP else p, mask=mask)
    top, s_total, t_total = merged(m, s, t, c)
    if PARTS > 1:
        partial_ptr += row * PARTS
        tl.store(partial_ptr + part, top)
        tl.store(partial_ptr + N.to(tl.int64) * PARTS + part, s_total)
        tl.store(partial_ptr + 2 * N.to(tl.int64) * PARTS + part, t_total)
        if not is_last_program(counter_ptr + row, PARTS):
            return
        i = tl.arange(0, triton.next_power_of_2(PARTS))
        m_parts = tl.load(partial_ptr + i, mask=i < PARTS, other=float("-inf"))
        s_parts = tl.load(partial_ptr + N.to(tl.int64) * PARTS + i, mask=i < PARTS, other=0.0)
        t_parts = tl.load(partial_ptr + 2 * N.to(tl.int64) * PARTS + i, mask=i < PARTS, other=0.0)
        top, s_total, t_total = merged(m_parts, s_parts, t_parts, c)
    log2_total = tl.log2(s_total)
    label_y, label_slope = load_capped(origin_ptr, softcap, HAS_SOFTCAP)
    label_y = tl.where(in_range, label_y, float("nan"))
    log2_p = (label_y - top) * c - log2_total
    tl.store(logprob_ptr + row, log2_p * LN_2)
    tl.store(entropy_ptr + row, (log2_total - t_total / s_total) * LN_2)
    tl.store(stat_ptr + row, top)
    tl.store(stat_ptr + stride_stat + row, log2_total * LN_2)
    if prob_ptr is not None:
        p = tl.exp2(log2_p)
        is_near = (top - label_y) * c <= max_gap  # False for NaN
        shift = tl.floor(log2_total * 0.5)
        tl.store(factor_ptr + row, tl.where(is_near, p, tl.exp2(shift - log2_total)))
        tl.store(factor_ptr + stride_factor + row, (1.0 - p) * label_slope if HAS_SOFTCAP else 1.0 - p)
        if not is_near:
            tl.debug_barrier()  # after what other threads have stored with the label's logit as base
            cache_columns(
                x_ptr, prob_ptr, stride_v, 0, V // BLOCK * BLOCK, V, top, shift, c, softcap, HAS_SOFTCAP, BLOCK
            )
        tl.debug_barrier()  # the label's column comes after what other threads have stored there
        tl.store(prob_ptr + tl.where(in_range, label, 0), 0.0)


# Eight elements per thread: 16 bytes of a half-precision row in one load, and registers left for the sums. The other
# candidates trade bytes in flight (a larger block) against concurrent programs (a smaller one).
FORWARD = Tunable("selective_logprobs.forward", Config(2048, 8), Config(1024, 4), Config(4096, 16))

_BYTES_PER_LOAD = 16
_ELEMENTS_PER_GROUP = 8
_ALIGNMENT = 16  # elements; Triton specializes strides on multiples of 16

# The label's logit is the base of the cached probabilities if the largest logit is at most this far above it, in units
# of ln 2: e^30 times its probability neither overflows nor makes the other factor underflow. float16 has no such range.
_MAX_GAP = 30 * 1.4426950408889634
_NO_GAP = -1.0


def _groups(logits: Tensor) -> dict[str, int]:
    """Return the size and the arrangement of groups that keeps each in one thread."""
    batch, row, column = strides(logits).values()
    aligned = column == 1 and not (batch % _ALIGNMENT or row % _ALIGNMENT or logits.data_ptr() % _BYTES_PER_LOAD)
    width = _BYTES_PER_LOAD // logits.itemsize if aligned else _ELEMENTS_PER_GROUP
    return {"ALIGNED": aligned, "WIDTH": width}


class GroupMaxima(NamedTuple):
    """The largest logit of each group of adjacent columns, minus the label's (or the first) logit, rounded up."""

    words: Tensor  # [N, groups / 2] int32, two bfloat16 each
    group: int  # columns per group
    half: int  # groups i and i + half share a word, in each block of 2 half groups

    @classmethod
    def allocate(cls, logits: Tensor) -> GroupMaxima:
        """Allocate those of aligned logits ``[1, N, V]``."""
        shape = launch_shape(FORWARD, logits)
        groups = _groups(logits)
        assert groups["ALIGNED"], "groups of unaligned rows are not adjacent columns"
        half = shape["BLOCK"] // groups["WIDTH"] // 2
        blocks = cdiv(logits.shape[-1], shape["BLOCK"])
        words = torch.empty(logits.shape[1], blocks * half, dtype=torch.int32, device=logits.device)
        return cls(words, groups["WIDTH"], half)


def forward(
    *,
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor,
    softcap: float,
    ignore_index: int,
    out: RowResults,
    cached: CachedRows | None = None,
    group_maxima: GroupMaxima | None = None,
) -> None:
    n, vocab = labels.shape[0], logits.shape[-1]
    if not n:
        return
    shape = launch_shape(FORWARD, logits)
    split = split_row(vocab, shape["BLOCK"])
    parts = split["PARTS"]
    launch(
        selective_logprobs_fwd_kernel,
        (n * parts,),
        x_ptr=logits,
        label_ptr=labels,
        tau_ptr=temperature,
        logprob_ptr=out.logprobs,
        entropy_ptr=out.entropy,
        stat_ptr=out.row_stats,
        partial_ptr=logits.new_empty(3, n, parts, dtype=torch.float32) if parts > 1 else None,
        counter_ptr=logits.new_zeros(n, dtype=torch.int32) if parts > 1 else None,
        prob_ptr=None if cached is None else cached.probs,
        factor_ptr=None if cached is None else cached.factors,
        maxima_ptr=None if group_maxima is None else group_maxima.words,
        **strides(logits),
        stride_tau=temperature.stride(0),
        stride_stat=out.row_stats.stride(0),
        stride_prob=0 if cached is None else cached.probs.stride(0),
        stride_factor=0 if cached is None else cached.factors.stride(0),
        stride_maxima=0 if group_maxima is None else group_maxima.words.stride(0),
        T=logits.shape[1],
        N=n,
        V=vocab,
        softcap=softcap,
        ignore_index=ignore_index,
        max_gap=_NO_GAP if cached is not None and cached.probs.dtype == torch.float16 else _MAX_GAP,
        HAS_SOFTCAP=softcap > 0,
        FAR=is_far(logits),
        **_groups(logits),
        **split,
        **shape,
    )
