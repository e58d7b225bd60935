"""What rewards log beside their values: metrics, and columns of the table of completions."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any


class RewardLog:
    """Collects what the calls of rewards log for a batch.

    Rewards receive the methods :meth:`log_metric` and :meth:`log_extra`, which have the names and arguments of TRL's.

    Args:
        size: number of samples of the batch.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.metrics: list[tuple[str, float]] = []
        self.columns: defaultdict[str, dict[int, Any]] = defaultdict(dict)

    def log_metric(self, name: str, value: float) -> None:
        """Log a number, which is averaged over the calls of an update on all processes.

        Raises:
            TypeError: ``value`` is not a number.
            ValueError: ``value`` is not finite.
        """
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise TypeError(f"log_metric: the value of {name!r} must be a number, got {value!r}") from None
        if not math.isfinite(number):
            raise ValueError(f"log_metric: the value of {name!r} must be finite, got {number}")
        self.metrics.append((str(name), number))

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Add a column to ``completions.jsonl``.

        Args:
            column: its name.
            values: one per sample of the call. What JSON cannot represent is written as text.

        Raises:
            ValueError: the number of values is another one.
        """
        values = list(values)
        if len(values) != self.size:
            raise ValueError(f"log_extra: column {column!r} has {len(values)} values for {self.size} samples")
        self.columns[str(column)].update(enumerate(map(_as_json, values)))

    def one_sample(self, index: int) -> OneSampleLog:
        """Return the log of a reward that is called for one sample."""
        return OneSampleLog(self, index)

    def add(self, other: RewardLog, first: int) -> None:
        """Add the log of a part of the batch, which begins at sample ``first``."""
        self.metrics += other.metrics
        for name, values in other.columns.items():
            self.columns[name].update({first + i: value for i, value in values.items()})

    def means(self) -> dict[str, float]:
        """Return the mean of each metric by name."""
        by_name = defaultdict(list)
        for name, value in self.metrics:
            by_name[name].append(value)
        return {name: statistics.fmean(values) for name, values in by_name.items()}

    def of_sample(self, index: int) -> dict[str, Any]:
        """Return the values of the columns for a sample, where it has one."""
        return {name: values[index] for name, values in self.columns.items() if index in values}

    def to_json(self) -> dict[str, Any]:
        """Return the content as JSON values; see :meth:`from_json`."""
        return {"metrics": self.metrics, "columns": {name: list(c.items()) for name, c in self.columns.items()}}

    @classmethod
    def from_json(cls, size: int, content: dict[str, Any]) -> RewardLog:
        """Read what :meth:`to_json` returned."""
        log = cls(size)
        log.metrics = [(name, value) for name, value in content["metrics"]]
        log.columns.update({name: dict(items) for name, items in content["columns"].items()})
        return log


class OneSampleLog:
    """The log as a reward of one sample receives it: :meth:`log_extra` takes a single value."""

    def __init__(self, log: RewardLog, index: int) -> None:
        self._log, self._index = log, index
        self.log_metric = log.log_metric

    def log_extra(self, column: str, value: Any) -> None:
        """Add a value to a column of ``completions.jsonl``."""
        self._log.columns[str(column)][self._index] = _as_json(value)


def _as_json(value: Any) -> Any:
    """Return a value as JSON values; as text where JSON has no form for it."""
    try:
        return json.loads(json.dumps(value, default=str))
    except (TypeError, ValueError):
        return str(value)
