"""Token indices, for which the host waits for the device.

It also waits for the sizes of the shards of a process group, and for where blocks of entries begin.

Other modules call these functions through this module, so that a replacement (for tensors without values, say) is seen
everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_MULTIPLE = 128


def nonzero_indices(mask: Tensor) -> Tensor:
    """Return the indices where ``mask`` ``[N]`` is set."""
    return mask.nonzero().squeeze(-1)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Return ``x[..., index]`` for ascending indices: ``x`` itself if they are all of them."""
    return x if len(index) == x.shape[-1] else x[..., index]


def partition(selected: Tensor, kind: Tensor | int, number: int) -> list[Tensor]:
    """Return the indices where ``selected`` ``[N]`` is set and ``kind`` is 0, 1 ... ``number - 1``.

    ``kind`` is ``[N]``, or the kind of all.
    """
    if isinstance(kind, int):
        indices = nonzero_indices(selected)
        return [indices if k == kind else indices[:0] for k in range(number)]
    kind = kind.masked_fill(~selected, number)
    # bincount would wait twice more on CUDA, for the smallest and the largest kind.
    sizes = (kind == torch.arange(number, device=kind.device)[:, None]).sum(1).tolist()
    return list(kind.argsort(stable=True)[: sum(sizes)].split(sizes))


def ranges(number: int, size: int) -> list[range]:
    """Split ``range(number)`` into ranges of at most ``size`` that differ little in length.

    Lengths are multiples of 128 where ``size`` is, for efficient matrix products.
    """
    if not number:
        return []
    even = -(-number // -(-number // size))
    step = min(size, -(-even // _MULTIPLE) * _MULTIPLE)
    return [range(first, min(first + step, number)) for first in range(0, number, step)]


def count(mask: Tensor, without_values: int | None = None) -> int:
    """Count how many are set. Fake and meta tensors have no values: return ``without_values``, or all."""
    if isinstance(mask, FakeTensor) or mask.is_meta:
        return len(mask) if without_values is None else without_values
    return int(mask.sum())


def total(sizes: Tensor, without_values: int) -> int:
    """Add up ``sizes``; ``without_values`` for fake and meta tensors, which have none."""
    return without_values if isinstance(sizes, FakeTensor) or sizes.is_meta else int(sizes.sum())
