"""Measurement of a case: gradients of a pool's responses, and what each estimator makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from benchmarks.signal.estimators import Estimator, TokenEstimator
from benchmarks.signal.gradients import ResponseGradients
from benchmarks.signal.pools import Pool
from benchmarks.signal.statistics import Moments


def measure(
    gradients: ResponseGradients,
    pool: Pool,
    estimators: Mapping[str, Estimator],
    token_estimators: Mapping[str, TokenEstimator],
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[dict[str, Moments], Tensor]:
    """Compute the moments of estimators.

    Args:
        gradients: of the policy.
        pool: its responses.
        estimators: those whose advantages are of whole responses, by name.
        token_estimators: those with an advantage per token, by name.
        progress: called with the number of finished prompts.

    Returns:
        The moments by name, and the squared norms ``[M, G]`` of the responses' scores.
    """
    count = len(pool.prompts)
    means = {name: torch.zeros(count, gradients.size) for name in [*estimators, *token_estimators]}
    squares = {name: torch.zeros(count) for name in means}
    norms = torch.zeros(pool.rewards.shape)
    for m, prompt in enumerate(pool.prompts):
        tokens, mask = pool.tokens(m), pool.mask(m)
        scores = gradients(tokens, len(prompt), mask)
        products = scores @ scores.T
        norms[m] = products.diag()
        for name, estimator in estimators.items():
            coefficients = estimator.coefficients(m, pool.rewards[m])
            means[name][m] = coefficients.mean(0) @ scores
            squares[name][m] = ((coefficients @ products) * coefficients).sum(1).mean()
        for name, of_tokens in token_estimators.items():
            weighted = gradients(tokens, len(prompt), of_tokens.advantages[m, :, : mask.shape[1]] * mask)
            means[name][m], squares[name][m] = weighted.mean(0), weighted.square().sum(1).mean()
        progress(m + 1)
    moments = {
        name: Moments(
            means[name],
            squares[name],
            estimators[name].responses if name in estimators else 1,
            unbiased=(estimators[name] if name in estimators else token_estimators[name]).unbiased,
        )
        for name in means
    }
    return moments, norms
