"""Triton kernels of the fused projection: matrix products that finish each tile of logits in registers.

A program takes tiles of BLOCK_N tokens by BLOCK_V columns, one after the other. Tiles follow each other such that those
in flight share rows of both factors in the L2 cache. With tensor descriptors, tiles are loaded and stored by the TMA
unit of NVIDIA GPUs from Hopper on. Elsewhere, and where rows do not begin at multiples of 16 bytes, by pointers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...._triton_utils import cdiv, launch, next_power_of_2
from ...row_passes.triton.shared import LOG2_E, LOG2_ZERO, capped
from . import tiling
from .factors import Factors, ProjectionPass, Statistics
from .tiling import ALIGNMENT, is_aligned

# Tiles of tokens that are multiplied with one tile of the weight while it is in the cache.
_GROUP = 8
_MOST_STRIDE = 1 << 23  # elements; places in a tile, of at most 256 rows, have 32 bits
_WORD = 32  # bits
_MULTIPLIES_HALF_WRONGLY = bool(triton.knobs.runtime.interpret)  # as numpy does with the bits of bfloat16


@triton.jit
def _place_of(number, n_tiles, v_tiles, GROUP: tl.constexpr):
    """Return the tile of tokens and the tile of columns: groups of token tiles along the whole vocabulary."""
    group = number // (GROUP * v_tiles)
    size = tl.minimum(n_tiles - group * GROUP, GROUP)
    place = number % (GROUP * v_tiles)
    return group * GROUP + place % size, place // size


@triton.jit
def _add_product(
    acc,
    a,
    b,
    row,
    column,
    N,
    V,
    K,
    stride_a,
    stride_a_column,
    stride_b,
    stride_b_column,
    PRECISION: tl.constexpr,
    TO_FLOAT32: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Add rows of ``a`` times rows of ``b`` to ``acc``. Rows past the end, which nobody reads, are those at 0."""
    if DESCRIPTORS:
        for start in range(0, K, BLOCK_K):
            x = a.load([row, start])
            y = b.load([column, start])
            if TO_FLOAT32:
                x = x.to(tl.float32)
                y = y.to(tl.float32)
            acc = tl.dot(x, y.T, acc, input_precision=PRECISION)
    else:
        # One pointer of 64 bits for the tile, and places in it of 32: a pointer per element does not fit in registers.
        rows = tl.arange(0, BLOCK_N)
        columns = tl.arange(0, BLOCK_V)
        k = tl.arange(0, BLOCK_K)
        a += row.to(tl.int64) * stride_a
        b += column.to(tl.int64) * stride_b
        a_at = tl.where(rows < N - row, rows, 0)[:, None] * stride_a + k[None, :] * stride_a_column
        b_at = tl.where(columns < V - column, columns, 0)[None, :] * stride_b + k[:, None] * stride_b_column
        for start in range(0, K, BLOCK_K):
            inside = k < K - start
            x = tl.load(a + a_at, mask=inside[None, :], other=0.0)
            y = tl.load(b + b_at, mask=inside[:, None], other=0.0)
            if TO_FLOAT32:
                x = x.to(tl.float32)
                y = y.to(tl.float32)
            acc = tl.dot(x, y, acc, input_precision=PRECISION)
            a += BLOCK_K * stride_a_column
            b += BLOCK_K * stride_b_column
    return acc


