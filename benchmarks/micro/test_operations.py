"""Micro-benchmarks of the suite micro."""

from __future__ import annotations

import pytest
import torch

from benchmarks.harness import checking, results, timing
from benchmarks.harness.operations import OPERATIONS, Point
from benchmarks.harness.peers import PEERS

pytest.importorskip("pytest_benchmark")

DEVICE = results.this_device()
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
POINT = Point(4096, 1024, 32_768) if DEVICE.type == "cuda" else Point(512, 64, 4096)


@pytest.mark.parametrize("way", ["ours", "eager PyTorch"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_step(benchmark, name, way):
    """Forward and backward of one operation."""
    operation = OPERATIONS[name]
    torch.manual_seed(0)
    problem = operation.make(POINT, DEVICE, DTYPE)
    function = PEERS[name][way](DEVICE) if way in PEERS[name] else next(iter(operation.ours(None).values()))
    truth, allowed = checking.truth_and_tolerance(operation, problem)
    assert checking.check(problem, function, truth, allowed)["passed"]

    def step() -> None:
        problem.results(function)
        timing.synchronize(DEVICE)

    benchmark.group = name
    benchmark(step)
