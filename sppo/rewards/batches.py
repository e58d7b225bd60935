"""Calls of a reward on a batch: on parts of it side by side, and on each sample of a part that failed."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from sppo.rewards.limits import Worker
from sppo.rewards.log import RewardLog
from sppo.rewards.worker import RewardError, SampleResult, TimeLimitError

_LEAST_SECONDS = 2.0


@dataclass(frozen=True)
class Batch:
    """Samples to score.

    Attributes:
        prompts, completions: text or chat messages.
        columns: the other columns.
        state: the trainer's state, or None.
        log: takes what rewards log.
        first: number of the first sample in the log.
    """

    prompts: Sequence[Any]
    completions: Sequence[Any]
    columns: Mapping[str, Sequence[Any]]
    state: Any
    log: RewardLog
    first: int = 0

    def __len__(self) -> int:
        return len(self.completions)

    def part(self, first: int, end: int) -> Batch:
        """Return the samples from ``first`` to before ``end``."""
        columns = {name: column[first:end] for name, column in self.columns.items()}
        prompts, completions = self.prompts[first:end], self.completions[first:end]
        return Batch(prompts, completions, columns, state=self.state, log=self.log, first=self.first + first)


class BatchReward(Protocol):
    """What calls of a reward need of it."""

    def load(self, worker: int = 0) -> Any:
        """Start the process with this number, if the reward runs in one."""

    def run(self, batch: Batch, timeout: float, worker: int = 0) -> list[SampleResult]:
        """Return a result per sample, or raise a RewardError."""


def score_each(reward: BatchReward, batch: Batch, timeout: float, workers: int) -> list[SampleResult]:
    """Call a reward on a batch, and return a result per sample.

    Where a call fails, it is repeated per sample, in twice ``timeout`` for all of them. Each sample has an equal share
    of the first half, and at least a tenth of ``timeout`` or two seconds. Those that exceed it are called again, each
    with a quarter of the time that is left.

    Args:
        reward: the reward.
        batch: the samples.
        timeout: time limit of a call, in seconds.
        workers: number of processes that call it side by side, each with a part of the batch.
    """
    n, workers = len(batch), max(1, min(workers, len(batch)))
    bounds = [(i * n // workers, (i + 1) * n // workers) for i in range(workers)] if n else []
    found = _side_by_side(reward, [batch.part(*span) for span in bounds], lambda: timeout, workers)
    results: list[SampleResult] = [None] * n
    failed: list[int] = []
    for (first, end), part in zip(bounds, found, strict=True):
        if isinstance(part, list):
            results[first:end] = part
        elif end - first == 1:
            results[first] = str(part)
        else:
            failed += range(first, end)
    if failed:
        _score_one_by_one(reward, batch, failed, results, timeout, workers)
    return results


def _score_one_by_one(
    reward: BatchReward, batch: Batch, indices: list[int], results: list[SampleResult], timeout: float, workers: int
) -> None:
    """Set the results of some samples, by a call for each."""
    workers = min(workers, len(indices))
    shared = _SharedTime(reward, 2 * timeout * workers, least=timeout / 20)
    # A share may be shorter than the first call in a new process, which imports what the reward uses.
    share = max(timeout * workers / len(indices), min(timeout / 10, _LEAST_SECONDS))
    for i in indices:
        results[i] = "was not called: other samples of the batch used up the time limit"
    for limit in (
        lambda: shared.unless_used_up(share),
        lambda: shared.unless_used_up(min(timeout, shared.left / 4)),
    ):
        late = []
        found = _side_by_side(shared, [batch.part(i, i + 1) for i in indices], limit, workers)
        for i, part in zip(indices, found, strict=True):
            if isinstance(part, RewardError):
                results[i] = str(part)
                late += [i] if isinstance(part, TimeLimitError) else []
            elif part is not None:
                (results[i],) = part
        indices = late


class _SharedTime:
    """A reward whose calls have some seconds together."""

    def __init__(self, reward: BatchReward, seconds: float, *, least: float) -> None:
        self.reward, self.left, self.least, self.lock = reward, seconds, least, threading.Lock()

    def unless_used_up(self, limit: float) -> float | None:
        """Return the limit of a call, or None if less than ``least`` seconds are left."""
        return limit if self.left > self.least else None

    def load(self, worker: int = 0) -> None:
        self.reward.load(worker)

    def run(self, batch: Batch, timeout: float, worker: int = 0) -> list[SampleResult]:
        start = time.monotonic()
        try:
            return self.reward.run(batch, timeout, worker)
        finally:
            with self.lock:
                self.left -= time.monotonic() - start


def _side_by_side(
    reward: BatchReward, batches: list[Batch], limit: Callable[[], float | None], workers: int
) -> list[list[SampleResult] | RewardError | None]:
    """Call a reward on batches, at most ``workers`` at a time.

    Returns:
        The results of each call or its error; None for one that was not made, because ``limit()`` was None.
    """
    free: queue.SimpleQueue[int] = queue.SimpleQueue()
    for worker in range(workers):
        free.put(worker)

    def call(batch: Batch, worker: int) -> list[SampleResult] | RewardError | None:
        try:
            seconds = limit()
            return None if seconds is None else reward.run(batch, seconds, worker)
        except RewardError as error:
            return error
        finally:
            free.put(worker)

    def load_and_call(batch: Batch, submit: Callable[..., Any]) -> Any:
        worker = free.get()
        try:
            reward.load(worker)  # here, as a process ends with the thread that started it; and outside the limit
        except RewardError as error:
            free.put(worker)
            return error
        return submit(call, batch, worker)

    if workers == 1:
        return [load_and_call(batch, lambda f, *args: f(*args)) for batch in batches]
    with ThreadPoolExecutor(workers) as pool:
        try:
            calls = [load_and_call(batch, pool.submit) for batch in batches]
            return [each.result() if isinstance(each, Future) else each for each in calls]
        except BaseException:
            Worker.kill_all()  # so that the threads end
            raise
