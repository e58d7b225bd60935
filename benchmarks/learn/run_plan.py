"""The runs of the study."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.harness.learning import plan
from benchmarks.harness.results import Row
from benchmarks.learn.runs import Run
from benchmarks.learn.variants import ALGORITHMS, CRITIC_RATES, VARIANTS, Task

SEEDS = 5


class Plan(plan.Plan[Task, Run]):
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
        every = {**ALGORITHMS, **VARIANTS.get(task, {})}
        chosen = {name: every[name] for name in ("sppo", "grpo", "reinforce, running mean")} if quick else every
        super().__init__(rows, task, chosen, critic_rates=CRITIC_RATES, seeds=seeds)
        self.policy = policy

    def make_run(self, name: str, rate: float, critic_rate: float, seed: int) -> Run:
        """See :class:`benchmarks.harness.learning.plan.Plan`."""
        return Run(self.task, name, dict(self.variants[name]), rate, critic_rate, seed, self.policy)


def plans(rows: Iterable[Row], tasks: Iterable[Task], policies: Mapping[str, str], **settings: Any) -> list[Plan]:
    """Return one plan per task, given the hashes of the policies by the names of the tasks."""
    rows = list(rows)
    return [Plan(rows, task, policies[task.name], **settings) for task in tasks if task.name in policies]
