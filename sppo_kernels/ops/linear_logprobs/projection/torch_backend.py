"""PyTorch backend of the fused projection: a tile of logits stays in the cache of a CPU until it is finished.

Every product has the same shape, whatever the number of tokens: the last tile is filled up with zeros. A matrix product
of another shape may add its terms in another order, and a token's results would depend on the tokens beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ...._backend import without_autocast
from ...row_passes.torch import capped_rows, exp_or_zero, softcap_derivative
from .factors import Factors, ProjectionPass, Statistics

TOKENS, COLUMNS = 256, 2048  # of a tile: 2 MB of logits

_LEAST_RATIO = 2.0**-99  # of probabilities, to that of the base; less counts as 0


class _Tokens:
    """Numbers of N tokens, filled up to whole tiles."""

    def __init__(self, n: int) -> None:
        self.n, self.size = n, -(-n // TOKENS) * TOKENS

    def fill_up(self, x: Tensor, value: float = 0.0) -> Tensor:
        """Return ``x`` [N, ...] with rows of ``value`` after it; half precision becomes float32."""
        dtype = torch.float32 if x.is_floating_point() else x.dtype
        filled_up = x.new_full((self.size, *x.shape[1:]), value, dtype=dtype)
        filled_up[: self.n] = x
        return filled_up

    def tiles(self, factors: Factors) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield rows, columns and float32 logits of each tile: all tokens with some columns, then with the next."""
        vocab = len(factors.weights[0])
        hiddens = [self.fill_up(hidden) for hidden in factors.hiddens]
        workspace = hiddens[0].new_empty(TOKENS * min(COLUMNS, vocab))
        for first_column in range(0, vocab, COLUMNS):
            columns = slice(first_column, min(first_column + COLUMNS, vocab))
            part = factors.columns(columns)
            weights = [weight.float() for weight in part.weights]
            logits = workspace[: TOKENS * len(weights[0])].view(TOKENS, -1)
            for first in range(0, self.size, TOKENS):
                rows = slice(first, first + TOKENS)
                with without_autocast(logits.device):
                    torch.mm(hiddens[0][rows], weights[0].t(), out=logits)
                    for hidden, weight in zip(hiddens[1:], weights[1:], strict=True):
                        logits.addmm_(hidden[rows], weight.t())
                if part.bias is not None:
                    logits += part.bias.float()
                yield rows, columns, logits


def _at_label(labels: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Return the tokens whose label is one of the columns, and its place among them."""
    inside = ((labels >= columns.start) & (labels < columns.stop)).nonzero().squeeze(-1)
    return inside, labels[inside] - columns.start


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
    n, vocab = len(labels), len(factors.weights[0])
    tokens = _Tokens(n)
    labels, temperature, base = tokens.fill_up(labels, -1), tokens.fill_up(temperature, 1.0), tokens.fill_up(base)
    sums = base.new_zeros(2 if log_floor is None else 3, tokens.size)
    bits = None if log_floor is None else labels.new_empty(tokens.size, -(-vocab // 8), dtype=torch.uint8)
    buffer = base.new_empty(TOKENS * COLUMNS)
    for rows, columns, x in tokens.tiles(factors):
        ratio = capped_rows(x, factors.softcap)
        d = x.sub_(base[rows, None]).div_(temperature[rows, None])
        token, place = _at_label(labels[rows], columns)
        d[token, place] = float("-inf")  # the label's share is added afterwards
        above = d > log_floor if log_floor is not None else None
        e = exp_or_zero(d, _LEAST_RATIO, out=buffer[: d.numel()].view(d.shape))
        if probs is not None:
            p = e if ratio is None else e * softcap_derivative(ratio)
            live = slice(rows.start, min(rows.stop, n))
            probs[live, columns] = (p * scale).to(probs.dtype)[: n - rows.start]
        if bits is not None and above is not None and log_floor is not None:
            bits[rows, columns.start // 8 : -(-columns.stop // 8)] = _packed(above)
            sums[2, rows] += e.clamp(max=math.exp(log_floor)).sum(-1)
        sums[0, rows] += e.sum(-1)
        sums[1, rows] += d.mul_(e).sum(-1)
    return Statistics(sums[:, :n].contiguous(), None if bits is None else bits[:n])


def _packed(mask: Tensor) -> Tensor:
    """Return eight columns per byte, the first in its lowest bit."""
    mask = torch.nn.functional.pad(mask, (0, -mask.shape[1] % 8)).view(len(mask), -1, 8)
    return (mask << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(-1, dtype=torch.uint8)


def maximum(factors: Factors) -> Tensor:
    tokens = _Tokens(len(factors.hiddens[0]))
    result = factors.hiddens[0].new_full((tokens.size,), float("-inf"), dtype=torch.float32)
    for rows, _columns, x in tokens.tiles(factors):
        capped_rows(x, factors.softcap)
        torch.maximum(result[rows], x.amax(-1), out=result[rows])
    return result[: tokens.n]


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
    n = len(labels)
    tokens = _Tokens(n)
    labels, temperature = tokens.fill_up(labels, -1), tokens.fill_up(temperature, 1.0)
    base, factor, at_label = (tokens.fill_up(x) for x in (base, factor, at_label))
    entropy_factor = None if entropy_factor is None else tokens.fill_up(entropy_factor)
    buffer = base.new_empty(TOKENS * COLUMNS)
    for rows, columns, x in tokens.tiles(factors):
        ratio = capped_rows(x, factors.softcap)
        d = x.sub_(base[rows, None]).div_(temperature[rows, None])
        e = exp_or_zero(d, _LEAST_RATIO, out=buffer[: d.numel()].view(d.shape))
        if entropy_factor is None:
            e *= -factor[rows, None]
        else:
            e *= d.mul_(-entropy_factor[rows, None]).sub_(factor[rows, None])
        if ratio is not None:
            e *= softcap_derivative(ratio)
        token, place = _at_label(labels[rows], columns)
        e[token, place] = at_label[rows][token]
        out[rows.start : min(rows.stop, n), columns] = e.to(out.dtype)[: n - rows.start]


TORCH_PROJECTION = ProjectionPass(statistics, maximum, gradient)
