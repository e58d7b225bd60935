"""Aggregation of metrics and phase times between two log entries."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Gather = Callable[[list[Any]], list[Any]]
"""A function that concatenates the lists of all processes."""


def gather_lists(items: list[Any]) -> list[Any]:
    """Concatenate the lists of all processes, in the order of their ranks."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return items
    per_process: list[list[Any]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(per_process, items)
    return [item for each in per_process for item in each]


_REST = "update"  # the phase outside of all others


class Meter:
    """Collects weighted means, extremes, sums and phase times; tensors stay on their device until :meth:`read`.

    Args:
        on_phase: called with the name of each phase that begins, and of the one around it when it ends.
    """

    def __init__(self, on_phase: Callable[[str], None] = lambda name: None) -> None:
        self._on_phase = on_phase
        self._phases = [_REST]
        self._nested_seconds = 0.0  # of the phases inside the current one
        self.clear()

    def clear(self) -> None:
        """Discard all values, and restart the clock."""
        self._means: dict[str, list[tuple[float | Tensor, float]]] = defaultdict(list)
        self._sums: dict[str, float] = defaultdict(float)
        self._start = time.perf_counter()

    def mean(self, values: Mapping[str, float | Tensor], weight: float = 1.0) -> None:
        """Add values by name to weighted means, or to extremes if the name ends in ``_min`` or ``_max``."""
        for name, value in values.items():
            self._means[name].append((value.detach() if isinstance(value, Tensor) else value, weight))

    def sum(self, name: str, value: float) -> None:
        """Add a value to a sum."""
        self._sums[name] += value

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds of a block to ``seconds/<name>``, excluding those of phases inside it."""
        start, outer_seconds = time.perf_counter(), self._nested_seconds
        self._nested_seconds = 0.0
        self._phases.append(name)
        self._on_phase(name)
        try:
            yield
        finally:
            self._phases.pop()
            self._on_phase(self._phases[-1])
            seconds = time.perf_counter() - start
            self.sum(f"seconds/{name}", seconds - self._nested_seconds)
            self._nested_seconds = outer_seconds + seconds

    def read(self, gather: Gather) -> dict[str, float]:
        """Return all metrics since the last read, over all processes, and clear the meter.

        Sums are averaged over processes. Seconds outside all phases count as ``seconds/update``.
        """
        elapsed = time.perf_counter() - self._start
        in_phases = sum(value for name, value in self._sums.items() if name.startswith("seconds/"))
        self._sums[f"seconds/{_REST}"] = elapsed - in_phases
        self._sums["tokens_per_second"] = self._sums["generated_tokens"] / elapsed
        entries: list[tuple[str, float, float]] = [(name, value, 1.0) for name, value in self._sums.items()]
        for name, pairs in self._means.items():
            values = torch.stack([torch.as_tensor(value, dtype=torch.float64) for value, _ in pairs]).tolist()
            entries += [(name, value, weight) for value, (_, weight) in zip(values, pairs, strict=True)]
        self.clear()
        by_name: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for name, value, weight in gather(entries):
            by_name[name].append((value, weight))
        return {name: _reduce(name, pairs) for name, pairs in by_name.items()}


def _reduce(name: str, pairs: list[tuple[float, float]]) -> float:
    is_named_by_user = name.removeprefix("eval_").startswith(("rewards/", "custom/"))
    if name.endswith("_min") and not is_named_by_user:
        return min(value for value, _ in pairs)
    if name.endswith("_max") and not is_named_by_user:
        return max(value for value, _ in pairs)
    weights = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / weights if weights else 0.0
