"""Check of results against float64, with the error of eager PyTorch in the same dtype as the measure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.operations import Operation
from benchmarks.harness.problem import Implementation, Outputs, Problem

TOLERANCE = 4.0  # times the error of eager PyTorch in the same dtype
FLOOR = 1e-5  # added to the tolerance, for cases in which eager PyTorch is exact
CERTIFIED = 1e-3  # allowed error of sparse gradients in float32
LEAST_MAGNITUDE = 0.1  # of a scalar output, which may be a sum that cancels


def errors_of(found: Outputs, truth: Outputs) -> dict[str, float]:
    """Return the largest error of each output and gradient that both have, over the largest magnitude."""
    return {name: _error(found[name], want) for name, want in truth.items() if name in found}


def _error(got: Tensor, want: Tensor) -> float:
    """Return infinity if the shapes differ, and NaN if there is one anywhere, which no bound allows."""
    if got.shape != want.shape:
        return float("inf")
    magnitude = float(want.abs().max())
    if want.ndim == 0:
        magnitude = max(magnitude, LEAST_MAGNITUDE)
    largest = [(g - w).abs().max() for g, w in zip(_parts(got), _parts(want), strict=True)]
    return float(torch.stack(largest).max()) / (magnitude or 1.0)


def _parts(x: Tensor) -> Iterable[Tensor]:
    """Split a tensor, because the float64 difference of two embedding gradients would not fit into memory."""
    return x.split(4096) if x.ndim else [x]


def worst(errors: Iterable[float]) -> float:
    """Return the largest error, or NaN if there is one, which Python's max may ignore."""
    return float(torch.tensor(list(errors)).max())


def truth_and_tolerance(operation: Operation, problem: Problem) -> tuple[Outputs, dict[str, float]]:
    """Compute the results in float64, and the error that each may have."""
    truth = operation.reference(problem, torch.float64)
    eager = errors_of(operation.reference(problem, problem.dtype), truth)
    return truth, {name: TOLERANCE * error + FLOOR for name, error in eager.items()}


def allowed_of(provider: str, dtype: torch.dtype, allowed: dict[str, float]) -> dict[str, float]:
    """Raise the bounds of sparse gradients in float32: they drop more than float32 rounds, less than bfloat16 does."""
    if dtype != torch.float32 or not provider.endswith(("sparse", "auto")):
        return allowed
    return {name: max(bound, CERTIFIED) if name.startswith("d ") else bound for name, bound in allowed.items()}


def check(
    problem: Problem, implementation: Implementation, truth: Outputs, allowed: dict[str, float]
) -> dict[str, Any]:
    """Compute errors with gradients and without, and whether all required outputs exist and are close enough."""
    errors = errors_of(problem.results(implementation), truth)
    needed = {*problem.upstream, *(f"d {name}" for name in problem.leaves)}
    with torch.no_grad():  # as when scoring, which is timed too and may take another path
        scored = errors_of(problem.forward(implementation), truth)
    right = needed <= errors.keys() and all(
        error <= allowed[name] for found in (errors, scored) for name, error in found.items()
    )  # NaN is not at most anything
    return {"errors": errors, "scored_errors": scored, "passed": bool(errors) and right}
