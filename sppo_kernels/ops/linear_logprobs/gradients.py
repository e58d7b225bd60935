"""Gradients of hidden states, output embedding and bias, accumulated from blocks of logit gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .matmul import Projection
from .scaled_rows import SCALED_ROWS
from .weighted_rows import WEIGHTED_ROWS, Entries


def same_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of ``x``."""
    return x.dtype


class ColumnSums(NamedTuple):
    """Gradients of which some columns of the logits have been added."""

    hiddens: list[Tensor | None]  # [C, H] float32
    new_weights: list[bool]  # whether d weight has been allocated, and not set, for these columns


class GradientAccumulator:
    """Sums d hiddens, d weights and d bias over blocks of tokens.

    d weight accumulates in float32, unless ``single_product`` says that one product makes it. For float16 inputs,
    upstream gradients are divided by a power of two (``scale``) near the largest of them: a loss averaged over 100,000
    tokens leaves gradients that float16 could not represent. Gradients passed to ``add`` must already be divided by
    what ``rescale`` returned last.
    """

    def __init__(
        self,
        *,
        hiddens: Sequence[Tensor],
        weights: Sequence[Tensor],
        bias: Tensor | None,
        needs: Sequence[bool],
        hidden_dtype: torch.dtype,
        backend: str,
    ) -> None:
        n = len(hiddens)
        self.scaled_rows, self.weighted_rows = SCALED_ROWS[backend], WEIGHTED_ROWS[backend]
        self.projection = Projection(weights, bias)
        self.hiddens, self.weights, self.bias = hiddens, weights, bias
        self.needs_hiddens, self.needs_weights, self.needs_bias = needs[:n], needs[n:-1], needs[-1]
        self.grad_hiddens = [
            x.new_zeros(x.shape if needed else (0,), dtype=hidden_dtype)
            for x, needed in zip(hiddens, self.needs_hiddens, strict=True)
        ]
        self.grad_weights: list[Tensor | None] = [None] * n
        self.single_product = False
        self.scaled = weights[0].dtype == torch.float16
        initial = 2.0**-100 if self.scaled else 1.0
        self.scale = torch.full((), initial, dtype=torch.float32, device=weights[0].device)
        self.grad_bias = self.scale.new_zeros(len(weights[0]) if self.needs_bias else 0)

    def rescale(self, upstream: Tensor) -> Tensor:
        """Return the divisor for upstream gradients: in float16 a power of two above the largest so far, else 1.

        What has been accumulated is rescaled to it.
        """
        if self.scaled and len(upstream):
            largest = upstream.abs().amax()
            exponent = torch.frexp(largest).exponent.clamp(-100, 100)
            exponent = torch.where(largest == 0, -100, exponent)  # zeros require no scale
            scale = torch.maximum(self.scale, torch.ldexp(torch.ones_like(self.scale), exponent))
            for total in (*self.grad_weights, self.grad_bias):
                if total is not None:
                    total *= self.scale / scale
            self.scale = scale
        return self.scale

    def add(self, index: Tensor, hiddens: Sequence[Tensor], logit_grads: Tensor) -> None:
        """Add logit gradients [C, V] of tokens ``index``, with hidden states [C, H]."""
        columns = self.begin_columns()
        self.add_columns(hiddens, logit_grads, slice(0, logit_grads.shape[1]), columns)
        self.finish_columns(index, columns)

    def begin_columns(self) -> ColumnSums:
        """Begin to add the logit gradients of some tokens, one block of columns after the other."""
        new = [self._allocate_weight(i, torch.empty) for i in range(len(self.weights))]
        return ColumnSums([None] * len(self.hiddens), new)

    def add_columns(self, hiddens: Sequence[Tensor], logit_grads: Tensor, columns: slice, sums: ColumnSums) -> None:
        """Add logit gradients [C, columns] of tokens with hidden states [C, H]."""
        factor = self.projection.factor(logit_grads)
        for i, (hidden, weight) in enumerate(zip(hiddens, self.projection.weights, strict=True)):
            if self.needs_hiddens[i]:
                sums.hiddens[i] = self.projection.product(factor, weight[columns], plus=sums.hiddens[i])
            if self.needs_weights[i]:
                self._add_to_weight(i, factor, hidden, columns, new=sums.new_weights[i])
        if self.needs_bias:
            self.grad_bias[columns] += logit_grads.sum(0, dtype=torch.float32)

    def finish_columns(self, index: Tensor, sums: ColumnSums) -> None:
        """Set the gradients of the hidden states of tokens ``index``, all of whose columns have been added."""
        for grads, total in zip(self.grad_hiddens, sums.hiddens, strict=True):
            if total is not None:
                self.scaled_rows(out=grads, x=total, factor=self.scale, target=index)

    def add_cached(self, index: Tensor, probs: Tensor, *, factors: Tensor, labels: Tensor) -> None:
        """Add logit gradients ``factors[1] onehot(label) - factors[0] probs`` of tokens ``index``.

        Args:
            index: ``[C]``.
            probs: ``[C, V]``, of ``CachedRows``.
            factors: ``[2, C]``, of ``CachedRows``, times the upstream gradients.
            labels: ``[C]``; V for one that another rank has.
        """
        factor = self.projection.factor(probs)
        row, label = -factors[0], factors[1]
        scaled = factors * self.scale
        place, order = labels.sort(stable=True)
        at_label = {"place": place, "weight": label[order]}
        for i, (hidden, weight) in enumerate(zip(self.hiddens, self.projection.weights, strict=True)):
            if self.needs_hiddens[i]:
                self.scaled_rows(
                    out=self.grad_hiddens[i],
                    x=self.projection.product(factor, weight),
                    factor=-scaled[0],
                    target=index,
                    label_factor=scaled[1],
                    labels=labels,
                    weight=weight,
                )
            if self.needs_weights[i]:
                h = hidden.new_empty(len(index), hidden.shape[1])
                self.scaled_rows(out=h, x=hidden, factor=row, source=index)
                new = self._allocate_weight(i, torch.empty)
                self._add_to_weight(i, factor, h, slice(0, len(weight)), new=new)
                del h
                self.weighted_rows(out=self.grad_weights[i], index=index[order], rows=hidden, **at_label)
        if self.needs_bias:
            # In two parts: where the factor is the same for all tokens, so is its rounding error.
            high = row.to(probs.dtype)
            parts = torch.stack([high, (row - high).to(probs.dtype)], 1)
            self.grad_bias += self.projection.product(factor.t(), self.projection.factor(parts)).sum(1)
            self._add_to_bias(**at_label)

    def add_sparse(self, index: Tensor, entries: Entries, *, tokens_per_block: int) -> None:
        """Add sparse logit gradients of tokens ``index``, with their coefficients already multiplied in."""
        column, order = entries.column.sort(stable=True)
        token = index[entries.token[order]]
        by_column = {"place": column, "weight": entries.weight[order]}
        for i, (hidden, weight) in enumerate(zip(self.hiddens, self.weights, strict=True)):
            if self.needs_hiddens[i]:
                for tokens, part in _blocks_of_tokens(entries, len(index), tokens_per_block):
                    total = self.scale.new_zeros(tokens.stop - tokens.start, hidden.shape[1])
                    place = part.token - tokens.start if tokens.start else part.token
                    self.weighted_rows(
                        out=total, place=place, index=part.column, weight=part.weight, rows=weight, out_is_zero=True
                    )
                    self.scaled_rows(out=self.grad_hiddens[i], x=total, factor=self.scale, target=index[tokens])
                    del total  # before the next block's
            if self.needs_weights[i]:
                new = self._allocate_weight(i, torch.zeros)
                self.weighted_rows(out=self.grad_weights[i], index=token, rows=hidden, out_is_zero=new, **by_column)
        if self.needs_bias:
            self._add_to_bias(**by_column)

    def _allocate_weight(self, i: int, allocate: Callable[..., Tensor]) -> bool:
        """Allocate d weight if it is needed and is not yet there. Return whether it was allocated.

        It has its own dtype where a single product makes it. A float16 gradient waits for its scale in float32.
        """
        if not self.needs_weights[i] or self.grad_weights[i] is not None:
            return False
        own = self.single_product and self.projection.mixed and not self.scaled
        weight = self.weights[i]
        dtype = weight.dtype if own else torch.float32
        self.grad_weights[i] = allocate(weight.shape, dtype=dtype, device=weight.device)
        return True

    def _add_to_weight(self, i: int, factor: Tensor, hidden: Tensor, columns: slice, *, new: bool) -> None:
        """Add the product of logit gradients [C, columns] and hidden states [C, H], or set d weight to it if new."""
        total = self.grad_weights[i]
        assert total is not None
        rows = total[columns]
        self.projection.product(
            factor.t(),
            self.projection.factor(hidden),
            plus=None if new else rows,
            out=rows if new else None,
            dtype=rows.dtype,
        )

    def _add_to_bias(self, *, place: Tensor, weight: Tensor) -> None:
        """Add ``weight`` to the gradient of the bias at the sorted ``place``."""
        ones = self.scale.new_ones(1, 1)
        index = torch.zeros_like(place)
        self.weighted_rows(out=self.grad_bias[:, None], place=place, index=index, weight=weight, rows=ones)

    def results(self, dtype_of: Callable[[Tensor], torch.dtype] = same_dtype) -> list[Tensor]:
        """Return gradients of hiddens, weights and bias; an empty tensor for one that is not needed.

        ``dtype_of`` maps a weight or the bias to the dtype of its gradient.
        """
        bias = self.weights[0] if self.bias is None else self.bias
        grad_weights = [
            weight.new_zeros(weight.shape if needed else (0,), dtype=dtype_of(weight))
            if total is None
            else (total.mul_(self.scale) if self.scaled else total).to(dtype_of(weight))
            for total, weight, needed in zip(self.grad_weights, self.weights, self.needs_weights, strict=True)
        ]
        return [*self.grad_hiddens, *grad_weights, (self.grad_bias * self.scale).to(dtype_of(bias))]


def _blocks_of_tokens(entries: Entries, num_tokens: int, size: int) -> Iterator[tuple[slice, Entries]]:
    """Yield ranges of up to ``size`` tokens, and the entries of each."""
    if num_tokens <= size:
        yield slice(0, num_tokens), entries
        return
    # From the device's own numbers: a list copied to it would wait once more.
    starts = torch.arange(0, num_tokens + size, size, device=entries.token.device)
    bounds = torch.searchsorted(entries.token, starts).tolist()
    for start, (first, last) in zip(range(0, num_tokens, size), pairwise(bounds), strict=True):
        yield slice(start, min(start + size, num_tokens)), Entries(*(field[first:last] for field in entries))
