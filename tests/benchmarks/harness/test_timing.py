"""Clocks: parts of a repetition are told apart, and warm-up does not count."""

from __future__ import annotations

import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.harness import timing

CPU = torch.device("cpu")


class Recorder(TorchDispatchMode):
    """Names of the operations of PyTorch that are called."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls.append(function._schema.name)
        return function(*args, **(kwargs or {}))


def test_parts_are_told_apart_and_add_up():
    parts = {"short": lambda: time.sleep(0.002), "long": lambda: time.sleep(0.006)}
    times = timing.measure_parts(parts, CPU, repeats=5, warmup=0)
    assert times["short"]["ms"] < times["long"]["ms"]
    assert times["all"]["ms"] == pytest.approx(times["short"]["ms"] + times["long"]["ms"], rel=0.3)


def test_warm_up_does_not_count():
    calls = []

    def slow_at_first():
        calls.append(None)
        time.sleep(0.05 if len(calls) <= 2 else 0.0)

    assert timing.measure(slow_at_first, CPU, repeats=4)["ms"] < 25
    assert len(calls) == 6


def test_the_host_is_clocked_by_itself():
    assert 4 < timing.host_ms(lambda: time.sleep(0.005), CPU, repeats=3) < 50


def test_the_cache_is_flushed_without_a_write():
    """Lines that were written would be written back during the call that is timed."""
    clock = timing.Clock(CPU)
    clock.on_gpu = True
    with Recorder() as recorder:
        clock.settle()
    assert recorder.calls == ["aten::sum"] * timing.FLUSHES
    assert timing.FLUSHED_BYTES > 126 << 20  # the L2 cache of a B200, the largest so far


def test_median_and_spread():
    spread = timing.spread([1.0, 2.0, 3.0, 4.0, 100.0])
    assert spread["ms"] == 3.0
    assert spread["iqr_ms"] > 1


def test_ceilings_are_rates():
    ceilings = timing.ceilings(CPU, torch.float32)
    assert 0.1 < ceilings["copy_gb_s"] < 10_000
    assert 0 < ceilings["matmul_tflops"] < 100
