"""The gradient of the logits as a few entries a token: how they are selected, and what they are multiplied by.

At the temperatures that people train at, a language model's p is almost all zero. Of a token's row of
E = (onehot(label) - p) cap'(logit) only the label and the largest p are kept, until what is left out of p adds up to
at most ``tolerance``; that mass is measured. Whatever comes after multiplies E by c / tau, so the gradient of the
logits is off by at most |c| dropped / tau, summed over the row, for any loss (cap' is at most 1).

Selection, row by row of a chunk of logits [C, V]:

    1  every entry above floor = log(tolerance / K) below the true log-sum-exp, which the forward pass of
       selective_logprobs has found, is noted: all of p > tolerance / K. What is passed over is added up.
    2  among the entries noted the largest threshold is found, by bisection, below which not too much lies. There is
       room for 4 K of them or more: registers, not memory.
    3  entries above it are written, in the order of the vocabulary.

    traffic a row   read 4 V bytes once more than without selection; for each entry noted its column out and in, and
                    its logit once more; 8 bytes for each entry kept. A dense E is 4 V read again and 2 V written.

A row so flat that K entries could not suffice is not read again. (The PyTorch backend has a block of rows in the cache,
where a second look costs no traffic.) A token that needs more than K entries, or whose noted entries leave out too
much, has a count of -1: it goes the exact way.

Products, with the entries of all tokens in one list of (token, column, weight = c e / tau):

    d hidden[t] = sum of weight W[column] over the entries of t           gathers rows of W
    d weight[v] = sum of weight hidden[token] over the entries of v       the list sorted by column, a row of W a sum

Both are one operation, ``weighted_rows``: out[d] += sum over a range of the list. A column that very many tokens share
is summed in pieces of the list, and their sums once more in order: no atomics, the same bits every run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .ops.selective_logprobs import (
    ROW_PASSES,
    row_statistics,
    rows_per_block,
    safe_labels,
    scaled_rows,
    softcap_derivative,
)
from .tuning import Config

try:
    import triton
    import triton.language as tl

    from ._triton_utils import launch
    from .ops.selective_logprobs import fitted, scaled_block, scaled_logits
except ImportError:
    triton = None

MAX_CAPACITY = 1024
_BISECTIONS = 16  # of some 20 nats: the threshold is within a thousandth of the best
_NATS_BELOW_FLOOR = 12.0  # where that search begins: what was noted early may lie below the floor
_NO_LABEL = 1 - 2**31  # an ignore_index that ignores nothing: all of these tokens bear loss
_PIECE = MAX_CAPACITY  # entries that are summed in one go: those of a token always, those of a column mostly


class Selected(NamedTuple):
    """What selection tells of each of C tokens, beside the entries themselves."""

    logprobs: Tensor  # [C]
    entropy: Tensor  # [C]
    stats: Tensor  # [2, C]
    entries: Tensor  # [C] int32: how many; -1 where they would not do
    dropped: Tensor  # [C]: the mass of p left out; 0 where there are no entries


class Entries(NamedTuple):
    """Entries of the gradient of the logits, those of token t from ``bounds[t]`` to ``bounds[t + 1]``."""

    token: Tensor  # [M] int64, which of the tokens
    column: Tensor  # [M] int64
    weight: Tensor  # [M] float32
    bounds: Tensor  # [tokens + 1] int64


def entries_of(index: Tensor, value: Tensor, count: Tensor, coefficient: Tensor) -> Entries:
    """One list of what lies in slots ``[tokens, K]``, each value multiplied by its token's coefficient."""
    filled = torch.arange(index.shape[1], device=index.device) < count[:, None]
    token, slot = filled.nonzero(as_tuple=True)
    weight = value[token, slot] * coefficient[token]
    ends = count.long().cumsum(0)
    return Entries(token, index[token, slot].long(), weight, torch.cat([ends.new_zeros(1), ends]))


class Columns(NamedTuple):
    """The same list in the order of the vocabulary: entries ``order`` from ``bounds[i]`` on belong to ``column[i]``."""

    order: Tensor  # [M]
    column: Tensor  # [columns], those that occur
    bounds: Tensor  # [columns + 1]


def by_column(entries: Entries) -> Columns:
    """Within a column in the order of the tokens."""
    order = entries.column.argsort(stable=True)
    column, count = entries.column[order].unique_consecutive(return_counts=True)
    ends = count.cumsum(0)
    return Columns(order, column, torch.cat([ends.new_zeros(1), ends]))


# PyTorch backend: a block of rows stays in the cache, so that looking at it once more costs no traffic


