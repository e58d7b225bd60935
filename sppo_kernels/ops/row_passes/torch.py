"""PyTorch backend of the row passes: one block of rows at a time, so that its float32 temporaries stay in the cache."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .results import CachedRows, RowPass, RowResults

_BLOCK_ELEMENTS = 1 << 19  # per thread: 2 MB, and as much again for exp of it
_LOG_ZERO = -200.0  # exp is 0 in float32 below -104; a finite stand-in keeps 0 * -inf out of p log p
# Probabilities up to these count as 0. Larger ones are not subnormal after their product with a logarithm, nor in
# backward after that with an upstream gradient of 1e-7.
_ZERO_FORWARD = 2.0**-125
_ZERO_BACKWARD = 2.0**-99


def rows_per_block(vocab: int) -> int:
    """Return how many rows have about _BLOCK_ELEMENTS elements per thread; each thread has a row at least."""
    return max(1, _BLOCK_ELEMENTS // vocab) * torch.get_num_threads()


def capped_rows(x: Tensor, softcap: float) -> Tensor | None:
    """Overwrite rows x [R, V] with y = cap(x). Return x / softcap, or None without a cap."""
    if not softcap:
        return None
    ratio = x / softcap
    torch.tanh(ratio, out=x).mul_(softcap)
    return ratio


def softcap_derivative(ratio: Tensor) -> Tensor:
    """Compute d cap(x) / dx at x / softcap = ``ratio``: 1 - tanh^2, in a form without cancellation at saturation."""
    e = (-2 * ratio.abs()).exp_()
    return 4 * e / (1 + e).square_()


def safe_labels(labels: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """Return which labels are in ``[0, vocab)``, and the labels with 0 in place of the others."""
    inside = (labels >= 0) & (labels < vocab)
    return inside, torch.where(inside, labels, 0)


def _row_blocks(keep: Tensor, vocab: int) -> Iterator[slice | Tensor]:
    """Return the rows to ``keep`` in blocks: slices where they are consecutive, otherwise indices."""
    for index in keep.nonzero().squeeze(-1).split(rows_per_block(vocab)):
        if len(index):
            first, last = int(index[0]), int(index[-1])
            yield slice(first, last + 1) if last - first + 1 == len(index) else index


def _copy_rows(logits: Tensor, rows: slice | Tensor, workspace: Tensor) -> Tensor:
    """Copy ``rows`` of ``[B, T, V]`` viewed as ``[B * T, V]`` to the first rows of ``workspace``, float32."""
    length = logits.shape[1]
    if isinstance(rows, slice) and rows.start // length == (rows.stop - 1) // length:
        first = rows.start % length
        block = logits[rows.start // length, first : first + rows.stop - rows.start]
    else:
        index = torch.arange(rows.start, rows.stop, device=logits.device) if isinstance(rows, slice) else rows
        block = logits[index // length, index % length]
    return workspace[: len(block)].copy_(block)


def exp_or_zero(x: Tensor, zero: float, out: Tensor) -> Tensor:
    """Compute exp(x) in ``out``, with 0 where it is at most ``zero``. Overwrites x with finite numbers.

    On a CPU, exp and products are up to a hundred times slower where their result is subnormal.
    """
    floor = math.log(zero) - 0.1  # its exp, rounded, is below zero
    return torch.threshold_(torch.exp(x.clamp_(min=floor), out=out), zero, 0.0)


def row_statistics(y: Tensor, labels: Tensor, temperature: Tensor, e: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute maximum, z at the label and sum of exp(z) of rows y [R, V], with z = (y - maximum) / temperature.

    Overwrites y with z, and ``e`` with exp(z).
    """
    maximum = y.amax(-1)
    # A row that contains only -inf has no distribution: NaN, as in PyTorch.
    y -= maximum[:, None]
    y /= temperature[:, None]
    inside, label = safe_labels(labels, y.shape[-1])
    target = torch.where(inside, y.gather(-1, label[:, None]).squeeze(-1), float("nan"))
    torch.exp(y.clamp_(min=_LOG_ZERO), out=e)
    return maximum, target, e.sum(-1)


