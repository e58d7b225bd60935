"""Checks of registered operations that the tests of the operations share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def check_registration(
    operation: Any, function: Callable[..., Tensor | Sequence[Tensor]], tensors: Sequence[Tensor], **settings: Any
) -> None:
    """Check a registered operation with opcheck, and that its function compiles whole with the same bits.

    Args:
        operation: the registered operation, called with ``tensors`` and ``settings``.
        function: the public function, called likewise.
    """
    torch.library.opcheck(operation.overload, tuple(tensors), settings)
    compiled = torch.compile(lambda *given: function(*given, **settings), fullgraph=True, backend="aot_eager")
    got, want = compiled(*tensors), function(*tensors, **settings)
    for x, y in zip(*([out] if isinstance(out, Tensor) else out for out in (got, want)), strict=True):
        assert torch.equal(x, y)
