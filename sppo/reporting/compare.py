"""Comparison of runs at equal tokens, equal updates and equal seconds: a table, a figure and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sppo._utils import SUMMARY_FILE, atomic_write
from sppo.reporting.history import RunHistory
from sppo.reporting.plots import (
    X_AXES,
    Log,
    add_run_legend,
    add_style_legend,
    checkpoint_number,
    draw_curve,
    draw_evaluations,
    format_axes,
    read_log,
    run_colors,
    save,
    short_names,
    tick_locator,
    x_positions,
)
from sppo.reporting.text import aligned, number, smooth

END = "end"
_SETTINGS = "training_args.json"
_SCORES = {"reward": "mean reward of training (running mean)", "held_out": "mean reward of held-out prompts"}


_TOLERANCE = 1.01  # entries of two runs seldom fall on the same number of tokens


@dataclass
class Run:
    """A run to compare.

    Attributes:
        name: short name of its folder.
        folder: its ``output_dir``, or a checkpoint.
        log: its log entries.
        algorithm, seed: None if the folder does not tell.
    """

    name: str
    folder: Path
    log: Log
    algorithm: str | None
    seed: int | None

    def reached(self, axis: str) -> float:
        """Return how far the run is, on an axis of ``X_AXES``."""
        return x_positions(self.log, axis)[-1]

    def scores(self, equal: Mapping[str, float]) -> dict[str, dict[str, float | None]]:
        """Return the mean rewards at equal amounts and at the end; None if there is none by then."""
        history = RunHistory()
        rewards: list[tuple[int, float]] = []  # index of the entry, reward
        held_out: list[tuple[int, float]] = []
        for i, entry in enumerate(self.log):
            evaluations = len(history.held_out)
            history.add(entry)
            if "loss" in entry and "reward" in entry:
                rewards.append((i, entry["reward"]))
            if len(history.held_out) > evaluations:
                held_out.append((i, history.held_out[-1]))
        means = smooth([reward for _, reward in rewards])
        series = {"reward": [(i, mean) for (i, _), mean in zip(rewards, means, strict=True)], "held_out": held_out}
        scores: dict[str, dict[str, float | None]] = {name: {} for name in series}
        for axis, limit in equal.items():
            positions = x_positions(self.log, axis)
            for name, points in series.items():
                reached = (value for i, value in reversed(points) if positions[i] <= limit * _TOLERANCE)
                scores[name][axis] = next(reached, None)
        for name, points in series.items():
            scores[name][END] = points[-1][1] if points else None
        return scores


def compare(folders: Sequence[Path], output: Path, json_file: Path | None = None) -> str:
    """Compare runs at the largest amounts of tokens, updates and seconds that all of them reached.

    Args:
        folders: the runs' ``output_dir``, or checkpoints.
        output: image file to write; its suffix determines the format.
        json_file: file to write the numbers to; None for none.

    Returns:
        The tables.

    Raises:
        ValueError: a folder holds no run, a run has not logged an update yet, or the format is unknown.
    """
    runs = [read_run(name, folder) for name, folder in short_names(folders).items()]
    equal = {axis: min(run.reached(axis) for run in runs) for axis in X_AXES}
    scores = {run.name: run.scores(equal) for run in runs}
    save(draw_comparison(runs, equal), output)
    if json_file is not None:
        rows = [
            {"run": run.name, "folder": str(run.folder), "algorithm": run.algorithm, "seed": run.seed}
            | {axis: run.reached(axis) for axis in ("updates", "tokens", "seconds")}
            | scores[run.name]
            for run in runs
        ]
        with atomic_write(json_file) as staged:
            staged.write_text(json.dumps({"equal": equal, "runs": rows}, indent=1) + "\n", encoding="utf-8")
    return "\n\n".join([_overview(runs), *(_table(name, runs, scores, equal) for name in _SCORES), f"Plot: {output}"])


def read_run(name: str, folder: Path) -> Run:
    """Read a run's log, and its algorithm and seed from its settings or its summary.

    Raises:
        ValueError: the folder holds no run, or the run has not logged an update yet.
    """
    log = read_log(folder)
    checkpoints = sorted(folder.glob(f"checkpoint-*/{_SETTINGS}"), key=checkpoint_number, reverse=True)
    facts: dict[str, Any] = {}
    for file in [folder / _SETTINGS, *checkpoints, folder / SUMMARY_FILE]:
        if file.is_file():
            facts = json.loads(file.read_text(encoding="utf-8")) | facts
    return Run(name, folder, log, facts.get("algorithm"), facts.get("seed"))


def _overview(runs: Sequence[Run]) -> str:
    rows = [["run", "algorithm", "seed", "updates", "tokens", "seconds"]]
    for run in runs:
        reached = [f"{run.reached(axis):,.0f}" for axis in ("updates", "tokens", "seconds")]
        rows.append([run.name, run.algorithm or "-", "-" if run.seed is None else str(run.seed), *reached])
    return aligned(rows)


def _table(
    name: str, runs: Sequence[Run], scores: Mapping[str, Mapping[str, Mapping[str, Any]]], equal: Mapping[str, float]
) -> str:
    rows = [["", *(f"{equal[axis]:,.0f} {axis}" for axis in X_AXES), END]]
    for run in runs:
        values = scores[run.name][name]
        rows.append([run.name, *("-" if values[at] is None else number(values[at]) for at in (*X_AXES, END))])
    return f"{_SCORES[name]} at\n{aligned(rows)}"


def draw_comparison(runs: Sequence[Run], equal: Mapping[str, float]) -> Figure:
    """Draw the reward over tokens, updates and seconds; a vertical line is where all runs are compared."""
    figure = Figure(figsize=(14, 4.5), layout="constrained")
    panels = figure.subplots(1, len(X_AXES), sharey=True)
    colors = run_colors(run.name for run in runs)
    for axes, (axis, label) in zip(panels, X_AXES.items(), strict=True):
        for run in runs:
            positions = x_positions(run.log, axis)
            draw_curve(axes, run.log, positions, "reward", colors[run.name])
            draw_evaluations(axes, run.log, positions, "reward", colors[run.name])
        axes.xaxis.set_major_locator(tick_locator(axis))
        format_axes(axes, "mean reward" if axes is panels[0] else "", (None, None), label)
        if len(runs) > 1:
            axes.axvline(equal[axis], color="0.6", linestyle=":", linewidth=1)
    add_style_legend(panels[0], {"rollouts": "-", "held-out prompts": "--"})
    add_run_legend(figure, colors)
    return figure
