"""Metrics between two logs, and the table of sample completions."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Gather = Callable[[list[Any]], list[Any]]
"""Gives the concatenation of every process's list."""


def gather_lists(items: list[Any]) -> list[Any]:
    """Concatenate the lists of all processes, in the order of their ranks."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return items
    per_process: list[list[Any]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(per_process, items)
    return [item for each in per_process for item in each]


class Meter:
    """Collects weighted means, extremes, sums and seconds; tensors stay on their device until :meth:`read`."""

    def __init__(self) -> None:
        self._inside = 0.0  # seconds of the phases inside the one that is counted now
        self.clear()

    def clear(self) -> None:
        """Forget everything, and count seconds from now."""
        self._means: dict[str, list[tuple[float | Tensor, float]]] = defaultdict(list)
        self._sums: dict[str, float] = defaultdict(float)
        self._since = time.perf_counter()

    def mean(self, values: Mapping[str, float | Tensor], weight: float = 1.0) -> None:
        """Take values into the means of their names; of names ending in ``_min`` or ``_max``, into the extremes."""
        for name, value in values.items():
            self._means[name].append((value.detach() if isinstance(value, Tensor) else value, weight))

    def sum(self, name: str, value: float) -> None:
        """Add to a sum."""
        self._sums[name] += value

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the seconds of a block as ``seconds/<name>``, without those of phases inside it."""
        start, before = time.perf_counter(), self._inside
        self._inside = 0.0
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self.sum(f"seconds/{name}", seconds - self._inside)
            self._inside = before + seconds

    def read(self, gather: Gather) -> dict[str, float]:
        """Everything since the last read, over all processes. Seconds of no phase are the update's."""
        elapsed = time.perf_counter() - self._since
        phases = sum(value for name, value in self._sums.items() if name.startswith("seconds/"))
        self._sums["seconds/update"] = elapsed - phases
        self._sums["tokens_per_second"] = self._sums["generated_tokens"] / elapsed
        mine: list[tuple[str, float, float]] = [(name, value, 1.0) for name, value in self._sums.items()]
        for name, pairs in self._means.items():
            values = torch.stack([torch.as_tensor(value, dtype=torch.float64) for value, _ in pairs]).tolist()
            mine += [(name, value, weight) for value, (_, weight) in zip(values, pairs, strict=True)]
        self.clear()
        columns: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for name, value, weight in gather(mine):
            columns[name].append((value, weight))
        return {name: _reduce(name, pairs) for name, pairs in columns.items()}


def _reduce(name: str, pairs: list[tuple[float, float]]) -> float:
    if name.endswith("_min"):
        return min(value for value, _ in pairs)
    if name.endswith("_max"):
        return max(value for value, _ in pairs)
    weights = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / weights if weights else 0.0
