"""Products with sparse matrices of few entries per row: sparse logit gradients, and the labels' entries of dense ones.

The entries of all tokens are in one list of (token, column, weight = c value / tau):

    d hidden[t] = sum of weight W[column] over the entries of t           gathers rows of W
    d weight[v] = sum of weight hidden[token] over the entries of v       with the list sorted by column

Both are one operation, ``weighted_rows``: out[place] += weight row, over a list that is sorted by place. The list is
cut into pieces of equal length. What a piece has of a place that lies in several pieces is stored apart, and added in
the order of the pieces: no atomics, the same bits in every run, and the host need not know where places begin.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..._backend import HAS_TRITON

if HAS_TRITON:
    import triton
    import triton.language as tl

    from ..._triton_utils import cdiv, launch, next_power_of_2


class Entries(NamedTuple):
    """Entries of a sparse [tokens, V] matrix, sorted by token and then by column."""

    token: Tensor  # [M] int64
    column: Tensor  # [M] int64
    weight: Tensor  # [M] float32


def gather_entries(index: Tensor, value: Tensor, count: Tensor, coefficient: Tensor) -> Entries:
    """List the first ``count`` entries of each row of ``[tokens, K]``, multiplied by the token's coefficient."""
    filled = torch.arange(index.shape[1], device=index.device) < count[:, None]
    token, slot = filled.nonzero(as_tuple=True)
    return Entries(token, index[token, slot].long(), weight=value[token, slot] * coefficient[token])


def _torch_weighted_rows(*, out, place, index, weight, rows, out_is_zero=False):
    """Add weight[e] rows[index[e]] to out[place[e]] for all e.

    ``place`` is sorted. Places past the end are skipped. ``out_is_zero`` says that ``out`` need not be read.
    """
    places, counts = place.unique_consecutive(return_counts=True)
    if rows.dtype != torch.float32:  # a float32 copy of those that are used
        used, index = index.unique(return_inverse=True)
        rows = rows[used].float()
    bag = functional.embedding_bag(
        index,
        rows,
        functional.pad(counts.cumsum(0), (1, 0)),
        mode="sum",
        per_sample_weights=weight,
        include_last_offset=True,
    )
    inside = int(torch.searchsorted(places, len(out)))
    places, bag = places[:inside], bag[:inside].to(out.dtype)
    if out_is_zero:
        out.index_copy_(0, places, bag)
    else:
        out.index_add_(0, places, bag)


WEIGHTED_ROWS: dict[str, Callable[..., None]] = {"torch": _torch_weighted_rows}


