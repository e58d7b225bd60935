"""Times and peaks of calls, and what the device itself can do: its copy bandwidth and its rate of matrix products.

On a GPU each repetition first reads a large buffer several times over. That replaces what the last repetition left in
the cache, leaving nothing there to be written back, and keeps the device busy while the host queues the call: the time
between two events is then the device's own. A call that waits for the device loses this start, and the host's time
counts from there on. How long the host takes to queue a call is measured beside it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

FLUSHED_BYTES = 1 << 28  # several times any cache
FLUSHES = 6  # at 3 TB/s about half a millisecond: longer than it takes to queue a few dozen launches


class Clock:
    """Marks of time on one device."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type != "cpu"
        self._read = torch.zeros(FLUSHED_BYTES // 4 if self.on_gpu else 0, device=device)

    def settle(self) -> None:
        """Replace what is in the cache, by reading, and give the host a start."""
        for _ in range(FLUSHES if self.on_gpu else 0):
            self._read.sum()

    def mark(self) -> Any:
        """Now, in the order of the device's work."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start: Any, end: Any) -> float:
        """Between two marks; the device has to be through with both."""
        return start.elapsed_time(end) if self.on_gpu else 1000 * (end - start)


def spread(times: Iterable[float]) -> dict[str, float]:
    """Median and interquartile range."""
    low, median, high = statistics.quantiles(times, n=4)
    return {"ms": median, "iqr_ms": high - low}


def measure(call: Callable[[], object], device: torch.device, repeats: int) -> dict[str, float]:
    """Median and interquartile range of a call, in ms, after a warm-up of two calls."""
    parts = measure_parts({"call": call}, device, repeats, warmup=2)
    return parts["call"]


def measure_parts(
    parts: dict[str, Callable[[], object]], device: torch.device, repeats: int, warmup: int
) -> dict[str, dict[str, float]]:
    """Of calls that follow one another in each repetition: those of each, and of ``"all"`` where there are several."""
    rows = durations(parts, device, warmup + repeats)[warmup:]
    results = {name: spread(row[name] for row in rows) for name in parts}
    if len(parts) > 1:
        results["all"] = spread(sum(row.values()) for row in rows)
    return results


def durations(parts: dict[str, Callable[[], object]], device: torch.device, repeats: int) -> list[dict[str, float]]:
    """Milliseconds of each of the calls that follow one another, repetition by repetition."""
    clock = Clock(device)
    rows = []
    for _ in range(repeats):
        clock.settle()
        marks = [clock.mark()]
        for call in parts.values():
            call()
            marks.append(clock.mark())
        rows.append(marks)
    synchronize(device)
    return [
        {name: clock.milliseconds(start, end) for name, (start, end) in zip(parts, pairwise(marks), strict=True)}
        for marks in rows
    ]


def host_ms(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time until a call returns to the host, in ms; the device is idle before, and may be at work after."""
    times = []
    for _ in range(repeats):
        synchronize(device)  # else the host ends up waiting for room in the queue
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def synchronize(device: torch.device) -> None:
    """Wait until the device is through with everything."""
    if device.type != "cpu":
        torch.cuda.synchronize()


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Most memory that PyTorch had allocated during a call, beyond what it had before; None on a CPU."""
    if device.type == "cpu":
        return None
    synchronize(device)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    synchronize(device)
    return torch.cuda.max_memory_allocated() - before


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Measured here and now: copying, in GB/s read plus written, and a large matrix product, in TFLOP/s."""
    size, n = (1 << 30, 8192) if device.type != "cpu" else (1 << 26, 1024)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    copy: Callable[[], Tensor] = lambda: target.copy_(source)
    return {
        "copy_gb_s": 2 * size / measure(copy, device, 10)["ms"] / 1e6,
        "matmul_tflops": 2 * n**3 / measure(lambda: a @ b, device, 10)["ms"] / 1e9,
    }
