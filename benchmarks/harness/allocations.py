"""What PyTorch allocates, noted on tensors without data: the bodies of our operations run, their kernels do not."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import accumulate, count
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sppo_kernels import _head as head
from sppo_kernels.ops import linear_logprobs as linear
from sppo_kernels.ops import linear_policy_loss as linear_policy
from sppo_kernels.ops import policy_loss as policy
from sppo_kernels.ops import prompt_value
from sppo_kernels.ops import selective_logprobs as selective

GIB = 1 << 30
# Registered operations are opaque to a dispatch mode, and on fake tensors show what they return alone.
_BODIES = {
    op._opoverload: op._init_fn
    for module in (linear, policy, prompt_value)
    for op in vars(module).values()
    if isinstance(op, torch.library.CustomOpDef)
}


class Allocations(TorchDispatchMode):
    """Notes each storage that comes into being under this mode, and each of those that goes.

    Attributes:
        kind: of the storages that come into being from now on.
    """

    def __init__(self, inputs: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.kind: Hashable = ""
        self._inputs = {x.untyped_storage() for x in inputs}
        self._serial = count()
        self._alive = {storage._cdata: next(self._serial) for storage in self._inputs}
        self._sizes: dict[int, int] = {}
        self._kinds: dict[int, Hashable] = {}
        self._events: list[tuple[int, int]] = []  # which storage; its bytes, negative when it goes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if DTensor in types:
            return NotImplemented  # it comes again with the local tensors
        if func is torch.ops.aten.addmm.dtype_out:  # it exists for CUDA alone, and writes in place
            return kwargs["out"]
        if func in _BODIES:
            with self:
                return _BODIES[func](*args, **kwargs)
        out = func(*args, **kwargs)
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._note(x.untyped_storage())
        return out

    @contextmanager
    def making(self, kind: Hashable) -> Iterator[None]:
        """What comes into being inside is of this kind."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def name(self, kind: Hashable, tensors: Iterable[Tensor]) -> None:
        """Say afterwards of what kind some tensors that are alive were from their beginning."""
        for x in tensors:
            local = x._local_tensor if isinstance(x, DTensor) else x
            self._kinds[self._alive[local.untyped_storage()._cdata]] = kind

    def kind_of(self, x: Tensor) -> Hashable:
        """Of its storage; None if that was not seen to come into being."""
        return self._kinds.get(self._alive.get(x.untyped_storage()._cdata, -1))

    @contextmanager
    def resizes(self) -> Iterator[None]:
        """Note too where a storage is freed, or made again, in place, as FSDP2 does."""
        resize = torch.UntypedStorage.resize_

        def noted(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            resize(storage, size)
            if (serial := self._alive.get(storage._cdata)) in self._sizes:
                self._events.append((serial, size - self._sizes[serial]))
                self._sizes[serial] = size
            return storage

        with mock.patch.object(torch.UntypedStorage, "resize_", noted):
            yield

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._alive:
            serial = self._alive[storage._cdata] = next(self._serial)
            self._sizes[serial], self._kinds[serial] = storage.nbytes(), self.kind
            self._events.append((serial, storage.nbytes()))
            weakref.finalize(storage, self._note_end, storage._cdata)

    def _note_end(self, cdata: int) -> None:
        serial = self._alive.pop(cdata)
        self._events.append((serial, -self._sizes.pop(serial)))

    def moment(self) -> int:
        """Now, as :meth:`peak_by_kind` takes it."""
        return len(self._events)

    def peak(self, apart_from: Iterable[Tensor] = ()) -> int:
        """Most bytes at one time, the storages of some tensors not among them."""
        left_out = {self._alive[x.untyped_storage()._cdata] for x in apart_from}
        return max(accumulate(size for serial, size in self._events if serial not in left_out), default=0)

    def peak_by_kind(self, since: int = 0, until: int | None = None) -> dict[Hashable, int]:
        """What the most bytes at one time between two moments were."""
        now: Counter[Hashable] = Counter()
        total, most, found = 0, -1, now.copy()
        for i, (serial, size) in enumerate(self._events[:until], 1):
            now[self._kinds[serial]] += size
            total += size
            if i >= since and total > most:
                most, found = total, now.copy()
        return dict(found)


class _NoKernel:
    """Stands for a Triton kernel: it takes a launch and does nothing."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *args, **kwargs: None


class _ProjectionOnCUDA(head.Projection):
    """As on a CUDA device. Fake tensors say they are on the CPU: PyTorch built without CUDA refuses to index others."""

    def __init__(self, weights, bias) -> None:
        self.mixed, self.weights, self.bias = True, weights, bias


@contextmanager
def without_values(spans: Iterable[tuple[int, int]]) -> Iterator[None]:
    """As on a CUDA device, without kernels.

    What has to look at values is told which tokens they would single out, one question after the other.
    """
    answers = iter(spans)
    where = lambda mask: torch.arange(*next(answers))
    triton: Callable[..., Any] = lambda backend, tensor: backend or "triton"
    modules = (head, linear, linear_policy, policy, prompt_value, selective)
    patches: list[Any] = [
        mock.patch.object(head, "Projection", _ProjectionOnCUDA),
        mock.patch.object(linear, "_CHUNK_BYTES_CPU", linear._CHUNK_BYTES_ACCELERATOR),
    ]
    patches += [mock.patch.object(module, "where", where) for module in (head, linear, linear_policy)]
    patches += [mock.patch.object(module, "pick_backend", triton) for module in (linear, policy, prompt_value)]
    patches += [
        mock.patch.object(module, name, _NoKernel())
        for module in modules
        for name in vars(module)
        if name.endswith("_kernel")
    ]
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield
