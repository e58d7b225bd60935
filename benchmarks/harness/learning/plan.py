"""The runs of a comparison and their order: the tuning runs that choose learning rates come first."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

from benchmarks.harness.learning.intervals import mean_reward
from benchmarks.harness.results import Row
from sppo.algorithms import algorithm_class

TUNING_SEED = 1000


class Task(Protocol):
    """What is learned.

    Attributes:
        name: name in tables.
        threshold: the reward to reach.
        rates: candidate learning rates of the policy.
    """

    @property
    def name(self) -> str: ...

    @property
    def threshold(self) -> float: ...

    @property
    def rates(self) -> Sequence[float]: ...


class Run(Protocol):
    """Definition of a run; ``key`` is a hash of everything that determines the result."""

    @property
    def task(self) -> Task: ...

    @property
    def variant(self) -> str: ...

    @property
    def learning_rate(self) -> float: ...

    @property
    def critic_learning_rate(self) -> float: ...

    @property
    def seed(self) -> int: ...

    @property
    def key(self) -> str: ...


AnyTask = TypeVar("AnyTask", bound=Task)
AnyRun = TypeVar("AnyRun", bound=Run)


class Plan(Generic[AnyTask, AnyRun]):
    """The runs of a task.

    Args:
        rows: rows of finished runs, those of other tasks included.
        task: the task.
        variants: settings by variant: ``algorithm`` and its settings; ``critic`` if it is not a copy of the policy;
            ``rates_of`` names the variant whose learning rates are used, and other variants choose their own.
        critic_rates: candidate learning rates of critics that the optimizer trains.
        seeds: number of seeds of the counted runs.
    """

    def __init__(
        self,
        rows: Iterable[Row],
        task: AnyTask,
        variants: Mapping[str, Mapping[str, Any]],
        *,
        critic_rates: Sequence[float],
        seeds: int,
    ) -> None:
        self.task, self.variants, self.critic_rates, self.seeds = task, variants, critic_rates, seeds
        self.done = {row["run"]: row for row in rows}

    def make_run(self, name: str, rate: float, critic_rate: float, seed: int) -> AnyRun:
        """Return the run of a variant."""
        raise NotImplementedError

    def tuning(self) -> list[AnyRun]:
        """Return the runs that choose the learning rates, with a seed that does not count."""
        return [run for name, settings in self.variants.items() if "rates_of" not in settings for run in self._of(name)]

    def _of(self, name: str) -> list[AnyRun]:
        """Return a variant's runs with each learning rate, and each critic learning rate if its critic has one."""
        of_critic = self.critic_rates if has_trained_critic(self.variants[name]) else self.critic_rates[:1]
        return [self.make_run(name, *rates, TUNING_SEED) for rates in itertools.product(self.task.rates, of_critic)]

    def counting(self) -> list[AnyRun]:
        """Return the runs at the best rates, seed by seed, so that an interrupted comparison is of use."""
        best = {name: self._best(settings.get("rates_of", name)) for name, settings in self.variants.items()}
        return [self.make_run(name, *best[name], seed) for seed in range(self.seeds) for name in self.variants]

    def _best(self, name: str) -> tuple[float, float]:
        """Return the rates with the best mean reward; the tuning runs must be done."""
        run = max(self._of(name), key=lambda run: mean_reward(self.done[run.key]))
        return run.learning_rate, run.critic_learning_rate

    def left(self, runs: Iterable[AnyRun]) -> list[AnyRun]:
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


def has_trained_critic(settings: Mapping[str, Any]) -> bool:
    """Return whether a variant has a critic that the optimizer trains; a probe is fitted, and has no learning rate."""
    return algorithm_class(settings["algorithm"]).critic in ("prompt", "token") and settings.get("critic") != "probe"
