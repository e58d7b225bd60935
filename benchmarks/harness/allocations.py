"""Tracking of PyTorch's allocations, on fake tensors too, where the library's operations run without their kernels."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate, count
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.harness.library_seams import OPERATION_BODIES

GIB = 1 << 30


class Allocations(TorchDispatchMode):
    """Records each storage that is allocated under this mode, and when it is freed.

    Args:
        inputs: tensors whose storages do not count.

    Attributes:
        kind: the kind of storages that are allocated from now on.
    """

    def __init__(self, inputs: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.kind: Hashable = ""
        self._inputs = {x.untyped_storage() for x in inputs}
        self._serial = count()
        self._alive = {storage._cdata: next(self._serial) for storage in self._inputs}
        self._sizes: dict[int, int] = {}
        self._kinds: dict[int, Hashable] = {}
        self._events: list[tuple[int, int]] = []  # storage and its bytes, negative when it is freed

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if DTensor in types:
            return NotImplemented  # the same call follows with the local tensors
        if func is torch.ops.aten.addmm.dtype_out:  # exists only for CUDA, and writes in place
            return kwargs["out"]
        if func in OPERATION_BODIES:
            with self:
                return OPERATION_BODIES[func](*args, **kwargs)
        out = func(*args, **kwargs)
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                parts = [x.crow_indices(), x.col_indices(), x.values()] if x.layout == torch.sparse_csr else [x]
                for part in parts:
                    self._record(part.untyped_storage())
        return out

    @contextmanager
    def making(self, kind: Hashable) -> Iterator[None]:
        """Give what is allocated inside this kind."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def name(self, kind: Hashable, tensors: Iterable[Tensor]) -> None:
        """Set the kind of tensors that are alive, as of their allocation."""
        for x in tensors:
            local = x._local_tensor if isinstance(x, DTensor) else x
            self._kinds[self._alive[local.untyped_storage()._cdata]] = kind

    def kind_of(self, x: Tensor) -> Hashable:
        """Return the kind of a tensor's storage; None if its allocation was not recorded."""
        return self._kinds.get(self._alive.get(x.untyped_storage()._cdata, -1))

    @contextmanager
    def resizes(self) -> Iterator[None]:
        """Record storages that are freed or allocated again in place too, as FSDP2 does."""
        resize = torch.UntypedStorage.resize_

        def recorded(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            resize(storage, size)
            if (serial := self._alive.get(storage._cdata)) in self._sizes:
                self._events.append((serial, size - self._sizes[serial]))
                self._sizes[serial] = size
            return storage

        with mock.patch.object(torch.UntypedStorage, "resize_", recorded):
            yield

    def _record(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._alive:
            serial = self._alive[storage._cdata] = next(self._serial)
            self._sizes[serial], self._kinds[serial] = storage.nbytes(), self.kind
            self._events.append((serial, storage.nbytes()))
            weakref.finalize(storage, self._record_end, storage._cdata)

    def _record_end(self, cdata: int) -> None:
        serial = self._alive.pop(cdata)
        self._events.append((serial, -self._sizes.pop(serial)))

    def moment(self) -> int:
        """Return the current moment for :meth:`peak_by_kind`."""
        return len(self._events)

    def peak(self, apart_from: Iterable[Tensor] = ()) -> int:
        """Return the most bytes allocated at one time, without the storages of some tensors."""
        left_out = {self._alive[x.untyped_storage()._cdata] for x in apart_from}
        return max(accumulate(size for serial, size in self._events if serial not in left_out), default=0)

    def peak_by_kind(self, since: int = 0, until: int | None = None) -> dict[Hashable, int]:
        """Return the bytes by kind at the peak between two moments."""
        now: Counter[Hashable] = Counter()
        total, most, found = 0, -1, now.copy()
        for i, (serial, size) in enumerate(self._events[:until], 1):
            now[self._kinds[serial]] += size
            total += size
            if i >= since and total > most:
                most, found = total, now.copy()
        return dict(found)
