"""Accuracy that SPPO reaches on truncated samples, with and without replaying the sampling support.

Trains a recipe with four updates per rollout on samples of the complete distribution, and on samples of top_p = 0.9:
with log-probabilities over the tokens that the sampler kept, and with log-probabilities over the whole vocabulary.
Evaluation is greedy for all, so that only training differs.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness import recipe_comparison, results
from benchmarks.harness.palette import GREY
from benchmarks.harness.recipe_comparison import Comparison
from benchmarks.harness.results import Row
from benchmarks.harness.suite import Suite

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COMMON = {
    "eval_temperature": 0.0,
    "per_device_train_batch_size": 256,
    "steps_per_generation": 4,
    "gradient_accumulation_steps": 1,
}
_CHANGES: dict[str, dict[str, Any]] = {
    "top_p 1": {},
    "top_p 0.9, replayed": {"top_p": 0.9},
    "top_p 0.9, not replayed": {"top_p": 0.9, "replay_sampling_support": False},
}
VARIANTS = {name: _COMMON | changes for name, changes in _CHANGES.items()}


def _accuracy(row: Row) -> str:
    return f"{row['before'] + row['change']:.3f} ± {row['change_error']:.3f}"


COLUMNS: results.Columns = {
    "samples": lambda row: row["variant"],
    "seeds": lambda row: row["seeds"],
    "accuracy before": lambda row: f"{row['before']:.3f}",
    "after": _accuracy,
    "reached the threshold": lambda row: row["reached"],
    "tokens to it": lambda row: (
        f"{row['tokens'] / 1e3:.0f}k ± {row['tokens_error'] / 1e3:.0f}k" if row["tokens"] else ""
    ),
}


def draw(path: Path, report: Row) -> None:
    """Draw each variant's held-out accuracy over the updates: the mean over the seeds, and each seed thinly."""

    def fill(figure: Figure) -> None:
        axes = figure.subplots()
        for i, variant in enumerate(VARIANTS):
            runs = [row for row in report["rows"] if row["variant"] == variant]
            # The last evaluation of each run follows the last update, and repeats the one before it.
            curves = [
                [y for _, y in row["evaluations"]][: row["updates"] // recipe_comparison.EVAL_EVERY] for row in runs
            ]
            if not curves:
                continue
            updates = [recipe_comparison.EVAL_EVERY * (k + 1) for k in range(min(map(len, curves)))]
            for curve in curves:
                axes.plot(updates, curve[: len(updates)], color=f"C{i}", linewidth=0.5, alpha=0.5)
            means = [statistics.fmean(values) for values in zip(*(c[: len(updates)] for c in curves), strict=True)]
            axes.plot(updates, means, color=f"C{i}", linewidth=2, label=variant)
        axes.axhline(report["threshold"], color=GREY, linestyle=":", linewidth=1)
        axes.set_xlabel("updates, four per rollout")
        axes.set_ylabel("held-out accuracy, greedy")
        axes.legend()

    results.save_figure(path, (7, 4), fill)


COMPARISON = Comparison("truncated_sampling", VARIANTS, COLUMNS, stop_at_threshold=False)
SUITE = Suite(
    recipe_comparison.add_arguments,
    COMPARISON.run,
    tables={"truncated_sampling": COMPARISON.published_table},
    draw=draw,
    needs="the trainer",
)
