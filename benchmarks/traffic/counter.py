"""Counter of what Triton's interpreter loads and stores, and what is expected of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from triton.runtime import interpreter


class Traffic(NamedTuple):
    """Bytes by name of the kernel."""

    loaded: Counter[str]
    stored: Counter[str]


@contextmanager
def counted() -> Iterator[Traffic]:
    """Count what kernels load and store inside this context; an atomic operation does both."""
    traffic = Traffic(Counter(), Counter())
    running = [""]
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    launch, load, store = executor.__call__, builder.create_masked_load, builder.create_masked_store
    update, swap = builder.create_atomic_rmw, builder.create_atomic_cas

    def note_launch(self: Any, *args: Any, **kwargs: Any) -> None:
        running[0] = self.fn.__name__
        launch(self, *args, **kwargs)

    def note_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        traffic.loaded[running[0]] += _bytes(pointers, mask.data)
        return load(self, pointers, mask, *rest)

    def note_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        traffic.stored[running[0]] += _bytes(pointers, mask.data)
        return store(self, pointers, value, mask, *rest)

    def note_update(self: Any, how: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        for direction in traffic:
            direction[running[0]] += _bytes(pointers, mask.data)
        return update(self, how, pointers, value, mask, *rest)

    def note_swap(self: Any, pointers: Any, *rest: Any) -> Any:
        for direction in traffic:
            direction[running[0]] += _bytes(pointers, np.ones_like(pointers.data, dtype=bool))
        return swap(self, pointers, *rest)

    notes = {
        "create_masked_load": note_load,
        "create_masked_store": note_store,
        "create_atomic_rmw": note_update,
        "create_atomic_cas": note_swap,
    }
    with mock.patch.multiple(builder, **notes), mock.patch.object(executor, "__call__", note_launch):
        yield traffic


def _bytes(pointers: Any, mask: np.ndarray) -> int:
    """Count the bytes of the distinct addresses that are not masked off."""
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    return size * len(np.unique(pointers.data[np.broadcast_to(mask, pointers.data.shape)]))


class Kernel(NamedTuple):
    """A kernel, the bytes that it has to move at least, and those that it is designed to move if these are more."""

    name: str
    least: float
    designed: float | None = None


class Case(NamedTuple):
    """A call, and the kernels that it launches."""

    operation: str
    label: str
    call: Callable[[], object]
    kernels: tuple[Kernel, ...]
