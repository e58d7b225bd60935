"""Products with sparse logit gradients.

The entries of all tokens are in one list of (token, column, weight = c value / tau):

    d hidden[t] = sum of weight W[column] over the entries of t           gathers rows of W
    d weight[v] = sum of weight hidden[token] over the entries of v       with the list sorted by column

Both are one operation, ``weighted_rows``: out[d] += sum over a range of the list. A column that very many tokens share
is summed in pieces of the list, and the sums of the pieces in order: no atomics, the same bits in every run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..._backend import HAS_TRITON
from .sparse import MAX_ENTRIES

if HAS_TRITON:
    import triton
    import triton.language as tl

    from ..._triton_utils import launch

_PIECE = MAX_ENTRIES  # entries summed in one piece: those of a token always, those of a column mostly


class Entries(NamedTuple):
    """Sparse logit gradients; those of token t are entries ``bounds[t]`` to ``bounds[t + 1]``."""

    token: Tensor  # [M] int64
    column: Tensor  # [M] int64
    weight: Tensor  # [M] float32
    bounds: Tensor  # [tokens + 1] int64


def gather_entries(index: Tensor, value: Tensor, count: Tensor, coefficient: Tensor) -> Entries:
    """List the first ``count`` entries of each row of ``[tokens, K]``, multiplied by the token's coefficient."""
    filled = torch.arange(index.shape[1], device=index.device) < count[:, None]
    token, slot = filled.nonzero(as_tuple=True)
    weight = value[token, slot] * coefficient[token]
    ends = count.long().cumsum(0)
    return Entries(token, index[token, slot].long(), weight, torch.cat([ends.new_zeros(1), ends]))


class Columns(NamedTuple):
    """The same list in the order of the vocabulary: ``order[bounds[i] : bounds[i + 1]]`` belong to ``column[i]``."""

    order: Tensor  # [M]
    column: Tensor  # [columns], each that occurs
    bounds: Tensor  # [columns + 1]


def by_column(entries: Entries) -> Columns:
    """Sort entries by column, and by token within a column."""
    order = entries.column.argsort(stable=True)
    column, count = entries.column[order].unique_consecutive(return_counts=True)
    ends = count.cumsum(0)
    return Columns(order, column, torch.cat([ends.new_zeros(1), ends]))


def _torch_weighted_rows(*, out, place, index, weight, bounds, rows):
    """Add to out[place[i]] the sum of weight[e] rows[index[e]] over e in [bounds[i], bounds[i + 1]).

    No place occurs twice.
    """
    first, last = int(bounds[0]), int(bounds[-1])
    bag = functional.embedding_bag(
        index[first:last],
        rows.float(),
        bounds - first,
        mode="sum",
        per_sample_weights=weight[first:last],
        include_last_offset=True,
    )
    out.index_add_(0, place, bag)


WEIGHTED_ROWS: dict[str, Callable[..., None]] = {"torch": _torch_weighted_rows}


if HAS_TRITON:
    # One program per range of the list and block of columns, BLOCK_E rows of the range at a time. Partial sums are
    # reduced after the loop. Reduced in each iteration, those of a narrow block were held by several threads, summed in
    # different orders, and all written to one place in shared memory.
    @triton.jit
    def linear_logprobs_weighted_rows_kernel(
        out_ptr,
        place_ptr,
        index_ptr,
        weight_ptr,
        first_ptr,
        last_ptr,
        rows_ptr,
        stride_row,
        stride_column,
        H,
        BLOCK_E: tl.constexpr,
        BLOCK_H: tl.constexpr,
    ):
        i = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        first = tl.load(first_ptr + i)
        last = tl.load(last_ptr + i)
        total = tl.zeros([BLOCK_E, BLOCK_H], tl.float32)
        for start in range(first, last, BLOCK_E):
            entry = start + tl.arange(0, BLOCK_E)
            row = tl.load(index_ptr + entry, mask=entry < last, other=0)
            weight = tl.load(weight_ptr + entry, mask=entry < last, other=0.0)
            mask = (entry < last)[:, None] & (column < H)[None, :]
            x = tl.load(rows_ptr + row[:, None] * stride_row + column[None, :] * stride_column, mask=mask, other=0.0)
            total += weight[:, None] * x.to(tl.float32)
        out_ptr += tl.load(place_ptr + i) * H + column
        tl.store(out_ptr, tl.load(out_ptr, mask=column < H, other=0.0) + tl.sum(total, 0), mask=column < H)

    def _triton_weighted_rows(*, out, place, index, weight, bounds, rows):
        """Compute what ``_torch_weighted_rows`` does, a range of over _PIECE entries piece by piece."""
        first, last = bounds[:-1], bounds[1:]
        short = last - first <= _PIECE
        entries = {"index": index, "weight": weight, "rows": rows}
        _launch_weighted_rows(out=out, place=place[short], first=first[short], last=last[short], **entries)
        place, first, last = place[~short], first[~short], last[~short]
        pieces = (last - first + _PIECE - 1) // _PIECE
        ends = pieces.cumsum(0)
        owner = torch.repeat_interleave(torch.arange(len(place), device=out.device), pieces)
        number = torch.arange(len(owner), device=out.device)
        begin = first[owner] + _PIECE * (number - (ends - pieces)[owner])
        end = torch.minimum(begin + _PIECE, last[owner])
        sums = out.new_zeros(len(owner), out.shape[1])
        _launch_weighted_rows(out=sums, place=number, first=begin, last=end, **entries)
        _launch_weighted_rows(
            out=out,
            place=place,
            first=ends - pieces,
            last=ends,
            index=number,
            weight=torch.ones_like(sums[:, 0]),
            rows=sums,
        )

    def _launch_weighted_rows(*, out, place, first, last, index, weight, rows):
        if len(place):
            block = min(128, triton.next_power_of_2(out.shape[1]))
            launch(
                linear_logprobs_weighted_rows_kernel,
                (len(place), triton.cdiv(out.shape[1], block)),
                out_ptr=out,
                place_ptr=place,
                index_ptr=index,
                weight_ptr=weight,
                first_ptr=first,
                last_ptr=last,
                rows_ptr=rows,
                stride_row=rows.stride(0),
                stride_column=rows.stride(1),
                H=out.shape[1],
                BLOCK_E=32,
                BLOCK_H=block,
                num_warps=4,
            )

    WEIGHTED_ROWS["triton"] = _triton_weighted_rows
