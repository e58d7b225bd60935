"""Learning curves: reward against tokens, updates and seconds, one row of panels per task."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness.results import save_figure
from benchmarks.learn.intervals import COSTS
from benchmarks.learn.run_plan import Plan
from benchmarks.learn.variants import ALGORITHMS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLES = {"tokens": "generated tokens", "updates": "updates", "seconds": "seconds of training, one thread"}


def draw(path: Path, plans: Iterable[Plan]) -> None:
    """Draw the mean over the seeds of each algorithm; the dotted line is the threshold of the task."""
    shown = [(plan.task, variants) for plan in plans if (variants := plan.counted())]
    if not shown:
        return

    def fill(figure: Figure) -> None:
        panels = figure.subplots(len(shown), len(COSTS), sharey="row", squeeze=False)
        for (task, variants), line in zip(shown, panels, strict=True):
            for cost, axes in zip(COSTS, line, strict=True):
                for name in (name for name in ALGORITHMS if name in variants):
                    columns = [zip(*(run[key] for run in variants[name]), strict=True) for key in (cost, "reward")]
                    colour = f"C{list(ALGORITHMS).index(name)}"
                    axes.plot(*([statistics.fmean(x) for x in column] for column in columns), label=name, color=colour)
                axes.axhline(task.threshold, color="grey", linestyle=":", linewidth=1)
                axes.set_xlabel(TITLES[cost])
            line[0].set_ylabel("held-out reward")
            line[0].set_title(task.name, loc="left", fontsize=10)
        panels[0][0].legend(fontsize=7)

    save_figure(path, (13, 3.2 * len(shown)), fill)
