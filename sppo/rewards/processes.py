"""Calls for many samples, each with limits of its own, in forked processes that are killed where a call takes longer.

Python and its libraries cannot be interrupted everywhere: a power of large integers is one call into C.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import sys
import time
import warnings
from collections.abc import Callable
from typing import NoReturn

EXCEEDED = "exceeded its limits"
_RESULT_BYTES, _ERROR_CHARS = 4096, 300
_PR_SET_DUMPABLE = 4  # from <linux/prctl.h>


class _Child:
    """A process that computes the sample whose number it reads, and writes the result."""

    def __init__(self, work: Callable[[int], float], memory_bytes: int) -> None:
        numbers, self.numbers = os.pipe()
        self.results, results = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads; the child starts none
            self.pid = os.fork()
        if self.pid == 0:
            os.close(self.numbers)
            os.close(self.results)
            _serve(work, numbers, results, memory_bytes)
        os.close(numbers)
        os.close(results)
        self.sample, self.end = -1, 0.0

    def start(self, sample: int, seconds: float) -> None:
        """Let it compute a sample, with a time limit."""
        self.sample, self.end = sample, time.monotonic() + seconds
        os.write(self.numbers, sample.to_bytes(8, "little"))

    def read(self) -> float | str:
        """Return the result, or a description of the failure."""
        text = os.read(self.results, _RESULT_BYTES)
        return json.loads(text) if text else EXCEEDED

    def kill(self) -> None:
        """End the process."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.numbers)
        os.close(self.results)


def _serve(work: Callable[[int], float], numbers: int, results: int, memory_bytes: int) -> NoReturn:
    try:
        _limit_memory(memory_bytes)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        while number := os.read(numbers, 8):
            try:
                result: float | str = float(work(int.from_bytes(number, "little")))
            except (MemoryError, RecursionError):
                result = EXCEEDED
            except BaseException as error:
                result = _describe(error)
            os.write(results, json.dumps(result).encode())
    finally:
        os._exit(0)


def _describe(error: BaseException) -> str:
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return f"{kind}{error}"[:_ERROR_CHARS]


def _limit_memory(additional: int) -> None:
    """Limit the address space of this process to what it has and ``additional`` bytes, where the system can."""
    try:
        import resource

        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[0])
        limit = pages * resource.getpagesize() + additional
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    except (ImportError, OSError, ValueError):
        pass


def _here(work: Callable[[int], float], sample: int) -> float | str:
    try:
        return float(work(sample))
    except (MemoryError, RecursionError):
        return EXCEEDED
    except Exception as error:
        return _describe(error)


def num_cores() -> int:
    """Return how many cores this process may use, where the system tells; else 1."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def hide_environment() -> None:
    """On Linux, hide the environment and memory of this process from others of its user; no debugger can attach."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def call_each(
    work: Callable[[int], float], count: int, *, seconds: float, memory_mb: int, at_once: int
) -> list[float | str]:
    """Call ``work(i)`` for each sample in forked processes, several at once.

    Args:
        work: returns a number; it must not rely on threads of this process.
        count: number of samples.
        seconds: time limit of each call.
        memory_mb: what a process may allocate, in MiB.
        at_once: number of processes.

    Returns:
        The number of each sample; EXCEEDED for a call that was killed or ran out of memory or stack; or the text of the
        error that it raised. Without ``os.fork``, as on Windows, calls are made here, one after the other and without
        limits.
    """
    if not hasattr(os, "fork"):
        return [_here(work, i) for i in range(count)]
    results: list[float | str] = [EXCEEDED] * count
    waiting = iter(range(count))
    children: list[_Child] = []
    try:
        for sample in waiting:
            children.append(_Child(work, memory_mb << 20))
            children[-1].start(sample, seconds)
            if len(children) == at_once:
                break
        while children:
            timeout = max(0.0, min(child.end for child in children) - time.monotonic())
            ready = select.select([child.results for child in children], [], [], timeout)[0]
            now = time.monotonic()
            for child in list(children):
                is_done = child.results in ready
                if is_done:
                    results[child.sample] = child.read()
                elif now < child.end:
                    continue
                sample, worker = next(waiting, -1), child
                if sample < 0 or not is_done or results[child.sample] == EXCEEDED:
                    children.remove(child)
                    child.kill()
                    if sample < 0:
                        continue
                    worker = _Child(work, memory_mb << 20)
                    children.append(worker)
                worker.start(sample, seconds)
    finally:
        for child in children:
            child.kill()
    return results
