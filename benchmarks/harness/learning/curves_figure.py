"""Figures of learning curves: a panel per task, a line per variant, a band for the interval of its mean."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.harness.learning.intervals import mean
from benchmarks.harness.learning.plan import Plan
from benchmarks.harness.palette import GREY, WIDTH
from benchmarks.harness.results import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Style(NamedTuple):
    """How a variant looks."""

    label: str
    colour: str
    line: str | tuple[int, tuple[int, ...]] = "-"
    marker: str = "o"


Variants = dict[str, Style]


class Axis(NamedTuple):
    """What rewards are drawn against: a column of the rows, the unit of the axis, and its factor to the column's."""

    column: str
    label: str
    factor: float


TOKENS = Axis("tokens", "thousands of generated tokens", 1e-3)
MINUTES = Axis("seconds", "minutes of processor time", 1 / 60)


def draw_curves(
    path: Path,
    plans: Sequence[Plan[Any, Any]],
    variants: Variants,
    *,
    axis: Axis = TOKENS,
    intervals: bool = True,
    limits: tuple[float, float] | None = (0, 1),
) -> None:
    """Draw held-out rewards over what they cost, the mean over the seeds; nothing without plans.

    Args:
        path: the file.
        plans: plans with finished runs; the runs of a variant have equally many evaluations.
        variants: how each variant looks; others are left out.
        axis: the horizontal axis.
        intervals: whether to draw 95% intervals.
        limits: of the vertical axis; None for those of the curves.
    """
    if not plans:
        return
    rows, columns = math.ceil(len(plans) / 2), min(len(plans), 2)

    def fill(figure: Figure) -> None:
        panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
        for axes, plan in zip(panels.flat, plans, strict=False):
            _fill(axes, plan, variants, axis, intervals)
        for axes in panels[:, 0]:
            axes.set_ylabel("held-out reward")
            if limits:
                axes.set_ylim(*limits)
        for axes in panels[-1]:
            axes.set_xlabel(axis.label)
        for axes in panels.flat[len(plans) :]:
            axes.set_axis_off()
        lines = {line.get_label(): line for axes in panels.flat for line in axes.lines}
        keys = [lines[style.label] for style in variants.values() if style.label in lines]
        figure.legend(handles=keys, loc="outside lower center", ncols=3, frameon=False)

    save_figure(path, (WIDTH, 0.8 + 2.5 * rows), fill)


def _fill(axes: Axes, plan: Plan[Any, Any], variants: Variants, axis: Axis, intervals: bool) -> None:
    found = plan.counted()
    for name in (name for name in variants if name in found):
        style = variants[name]
        spent = [
            statistics.fmean(x) * axis.factor for x in zip(*(run[axis.column] for run in found[name]), strict=True)
        ]
        rewards = [mean(y) for y in zip(*(run["reward"] for run in found[name]), strict=True)]
        means = [y.value for y in rewards]
        axes.plot(spent, means, color=style.colour, linestyle=style.line, label=style.label)
        if intervals and len(found[name]) > 1:
            ends = [y.low for y in rewards], [y.high for y in rewards]
            axes.fill_between(spent, *ends, color=style.colour, alpha=0.1, linewidth=0)
    axes.axhline(plan.task.threshold, color=GREY, linestyle=":", linewidth=1)
    axes.set_title(plan.task.name, loc="left")