def _torch_select(logits, labels, temperature, softcap, tolerance, known, index, value):
    """Logits [1, C, V], which are overwritten -> Selected; the entries go into index and value [C, K].

    ``known`` [2, C]: maximum and log-sum of the whole rows of which the logits are a part; None where they are whole.
    """
    n, vocab = len(labels), logits.shape[-1]
    logprobs, entropy, passed_over = (logits.new_empty(n) for _ in range(3))
    stats = logits.new_empty(2, n) if known is None else known
    height = min(n, rows_per_block(vocab))
    buffer = logits.new_empty(height, vocab)
    noted = []
    for first in range(0, n, height):
        rows = slice(first, min(n, first + height))
        z, ratio = scaled_rows(logits[0, rows], temperature[rows], softcap)
        e = buffer[: len(z)]
        if known is None:
            stats[0, rows], target, total = row_statistics(z, labels[rows], e)
            stats[1, rows] = total.log()
            logprobs[rows] = target - stats[1, rows]
            entropy[rows] = stats[1, rows] - z.mul_(e).sum(-1) / total
        else:
            total = known[1, rows].exp()
            torch.exp(z.sub_(known[0, rows, None]), out=e)
        mass = total if known is None else e.sum(-1)
        row, column, p, is_label = _above(e, mass, total, labels[rows], tolerance, index.shape[1])
        slope = 1.0 if ratio is None else softcap_derivative(ratio[row, column])
        noted.append((row + first, column, p, is_label, torch.where(is_label, 1 - p, -p) * slope))
        passed_over[rows] = e.sum(-1) / total
    row, column, p, is_label, entry = (torch.cat(parts) for parts in zip(*noted, strict=True))
    count, dropped = _fill(row, column, p, is_label, entry, passed_over, tolerance, index, value)
    return Selected(logprobs, entropy, stats, count, dropped)


