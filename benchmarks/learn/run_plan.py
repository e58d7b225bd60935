"""The runs of the study and their order: the tuning runs that choose learning rates come first."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.harness.results import Row
from benchmarks.learn.intervals import mean_reward
from benchmarks.learn.runs import Run
from benchmarks.learn.variants import ALGORITHMS, CRITIC_RATES, VARIANTS, Task
from sppo.algorithms import algorithm_class

SEEDS = 5
TUNING_SEED = 1000


class Plan:
    """The runs of a task.

    Args:
        rows: rows of finished runs, those of other tasks included.
        task: the task.
        policy: hash of the initial weights.
        seeds: number of seeds of the counted runs.
        quick: whether to use few algorithms and no variants.
    """

    def __init__(
        self, rows: Iterable[Row], task: Task, policy: str, *, seeds: int = SEEDS, quick: bool = False
    ) -> None:
        self.task, self.policy, self.seeds = task, policy, seeds
        self.done = {row["run"]: row for row in rows}
        every = {**ALGORITHMS, **VARIANTS.get(task, {})}
        self.variants = {name: every[name] for name in ("sppo", "grpo", "reinforce, running mean")} if quick else every

    def tuning(self) -> list[Run]:
        """Return the runs that choose the learning rates, with a seed that does not count."""
        return [run for name, settings in self.variants.items() if "rates_of" not in settings for run in self._of(name)]

    def _of(self, name: str) -> list[Run]:
        """Return a variant's runs with each learning rate, and each critic learning rate if it has a critic."""
        settings = self.variants[name]
        of_critic = CRITIC_RATES if algorithm_class(settings["algorithm"]).critic else CRITIC_RATES[:1]
        return [self._run(name, *rates, TUNING_SEED) for rates in itertools.product(self.task.rates, of_critic)]

    def _run(self, name: str, rate: float, critic_rate: float, seed: int) -> Run:
        return Run(self.task, name, self.variants[name], rate, critic_rate, seed, self.policy)

    def counting(self) -> list[Run]:
        """Return the runs at the best rates, seed by seed, so that an interrupted study is of use."""
        best = {name: self._best(settings.get("rates_of", name)) for name, settings in self.variants.items()}
        return [self._run(name, *best[name], seed) for seed in range(self.seeds) for name in self.variants]

    def _best(self, name: str) -> tuple[float, float]:
        """Return the rates with the best mean reward; the tuning runs must be done."""
        run = max(self._of(name), key=lambda run: mean_reward(self.done[run.key]))
        return run.learning_rate, run.critic_learning_rate

    def left(self, runs: Iterable[Run]) -> list[Run]:
        """Return the runs that are not done."""
        return [run for run in runs if run.key not in self.done]

    def counted(self) -> dict[str, list[Row]]:
        """Return the rows of finished counted runs by variant; nothing until all tuning runs are done."""
        if self.left(self.tuning()):
            return {}
        found: dict[str, list[Row]] = {name: [] for name in self.variants}
        for run in self.counting():
            if run.key in self.done:
                found[run.variant].append(self.done[run.key])
        return {name: rows for name, rows in found.items() if rows}


def plans(rows: Iterable[Row], tasks: Iterable[Task], policies: Mapping[str, str], **settings: Any) -> list[Plan]:
    """Return one plan per task, given the hashes of the policies by the names of the tasks."""
    rows = list(rows)
    return [Plan(rows, task, policies[task.name], **settings) for task in tasks if task.name in policies]
