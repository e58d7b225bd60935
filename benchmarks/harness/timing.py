"""Times and peak memory of calls, and the copy bandwidth and matrix-product rate of the device.

On a GPU each repetition first reads a large buffer several times. This replaces the contents of the cache, leaves
nothing to be written back, and keeps the device busy while the host queues the call, so that the time between two
events is the device's own. A call that waits for the device loses this head start, and the host's time counts from
there on. The host's time to queue a call is measured separately.
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
    """Time marks on one device."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type != "cpu"
        self._read = torch.zeros(FLUSHED_BYTES // 4 if self.on_gpu else 0, device=device)

    def settle(self) -> None:
        """Replace the contents of the cache by reading, and give the host a head start."""
        for _ in range(FLUSHES if self.on_gpu else 0):
            self._read.sum()

    def mark(self) -> Any:
        """Return a mark of the current time, in the order of the device's work."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start: Any, end: Any) -> float:
        """Return the time between two marks, both of which the device must have passed."""
        return start.elapsed_time(end) if self.on_gpu else 1000 * (end - start)


def spread(times: Iterable[float]) -> dict[str, float]:
    """Return median and interquartile range."""
    low, median, high = statistics.quantiles(times, n=4)
    return {"ms": median, "iqr_ms": high - low}


def measure(call: Callable[[], object], device: torch.device, repeats: int) -> dict[str, float]:
    """Measure median and interquartile range of a call in ms, after a warm-up of two calls."""
    parts = measure_parts({"call": call}, device, repeats, warmup=2)
    return parts["call"]


def measure_parts(
    parts: dict[str, Callable[[], object]], device: torch.device, repeats: int, warmup: int
) -> dict[str, dict[str, float]]:
    """Measure successive calls: median and interquartile range of each, and of ``"all"`` if there are several."""
    rows = durations(parts, device, warmup + repeats)[warmup:]
    results = {name: spread(row[name] for row in rows) for name in parts}
    if len(parts) > 1:
        results["all"] = spread(sum(row.values()) for row in rows)
    return results


def durations(parts: dict[str, Callable[[], object]], device: torch.device, repeats: int) -> list[dict[str, float]]:
    """Measure successive calls in ms, repetition by repetition."""
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
    """Measure the median time in ms until a call returns to the host; the device is idle before the call."""
    times = []
    for _ in range(repeats):
        synchronize(device)  # otherwise the host would wait for space in the queue
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished."""
    if device.type != "cpu":
        torch.cuda.synchronize()


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Measure the peak of PyTorch's allocations during a call, beyond those before it; None on a CPU."""
    if device.type == "cpu":
        return None
    synchronize(device)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    synchronize(device)
    return torch.cuda.max_memory_allocated() - before


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Measure copying, in GB/s read plus written, and a large matrix product, in TFLOP/s."""
    size, n = (1 << 30, 8192) if device.type != "cpu" else (1 << 26, 1024)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    copy: Callable[[], Tensor] = lambda: target.copy_(source)
    return {
        "copy_gb_s": 2 * size / measure(copy, device, 10)["ms"] / 1e6,
        "matmul_tflops": 2 * n**3 / measure(lambda: a @ b, device, 10)["ms"] / 1e9,
    }
