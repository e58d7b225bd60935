"""The plan of the study, its table and its figures."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.learning import comparison, plan
from benchmarks.harness.learning.curves_figure import MINUTES, TOKENS, Axis, Style, draw_curves
from benchmarks.harness.learning.intervals import mean
from benchmarks.harness.palette import BLUE, CYAN, GREY, MAGENTA, ORANGE, RED, TEAL
from benchmarks.harness.results import Columns, Row
from benchmarks.learn_smollm2.runs import Run
from benchmarks.learn_smollm2.variants import CRITIC_RATES, QUICK_VARIANTS, VARIANTS, Task

SEEDS = 3
GIB = 1 << 30


class Plan(plan.Plan[Task, Run]):
    """The runs of the study.

    Args:
        rows: rows of finished runs.
        task: the task.
        identity: hash of weights and prompts.
        seeds: number of seeds of the counted runs.
        quick: whether to use few variants and one rate of critics.
    """

    def __init__(
        self, rows: Iterable[Row], task: Task, identity: str, *, seeds: int = SEEDS, quick: bool = False
    ) -> None:
        variants = {name: VARIANTS[name] for name in QUICK_VARIANTS} if quick else VARIANTS
        super().__init__(rows, task, variants, critic_rates=CRITIC_RATES[: 1 if quick else None], seeds=seeds)
        self.identity = identity

    def make_run(self, name: str, rate: float, critic_rate: float, seed: int) -> Run:
        """See :class:`benchmarks.harness.learning.plan.Plan`."""
        return Run(self.task, name, dict(self.variants[name]), rate, critic_rate, seed, self.identity)


def compared(plan: Plan) -> list[Row]:
    """Return one line per variant."""
    counted = plan.counted()
    return [line | _measures(counted[line["variant"]]) for line in comparison.compared([plan])]


def _measures(runs: Sequence[Row]) -> Row:
    explained = [mean_explained for run in runs if (mean_explained := _mean_of(run["explained_variance"])) is not None]
    peaks = [run["peak_bytes"] / GIB for run in runs if run["peak_bytes"] is not None]
    return {
        "update_s": statistics.fmean(run["seconds"][-1] / run["updates"][-1] for run in runs),
        "explained_variance": mean(explained) if explained else None,
        "peak_gib": max(peaks, default=None),
    }


def _mean_of(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


COLUMNS: Columns = {
    "algorithm": comparison.COLUMNS["algorithm"],
    "rate": comparison.COLUMNS["rate"],
    "threshold": lambda line: line["threshold"],
    **{name: value for name, value in comparison.COLUMNS.items() if name not in ("task", "algorithm", "rate")},
    "seconds per update": lambda line: line["update_s"],
    "explained variance": lambda line: line["explained_variance"],
    "peak, GiB": lambda line: line["peak_gib"],
}

STYLES = {
    "sppo": Style("SPPO", BLUE),
    "sppo, critic of 6 layers": Style("SPPO, critic of 6 layers", CYAN),
    "sppo, probe": Style("SPPO, probe", TEAL),
    "ppo": Style("PPO", RED, "--"),
    "grpo": Style("GRPO", ORANGE, "-."),
    "rloo": Style("RLOO", MAGENTA, "-."),
    "reinforce, running mean": Style("REINFORCE, running mean", GREY, ":"),
}
FIGURES: Mapping[str, Axis] = {"tokens": TOKENS, "seconds": MINUTES}
"""What rewards are drawn against, by the name of the figure."""


def draw(path: Path, plan: Plan, axis: Axis) -> None:
    """Draw the rewards of all variants; nothing before a counted run is done."""
    draw_curves(path, [plan] if plan.counted() else [], STYLES, axis=axis, intervals=False, limits=None)


def reported(report: Mapping[str, Any], task: Task) -> Plan:
    """Return the plan that the rows of a report belong to."""
    return Plan(report["rows"], task, report["identity"])
