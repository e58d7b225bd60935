"""Matrix products with the output embedding: the vendor's, with float32 results."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..._backend import without_autocast

_ROW_MULTIPLE = 64  # elements: 128 bytes in half precision


def row_stride(vocab: int) -> int:
    """Return the elements from one row of logits to the next, a multiple of 64.

    Rows then begin at multiples of 16 bytes for any V, which is the width at which matrix products copy.
    """
    return -(-vocab // _ROW_MULTIPLE) * _ROW_MULTIPLE


class Projection:
    """Products with the output embedding in float32, from half-precision factors where the device supports it."""

    def __init__(self, weights: Sequence[Tensor], bias: Tensor | None) -> None:
        half = weights[0].dtype in (torch.float16, torch.bfloat16)
        self.mixed = half and weights[0].device.type == "cuda" and torch.version.hip is None
        self.bias = None if bias is None else bias.float()
        self._weights = weights

    @cached_property
    def weights(self) -> Sequence[Tensor]:
        """Factors of the products: elsewhere float32 copies, so that logits are not rounded to half precision."""
        return self._weights if self.mixed else [weight.float() for weight in self._weights]

    def accepts(self, dtype: torch.dtype) -> bool:
        """Return whether factors of this dtype are multiplied without a copy."""
        return self.mixed or dtype == torch.float32

    def factor(self, x: Tensor) -> Tensor:
        """Convert ``x`` to the dtype that ``product`` multiplies."""
        return x if self.mixed else x.float()

    def product(
        self,
        a: Tensor,
        b: Tensor,
        plus: Tensor | None = None,
        out: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Compute ``a b + plus`` in ``dtype``, overwriting ``plus``. A dtype other than float32 is that of the factors.

        No second tensor of that size is allocated, unless it has one row.
        """
        out_dtype: dict[str, Any] = {"out_dtype": dtype} if self.mixed and dtype == torch.float32 else {}
        with without_autocast(a.device):
            if plus is None:
                return torch.mm(a, b, **out_dtype, out=out)
            if self.mixed and len(plus) == 1:  # addmm treats one row as a bias, which PyTorch rejects under TunableOp
                return plus.add_(torch.mm(a, b, **out_dtype))
            return torch.addmm(plus, a, b, **out_dtype, out=plus)

    def workspace(self, tokens: int, columns: int | None = None) -> Tensor | None:
        """Allocate memory for the logits of successive blocks on a CPU; None elsewhere, where the allocator reuses it.

        On a CPU the system clears each new page first, which takes a third of the time of the product.
        """
        if self._weights[0].device.type != "cpu" or self.mixed:
            return None
        return self._allocate(tokens, len(self._weights[0]) if columns is None else columns)

    def _allocate(self, tokens: int, columns: int) -> Tensor:
        """Allocate [tokens, columns] float32 with rows ``row_stride(columns)`` apart."""
        return self._weights[0].new_empty(tokens, row_stride(columns), dtype=torch.float32)[:, :columns]

    def logits(
        self, hiddens: Sequence[Tensor], workspace: Tensor | None = None, columns: slice = slice(None)
    ) -> Tensor:
        """Compute columns of the logits of C tokens, [1, C, columns] float32, in ``workspace`` if given."""
        weights = [weight[columns] for weight in self.weights]
        shape = len(hiddens[0]), len(weights[0])
        out = self._allocate(*shape) if workspace is None else workspace[: shape[0], : shape[1]]
        logits = None
        for hidden, weight in zip(hiddens, weights, strict=True):
            logits = self.product(self.factor(hidden), weight.t(), plus=logits, out=out)
        assert logits is not None
        return (logits if self.bias is None else logits.add_(self.bias[columns])).unsqueeze(0)