if HAS_TRITON:
    _PIECE = 64  # entries per program: few enough for thousands of programs, enough for most places to lie in one
    _WIDEST = 1024  # columns per program
    _COLUMNS_PER_WARP = 256

    @triton.jit
    def _finish(out_ptr, total, mask, OUT_IS_ZERO: tl.constexpr):
        if not OUT_IS_ZERO:
            total += tl.load(out_ptr, mask=mask, other=0.0).to(tl.float32)
            tl.debug_barrier()  # another thread may store what this one has loaded
        tl.store(out_ptr, total, mask=mask)

    # One program per piece of the list and block of columns. It adds up one place after the other. The next entry's
    # place, index and weight are loaded one step ahead of its row.
    @triton.jit(do_not_specialize=["M", "NUM_PLACES"])
    def linear_logprobs_weighted_rows_kernel(
        out_ptr,
        place_ptr,
        index_ptr,
        weight_ptr,
        rows_ptr,
        open_ptr,
        stride_row,
        stride_column,
        M,
        NUM_PLACES,
        H,
        OUT_IS_ZERO: tl.constexpr,
        PIECE: tl.constexpr,
        BLOCK_H: tl.constexpr,
    ):
        piece = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        mask = column < H
        first = piece * PIECE
        last = tl.minimum(first + PIECE, M)
        before = tl.load(place_ptr + first - 1, mask=first > 0, other=-1)
        place = tl.load(place_ptr + first)
        index = tl.load(index_ptr + first)
        weight = tl.load(weight_ptr + first)
        # What began in an earlier piece, and what goes on in the next one, are stored in open_ptr [pieces, 2, H].
        open_ptr += piece * 2 * H + column
        goes_on = before == place
        total = tl.zeros([BLOCK_H], tl.float32)
        for entry in range(first, last):
            row = tl.load(rows_ptr + index * stride_row + column * stride_column, mask=mask, other=0.0).to(tl.float32)
            total += weight * row
            following = tl.load(place_ptr + entry + 1, mask=entry + 1 < M, other=-1)
            index = tl.load(index_ptr + entry + 1, mask=entry + 1 < last, other=0)
            weight = tl.load(weight_ptr + entry + 1, mask=entry + 1 < last, other=0.0)
            if (following != place) | (entry + 1 == last):
                if goes_on:
                    tl.store(open_ptr, total, mask=mask)
                elif following == place:
                    tl.store(open_ptr + H, total, mask=mask)
                elif place < NUM_PLACES:
                    _finish(out_ptr + place * H + column, total, mask, OUT_IS_ZERO)
                goes_on = following == place
                total = tl.zeros([BLOCK_H], tl.float32)
            place = following

    # One program per piece and block of columns, which adds up the place that begins in this piece and goes on.
    @triton.jit(do_not_specialize=["M", "NUM_PLACES"])
    def linear_logprobs_open_rows_kernel(
        out_ptr,
        place_ptr,
        open_ptr,
        M,
        NUM_PLACES,
        H,
        OUT_IS_ZERO: tl.constexpr,
        PIECE: tl.constexpr,
        BLOCK_H: tl.constexpr,
    ):
        piece = tl.program_id(0).to(tl.int64)
        end = (piece + 1) * PIECE
        place = tl.load(place_ptr + end - 1)
        before = tl.load(place_ptr + piece * PIECE - 1, mask=piece > 0, other=-1)
        # The grid has no program for the last piece, which nothing follows.
        if (place != tl.load(place_ptr + end)) | (place == before) | (place >= NUM_PLACES):
            return
        column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        mask = column < H
        open_ptr += piece * 2 * H + column
        total = tl.load(open_ptr + H, mask=mask, other=0.0)
        following = place
        offset = tl.zeros([], tl.int64)
        while following == place:
            offset += 2 * H
            total += tl.load(open_ptr + offset, mask=mask, other=0.0)
            end += PIECE
            following = tl.load(place_ptr + end, mask=end < M, other=-1)
        _finish(out_ptr + place * H + column, total, mask, OUT_IS_ZERO)

    def _triton_weighted_rows(*, out, place, index, weight, rows, out_is_zero=False):
        """Compute what ``_torch_weighted_rows`` does."""
        (num_places, width), entries = out.shape, len(place)
        if not entries:
            return
        pieces, block = cdiv(entries, _PIECE), min(_WIDEST, next_power_of_2(width))
        sums = torch.empty(pieces, 2, width, dtype=torch.float32, device=out.device)
        shared = {
            "out_ptr": out,
            "place_ptr": place,
            "open_ptr": sums,
            "M": entries,
            "NUM_PLACES": num_places,
            "H": width,
            "OUT_IS_ZERO": out_is_zero,
            "PIECE": _PIECE,
            "BLOCK_H": block,
            "num_warps": max(1, block // _COLUMNS_PER_WARP),
        }
        launch(
            linear_logprobs_weighted_rows_kernel,
            (pieces, cdiv(width, block)),
            **shared,
            index_ptr=index,
            weight_ptr=weight,
            rows_ptr=rows,
            stride_row=rows.stride(0),
            stride_column=rows.stride(1),
        )
        if pieces > 1:
            launch(linear_logprobs_open_rows_kernel, (pieces - 1, cdiv(width, block)), **shared)

    WEIGHTED_ROWS["triton"] = _triton_weighted_rows