def _above(e: Tensor, mass: Tensor, total: Tensor, labels: Tensor, tolerance: float, capacity: int):
    """Row, column, p = e / total and whether it is the label, of the label and of all p above the floor.

    They come in the order of the columns, and are zeroed in e. Of a row so flat that ``capacity`` entries could not
    hold its mass the label alone is taken, and of one with more than twice as many above the floor nothing: those over
    the capacity would be more than ``capacity``, each of more than tolerance / capacity.
    """
    height, vocab = e.shape
    width = math.gcd(vocab, 64)
    inside, label = safe_labels(labels, vocab)
    label_e = e.gather(-1, label[:, None]).squeeze(-1)
    # The maximum of a few columns first: most of them have nothing above the floor, and need no second look.
    highest = e.view(height, -1, width).amax(-1)
    flat = capacity * highest.amax(-1) < mass - tolerance * total
    floor = torch.where(flat, float("inf"), total * (tolerance / capacity))
    for x, where_label in ((e, label), (highest, label // width)):  # as if above any floor
        at = where_label[:, None]
        x.scatter_(-1, at, torch.where(inside[:, None], float("inf"), x.gather(-1, at)))
    row, group = (highest >= floor[:, None]).nonzero(as_tuple=True)
    above = e.view(-1, width)[row * (vocab // width) + group] >= floor[row, None]
    many = torch.zeros_like(label).index_add(0, row, above.sum(-1)) > 2 * capacity
    row, group, above = (x[~many[row]] for x in (row, group, above))
    inner, place = above.nonzero(as_tuple=True)
    row, column = row[inner], group[inner] * width + place
    found = e[row, column]
    is_label = found == float("inf")
    found = torch.where(is_label, label_e[row], found)
    e[row, column] = 0.0
    return row, column, found / total[row], is_label


def _fill(row, column, p, is_label, entry, passed_over, tolerance, index, value) -> tuple[Tensor, Tensor]:
    """Of the noted entries those that are needed, into index and value; -> count and dropped."""
    n, capacity = index.shape
    loose = torch.where(is_label, 0.0, p)  # what may be left out
    left_out = lambda cut: passed_over.index_add(0, row, torch.where(loose <= cut[row], loose, 0.0))
    low = torch.full_like(passed_over, math.log(tolerance / capacity) - _NATS_BELOW_FLOOR)
    high = torch.full_like(passed_over, math.log(tolerance))
    cut = torch.zeros_like(passed_over)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        fine = left_out(middle.exp()) <= tolerance
        cut = torch.where(fine, middle.exp(), cut)
        low, high = torch.where(fine, middle, low), torch.where(fine, high, middle)
    dropped = left_out(cut)
    keep = (loose > cut[row]) | is_label
    many = torch.bincount(row[keep], minlength=n)
    enough = (dropped <= tolerance) & (many <= capacity)  # NaN is not at most anything
    keep &= enough[row]
    row = row[keep]
    place = torch.arange(len(row), device=row.device) - (torch.where(enough, many, 0).cumsum(0) - many)[row]
    index[row, place], value[row, place] = column[keep].int(), entry[keep]
    return torch.where(enough, many, -1).int(), torch.where(enough, dropped, 0.0)


def _torch_weighted_rows(out, place, index, weight, bounds, rows):
    """out[place[i]] += sum of weight[e] rows[index[e]] over e in [bounds[i], bounds[i + 1]); all places differ."""
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


SELECT: dict[str, Callable[..., Selected]] = {"torch": _torch_select}
WEIGHTED_ROWS: dict[str, Callable[..., None]] = {"torch": _torch_weighted_rows}


if triton is not None:

    @triton.jit
    def _note(noted_ptr, column, near, found, ROOM: tl.constexpr):
        """Stores those that are near behind the ``found`` ones as far as there is room; how many there are then."""
        place = found + tl.cumsum(near.to(tl.int32), 0) - 1
        tl.store(noted_ptr + place, column, mask=near & (place < ROOM))
        return tl.max(place, 0) + 1

    _NOTE_CONFIG = Config(1024, 8)  # four elements a thread: 16 bytes, and few enough registers for the scan

    # Step 1, one program per row. In a launch of its own, since steps 2 and 3 want as many threads for a short row.
    @triton.jit(do_not_specialize=["N"])
    def _note_kernel(
        x_ptr, label_ptr, tau_ptr, stat_ptr, noted_ptr, found_ptr, left_out_ptr,
        stride_x, stride_tau, N, V, softcap, tolerance, log_floor, K,
        WHOLE_ROWS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ROOM: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        m = tl.load(stat_ptr + row)
        log_total = tl.load(stat_ptr + N + row)
        if WHOLE_ROWS and K * tl.exp(-log_total) < 1.0 - tolerance:  # K times the largest p are not enough
            tl.store(found_ptr + row, 0)
            tl.store(left_out_ptr + row, 1.0)
            return
        x_ptr += row * stride_x
        noted_ptr += row * ROOM
        tau = tl.load(tau_ptr + row * stride_tau)
        label = tl.load(label_ptr + row)
        label = tl.where((label >= 0) & (label < V), label, -1).to(tl.int32)  # -1, no column, if it is on another rank
        lanes = tl.arange(0, BLOCK)
        found = tl.zeros([], tl.int32)
        beyond = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            z, _ = scaled_block(x_ptr, start, 1, V, softcap, tau, HAS_SOFTCAP, BLOCK)
            log_p = z - m - log_total
            near = (log_p > log_floor) | (lanes == label - start)
            beyond += tl.where(near, 0.0, tl.exp(log_p))
            if (tl.max(log_p, 0) > log_floor) | ((label >= start) & (label < start + BLOCK)):
                found = _note(noted_ptr, start + lanes, near, found, ROOM)
        tl.store(found_ptr + row, found)
        tl.store(left_out_ptr + row, tl.sum(beyond, 0))

    # Steps 2 and 3, one program a row.
    @triton.jit(do_not_specialize=["N"])
    def _fill_kernel(
        x_ptr, label_ptr, tau_ptr, stat_ptr, noted_ptr, found_ptr, left_out_ptr, index_ptr, value_ptr,
        count_ptr, dropped_ptr, stride_x, stride_tau, N, V, softcap, tolerance, log_tolerance, log_floor, K,
        HAS_SOFTCAP: tl.constexpr, ROOM: tl.constexpr, STEPS: tl.constexpr, NATS_BELOW_FLOOR: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        label = tl.load(label_ptr + row)
        found = tl.load(found_ptr + row)
        left_out = tl.load(left_out_ptr + row)
        m = tl.load(stat_ptr + row)
        log_total = tl.load(stat_ptr + N + row)
        lane = tl.arange(0, ROOM)
        noted = lane < found
        column = tl.load(noted_ptr + row * ROOM + lane, mask=noted, other=V)
        tau = tl.load(tau_ptr + row * stride_tau)
        z, slope = scaled_logits(x_ptr + row * stride_x, column, 1, V, softcap, tau, HAS_SOFTCAP, False)
        p = tl.where(noted, tl.exp(z - m - log_total), 0.0)
        is_label = noted & (column == label)
        loose = tl.where(is_label, 0.0, p)
        low = log_floor - NATS_BELOW_FLOOR
        high = log_tolerance
        cut = 0.0
        for _ in range(STEPS):
            middle = (low + high) / 2
            fine = left_out + tl.sum(tl.where(loose <= tl.exp(middle), loose, 0.0), 0) <= tolerance
            cut = tl.where(fine, tl.exp(middle), cut)
            low = tl.where(fine, middle, low)
            high = tl.where(fine, high, middle)
        dropped = left_out + tl.sum(tl.where(loose <= cut, loose, 0.0), 0)
        keep = (loose > cut) | is_label
        place = tl.cumsum(keep.to(tl.int32), 0)  # from 1
        count = tl.max(place, 0)
        enough = (found <= ROOM) & (dropped <= tolerance) & (count <= K)  # NaN is not at most anything
        entry = tl.where(is_label, 1.0 - p, -p)
        if HAS_SOFTCAP:
            entry *= slope
        keep &= place <= tl.where(enough, K, 0)
        slot = row * K + place - 1
        tl.store(index_ptr + slot, column, mask=keep)
        tl.store(value_ptr + slot, entry, mask=keep)
        tl.store(count_ptr + row, tl.where(enough, count, -1))
        tl.store(dropped_ptr + row, tl.where(enough, dropped, 0.0))

    # One program per range of the list and block of columns, BLOCK_E rows of the range at a time. Partial sums are
    # reduced after the loop: reduced in each iteration, those of a narrow block lay in several threads, added up in
    # different orders, which all wrote theirs to one place in shared memory.
    @triton.jit
    def _weighted_rows_kernel(
        out_ptr, place_ptr, index_ptr, weight_ptr, first_ptr, last_ptr, rows_ptr, stride_row, stride_column, H,
        BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr,
    ):  # fmt: skip
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

    def _triton_select(logits, labels, temperature, softcap, tolerance, known, index, value):
        """As _torch_select; the logits stay as they are."""
        (n, capacity), vocab = index.shape, logits.shape[-1]
        new = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=logits.device)
        if known is None:
            logprobs, entropy, stats = ROW_PASSES["triton"].forward(logits, labels, temperature, softcap, _NO_LABEL)
        else:
            logprobs, entropy, stats = new(n), new(n), known.contiguous()
        dropped, count = new(n), new(n, dtype=torch.int32)
        room = 4 * triton.next_power_of_2(capacity)
        noted = new(n, room, dtype=torch.int32), new(n, dtype=torch.int32), new(n)
        strides = logits.stride(1), temperature.stride(0)
        log_floor, has_softcap = math.log(tolerance / capacity), softcap > 0
        if n:
            launch(_note_kernel, (n,),
                logits, labels, temperature, stats, *noted, *strides, n, vocab, softcap, tolerance, log_floor, capacity,
                WHOLE_ROWS=known is None, HAS_SOFTCAP=has_softcap, ROOM=room, **fitted(_NOTE_CONFIG, vocab),
            )  # fmt: skip
            launch(_fill_kernel, (n,),
                logits, labels, temperature, stats, *noted, index, value, count, dropped, *strides, n, vocab,
                softcap, tolerance, math.log(tolerance), log_floor, capacity, HAS_SOFTCAP=has_softcap, ROOM=room,
                STEPS=_BISECTIONS, NATS_BELOW_FLOOR=_NATS_BELOW_FLOOR, num_warps=max(1, room // 256),
            )  # fmt: skip
        return Selected(logprobs, entropy, stats, count, dropped)

    def _triton_weighted_rows(out, place, index, weight, bounds, rows):
        """As _torch_weighted_rows. A range of over _PIECE entries goes by in pieces, whose sums are added in turn."""
        first, last = bounds[:-1], bounds[1:]
        short = last - first <= _PIECE
        _launch_weighted_rows(out, place[short], first[short], last[short], index, weight, rows)
        place, first, last = place[~short], first[~short], last[~short]
        pieces = (last - first + _PIECE - 1) // _PIECE
        ends = pieces.cumsum(0)
        owner = torch.repeat_interleave(torch.arange(len(place), device=out.device), pieces)
        number = torch.arange(len(owner), device=out.device)
        begin = first[owner] + _PIECE * (number - (ends - pieces)[owner])
        sums = out.new_zeros(len(owner), out.shape[1])
        _launch_weighted_rows(sums, number, begin, torch.minimum(begin + _PIECE, last[owner]), index, weight, rows)
        _launch_weighted_rows(out, place, ends - pieces, ends, number, torch.ones_like(sums[:, 0]), sums)

    def _launch_weighted_rows(out, place, first, last, index, weight, rows):
        if len(place):
            block = min(128, triton.next_power_of_2(out.shape[1]))
            launch(_weighted_rows_kernel, (len(place), triton.cdiv(out.shape[1], block)),
                out, place, index, weight, first, last, rows, *rows.stride(), out.shape[1],
                BLOCK_E=32, BLOCK_H=block, num_warps=4,
            )  # fmt: skip

    SELECT["triton"] = _triton_select
    WEIGHTED_ROWS["triton"] = _triton_weighted_rows
