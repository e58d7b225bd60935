"""Whether a way gives the right results: its error against float64, held against that of eager PyTorch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.operations import Function, Operation, Outputs, Problem

TOLERANCE = 4.0  # times eager PyTorch's error in the same dtype
FLOOR = 1e-5  # besides, where eager PyTorch happens to be exact
CERTIFIED = 1e-3  # of gradients of which only a few entries were kept, in float32
LEAST_MAGNITUDE = 0.1  # of a single number, which may be a sum that cancels


def errors_of(found: Outputs, truth: Outputs) -> dict[str, float]:
    """Largest error of each output and gradient that both have, over the largest magnitude."""
    return {name: _error(found[name], want) for name, want in truth.items() if name in found}


def _error(got: Tensor, want: Tensor) -> float:
    """Infinite where the shapes differ; NaN where there is one anywhere, which no bound allows."""
    if got.shape != want.shape:
        return float("inf")
    magnitude = float(want.abs().max())
    if want.ndim == 0:
        magnitude = max(magnitude, LEAST_MAGNITUDE)
    largest = [(g - w).abs().max() for g, w in zip(_parts(got), _parts(want), strict=True)]
    return float(torch.stack(largest).max()) / (magnitude or 1.0)


def _parts(x: Tensor) -> Iterable[Tensor]:
    """A float64 difference of two gradients of a whole embedding would not fit beside them."""
    return x.split(4096) if x.ndim else [x]


def worst(errors: Iterable[float]) -> float:
    """The largest; NaN where one is, which Python's own max may pass over."""
    return float(torch.tensor(list(errors)).max())


def truth_and_tolerance(operation: Operation, problem: Problem) -> tuple[Outputs, dict[str, float]]:
    """Results in float64, and how far each may be from them."""
    truth = operation.evaluate(problem, torch.float64)
    eager = errors_of(operation.evaluate(problem, problem.dtype), truth)
    return truth, {name: TOLERANCE * error + FLOOR for name, error in eager.items()}


def allowed_of(way: str, dtype: torch.dtype, allowed: dict[str, float]) -> dict[str, float]:
    """A few entries of a gradient leave out more than float32 rounds away, and less than half precision does."""
    if dtype != torch.float32 or not way.endswith(("sparse", "auto")):
        return allowed
    return {name: max(bound, CERTIFIED) if name.startswith("d ") else bound for name, bound in allowed.items()}


def check(problem: Problem, function: Function, truth: Outputs, allowed: dict[str, float]) -> dict[str, Any]:
    """Errors of a way, with gradients and without, and whether all it must give is there and close enough."""
    errors = errors_of(problem.results(function), truth)
    needed = {*problem.upstream, *(f"d {name}" for name in problem.leaves)}
    with torch.no_grad():  # as when scoring, which is timed too and may take another path
        scored = errors_of(problem.forward(function), truth)
    right = needed <= errors.keys() and all(
        error <= allowed[name] for found in (errors, scored) for name, error in found.items()
    )  # NaN is not at most anything
    return {"errors": errors, "scored_errors": scored, "passed": bool(errors) and right}
