"""Micro-benchmarks of the suite micro."""

from __future__ import annotations

import pytest
import torch

from benchmarks.harness import checking, results, timing
from benchmarks.harness.cases import OURS
from benchmarks.harness.operations import OPERATIONS
from benchmarks.harness.peers import PEERS
from benchmarks.harness.problem import ProblemSize

pytest.importorskip("pytest_benchmark")

DEVICE = results.this_device()
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
SIZE = ProblemSize(4096, 1024, 32_768) if DEVICE.type == "cuda" else ProblemSize(512, 64, 4096)


@pytest.mark.parametrize("provider", [OURS, "eager PyTorch"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_step(benchmark, name, provider):
    """Time forward and backward of one operation."""
    operation = OPERATIONS[name]
    torch.manual_seed(0)
    problem = operation.inputs(SIZE, DEVICE, DTYPE)
    if provider == OURS:
        implementation = next(iter(operation.implementations(None).values()))
    else:
        implementation = PEERS[name][provider](DEVICE)
    truth, allowed = checking.truth_and_tolerance(operation, problem)
    assert checking.check(problem, implementation, truth, allowed)["passed"]

    def step() -> None:
        problem.results(implementation)
        timing.synchronize(DEVICE)

    benchmark.group = name
    benchmark(step)
