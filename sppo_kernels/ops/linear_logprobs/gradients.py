"""Gradients of hidden states, output embedding and bias, accumulated from blocks of logit gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .matmul import Projection
from .weighted_rows import WEIGHTED_ROWS, Entries, by_column


def same_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of ``x``."""
    return x.dtype


class GradientAccumulator:
    """Sums d hiddens, d weights and d bias over blocks of tokens.

    d weight accumulates in float32. For float16 inputs, upstream gradients are divided by a power of two (``scale``)
    near the largest of them: a loss averaged over 100,000 tokens leaves gradients that float16 could not represent.
    Gradients passed to ``add`` must already be divided by what ``rescale`` returned last.
    """

    def __init__(
        self,
        *,
        hiddens: Sequence[Tensor],
        weights: Sequence[Tensor],
        bias: Tensor | None,
        needs: Sequence[bool],
        hidden_dtype: torch.dtype,
    ) -> None:
        n = len(hiddens)
        self.projection = Projection(weights, bias)
        self.hiddens, self.weights, self.bias = hiddens, weights, bias
        self.needs_hiddens, self.needs_weights, self.needs_bias = needs[:n], needs[n:-1], needs[-1]
        self.grad_hiddens = [
            x.new_zeros(x.shape if needed else (0,), dtype=hidden_dtype)
            for x, needed in zip(hiddens, self.needs_hiddens, strict=True)
        ]
        self.grad_weights: list[Tensor | None] = [None] * n
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

    def add(self, index: Tensor, logit_grads: Tensor, coefficient: Tensor | None = None) -> None:
        """Add logit gradients [C, V] of tokens ``index``, each row multiplied by ``coefficient`` [C, 1]."""
        factor = self.projection.factor(logit_grads)
        for i, (hidden, weight) in enumerate(zip(self.hiddens, self.projection.weights, strict=True)):
            if self.needs_hiddens[i]:
                grad = self.projection.product(factor, weight)
                grad *= self.scale if coefficient is None else self.scale * coefficient
                self.grad_hiddens[i][index] = grad.to(self.grad_hiddens[i].dtype)
                del grad
            if self.needs_weights[i]:
                h = hidden[index] if coefficient is None else (hidden[index] * coefficient).to(hidden.dtype)
                self.grad_weights[i] = self.projection.product(
                    factor.t(), self.projection.factor(h), plus=self.grad_weights[i]
                )
        if not self.needs_bias:
            return
        if coefficient is None:
            self.grad_bias += logit_grads.sum(0, dtype=torch.float32)
        else:  # in two parts: where the coefficient is the same for all tokens, so is its rounding error
            high = coefficient.to(logit_grads.dtype)
            parts = torch.cat([high, (coefficient - high).to(logit_grads.dtype)], 1)
            self.grad_bias += self.projection.product(factor.t(), self.projection.factor(parts)).sum(1)

    def add_sparse(self, index: Tensor, entries: Entries, *, backend: str, tokens_per_block: int) -> None:
        """Add sparse logit gradients of tokens ``index``, with their coefficients already multiplied in."""
        weighted_rows = WEIGHTED_ROWS[backend]
        columns = by_column(entries)
        token, weight = entries.token[columns.order], entries.weight[columns.order]
        for i, (hidden, factor) in enumerate(zip(self.hiddens, self.projection.weights, strict=True)):
            if self.needs_hiddens[i]:
                for first in range(0, len(index), tokens_per_block):
                    part = index[first : first + tokens_per_block]
                    grad = self.scale.new_zeros(len(part), hidden.shape[1])
                    weighted_rows(
                        out=grad,
                        place=torch.arange(len(part), device=index.device),
                        index=entries.column,
                        weight=entries.weight,
                        bounds=entries.bounds[first : first + len(part) + 1],
                        rows=factor,
                    )
                    self.grad_hiddens[i][part] = grad.mul_(self.scale).to(self.grad_hiddens[i].dtype)
                    del grad  # before the next block's
            if self.needs_weights[i]:
                if self.grad_weights[i] is None:
                    self.grad_weights[i] = self.scale.new_zeros(self.weights[i].shape)
                weighted_rows(
                    out=self.grad_weights[i],
                    place=columns.column,
                    index=index[token],
                    weight=weight,
                    bounds=columns.bounds,
                    rows=hidden,
                )
        if self.needs_bias:
            weighted_rows(
                out=self.grad_bias[:, None],
                place=columns.column,
                index=torch.zeros_like(token),
                weight=weight,
                bounds=columns.bounds,
                rows=self.scale.new_ones(1, 1),
            )

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