def _forward(
    *,
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor,
    softcap: float,
    ignore_index: int,
    out: RowResults,
    cached: CachedRows | None = None,
) -> None:
    n, vocab = labels.shape[0], logits.shape[-1]
    keep = labels != ignore_index
    inside, label = safe_labels(labels, vocab)
    has_temperature = bool((temperature != 1).any())
    # Of an ignored row: log 1 and 0 make all results 0.
    maximum, target, weighted = logits.new_zeros(3, n, dtype=torch.float32)
    total = torch.ones_like(maximum)
    workspace = logits.new_empty(2, min(n, rows_per_block(vocab)), vocab, dtype=torch.float32)
    for rows in _row_blocks(keep, vocab):
        z = _copy_rows(logits, rows, workspace[0])
        capped_rows(z, softcap)
        maximum[rows] = top = z.amax(-1)
        # A row that contains only -inf has no distribution: NaN, as in PyTorch.
        z -= top[:, None]
        if has_temperature:
            z /= temperature[rows, None]
        target[rows] = z.gather(-1, label[rows, None]).squeeze(-1)
        z *= exp_or_zero(z, _ZERO_FORWARD, out=workspace[1, : len(z)])
        # One call for both: alone, the sum of a single row would be split over threads, and round differently.
        weighted[rows], total[rows] = workspace[:, : len(z)].sum(-1)
    log_total = total.log()
    out.logprobs.copy_(torch.where(inside | ~keep, target - log_total, float("nan")))
    out.entropy.copy_(log_total - weighted / total)
    out.row_stats[0], out.row_stats[1] = maximum, log_total
    if cached is not None:
        _cache(
            logits=logits,
            labels=labels,
            temperature=temperature,
            softcap=softcap,
            row_stats=out.row_stats,
            cached=cached,
        )


def _cache(
    *,
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor,
    softcap: float,
    row_stats: Tensor,
    cached: CachedRows,
) -> None:
    n, vocab = cached.probs.shape
    # A power of two, so that p / shift is as exact as p; its square root leaves both factors in float16's range.
    shift = (row_stats[1] / (2 * math.log(2))).floor_().mul_(math.log(2))
    inside, label = safe_labels(labels, vocab)
    for rows in torch.arange(n, device=labels.device).split(rows_per_block(vocab)):
        y, at = logits[0, rows].float(), label[rows, None]
        ratio = capped_rows(y, softcap)
        y -= row_stats[0, rows, None]
        y /= temperature[rows, None]
        rest = -torch.expm1(y.gather(-1, at) - row_stats[1, rows, None])
        p = exp_or_zero(y.sub_(shift[rows, None]), _ZERO_BACKWARD, out=torch.empty_like(y))
        if ratio is not None:
            slope = softcap_derivative(ratio)
            p *= slope
            rest *= slope.gather(-1, at)
        p.scatter_(-1, at, torch.where(inside[rows, None], 0.0, p.gather(-1, at)))
        cached.probs[rows] = p.to(cached.probs.dtype)
        cached.factors[1, rows] = torch.where(inside[rows], rest.squeeze(-1), 0.0)
    cached.factors[0] = torch.exp(shift - row_stats[1])


def _backward(
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
    rows_out = grad_logits.view(-1, vocab)
    live = ((grad_logprobs != 0) | (grad_entropy != 0)) & (labels != ignore_index)
    rows_out.index_fill_(0, (~live).nonzero().squeeze(-1), 0.0)
    inside, label = safe_labels(labels, vocab)
    onehot = inside.float()
    has_temperature, has_entropy = bool((temperature != 1).any()), bool((grad_entropy != 0).any())
    of_logprob, of_entropy = grad_logprobs / temperature, grad_entropy / temperature
    workspace = logits.new_empty(2, min(n, rows_per_block(vocab)), vocab, dtype=torch.float32)
    for rows in _row_blocks(live, vocab):
        logp = _copy_rows(logits, rows, workspace[0])
        ratio = capped_rows(logp, softcap)
        logp -= row_stats[0, rows, None]
        if has_temperature:
            logp /= temperature[rows, None]
        logp -= row_stats[1, rows, None]
        g = exp_or_zero(logp, _ZERO_BACKWARD, out=workspace[1, : len(logp)])
        if has_entropy:
            logp.add_(entropy[rows, None]).mul_(g).mul_(of_entropy[rows, None])
        g.scatter_add_(-1, label[rows, None], -onehot[rows, None])  # p - 1 first: it is exact near p = 1
        g *= -of_logprob[rows, None]
        if has_entropy:
            g -= logp
        if ratio is not None:
            g *= softcap_derivative(ratio)
        rows_out[rows] = g if isinstance(rows, slice) else g.to(grad_logits.dtype)


TORCH_ROW_PASS = RowPass(_forward, _backward, _cache)
