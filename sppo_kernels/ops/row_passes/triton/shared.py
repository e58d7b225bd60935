"""Columns, configurations and device functions that the Triton row passes share."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...._triton_utils import cdiv, next_power_of_2, tanh, tanh_derivative
from ....tuning import Config, Tunable

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
# 2^z is 0 in float32 below -150; a finite stand-in keeps 0 * -inf out of p log p.
LOG2_ZERO: tl.constexpr = tl.constexpr(-300.0)


@triton.jit
def capped(x, softcap, HAS_SOFTCAP: tl.constexpr):
    """Compute cap(x), and its derivative (unused without a cap).

    The choice keeps the product apart from the subtraction of a maximum of such products. Fused, the difference of a
    number from itself would not be 0.
    """
    slope = x
    if HAS_SOFTCAP:
        ratio = x / softcap
        slope = tanh_derivative(ratio)
        x = tl.where(ratio == ratio, softcap * tanh(ratio), ratio)
    return x, slope


@triton.jit
def offsets(columns, stride_v, FAR: tl.constexpr):
    """Return the distance of columns from the start of a row; FAR: it does not fit in 32 bits."""
    return columns.to(tl.int64) * stride_v if FAR else columns * stride_v


@triton.jit
def load_capped(x_ptr, softcap, HAS_SOFTCAP: tl.constexpr):
    """Load float32 logits at ``x_ptr`` without a mask, and cap them."""
    return capped(tl.load(x_ptr).to(tl.float32), softcap, HAS_SOFTCAP)


@triton.jit
def columns_of_part(V, PARTS: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr):
    """Return where this program's columns begin, where its last whole block ends, and where they end.

    A mask at V, which need not be a multiple of anything, narrows loads and stores to one element each. Only the block
    after the whole ones has one.
    """
    first = (tl.program_id(0) % PARTS) * PART
    last = tl.minimum(first + PART, V)
    return first, first + (last - first) // BLOCK * BLOCK, last


@triton.jit
def cache_columns(
    x_ptr,
    prob_ptr,
    stride_v,
    first,
    whole,
    last,
    top,
    shift,
    c,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store 2^((y - top) c - shift) cap'(x) of the columns from ``first`` to ``last``."""
    columns = tl.arange(0, BLOCK)
    for start in range(first, whole, BLOCK):
        y, slope = load_capped(x_ptr + (start + columns) * stride_v, softcap, HAS_SOFTCAP)
        p = tl.exp2((y - top) * c - shift)
        tl.store(prob_ptr + start + columns, p * slope if HAS_SOFTCAP else p)
    if whole < last:
        mask = whole + columns < last
        x = tl.load(x_ptr + (whole + columns) * stride_v, mask=mask, other=0.0).to(tl.float32)
        y, slope = capped(x, softcap, HAS_SOFTCAP)
        p = tl.exp2((y - top) * c - shift)
        tl.store(prob_ptr + whole + columns, p * slope if HAS_SOFTCAP else p, mask=mask)


_COLUMNS_PER_PROGRAM = 1 << 15
LEAST_BLOCK = 16  # columns: two groups of the widest


def launch_shape(tunable: Tunable[Config], rows: Tensor) -> dict[str, int]:
    """Return block and warps for rows ``[..., V]``."""
    return fitted(tunable.config(rows.shape[-1], rows.itemsize), rows.shape[-1])


def fitted(config: Config, length: int) -> dict[str, int]:
    """Return block and warps of ``config``, reduced for shorter rows with the same elements per thread."""
    block = min(config.block, max(LEAST_BLOCK, next_power_of_2(length)))
    return {"BLOCK": block, "num_warps": max(1, config.num_warps * block // config.block)}


def split_row(vocab: int, block: int) -> dict[str, int]:
    """Return over how many programs a row is split, and how many columns each has."""
    blocks = cdiv(vocab, block)
    blocks_per_part = cdiv(blocks, cdiv(vocab, _COLUMNS_PER_PROGRAM))
    return {"PARTS": cdiv(blocks, blocks_per_part), "PART": blocks_per_part * block}


def is_far(logits: Tensor) -> bool:
    """Return whether columns are so far apart, as in transposed logits, that 32 bits do not count the elements."""
    return logits.shape[-1] * logits.stride(-1) >= 1 << 31


def strides(logits: Tensor) -> dict[str, int]:
    """Return the strides of ``[B, T, V]`` by kernel argument; that of a single batch is 0 and never changes."""
    batch, row, column = logits.stride()
    return {"stride_b": batch if logits.shape[0] > 1 else 0, "stride_t": row, "stride_v": column}
