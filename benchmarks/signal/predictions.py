"""Predictions of signals from the rates of success, the norms of scores and the gradients of single prompts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from benchmarks.signal.statistics import Moments, pair_mean, resamples
from benchmarks.signal.theory import Facts

GROUP_SIZES = (2, 4, 8, 16)


class Predictor:
    """Predicts the signal of estimators at a policy.

    Args:
        reference: moments of an unbiased estimator of low variance, whose units are single responses.
        facts: facts about the prompts.
        responses: sampled responses per prompt that the moments are means of.
        estimate: number of responses of an estimate.
    """

    def __init__(self, reference: Moments, facts: Facts, *, responses: int, estimate: int) -> None:
        mean = reference.mean.double()
        products = mean @ mean.T
        self._norm = pair_mean(products, resamples(len(mean))[:1])[0]
        # Of each prompt's own gradient: its squared norm, and its product with the gradient; both without bias.
        self._own = (products.diag() * responses - reference.square.double()) / (responses - 1)
        self._along = (products.sum(1) - products.diag()) / (len(mean) - 1)
        self._facts, self._estimate = facts, estimate

    def signal(
        self, moment: Tensor, *, size: int = 1, responses: int | None = None, gain: Tensor | None = None
    ) -> float:
        """Predict a signal.

        Args:
            moment: mean of ``A^2 |s|^2`` of a response, by prompt ``[M]``.
            size: responses per unit that the gradient is a mean of.
            responses: generated responses per unit, if they are not ``size``.
            gain: factor of each prompt's gradient ``[M]``; None for 1.
        """
        gain = torch.ones_like(moment) if gain is None else gain
        along = (gain * self._along).mean()
        of_pairs = (1 - 1 / size) * (gain.square() * self._own).mean()
        variance = (responses or size) * (moment.mean() / size + of_pairs - along.square() / self._norm)
        return (self._estimate * along.square() / self._norm / variance).item()

    def baselines(self, baselines: Mapping[str, Tensor]) -> dict[str, float]:
        """Predict the signals of ``A = R - b`` by name, given the baselines ``[M]``."""
        return {name: self.signal(self._facts.baseline(each)) for name, each in baselines.items()}

    def groups(self) -> dict[str, float]:
        """Predict the signals of RLOO and GRPO by name."""
        facts = self._facts
        return {
            **{f"rloo, {k} responses": self.signal(facts.rloo(k), size=k) for k in GROUP_SIZES},
            **{
                f"grpo, {k} responses": self.signal(facts.grpo(k), size=k, gain=facts.grpo_gain(k)) for k in GROUP_SIZES
            },
        }

    def greedy(self, rewards: Tensor) -> float:
        """Predict the signal of ReMax, given the rewards ``[M]`` of the greedy responses."""
        return self.signal(self._facts.baseline(rewards), responses=2)
