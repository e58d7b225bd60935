"""Selection of sparse logit gradients: the few entries per token that matter.

This is the forward; ``gradients.add_sparse`` and ``weighted_rows`` are the backward.

At the temperatures that people train at, a language model's p is almost all zero. Of a token's row of
(onehot(label) - p) cap'(logit) only the label and the largest p are kept, until the probability left out is at most
``mass_tolerance``; that mass is measured. The loss multiplies the row by c / tau, so the gradient of the logits is off
by at most |c| dropped_mass / tau, summed over the row, for any loss (cap' is at most 1).

Selection, row by row of a chunk of logits [C, V], with K = max_entries:

    1  collect as candidates all p > mass_tolerance / K, by comparing logits with the true log-sum-exp that the forward
       pass of selective_logprobs has computed; what they leave out is the rest
    2  find by bisection the largest threshold below which the candidates and the rest sum up to at most
       mass_tolerance; there are at most 4 K candidates, or the next larger power of two, held in registers
    3  write the candidates above the threshold, in the order of the vocabulary

The forward pass leaves the largest logit of each group of four columns (``GroupMaxima``). Step 1 reads these, and then
only the groups that can hold a candidate.

    traffic per row   V / 2 bytes written and read, 16 bytes read per group with a candidate; per candidate its column
                      written and read and its logit read again; 8 bytes per entry kept

A row so flat that K entries could not suffice is not looked at. (The PyTorch backend has a block of rows in the cache,
where a second look costs no traffic.) A token that needs more than K entries, or whose candidates leave out too much,
has a count of -1 and takes the dense path.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..._backend import HAS_TRITON
from ..row_passes import ROW_PASSES
from ..row_passes.torch import (
    capped_rows,
    row_statistics,
    rows_per_block,
    safe_labels,
    softcap_derivative,
)

if HAS_TRITON:
    import triton
    import triton.language as tl

    from ..._triton_utils import launch, next_power_of_2
    from ..row_passes.triton import GroupMaxima
    from ..row_passes.triton.shared import LOG2_E, capped, load_capped

MAX_ENTRIES = 1024
_BISECTIONS = 16  # of some 26 powers of two: the threshold is within a thousandth of the best
_LOG2_BELOW_FLOOR = 17.0  # where that search begins
NO_IGNORE_INDEX = 1 - 2**31  # ignores nothing: all tokens here have a loss


class Selected(NamedTuple):
    """Results of the selection for C tokens, in addition to the entries."""

    num_entries: Tensor  # [C] int32; -1 where entries do not suffice
    dropped_mass: Tensor  # [C], probability left out; 0 where there are no entries


class Candidates(NamedTuple):
    """Candidates of a block of rows, in the order of rows and columns."""

    row: Tensor  # [M]
    column: Tensor  # [M]
    p: Tensor  # [M]
    is_label: Tensor  # [M] bool
    value: Tensor  # [M], the logit gradient

    @classmethod
    def cat(cls, parts: list[Candidates]) -> Candidates:
        """Concatenate the candidates of successive blocks."""
        return cls(*(torch.cat(field) for field in zip(*parts, strict=True)))


# PyTorch backend: a block of rows stays in the cache, so that reading it once more costs no traffic


def _torch_select(*, logits, labels, temperature, softcap, mass_tolerance, combine, out, index, value):
    """Select entries of logits [1, C, V], which are overwritten, into index and value [C, K]. Returns Selected.

    Also fills ``out``, a ``RowResults``. ``combine`` replaces the results of a shard of the rows in it by those of
    complete rows, and returns the probability of the shard; None if the rows are complete.
    """
    n, vocab = len(labels), logits.shape[-1]
    rest = logits.new_empty(n)
    if combine is not None:
        ROW_PASSES["torch"].forward(
            logits=logits,
            labels=labels,
            temperature=temperature,
            softcap=softcap,
            ignore_index=NO_IGNORE_INDEX,
            out=out,
        )
        combine(out)
    height = min(n, rows_per_block(vocab))
    buffer = logits.new_empty(height, vocab)
    candidates = []
    for first in range(0, n, height):
        rows = slice(first, min(n, first + height))
        z = logits[0, rows]
        ratio = capped_rows(z, softcap)
        e = buffer[: len(z)]
        if combine is None:
            out.row_stats[0, rows], target, total = row_statistics(z, labels[rows], temperature[rows], e)
            out.row_stats[1, rows] = total.log()
            out.logprobs[rows] = target - out.row_stats[1, rows]
            out.entropy[rows] = out.row_stats[1, rows] - z.mul_(e).sum(-1) / total
        else:
            total = out.row_stats[1, rows].exp()
            torch.exp(z.sub_(out.row_stats[0, rows, None]).div_(temperature[rows, None]), out=e)
        found = _collect_candidates(
            e,
            mass=total if combine is None else e.sum(-1),
            total=total,
            labels=labels[rows],
            mass_tolerance=mass_tolerance,
            max_entries=index.shape[1],
        )
        if ratio is not None:
            found = found._replace(value=found.value * softcap_derivative(ratio[found.row, found.column]))
        candidates.append(found._replace(row=found.row + first))
        rest[rows] = e.sum(-1) / total
    num_entries, dropped_mass = fill(
        Candidates.cat(candidates), rest=rest, mass_tolerance=mass_tolerance, index=index, value=value
    )
    return Selected(num_entries, dropped_mass)


def _collect_candidates(
    e: Tensor, *, mass: Tensor, total: Tensor, labels: Tensor, mass_tolerance: float, max_entries: int
) -> Candidates:
    """Collect the label and all p = e / total above mass_tolerance / max_entries, and zero them in e.

    Of a row so flat that ``max_entries`` entries could not hold its mass only the label is taken. Of a row with more
    than twice as many above the floor nothing is taken: more than ``max_entries`` would be left out, each of more than
    mass_tolerance / max_entries.
    """
    height, vocab = e.shape
    width = math.gcd(vocab, 64)
    inside, label = safe_labels(labels, vocab)
    label_e = e.gather(-1, label[:, None]).squeeze(-1)
    # The maximum of groups of columns first: most groups have nothing above the floor and are not read again.
    highest = e.view(height, -1, width).amax(-1)
    flat = max_entries * highest.amax(-1) < mass - mass_tolerance * total
    floor = torch.where(flat, float("inf"), total * (mass_tolerance / max_entries))
    _set_to_infinity(e, label, inside)  # above any floor
    _set_to_infinity(highest, label // width, inside)
    row, group = (highest >= floor[:, None]).nonzero(as_tuple=True)
    above = e.view(-1, width)[row * (vocab // width) + group] >= floor[row, None]
    many = torch.zeros_like(label).index_add(0, row, above.sum(-1)) > 2 * max_entries
    row, group, above = (x[~many[row]] for x in (row, group, above))
    inner, place = above.nonzero(as_tuple=True)
    row, column = row[inner], group[inner] * width + place
    found = e[row, column]
    is_label = found == float("inf")
    found = torch.where(is_label, label_e[row], found)
    e[row, column] = 0.0
    p = found / total[row]
    return Candidates(row, column, p, is_label, value=torch.where(is_label, 1 - p, -p))


def sums_of_rows(x: Tensor, *, row: Tensor, num_rows: int) -> Tensor:
    """Sum ``x`` [M] over the entries of each of ``num_rows`` rows, which ascend in ``row`` [M]."""
    return _sums(x, torch.bincount(row, minlength=num_rows))


def _sums(x: Tensor, sizes: Tensor) -> Tensor:
    """Sum successive parts of ``x`` of these sizes; unlike ``index_add`` on a GPU always in the same order."""
    return torch.segment_reduce(x, "sum", lengths=sizes, unsafe=True)


def _set_to_infinity(x: Tensor, column: Tensor, mask: Tensor) -> None:
    """Set one column per row of x to infinity where ``mask``."""
    at = column[:, None]
    x.scatter_(-1, at, torch.where(mask[:, None], float("inf"), x.gather(-1, at)))


def fill(
    candidates: Candidates, *, rest: Tensor, mass_tolerance: float, index: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    """Write the candidates that are needed into index and value. Returns num_entries and dropped_mass."""
    n, max_entries = index.shape
    row, is_label = candidates.row, candidates.is_label
    optional = torch.where(is_label, 0.0, candidates.p)  # what may be left out
    sizes = torch.bincount(row, minlength=n)

    def left_out(threshold: Tensor) -> Tensor:
        return rest + _sums(torch.where(optional <= threshold[row], optional, 0.0), sizes)

    low = torch.full_like(rest, math.log2(mass_tolerance / max_entries) - _LOG2_BELOW_FLOOR)
    high = torch.full_like(rest, math.log2(mass_tolerance))
    threshold = torch.zeros_like(rest)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        fine = left_out(middle.exp2()) <= mass_tolerance
        threshold = torch.where(fine, middle.exp2(), threshold)
        low, high = torch.where(fine, middle, low), torch.where(fine, high, middle)
    dropped = left_out(threshold)
    keep = (optional > threshold[row]) | is_label
    count = torch.bincount(row[keep], minlength=n)
    enough = (dropped <= mass_tolerance) & (count <= max_entries)  # False for NaN
    keep &= enough[row]
    row = row[keep]
    place = torch.arange(len(row), device=row.device) - (torch.where(enough, count, 0).cumsum(0) - count)[row]
    index[row, place], value[row, place] = candidates.column[keep].int(), candidates.value[keep]
    return torch.where(enough, count, -1).int(), torch.where(enough, dropped, 0.0)


SELECT: dict[str, Callable[..., Selected]] = {"torch": _torch_select}


if HAS_TRITON:
    _TWO_MINUS_INF: tl.constexpr = tl.constexpr(-8323200)  # 0xFF80FF80: two of bfloat16
    _WORDS, _GROUPS, _WARPS = 1024, 64, 4  # few warps: a scan costs as much for each, whatever it has

    @triton.jit
    def _append(list_ptr, item, near, found, MAX_ITEMS: tl.constexpr):
        """Store the items that are near after the ``found`` ones, up to MAX_ITEMS. Return the new count."""
        place = found + tl.cumsum(near.to(tl.int32), 0) - 1
        tl.store(list_ptr + place, item, mask=near & (place < MAX_ITEMS))
        return tl.max(place, 0) + 1

    @triton.jit
    def _unpack(word):
        """Return the two bfloat16 in each word as float32."""
        return (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)

    @triton.jit
    def _log2_p(x_ptr, column, mask, top, c, log2_total, softcap, HAS_SOFTCAP: tl.constexpr):
        """Compute log2 p of columns, and the derivative of the cap (unused without one)."""
        y, slope = capped(tl.load(x_ptr + column, mask=mask, other=0.0).to(tl.float32), softcap, HAS_SOFTCAP)
        return (y - top) * c - log2_total, slope

    # Step 1, one program per row. A launch of its own, since steps 2 and 3 need a number of threads that depends on K.
    @triton.jit(do_not_specialize=["stride_stat"])
    def linear_logprobs_candidates_kernel(
        x_ptr,
        label_ptr,
        tau_ptr,
        stat_ptr,
        mass_ptr,
        maxima_ptr,
        group_ptr,
        candidate_ptr,
        found_ptr,
        left_out_ptr,
        stride_x,
        stride_tau,
        stride_stat,
        stride_maxima,
        V,
        softcap,
        tolerance,
        log2_floor,
        K,
        HAS_SOFTCAP: tl.constexpr,
        MAX_CANDIDATES: tl.constexpr,
        GROUP: tl.constexpr,
        HALF: tl.constexpr,
        WORDS: tl.constexpr,
        GROUPS: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        top = tl.load(stat_ptr + row)
        log2_total = tl.load(stat_ptr + stride_stat + row) * LOG2_E
        if mass_ptr is None:
            mass = 1.0
            if K * tl.exp2(-log2_total) < 1.0 - tolerance:  # K times the largest p are not enough
                tl.store(found_ptr + row, 0)
                tl.store(left_out_ptr + row, 1.0)
                return
        else:
            mass = tl.load(mass_ptr + row)
        x_ptr += row * stride_x
        group_ptr += row * MAX_CANDIDATES
        candidate_ptr += row * MAX_CANDIDATES
        c = LOG2_E / tl.load(tau_ptr + row * stride_tau)
        label = tl.load(label_ptr + row)
        in_range = (label >= 0) & (label < V)
        label = tl.where(in_range, label, -2 * GROUP * HALF).to(tl.int32)  # in no block, if it is on another rank
        origin, _ = load_capped(x_ptr + tl.where(in_range, label, 0), softcap, HAS_SOFTCAP)
        # A little below the floor: what is in these groups is compared exactly afterwards.
        margin = 0.01 / c + 1e-6 * (tl.abs(top) + tl.abs(origin))
        floor = (top - origin) + (log2_floor + log2_total) / c - margin
        maxima_ptr += row * stride_maxima
        words = stride_maxima
        label_group = label // GROUP
        label_word = label_group // (2 * HALF) * HALF  # the first of its block
        found = tl.zeros([], tl.int32)
        for start in range(0, words, WORDS):
            word = start + tl.arange(0, WORDS)
            low, high = _unpack(tl.load(maxima_ptr + word, mask=word < words, other=_TWO_MINUS_INF))
            largest = tl.max(tl.maximum(low, high), 0)
            if (largest > floor) | ((label_word >= start) & (label_word < start + WORDS)):
                # Few tiles have a candidate. They are read again, block by block, in the order of the vocabulary.
                for block in range(start, tl.minimum(start + WORDS, words), HALF):
                    first, second = _unpack(tl.load(maxima_ptr + block + tl.arange(0, HALF)))
                    largest_of_group = tl.reshape(tl.trans(tl.join(first, second)), [2 * HALF])
                    number = 2 * block + tl.arange(0, 2 * HALF)
                    is_near = (largest_of_group > floor) | (number == label_group)
                    if tl.max(is_near.to(tl.int32), 0) > 0:
                        found = _append(group_ptr, number, is_near, found, MAX_CANDIDATES)
        tl.debug_barrier()  # other threads have stored the groups that this one reads
        many = found > MAX_CANDIDATES
        groups = tl.where(many, 0, found)
        found = tl.where(many, MAX_CANDIDATES + 1, 0)
        collected = tl.zeros([GROUPS, GROUP], tl.float32)
        for start in range(0, groups, GROUPS):
            place = start + tl.arange(0, GROUPS)
            group = tl.load(group_ptr + place, mask=place < groups, other=0)
            column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
            mask = (place < groups)[:, None] & (column < V)
            log2_p, _slope = _log2_p(x_ptr, column, mask, top, c, log2_total, softcap, HAS_SOFTCAP)
            near = mask & ((log2_p > log2_floor) | (column == label))
            collected += tl.where(near, tl.exp2(log2_p), 0.0)
            found = _append(
                candidate_ptr,
                tl.reshape(column, [GROUPS * GROUP]),
                tl.reshape(near, [GROUPS * GROUP]),
                found,
                MAX_CANDIDATES,
            )
        tl.store(found_ptr + row, found)
        # The difference of numbers near 1 has an error near 1e-7, which the certificate does not count.
        tl.store(left_out_ptr + row, tl.maximum(mass - tl.sum(tl.sum(collected, 1), 0), 0.0))

    # Steps 2 and 3, one program per row.
    @triton.jit(do_not_specialize=["stride_stat"])
    def linear_logprobs_select_kernel(
        x_ptr,
        label_ptr,
        tau_ptr,
        stat_ptr,
        candidate_ptr,
        found_ptr,
        left_out_ptr,
        index_ptr,
        value_ptr,
        count_ptr,
        dropped_ptr,
        stride_x,
        stride_tau,
        stride_stat,
        V,
        softcap,
        tolerance,
        log2_tolerance,
        log2_floor,
        K,
        HAS_SOFTCAP: tl.constexpr,
        MAX_CANDIDATES: tl.constexpr,
        STEPS: tl.constexpr,
        BELOW_FLOOR: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        label = tl.load(label_ptr + row)
        found = tl.load(found_ptr + row)
        left_out = tl.load(left_out_ptr + row)
        top = tl.load(stat_ptr + row)
        log2_total = tl.load(stat_ptr + stride_stat + row) * LOG2_E
        lane = tl.arange(0, MAX_CANDIDATES)
        is_candidate = lane < tl.where(found <= MAX_CANDIDATES, found, 0)  # too many candidates were not listed
        column = tl.load(candidate_ptr + row * MAX_CANDIDATES + lane, mask=is_candidate, other=V)
        c = LOG2_E / tl.load(tau_ptr + row * stride_tau)
        x_ptr += row * stride_x
        log2_p, slope = _log2_p(x_ptr, column, is_candidate, top, c, log2_total, softcap, HAS_SOFTCAP)
        p = tl.where(is_candidate, tl.exp2(log2_p), 0.0)
        is_label = is_candidate & (column == label)
        optional = tl.where(is_label, 0.0, p)
        low = log2_floor - BELOW_FLOOR
        high = log2_tolerance
        threshold = 0.0
        for _ in range(STEPS):
            middle = (low + high) / 2
            fine = left_out + tl.sum(tl.where(optional <= tl.exp2(middle), optional, 0.0), 0) <= tolerance
            threshold = tl.where(fine, tl.exp2(middle), threshold)
            low = tl.where(fine, middle, low)
            high = tl.where(fine, high, middle)
        dropped = left_out + tl.sum(tl.where(optional <= threshold, optional, 0.0), 0)
        keep = (optional > threshold) | is_label
        place = tl.cumsum(keep.to(tl.int32), 0)  # from 1
        count = tl.max(place, 0)
        enough = (found <= MAX_CANDIDATES) & (dropped <= tolerance) & (count <= K)  # False for NaN
        value = tl.where(is_label, 1.0 - p, -p)
        if HAS_SOFTCAP:
            value *= slope
        keep &= place <= tl.where(enough, K, 0)
        slot = row * K + place - 1
        tl.store(index_ptr + slot, column, mask=keep)
        tl.store(value_ptr + slot, value, mask=keep)
        tl.store(count_ptr + row, tl.where(enough, count, -1))
        tl.store(dropped_ptr + row, tl.where(enough, dropped, 0.0))

    def _triton_select(*, logits, labels, temperature, softcap, mass_tolerance, combine, out, index, value):
        """Select entries as ``_torch_select`` does, without overwriting the logits."""
        (n, max_entries), vocab = index.shape, logits.shape[-1]

        def new(*shape, dtype=torch.float32):
            return torch.empty(shape, dtype=dtype, device=logits.device)

        maxima = GroupMaxima.allocate(logits)
        ROW_PASSES["triton"].forward(
            logits=logits,
            labels=labels,
            temperature=temperature,
            softcap=softcap,
            ignore_index=NO_IGNORE_INDEX,
            out=out,
            group_maxima=maxima,
        )
        mass = None if combine is None else combine(out)
        selected = Selected(num_entries=new(n, dtype=torch.int32), dropped_mass=new(n))
        max_candidates = 4 * next_power_of_2(max_entries)
        shared = {
            "x_ptr": logits,
            "label_ptr": labels,
            "tau_ptr": temperature,
            "stat_ptr": out.row_stats,
            "candidate_ptr": new(n, max_candidates, dtype=torch.int32),
            "found_ptr": new(n, dtype=torch.int32),
            "left_out_ptr": new(n),
            "stride_x": logits.stride(1),
            "stride_tau": temperature.stride(0),
            "stride_stat": out.row_stats.stride(0),
            "V": vocab,
            "softcap": softcap,
            "tolerance": mass_tolerance,
            "log2_floor": math.log2(mass_tolerance / max_entries),
            "K": max_entries,
            "HAS_SOFTCAP": softcap > 0,
            "MAX_CANDIDATES": max_candidates,
        }
        if n:
            words = max(maxima.half, min(_WORDS, next_power_of_2(maxima.words.shape[1])))
            launch(
                linear_logprobs_candidates_kernel,
                (n,),
                **shared,
                mass_ptr=mass,
                maxima_ptr=maxima.words,
                group_ptr=new(n, max_candidates, dtype=torch.int32),
                stride_maxima=maxima.words.stride(0),
                GROUP=maxima.group,
                HALF=maxima.half,
                WORDS=words,
                GROUPS=_GROUPS,
                num_warps=max(1, _WARPS * words // _WORDS),
            )
            launch(
                linear_logprobs_select_kernel,
                (n,),
                **shared,
                index_ptr=index,
                value_ptr=value,
                count_ptr=selected.num_entries,
                dropped_ptr=selected.dropped_mass,
                log2_tolerance=math.log2(mass_tolerance),
                STEPS=_BISECTIONS,
                BELOW_FLOOR=_LOG2_BELOW_FLOOR,
                num_warps=max(1, max_candidates // 256),
            )
        return selected

    SELECT["triton"] = _triton_select
