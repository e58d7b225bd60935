"""Factors of the fused projection, and the interface of its backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Factors(NamedTuple):
    """What the logits of N tokens are made of: capped sums of products, and a bias."""

    hiddens: list[Tensor]  # [N, H], and [N, r] of an adapter
    weights: list[Tensor]  # [V, H], and [V, r] of an adapter
    bias: Tensor | None  # [V]
    softcap: float  # 0 for none

    def tokens(self, index: Tensor | slice) -> Factors:
        """Return the factors of some of the tokens."""
        return self._replace(hiddens=[hidden[index] for hidden in self.hiddens])

    def columns(self, columns: slice) -> Factors:
        """Return the factors of some columns of the logits."""
        bias = None if self.bias is None else self.bias[columns]
        return self._replace(weights=[weight[columns] for weight in self.weights], bias=bias)


class Statistics(NamedTuple):
    """Sums over the columns of the logits other than the label's, with d = (cap(x) - base) / temperature."""

    sums: Tensor  # [2 or 3, N] float32: of exp(d), of exp(d) d, and with a floor of exp(min(d, floor))
    bits: Tensor | None  # [N, words] uint8 or int32: a bit per column, the lowest first, set where d is above the floor


class ProjectionPass(NamedTuple):
    """One backend of the fused projection. All but the factors are named. Labels are columns; V for one elsewhere.

    statistics(factors, labels, temperature, base, probs=None, scale=1, log_floor=None): returns Statistics. Fills
        ``probs`` [N, V] with scale exp(d) cap'(x), and 0 at the label. With ``log_floor`` it returns bits.
    maximum(factors): returns the maximum of cap(x) of each token
    gradient(factors, labels, temperature, base, factor, entropy_factor, at_label, out): fills ``out`` [N, V] with
        -exp(d) (factor + entropy_factor d) cap'(x), and ``at_label`` at the label
    """

    statistics: Callable[..., Statistics]
    maximum: Callable[..., Tensor]
    gradient: Callable[..., None]


def head_class(weight: Tensor) -> str:
    """Name the class of output embeddings with the shape and the element size of ``weight``."""
    vocab, width = weight.shape
    return f"{vocab} x {width}, {weight.itemsize} bytes"
