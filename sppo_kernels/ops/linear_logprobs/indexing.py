"""Token indices. The host waits for the device only here, and for the sizes of the shards of a process group.

Other modules call these functions through this module, so that a replacement (for tensors without values, say) is seen
everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def nonzero_indices(mask: Tensor) -> Tensor:
    """Return the indices where ``mask`` ``[N]`` is set."""
    return mask.nonzero().squeeze(-1)


def chunks(index: Tensor, size: int) -> Sequence[Tensor]:
    """Split indices into chunks of at most ``size``; none if there are no indices."""
    return index.split(size) if len(index) else ()


def count(mask: Tensor, without_values: int | None = None) -> int:
    """Count how many are set. Fake and meta tensors have no values: return ``without_values``, or all."""
    if isinstance(mask, FakeTensor) or mask.is_meta:
        return len(mask) if without_values is None else without_values
    return int(mask.sum())
