"""The check of results: what is missing, wrong anywhere or wrong only when scoring does not pass."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.harness import checking
from benchmarks.harness.checking import check, truth_and_tolerance
from benchmarks.harness.operations import OPERATIONS
from benchmarks.harness.problem import Problem, ProblemSize

CPU = torch.device("cpu")
SIZE = ProblemSize(8, 16, 97, ignored=0.25, clipped=0.25)


def test_an_output_left_out_is_wrong():
    operation = OPERATIONS["linear_logprobs"]
    problem = operation.inputs(SIZE, CPU, torch.float32)
    truth, allowed = truth_and_tolerance(operation, problem)
    scored = Problem(problem.tensors)  # no gradients
    assert not check(scored, lambda **_: {}, truth, allowed)["passed"]
    assert check(scored, operation.implementations(None)["cache"], truth, allowed)["passed"]
    gradients = {name: x for name, x in truth.items() if name.startswith("d ")}
    assert not check(problem, operation.implementations(None)["cache"], gradients, allowed)["passed"]


@pytest.mark.parametrize(
    ("spoil_it", "error"),
    [
        (lambda x: x[-1].fill_(float("nan")), float("nan")),
        (lambda x: x[-1].fill_(float("inf")), float("inf")),
        (lambda x: x[-1].add_(0.5), 0.5),
    ],
)
def test_an_error_anywhere_is_found(spoil_it, error):
    """In the last of several parts too, where Python's max would pass over NaN."""
    want = torch.ones(9000, 2)
    got = want.clone()
    spoil_it(got)
    assert checking.errors_of({"x": got}, {"x": want})["x"] == pytest.approx(error, nan_ok=True)
    assert checking.errors_of({"x": got[:1]}, {"x": want})["x"] == float("inf")


def test_what_is_wrong_only_when_scoring_is_wrong():
    operation = OPERATIONS["linear_logprobs"]
    problem = operation.inputs(SIZE, CPU, torch.float32)
    truth, allowed = truth_and_tolerance(operation, problem)
    right = operation.implementations(None)["cache"]
    lazy = lambda **tensors: {k: x if torch.is_grad_enabled() else x * 2 for k, x in right(**tensors).items()}
    assert check(problem, right, truth, allowed)["passed"]
    assert not check(problem, lazy, truth, allowed)["passed"]