@triton.jit
def _store_bits(bit_ptr, is_above, rows, column, live, stride_bit, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """Store one bit per column, 32 in a word."""
    bit = 1 << (tl.arange(0, BLOCK_V) % 32)
    words = tl.sum(tl.reshape(tl.where(is_above, bit[None, :], 0), [BLOCK_N, BLOCK_V // 32, 32]), 2)
    word = column // 32 + tl.arange(0, BLOCK_V // 32)
    at = bit_ptr + rows.to(tl.int64)[:, None] * stride_bit + word[None, :]
    tl.store(at, words, mask=live[:, None] & (word < stride_bit)[None, :])


# Numbers of tokens change from call to call, and slices of what belongs to tokens begin anywhere.
@triton.jit(
    do_not_specialize=["N", "stride_bit"],
    do_not_specialize_on_alignment=[
        "label_ptr", "tau_ptr", "base_ptr", "part_ptr", "factor_ptr", "entropy_factor_ptr",
        "at_label_ptr", "bit_ptr",
    ],
)  # fmt: skip
def linear_logprobs_projection_kernel(
    hidden,
    weight,
    adapter_hidden,
    adapter_weight,
    bias_ptr,
    label_ptr,
    tau_ptr,
    base_ptr,
    part_ptr,
    out,
    bit_ptr,
    factor_ptr,
    entropy_factor_ptr,
    at_label_ptr,
    stride_hidden,
    stride_hidden_column,
    stride_weight,
    stride_weight_column,
    stride_adapter_hidden,
    stride_adapter_hidden_column,
    stride_adapter_weight,
    stride_adapter_weight_column,
    stride_out,
    stride_bit,
    N,
    V,
    H,
    R,
    softcap,
    log2_floor,
    scale,
    MODE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    EVEN_V: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    TO_FLOAT32: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    ADAPTER_DESCRIPTORS: tl.constexpr,
    OUT_DESCRIPTOR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):
    n_tiles = tl.cdiv(N, BLOCK_N)
    v_tiles = tl.cdiv(V, BLOCK_V)
    for number in tl.range(tl.program_id(0), n_tiles * v_tiles, tl.num_programs(0)):
        n_tile, v_tile = _place_of(number, n_tiles, v_tiles, GROUP)
        row = n_tile * BLOCK_N
        column = v_tile * BLOCK_V
        rows = row + tl.arange(0, BLOCK_N)
        columns = column + tl.arange(0, BLOCK_V)
        live = rows < N
        # What belongs to tokens is loaded before the product, during which it arrives.
        if MODE != "maximum":
            rate = LOG2_E / tl.load(tau_ptr + rows, mask=live, other=1.0)
            base = tl.load(base_ptr + rows, mask=live, other=0.0)
            label = tl.load(label_ptr + rows, mask=live, other=-1)
            # Places in the tile, of 32 bits; comparing each element with numbers of 64 takes twice as long.
            place = tl.where((label >= column) & (label < column + BLOCK_V), label - column, -1).to(tl.int32)
            has_label = tl.max(place, 0) >= 0
        x = _add_product(
            tl.zeros([BLOCK_N, BLOCK_V], tl.float32),
            hidden,
            weight,
            row,
            column,
            N,
            V,
            H,
            stride_hidden,
            stride_hidden_column,
            stride_weight,
            stride_weight_column,
            PRECISION,
            TO_FLOAT32,
            DESCRIPTORS,
            BLOCK_N,
            BLOCK_V,
            BLOCK_K,
        )
        if adapter_hidden is not None:
            x = _add_product(
                x,
                adapter_hidden,
                adapter_weight,
                row,
                column,
                N,
                V,
                R,
                stride_adapter_hidden,
                stride_adapter_hidden_column,
                stride_adapter_weight,
                stride_adapter_weight_column,
                PRECISION,
                TO_FLOAT32,
                ADAPTER_DESCRIPTORS,
                BLOCK_N,
                BLOCK_V,
                BLOCK_R,
            )
        if bias_ptr is not None:
            x += tl.load(bias_ptr + columns, mask=columns < V, other=0.0).to(tl.float32)[None, :]
        y, slope = capped(x, softcap, HAS_SOFTCAP)
        if not EVEN_V:
            y = tl.where((columns < V)[None, :], y, float("-inf"))
        if MODE == "maximum":
            tl.store(part_ptr + v_tile.to(tl.int64) * N + rows, tl.max(y, 1), mask=live)
        else:
            if MODE != "gradient" and has_label:
                is_label = tl.arange(0, BLOCK_V)[None, :] == place[:, None]
                y = tl.where(is_label, float("-inf"), y)  # the label's share is added afterwards
            d = (y - base[:, None]) * rate[:, None]
            if bit_ptr is not None:
                _store_bits(bit_ptr, d > log2_floor, rows, column, live, stride_bit, BLOCK_N, BLOCK_V)
                tl.debug_barrier()  # keeps the compiler from holding masks and exponentials at once, which would spill
            e = tl.exp2(d)
            if MODE == "statistics":
                part = part_ptr + v_tile.to(tl.int64) * N + rows
                part_step = v_tiles.to(tl.int64) * N
                tl.store(part, tl.sum(e, 1), mask=live)
                tl.store(part + part_step, tl.sum(e * tl.maximum(d, LOG2_ZERO), 1), mask=live)
                if bit_ptr is not None:
                    limited = tl.minimum(e, tl.exp2(log2_floor))
                    tl.store(part + 2 * part_step, tl.sum(limited, 1), mask=live)
            else:
                factor = tl.load(factor_ptr + rows, mask=live, other=0.0)
                if entropy_factor_ptr is None:
                    e *= -factor[:, None]
                else:
                    entropy_factor = tl.load(entropy_factor_ptr + rows, mask=live, other=0.0)
                    e *= -(factor[:, None] + entropy_factor[:, None] * tl.maximum(d, LOG2_ZERO))
            if out is not None:
                if HAS_SOFTCAP:
                    e *= slope
                if SCALED:
                    e *= scale
                if MODE == "gradient" and has_label:
                    at_label = tl.load(at_label_ptr + rows, mask=live, other=0.0)
                    e = tl.where(tl.arange(0, BLOCK_V)[None, :] == place[:, None], at_label[:, None], e)
                if OUT_DESCRIPTOR:
                    out.store([row, column], e.to(out.dtype))
                else:
                    at = out + rows.to(tl.int64)[:, None] * stride_out + columns[None, :]
                    tl.store(at, e.to(out.dtype.element_ty), mask=live[:, None] & (columns < V)[None, :])


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["out_ptr"])
def linear_logprobs_add_tiles_kernel(
    part_ptr, out_ptr, N, tiles, IS_MAXIMUM: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr
):
    """Combine the parts [fields, tiles, N] of each token in the order of the vocabulary, TILES at a time."""
    field = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = rows < N
    part_ptr += field * tiles * N
    empty = float("-inf") if IS_MAXIMUM else 0.0
    total = tl.full([BLOCK], empty, tl.float32)
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)
        at = part_ptr + tile.to(tl.int64)[:, None] * N + rows[None, :]
        part = tl.load(at, mask=(tile < tiles)[:, None] & live[None, :], other=empty)
        total = tl.maximum(total, tl.max(part, 0)) if IS_MAXIMUM else total + tl.sum(part, 0)
    tl.store(out_ptr + field * N + rows, total, mask=live)


_ADDED_ROWS, _ADDED_TILES = 32, 32  # per program, and per step


def _accessible(factors: Factors) -> Factors:
    """Copy hidden states that could be aligned and are not, since the tile, and with it last bits, depend on that.

    Factors with strides that are too large for the kernel are copied too. Such a weight has few rows, or few columns.
    """

    def rows(x: Tensor, *, copy: bool = False) -> Tensor:
        return x.clone(memory_format=torch.contiguous_format) if copy or max(x.stride()) > _MOST_STRIDE else x

    return factors._replace(
        hiddens=[rows(x, copy=not is_aligned(x) and x.shape[1] * x.itemsize % ALIGNMENT == 0) for x in factors.hiddens],
        weights=[rows(x) for x in factors.weights],
    )


def statistics(
    factors: Factors,
    *,
    labels: Tensor,
    temperature: Tensor,
    base: Tensor,
    probs: Tensor | None = None,
    scale: float = 1.0,
    log_floor: float | None = None,
) -> Statistics:
    factors = _accessible(factors)
    n, vocab = len(labels), len(factors.weights[0])
    bits = None if log_floor is None else labels.new_empty(n, cdiv(vocab, _WORD), dtype=torch.int32)
    parts = _parts(2 if log_floor is None else 3, factors, n)
    _launch(
        "statistics",
        factors,
        label_ptr=labels,
        tau_ptr=temperature,
        base_ptr=base,
        part_ptr=parts,
        out=probs,
        scale=scale,
        bit_ptr=bits,
        log2_floor=(log_floor or 0.0) / math.log(2),
    )
    sums = _add_tiles(parts)
    sums[1] *= math.log(2)
    return Statistics(sums, bits)


def maximum(factors: Factors) -> Tensor:
    factors = _accessible(factors)
    parts = _parts(1, factors, len(factors.hiddens[0]))
    _launch("maximum", factors, part_ptr=parts)
    return _add_tiles(parts, is_maximum=True)[0]


def gradient(
    factors: Factors,
    *,
    labels: Tensor,
    temperature: Tensor,
    base: Tensor,
    factor: Tensor,
    entropy_factor: Tensor | None,
    at_label: Tensor,
    out: Tensor,
) -> None:
    _launch(
        "gradient",
        _accessible(factors),
        label_ptr=labels,
        tau_ptr=temperature,
        base_ptr=base,
        factor_ptr=factor,
        entropy_factor_ptr=None if entropy_factor is None else entropy_factor * math.log(2),
        at_label_ptr=at_label,
        out=out,
    )


TRITON_PROJECTION = ProjectionPass(statistics, maximum, gradient)


def _parts(fields: int, factors: Factors, n: int) -> Tensor:
    weight = factors.weights[0]
    tiles = cdiv(len(weight), tiling.tile_of(factors).block_v)
    return torch.empty(fields, tiles, n, dtype=torch.float32, device=weight.device)


def _add_tiles(parts: Tensor, *, is_maximum: bool = False) -> Tensor:
    """Combine parts [fields, tiles, N] over the tiles."""
    fields, tiles, n = parts.shape
    out = parts.new_empty(fields, n)
    launch(
        linear_logprobs_add_tiles_kernel,
        (cdiv(n, _ADDED_ROWS), fields),
        part_ptr=parts,
        out_ptr=out,
        N=n,
        tiles=tiles,
        IS_MAXIMUM=is_maximum,
        BLOCK=_ADDED_ROWS,
        TILES=_ADDED_TILES,
        num_warps=4,
    )
    return out


def _launch(mode: str, factors: Factors, *, part_ptr=None, out=None, scale=1.0, bit_ptr=None, **tokens: Any) -> None:
    hiddens, weights = factors.hiddens, factors.weights
    n, vocab = len(hiddens[0]), len(weights[0])
    tile = tiling.tile_of(factors)
    is_float32 = weights[0].dtype == torch.float32
    depths = [max(16, min(tile.block_k, next_power_of_2(x.shape[1]))) for x in hiddens]
    use_descriptors = tiling.capability() >= tiling.HOPPER and not is_float32
    described = [use_descriptors and is_aligned(a) and is_aligned(b) for a, b in zip(hiddens, weights, strict=True)]
    if bit_ptr is not None:
        tile = tile._replace(block_n=min(tile.block_n, tiling.MOST_ROWS_WITH_BITS))
    operands: dict[str, Any] = {"adapter_hidden": None, "adapter_weight": None}
    for prefix, hidden, weight, depth, by_descriptor in zip(
        ("", "adapter_"), hiddens, weights, depths, described, strict=False
    ):
        for name, x, rows in (("hidden", hidden, tile.block_n), ("weight", weight, tile.block_v)):
            operands[prefix + name] = TensorDescriptor.from_tensor(x, [rows, depth]) if by_descriptor else x
            operands[f"stride_{prefix}{name}"], operands[f"stride_{prefix}{name}_column"] = x.stride()
    if len(hiddens) == 1:
        strides = ("adapter_hidden", "adapter_hidden_column", "adapter_weight", "adapter_weight_column")
        operands |= {f"stride_{name}": 1 for name in strides}
    out_by_descriptor = out is not None and use_descriptors and is_aligned(out)
    absent = dict.fromkeys(
        ("label_ptr", "tau_ptr", "base_ptr", "factor_ptr", "entropy_factor_ptr", "at_label_ptr"), None
    )
    launch(
        linear_logprobs_projection_kernel,
        (_num_programs(weights[0].device, cdiv(n, tile.block_n) * cdiv(vocab, tile.block_v)),),
        **operands,
        **{"log2_floor": 0.0, **absent, **tokens},
        bias_ptr=factors.bias,
        part_ptr=part_ptr,
        out=TensorDescriptor.from_tensor(out, [tile.block_n, tile.block_v]) if out_by_descriptor else out,
        bit_ptr=bit_ptr,
        stride_out=1 if out is None else out.stride(0),
        stride_bit=1 if bit_ptr is None else bit_ptr.stride(0),
        N=n,
        V=vocab,
        H=hiddens[0].shape[1],
        R=hiddens[-1].shape[1],
        softcap=factors.softcap,
        scale=scale,
        MODE=mode,
        HAS_SOFTCAP=factors.softcap > 0,
        EVEN_V=vocab % tile.block_v == 0,
        SCALED=scale != 1.0,
        PRECISION="ieee",
        TO_FLOAT32=_MULTIPLIES_HALF_WRONGLY and not is_float32,
        DESCRIPTORS=described[0],
        ADAPTER_DESCRIPTORS=described[-1],
        OUT_DESCRIPTOR=out_by_descriptor,
        BLOCK_N=tile.block_n,
        BLOCK_V=tile.block_v,
        BLOCK_K=depths[0],
        BLOCK_R=depths[-1],
        GROUP=_GROUP,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _num_programs(device: torch.device, tiles: int) -> int:
    """Return one program per multiprocessor, or per tile where their number is unknown."""
    if device.type == "cpu":
        return tiles
    properties = torch.get_device_module(device).get_device_properties(device)
    return min(tiles, getattr(properties, "multi_processor_count", tiles))
