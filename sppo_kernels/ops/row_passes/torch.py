"""PyTorch backend of the row passes: one block of rows at a time, so that its float32 temporaries stay in the cache."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .results import CachedRows, RowPass, RowResults

_BLOCK_ELEMENTS = 1 << 20  # 4 MB, and as much again for exp of it
_LOG_ZERO = -200.0  # exp is 0 in float32 below -104; a finite stand-in keeps 0 * -inf out of p log p


def rows_per_block(vocab: int) -> int:
    """Return how many rows have about _BLOCK_ELEMENTS elements in all."""
    return max(1, _BLOCK_ELEMENTS // vocab)


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


def _row_blocks(rows: Tensor, labels: Tensor, ignore_index: int):
    """Return indices of the rows with a loss, in blocks."""
    keep = (labels != ignore_index).nonzero().squeeze(-1)
    return keep.split(rows_per_block(rows.shape[-1]))


def _block_of_rows(logits: Tensor, index: Tensor) -> Tensor:
    """Copy rows ``index`` of ``[B, T, V]`` viewed as ``[B * T, V]`` to float32, without copying all of it."""
    return logits[index // logits.shape[1], index % logits.shape[1]].float()


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
    for field in out:
        field.zero_()
    for index in _row_blocks(logits, labels, ignore_index):
        z = _block_of_rows(logits, index)
        capped_rows(z, softcap)
        e = torch.empty_like(z)
        maximum, target, total = row_statistics(z, labels[index], temperature[index], e)
        log_total = total.log()
        out.logprobs[index] = target - log_total
        out.entropy[index] = log_total - z.mul_(e).sum(-1) / total
        out.row_stats[0, index], out.row_stats[1, index] = maximum, log_total
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
        p = y.sub_(shift[rows, None]).exp_()
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
    rows_out = grad_logits.zero_().view(-1, logits.shape[-1])
    live = torch.where((grad_logprobs != 0) | (grad_entropy != 0), labels, ignore_index)
    for index in _row_blocks(logits, live, ignore_index):
        logp = _block_of_rows(logits, index)
        ratio = capped_rows(logp, softcap)
        logp -= row_stats[0, index, None]
        logp /= temperature[index, None]
        logp -= row_stats[1, index, None]
        p = logp.exp()
        inside, label = safe_labels(labels[index], logp.shape[-1])
        e = (-p).scatter_add_(-1, label[:, None], inside[:, None].float())  # 1 - p first: it is exact near p = 1
        spread = logp.clamp_(min=_LOG_ZERO) + entropy[index, None]
        g = grad_logprobs[index, None] * e - grad_entropy[index, None] * p * spread
        if ratio is not None:
            g *= softcap_derivative(ratio)
        rows_out[index] = (g / temperature[index, None]).to(grad_logits.dtype)


TORCH_ROW_PASS = RowPass(_forward, _backward, _cache)
