"""Selection of sparse logit gradients: the few entries per token that matter.

This is the forward; ``gradients.add_sparse`` and ``weighted_rows`` are the backward.

At the temperatures that people train at, a language model's p is almost all zero. Of a token's row of
(onehot(label) - p) cap'(logit) only the label and the largest p are kept, until the probability left out is at most
``mass_tolerance``; that mass is measured. The loss multiplies the row by c / tau, so the gradient of the logits is off
by at most |c| dropped_mass / tau, summed over the row, for any loss (cap' is at most 1).

Selection, row by row of a chunk of logits [C, V], with K = max_entries:

    1  collect as candidates all p > mass_tolerance / K, by comparing logits with the true log-sum-exp that the forward
       pass of selective_logprobs has computed; sum up the rest
    2  find by bisection the largest threshold below which the candidates and the rest sum up to at most
       mass_tolerance; there are at most 4 K candidates, or the next larger power of two, held in registers
    3  write the candidates above the threshold, in the order of the vocabulary

    traffic per row   4 V bytes read once more than without selection; per candidate its column written and read and
                      its logit read again; 8 bytes per entry kept. Dense logit gradients read 4 V again and write 2 V.

A row so flat that K entries could not suffice is not read again. (The PyTorch backend has a block of rows in the cache,
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
from ...tuning import Config
from .._row_kernels import (
    ROW_PASSES,
    row_statistics,
    rows_per_block,
    safe_labels,
    scaled_rows,
    softcap_derivative,
)

if HAS_TRITON:
    import triton
    import triton.language as tl

    from ..._triton_utils import launch
    from .._row_kernels import fitted, scaled_block, scaled_logits

MAX_ENTRIES = 1024
_BISECTIONS = 16  # of some 20 nats: the threshold is within a thousandth of the best
_NATS_BELOW_FLOOR = 12.0  # where that search begins
_NO_IGNORE_INDEX = 1 - 2**31  # ignores nothing: all tokens here have a loss


class Selected(NamedTuple):
    """Results of selection for C tokens, in addition to the entries."""

    logprobs: Tensor  # [C]
    entropy: Tensor  # [C]
    row_stats: Tensor  # [2, C]
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


def _torch_select(*, logits, labels, temperature, softcap, mass_tolerance, row_stats, index, value):
    """Select entries of logits [1, C, V], which are overwritten, into index and value [C, K]. Returns Selected.

    ``row_stats`` [2, C] are those of the complete rows where the logits are one shard of them, else None.
    """
    n, vocab = len(labels), logits.shape[-1]
    complete = row_stats is None
    logprobs, entropy, rest = (logits.new_empty(n) for _ in range(3))
    row_stats = logits.new_empty(2, n) if complete else row_stats
    height = min(n, rows_per_block(vocab))
    buffer = logits.new_empty(height, vocab)
    candidates = []
    for first in range(0, n, height):
        rows = slice(first, min(n, first + height))
        z, ratio = scaled_rows(logits[0, rows], temperature[rows], softcap)
        e = buffer[: len(z)]
        if complete:
            row_stats[0, rows], target, total = row_statistics(z, labels[rows], e)
            row_stats[1, rows] = total.log()
            logprobs[rows] = target - row_stats[1, rows]
            entropy[rows] = row_stats[1, rows] - z.mul_(e).sum(-1) / total
        else:
            total = row_stats[1, rows].exp()
            torch.exp(z.sub_(row_stats[0, rows, None]), out=e)
        found = _collect_candidates(
            e,
            mass=total if complete else e.sum(-1),
            total=total,
            labels=labels[rows],
            mass_tolerance=mass_tolerance,
            max_entries=index.shape[1],
        )
        if ratio is not None:
            found = found._replace(value=found.value * softcap_derivative(ratio[found.row, found.column]))
        candidates.append(found._replace(row=found.row + first))
        rest[rows] = e.sum(-1) / total
    num_entries, dropped_mass = _fill(
        Candidates.cat(candidates), rest=rest, mass_tolerance=mass_tolerance, index=index, value=value
    )
    return Selected(logprobs, entropy, row_stats, num_entries, dropped_mass)


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


def _set_to_infinity(x: Tensor, column: Tensor, mask: Tensor) -> None:
    """Set one column per row of x to infinity where ``mask``."""
    at = column[:, None]
    x.scatter_(-1, at, torch.where(mask[:, None], float("inf"), x.gather(-1, at)))


def _fill(
    candidates: Candidates, *, rest: Tensor, mass_tolerance: float, index: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    """Write the candidates that are needed into index and value. Returns num_entries and dropped_mass."""
    n, max_entries = index.shape
    row, is_label = candidates.row, candidates.is_label
    optional = torch.where(is_label, 0.0, candidates.p)  # what may be left out

    def left_out(threshold: Tensor) -> Tensor:
        return rest.index_add(0, row, torch.where(optional <= threshold[row], optional, 0.0))

    low = torch.full_like(rest, math.log(mass_tolerance / max_entries) - _NATS_BELOW_FLOOR)
    high = torch.full_like(rest, math.log(mass_tolerance))
    threshold = torch.zeros_like(rest)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        fine = left_out(middle.exp()) <= mass_tolerance
        threshold = torch.where(fine, middle.exp(), threshold)
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

    @triton.jit
    def _append(candidate_ptr, column, near, found, MAX_CANDIDATES: tl.constexpr):
        """Store the columns that are near after the ``found`` ones, up to MAX_CANDIDATES. Return the new count."""
        place = found + tl.cumsum(near.to(tl.int32), 0) - 1
        tl.store(candidate_ptr + place, column, mask=near & (place < MAX_CANDIDATES))
        return tl.max(place, 0) + 1

    _CANDIDATES_CONFIG = Config(1024, 8)  # four elements per thread: 16 bytes, and registers left for the scan

    # Step 1, one program per row. A launch of its own, since steps 2 and 3 need a number of threads that depends on K.
    @triton.jit(do_not_specialize=["N"])
    def linear_logprobs_candidates_kernel(
        x_ptr,
        label_ptr,
        tau_ptr,
        stat_ptr,
        candidate_ptr,
        found_ptr,
        left_out_ptr,
        stride_x,
        stride_tau,
        N,
        V,
        softcap,
        tolerance,
        log_floor,
        K,
        COMPLETE_ROWS: tl.constexpr,
        HAS_SOFTCAP: tl.constexpr,
        MAX_CANDIDATES: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        m = tl.load(stat_ptr + row)
        log_total = tl.load(stat_ptr + N + row)
        if COMPLETE_ROWS and K * tl.exp(-log_total) < 1.0 - tolerance:  # K times the largest p are not enough
            tl.store(found_ptr + row, 0)
            tl.store(left_out_ptr + row, 1.0)
            return
        x_ptr += row * stride_x
        candidate_ptr += row * MAX_CANDIDATES
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
                found = _append(candidate_ptr, start + lanes, near, found, MAX_CANDIDATES)
        tl.store(found_ptr + row, found)
        tl.store(left_out_ptr + row, tl.sum(beyond, 0))

    # Steps 2 and 3, one program per row.
    @triton.jit(do_not_specialize=["N"])
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
        N,
        V,
        softcap,
        tolerance,
        log_tolerance,
        log_floor,
        K,
        HAS_SOFTCAP: tl.constexpr,
        MAX_CANDIDATES: tl.constexpr,
        STEPS: tl.constexpr,
        NATS_BELOW_FLOOR: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        label = tl.load(label_ptr + row)
        found = tl.load(found_ptr + row)
        left_out = tl.load(left_out_ptr + row)
        m = tl.load(stat_ptr + row)
        log_total = tl.load(stat_ptr + N + row)
        lane = tl.arange(0, MAX_CANDIDATES)
        is_candidate = lane < found
        column = tl.load(candidate_ptr + row * MAX_CANDIDATES + lane, mask=is_candidate, other=V)
        tau = tl.load(tau_ptr + row * stride_tau)
        z, slope = scaled_logits(x_ptr + row * stride_x, column, 1, V, softcap, tau, HAS_SOFTCAP, False)
        p = tl.where(is_candidate, tl.exp(z - m - log_total), 0.0)
        is_label = is_candidate & (column == label)
        optional = tl.where(is_label, 0.0, p)
        low = log_floor - NATS_BELOW_FLOOR
        high = log_tolerance
        threshold = 0.0
        for _ in range(STEPS):
            middle = (low + high) / 2
            fine = left_out + tl.sum(tl.where(optional <= tl.exp(middle), optional, 0.0), 0) <= tolerance
            threshold = tl.where(fine, tl.exp(middle), threshold)
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

    def _triton_select(*, logits, labels, temperature, softcap, mass_tolerance, row_stats, index, value):
        """Select entries as ``_torch_select`` does, without overwriting the logits."""
        (n, max_entries), vocab = index.shape, logits.shape[-1]

        def new(*shape, dtype=torch.float32):
            return torch.empty(shape, dtype=dtype, device=logits.device)

        complete = row_stats is None
        if complete:
            logprobs, entropy, row_stats = ROW_PASSES["triton"].forward(
                logits=logits,
                labels=labels,
                temperature=temperature,
                softcap=softcap,
                ignore_index=_NO_IGNORE_INDEX,
            )
        else:
            logprobs, entropy, row_stats = new(n), new(n), row_stats.contiguous()
        selected = Selected(logprobs, entropy, row_stats, num_entries=new(n, dtype=torch.int32), dropped_mass=new(n))
        max_candidates = 4 * triton.next_power_of_2(max_entries)
        shared = {
            "x_ptr": logits,
            "label_ptr": labels,
            "tau_ptr": temperature,
            "stat_ptr": row_stats,
            "candidate_ptr": new(n, max_candidates, dtype=torch.int32),
            "found_ptr": new(n, dtype=torch.int32),
            "left_out_ptr": new(n),
            "stride_x": logits.stride(1),
            "stride_tau": temperature.stride(0),
            "N": n,
            "V": vocab,
            "softcap": softcap,
            "tolerance": mass_tolerance,
            "log_floor": math.log(mass_tolerance / max_entries),
            "K": max_entries,
            "HAS_SOFTCAP": softcap > 0,
            "MAX_CANDIDATES": max_candidates,
        }
        if n:
            launch(
                linear_logprobs_candidates_kernel,
                (n,),
                **shared,
                COMPLETE_ROWS=complete,
                **fitted(_CANDIDATES_CONFIG, vocab),
            )
            launch(
                linear_logprobs_select_kernel,
                (n,),
                **shared,
                index_ptr=index,
                value_ptr=value,
                count_ptr=selected.num_entries,
                dropped_ptr=selected.dropped_mass,
                log_tolerance=math.log(mass_tolerance),
                STEPS=_BISECTIONS,
                NATS_BELOW_FLOOR=_NATS_BELOW_FLOOR,
                num_warps=max(1, max_candidates // 256),
            )
        return selected

    SELECT["triton"] = _triton_select
