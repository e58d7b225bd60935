"""Backward row pass, and the one that caches probabilities of rows of which the statistics are known."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...._triton_utils import launch
from ....tuning import Config, Tunable
from ..results import CachedRows
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


# One program per row and part of its columns, which share only three numbers per row.
@triton.jit(do_not_specialize=["stride_stat", "T"])
def selective_logprobs_bwd_kernel(
    grad_logprob_ptr,
    grad_entropy_ptr,
    x_ptr,
    label_ptr,
    tau_ptr,
    entropy_ptr,
    stat_ptr,
    dx_ptr,
    stride_b,
    stride_t,
    stride_v,
    stride_dx,
    stride_tau,
    stride_stat,
    T,
    V,
    softcap,
    ignore_index,
    HAS_SOFTCAP: tl.constexpr,
    FAR: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) // PARTS
    first, whole, last = columns_of_part(V, PARTS, PART, BLOCK)
    columns = tl.arange(0, BLOCK)
    dx_ptr += row * stride_dx
    label = tl.load(label_ptr + row)
    g_logprob = tl.load(grad_logprob_ptr + row).to(tl.float32)
    g_entropy = tl.load(grad_entropy_ptr + row).to(tl.float32)
    if (label == ignore_index) | ((g_logprob == 0.0) & (g_entropy == 0.0)):
        for start in range(first, whole, BLOCK):
            tl.store(dx_ptr + start + columns, tl.zeros([BLOCK], tl.float32))
        if whole < last:
            tl.store(dx_ptr + whole + columns, tl.zeros([BLOCK], tl.float32), mask=whole + columns < last)
        return
    tau = tl.load(tau_ptr + row * stride_tau)
    c = LOG2_E / tau
    x_ptr += (row // T) * stride_b + (row % T) * stride_t
    top = tl.load(stat_ptr + row)
    log2_total = tl.load(stat_ptr + stride_stat + row) * LOG2_E
    # d x = a onehot - p (a + b (log p + entropy)), with log p in units of ln 2
    a = g_logprob / tau
    b = g_entropy / tau
    constant = a + b * tl.load(entropy_ptr + row)
    b *= LN_2
    for start in range(first, whole, BLOCK):
        y, slope = load_capped(x_ptr + offsets(start + columns, stride_v, FAR), softcap, HAS_SOFTCAP)
        log2_p = (y - top) * c - log2_total
        if b != 0.0:  # noqa: SIM108
            g = -tl.exp2(log2_p) * (tl.maximum(log2_p, LOG2_ZERO) * b + constant)
        else:
            g = -tl.exp2(log2_p) * a
        tl.store(dx_ptr + start + columns, g * slope if HAS_SOFTCAP else g)
    if whole < last:
        mask = whole + columns < last
        x = tl.load(x_ptr + offsets(whole + columns, stride_v, FAR), mask=mask, other=0.0).to(tl.float32)
        y, slope = capped(x, softcap, HAS_SOFTCAP)
        log2_p = (y - top) * c - log2_total
        g = -tl.exp2(log2_p) * (tl.maximum(log2_p, LOG2_ZERO) * b + constant)
        tl.store(dx_ptr + whole + columns, g * slope if HAS_SOFTCAP else g, mask=mask)
    if (label >= first) & (label < last):
        y, slope = load_capped(x_ptr + label * stride_v, softcap, HAS_SOFTCAP)
        log2_p = (y - top) * c - log2_total
        p = tl.exp2(log2_p)
        # 1 - p before it is multiplied: it is exact near p = 1
        g = a * (1.0 - p) - p * (tl.maximum(log2_p, LOG2_ZERO) * b + (constant - a))
        tl.debug_barrier()  # after what other threads have stored there
        tl.store(dx_ptr + label, g * slope if HAS_SOFTCAP else g)


# The same programs. A label outside [0, V) is in another rank's columns.
@triton.jit(do_not_specialize=["stride_stat", "stride_factor"])
def linear_logprobs_cache_kernel(
    x_ptr,
    label_ptr,
    tau_ptr,
    stat_ptr,
    prob_ptr,
    factor_ptr,
    stride_t,
    stride_v,
    stride_prob,
    stride_factor,
    stride_tau,
    stride_stat,
    V,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) // PARTS
    first, whole, last = columns_of_part(V, PARTS, PART, BLOCK)
    x_ptr += row * stride_t
    prob_ptr += row * stride_prob
    c = LOG2_E / tl.load(tau_ptr + row * stride_tau)
    top = tl.load(stat_ptr + row)
    log2_total = tl.load(stat_ptr + stride_stat + row) * LOG2_E
    shift = tl.floor(log2_total * 0.5)
    cache_columns(x_ptr, prob_ptr, stride_v, first, whole, last, top, shift, c, softcap, HAS_SOFTCAP, BLOCK)
    label = tl.load(label_ptr + row)
    if first == 0:
        tl.store(factor_ptr + row, tl.exp2(shift - log2_total))
        if (label < 0) | (label >= V):
            tl.store(factor_ptr + stride_factor + row, 0.0)
    if (label >= first) & (label < last):
        y, slope = load_capped(x_ptr + label * stride_v, softcap, HAS_SOFTCAP)
        rest = 1.0 - tl.exp2((y - top) * c - log2_total)
        tl.store(factor_ptr + stride_factor + row, rest * slope if HAS_SOFTCAP else rest)
        tl.debug_barrier()  # after what other threads have stored there
        tl.store(prob_ptr + label, 0.0)


# The candidates trade bytes in flight against concurrent programs, as those of the forward pass do.
BACKWARD = Tunable("selective_logprobs.backward", Config(2048, 8), Config(1024, 4), Config(2048, 4), Config(4096, 8))


def backward(
    *,
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor,
    entropy: Tensor,
    row_stats: Tensor,
    softcap: float,
    ignore_index: int,
    grad_logits: Tensor,
) -> None:
    n, vocab = labels.shape[0], logits.shape[-1]
    if n:
        shape = launch_shape(BACKWARD, logits)
        split = split_row(vocab, shape["BLOCK"])
        launch(
            selective_logprobs_bwd_kernel,
            (n * split["PARTS"],),
            grad_logprob_ptr=grad_logprobs,
            grad_entropy_ptr=grad_entropy,
            x_ptr=logits,
            label_ptr=labels,
            tau_ptr=temperature,
            entropy_ptr=entropy,
            stat_ptr=row_stats,
            dx_ptr=grad_logits,
            **strides(logits),
            stride_dx=grad_logits.stride(-2),
            stride_tau=temperature.stride(0),
            stride_stat=row_stats.stride(0),
            T=logits.shape[1],
            V=vocab,
            softcap=softcap,
            ignore_index=ignore_index,
            HAS_SOFTCAP=softcap > 0,
            FAR=is_far(logits),
            **split,
            **shape,
        )


def cache(
    *,
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor,
    softcap: float,
    row_stats: Tensor,
    cached: CachedRows,
) -> None:
    n, vocab = labels.shape[0], logits.shape[-1]
    if n:
        shape = launch_shape(BACKWARD, logits)
        split = split_row(vocab, shape["BLOCK"])
        launch(
            linear_logprobs_cache_kernel,
            (n * split["PARTS"],),
            x_ptr=logits,
            label_ptr=labels,
            tau_ptr=temperature,
            stat_ptr=row_stats,
            prob_ptr=cached.probs,
            factor_ptr=cached.factors,
            stride_t=logits.stride(1),
            stride_v=logits.stride(2),
            stride_prob=cached.probs.stride(0),
            stride_factor=cached.factors.stride(0),
            stride_tau=temperature.stride(0),
            stride_stat=row_stats.stride(0),
            V=vocab,
            softcap=softcap,
            HAS_SOFTCAP=softcap > 0,
            **split,
            **shape,
        )
