"""The figure of the README: memory of log-probabilities, and what a critic is worth per response."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import memory
from benchmarks.harness.allocations import GIB
from benchmarks.harness.palette import BLUE, CYAN, GREY, MAGENTA, ORANGE, TEAL
from benchmarks.harness.results import Row, load, load_all, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PEAKS = ("eager", "cache, everything kept", "linear_policy_loss", "recompute", "support of 20")
"""Cases of the suite memory."""

SPREADS = {"even": "all 0.3", "graded": "0.98\nto 0.02", "mixed": "0.9\nand 0.1", "extreme": "0.98\nand 0.02"}
"""Walks of 64 steps of the suite signal, and the success rates of their prompts."""

ESTIMATORS = {
    "sppo, ideal critic": ("SPPO, ideal critic", CYAN, "o"),
    "sppo, probe": ("SPPO, probe after 20 rollouts", BLUE, "*"),
    "sppo, critic, rate 1e-5": ("SPPO, default critic after 20 rollouts", ORANGE, "s"),
    "rloo, 8 responses": ("RLOO, groups of 8", MAGENTA, "D"),
    "grpo, 8 responses": ("GRPO, groups of 8", TEAL, "^"),
}


def draw(path: Path, folder: Path) -> None:
    """Draw the figure from the results in ``folder``; nothing if they are missing."""
    if not all(load_all(folder, suite) for suite in ("memory", "signal")):
        return

    def fill(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, width_ratios=(1, 1))
        _memory(left, load(folder, "memory"))
        _signal(right, load(folder, "signal"))

    save_figure(path, (8.8, 3.0), fill)


def _memory(axes: Axes, report: Row) -> None:
    tokens = max(row["tokens"] for row in report["rows"])
    rows = {row["case"]: row for row in report["rows"] if row["tokens"] == tokens}
    peaks = [rows[case]["peak_bytes"] / GIB for case in PEAKS]
    axes.barh(range(len(peaks)), peaks, color=[ORANGE, *[BLUE] * (len(peaks) - 1)])
    for place, peak in enumerate(peaks):
        axes.text(peak + 0.6, place, f"{peak:.1f} GiB", va="center", fontsize=8)
    axes.set_yticks(range(len(peaks)), [memory.LABELS[case] for case in PEAKS], fontsize=8)
    axes.set_xlim(0, peaks[0] * 1.2)
    axes.invert_yaxis()
    size = rows["eager"]
    axes.set_title(
        "Peak memory of log-probabilities, forward and backward\n"
        f"{size['tokens']:,} tokens, H = {size['hidden']:,}, V = {size['vocab']:,}; counted without a GPU",
        fontsize=8.5,
    )


def _times(case: Row, name: str) -> float:
    """Return the signal of an estimator relative to a constant baseline's; of a trained critic the mean over seeds."""
    return statistics.fmean(row["times"] for row in case["rows"] if row["estimator"].partition(", seed")[0] == name)


def _signal(axes: Axes, report: Row) -> None:
    cases = [report["cases"][f"walks: {spread}, 64 steps"] for spread in SPREADS]
    for name, (label, colour, marker) in ESTIMATORS.items():
        axes.plot([_times(case, name) for case in cases], color=colour, marker=marker, label=label)
    axes.axhline(1, color=GREY, linewidth=0.8, linestyle=":")
    axes.text(2.98, 0.82, "constant baseline", color=GREY, fontsize=8, ha="right")
    axes.set_xticks(range(len(SPREADS)), SPREADS.values(), fontsize=8)
    axes.set_xlabel("success rates of the prompts", fontsize=8)
    axes.set_title(
        "Signal of the policy gradient per response\ntimes a constant baseline's; exact, small policies", fontsize=8.5
    )
    axes.legend(loc="upper left")
