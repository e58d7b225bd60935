"""Signal and bias of gradient estimators, with bootstrap intervals over prompts.

With the gradient ``mu`` of the expected reward, a contribution ``u`` of one unit of k responses, and ``m = E u``:

    variance per response    v = k (E |u|^2 - |m|^2)        an estimate of n responses has the variance v / n
    signal of n responses    n (m . mu)^2 / (|mu|^2 v)      |mu|^2 n / v, if the estimator is unbiased
    alignment                m . mu / (|m| |mu|)            1, if it is unbiased up to its scale

Squares of means are estimated by products of the means of two different prompts, which have no bias.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.results import Row

RESAMPLES = 1000


class Moments(NamedTuple):
    """Means of an estimator's units by prompt.

    Attributes:
        mean: float32 ``[M, P]``, mean contribution.
        square: float32 ``[M]``, mean squared norm of a contribution.
        responses: generated responses per unit.
        unbiased: see :class:`benchmarks.signal.estimators.Estimator`.
    """

    mean: Tensor
    square: Tensor
    responses: int
    unbiased: bool


class Products(NamedTuple):
    """Inner products ``[M, M]`` of the means of two prompts: of an estimator, and with those of the reference."""

    own: Tensor
    with_reference: Tensor


def resamples(prompts: int) -> Tensor:
    """Return weights ``[1 + RESAMPLES, prompts]`` of the prompts: all equal, then those of bootstrap resamples."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(prompts, (RESAMPLES, prompts), generator=generator)
    counts = torch.zeros(RESAMPLES, prompts, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(RESAMPLES, prompts, dtype=torch.float64)
    )
    return torch.cat([torch.ones(1, prompts, dtype=torch.float64), counts])


def pair_mean(products: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean ``[R]`` of ``products`` ``[M, M]`` over pairs of different prompts."""
    total = torch.einsum("rm,mn,rn->r", weights, products, weights) - weights.square() @ products.diag()
    return total / (weights.sum(1).square() - weights.square().sum(1))


def statistics(moments: dict[str, Moments], reference: str, *, responses: int, compared_with: str) -> list[Row]:
    """Compute a row per estimator.

    Args:
        moments: by name.
        reference: name of an unbiased estimator of low variance, which stands for the gradient.
        responses: number of responses of an estimate.
        compared_with: name of the estimator whose signal others are divided by.

    Returns:
        ``signal``, its ratio to that of ``compared_with``, and ``alignment``, each with the bounds of its 95% interval.
    """
    weights = resamples(len(moments[reference].square))
    true = moments[reference].mean.double()
    norm = pair_mean(true @ true.T, weights)
    found = {name: _signal_and_alignment(each, true, norm, weights, responses) for name, each in moments.items()}
    base = found[compared_with][0]
    return [
        {
            "estimator": name,
            **_interval("signal", signal),
            **_interval("times", signal / base),
            **_interval("alignment", alignment),
        }
        for name, (signal, alignment) in found.items()
    ]


def _signal_and_alignment(
    moments: Moments, true: Tensor, norm: Tensor, weights: Tensor, responses: int
) -> tuple[Tensor, Tensor]:
    mean = moments.mean.double()
    own, along = pair_mean(mean @ mean.T, weights), pair_mean(mean @ true.T, weights)
    square = weights @ moments.square.double() / weights.sum(1)
    variance = moments.responses * (square - own.clamp(min=0))
    return (
        responses * (norm if moments.unbiased else along.square() / norm) / variance,
        along / (own.clamp(min=1e-30) * norm.clamp(min=1e-30)).sqrt(),
    )


def _interval(name: str, values: Tensor) -> Row:
    """Return the first of ``values``, and the central 95% of the others."""
    low, high = values[1:].quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return {name: values[0].item(), f"{name}_low": low, f"{name}_high": high}
