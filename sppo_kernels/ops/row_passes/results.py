"""Results of the row passes, and the probabilities that the forward pass can leave for backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class RowResults(NamedTuple):
    """Results of the forward pass over N rows of logits, float32."""

    logprobs: Tensor  # [N]
    entropy: Tensor  # [N]
    row_stats: Tensor  # [2, N]: maximum of y = cap(x), and log of the sum of exp((y - maximum) / tau)

    @classmethod
    def empty(cls, num_rows: int, device: torch.device) -> RowResults:
        """Allocate results of ``num_rows`` rows."""
        return cls(*(torch.empty(*lead, num_rows, dtype=torch.float32, device=device) for lead in ((), (), (2,))))

    def rows(self, first: int, last: int) -> RowResults:
        """Return a view of the results of rows ``first`` to ``last``."""
        return RowResults(*(field[..., first:last] for field in self))


class CachedRows(NamedTuple):
    """Probabilities of N rows up to a factor per row, with the label apart.

    In terms of them tau d logprob / d x = factors[1] onehot(label) - factors[0] probs. The base of a row is any number
    near its largest z that spares ``probs`` overflow and underflow. The rounding errors of ``probs`` are relative to
    entries that are all positive, and its label's entry is in ``factors`` alone, in float32: where the label is likely,
    or all tokens are equally likely, the rounding of onehot - p would dominate the error of the gradients.
    """

    probs: Tensor  # [N, V], exp(z - base) cap'(x), and 0 at the label
    factors: Tensor  # [2, N] float32: exp(base - log-sum-exp of z), and (1 - p) cap'(x) at the label


class RowPass(NamedTuple):
    """Forward and backward pass of one backend over rows of logits [B, T, V]. Arguments are named.

    Labels [N], temperatures [N] and gradients [N] are one per row, N = B T; only temperatures may be strided.

    forward(logits, labels, temperature, softcap, ignore_index, out, cached=None): fills ``out``, a ``RowResults``, and
        in the same read ``cached``, a ``CachedRows``
    backward(grad_logprobs, grad_entropy, logits, labels, temperature, entropy, row_stats, softcap, ignore_index,
        grad_logits): overwrites ``grad_logits``
    cache(logits, labels, temperature, softcap, row_stats, cached): fills ``cached`` with rows of which the
        ``row_stats`` are known. A label outside [0, V), which another rank has, gets no entry.
    """

    forward: Callable[..., None]
    backward: Callable[..., None]
    cache: Callable[..., None]
