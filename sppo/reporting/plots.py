"""Plots of one or more runs: reward, response length, entropy, critic calibration and time per phase."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from sppo._utils import METRICS_FILE, atomic_write, read_lines
from sppo.reporting.text import smooth

Log = Sequence[Mapping[str, Any]]
"""Log entries of the trainer: training metrics and evaluations, each with its ``step``."""

X_AXES = {"tokens": "generated tokens", "updates": "updates", "seconds": "seconds of training"}
_PHASES = ("rollout", "reward", "critic", "update", "evaluate", "checkpoint")
_PHASE_COLORS = ("#3b4a6b", "#7a89a6", "#b3bed1", "#8c6d5f", "#c4a797", "#d9cfc4")  # distinct from the colors of runs


def plot(folders: Sequence[Path], output: Path, x: str = "tokens") -> None:
    """Plot runs into an image file.

    Args:
        folders: the runs' ``output_dir``, or checkpoints.
        output: the file; its suffix determines the format.
        x: the x axis, a key of ``X_AXES``.

    Raises:
        ValueError: a folder holds no run, a run has not logged an update yet, or the format is unknown.
    """
    save(draw({name: read_log(folder) for name, folder in short_names(folders).items()}, x), output)


def save(figure: Figure, output: Path) -> None:
    """Write a figure to an image file.

    Raises:
        ValueError: the format is unknown.
    """
    formats = figure.canvas.get_supported_filetypes()
    if output.suffix.removeprefix(".") not in formats:
        raise ValueError(f"output must end in one of .{', .'.join(formats)}, got {str(output)!r}")
    with atomic_write(output) as staged:
        figure.savefig(staged, dpi=150)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Read the log of a run from ``metrics.jsonl``, else from its newest checkpoint.

    Args:
        folder: the run's ``output_dir``, or a checkpoint.

    Raises:
        ValueError: the folder has no log, or the log has no update yet.
    """
    states = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=checkpoint_number)
    state = [*states, *folder.glob("trainer_state.json")][-1:]
    if (folder / METRICS_FILE).is_file():
        log = read_lines(folder / METRICS_FILE)
    elif state:
        log = json.loads(state[0].read_text(encoding="utf-8"))["log_history"]
    else:
        raise ValueError(
            f"{str(folder)!r} holds no run: neither {METRICS_FILE} nor checkpoint-*/trainer_state.json; "
            "give the output_dir of sppo train"
        )
    if not any("loss" in entry for entry in log):
        raise ValueError(f"the run in {str(folder)!r} has logged no update yet; try again after its first update")
    return log


def checkpoint_number(file: Path) -> int:
    """Return the number of the checkpoint that a file is in, or -1."""
    number = file.parent.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def short_names(folders: Sequence[Path]) -> dict[str, Path]:
    """Return folders by the shortest distinct ends of their paths."""
    paths = list(dict.fromkeys(Path(os.path.abspath(folder)) for folder in folders))
    for depth in range(1, max(len(path.parts) for path in paths)):
        names = {str(Path(*path.parts[-depth:])): path for path in paths}
        if len(names) == len(paths):
            return names
    return {str(path): path for path in paths}


def draw(runs: Mapping[str, Log], x: str = "tokens") -> Figure:
    """Draw runs into one figure; values are faint, running means are not.

    Args:
        runs: logs by the runs' names in the legend.
        x: the x axis, a key of ``X_AXES``.
    """
    figure = Figure(figsize=(12, 10), layout="constrained")
    panels = figure.subplot_mosaic(
        [["reward", "brier"], ["length", "calibration"], ["truncated", "entropy"], ["phases", "phases"]],
        height_ratios=[3, 3, 3, 0.6 + 0.5 * len(runs)],
    )
    colors = run_colors(runs)
    for name, log in runs.items():
        positions = x_positions(log, x)
        for panel, metric in _CURVES.items():
            draw_curve(panels[panel], log, positions, metric, colors[name])
        draw_curve(panels["brier"], log, positions, "brier_baseline", colors[name], linestyle=":", show_values=False)
        draw_evaluations(panels["reward"], log, positions, "reward", colors[name])
        draw_evaluations(panels["length"], log, positions, "response_length", colors[name])
        draw_evaluations(panels["truncated"], log, positions, "truncated", colors[name])
    for panel, (label, limits) in _LABELS.items():
        if panel != "reward":
            panels[panel].sharex(panels["reward"])
        format_axes(panels[panel], label, limits, X_AXES[x])
    panels["reward"].xaxis.set_major_locator(tick_locator(x))
    add_style_legend(panels["reward"], {"rollouts": "-", "held-out prompts": "--"})
    add_style_legend(panels["brier"], {"critic": "-", "mean success rate so far": ":"})
    _draw_phases(panels["phases"], runs)
    if len(runs) > 1:
        add_run_legend(figure, colors)
    else:
        figure.suptitle(next(iter(runs)))
    return figure


def run_colors(names: Iterable[str]) -> dict[str, str]:
    """Return the color of each run."""
    return {name: f"C{i % 10}" for i, name in enumerate(names)}


def tick_locator(x: str) -> MaxNLocator:
    """Make a locator of the ticks of an x axis, a key of ``X_AXES``; there are no fractions of updates and tokens."""
    return MaxNLocator("auto", steps=[1, 2, 5, 10], integer=x != "seconds")


def add_run_legend(figure: Figure, colors: Mapping[str, str]) -> None:
    """Add a legend of the runs above a figure."""
    lines = [Line2D([], [], color=color, linewidth=3, label=name) for name, color in colors.items()]
    figure.legend(handles=lines, loc="outside upper center", ncols=min(len(lines), 4), frameon=False)


_CURVES = {
    "reward": "reward",
    "brier": "brier",
    "length": "response_length",
    "calibration": "expected_calibration_error",
    "truncated": "truncated",
    "entropy": "entropy",
}
_LABELS: dict[str, tuple[str, tuple[float | None, float | None]]] = {
    "reward": ("mean reward", (None, None)),
    "brier": ("critic's Brier score\n(lower is better)", (0, None)),
    "length": ("response length [tokens]", (0, None)),
    "calibration": ("expected calibration error\nof the critic", (0, None)),
    "truncated": ("truncated responses", (-0.02, 1.02)),
    "entropy": ("entropy [nats per token]", (0, None)),
}


def x_positions(log: Log, x: str) -> list[float]:
    """Return the position of each log entry on the x axis."""
    position = 0.0
    positions = []
    for entry in log:
        if x == "updates":
            position = entry.get("step", position)
        elif x == "tokens":
            position = entry.get("total_generated_tokens", position)
        else:
            position += sum(seconds for _, seconds in _phases(entry))
        positions.append(position)
    return positions


def _phases(entry: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    return ((name.removeprefix("seconds/"), value) for name, value in entry.items() if name.startswith("seconds/"))


def draw_curve(
    axes: Axes,
    log: Log,
    positions: Sequence[float],
    metric: str,
    color: str,
    *,
    linestyle: str = "-",
    show_values: bool = True,
) -> None:
    """Draw the running mean of a metric over its faint values; entries without the metric are skipped."""
    points = [(x, entry[metric]) for x, entry in zip(positions, log, strict=True) if metric in entry]
    if not points:
        return
    xs, values = zip(*points, strict=True)
    if show_values:
        axes.plot(xs, values, color=color, alpha=0.25, linewidth=0.8)
    axes.plot(xs, smooth(values), color=color, linestyle=linestyle, marker="." if len(xs) == 1 else None)


def draw_evaluations(axes: Axes, log: Log, positions: Sequence[float], metric: str, color: str) -> None:
    """Draw a metric of the evaluations, with one line per set of held-out prompts."""
    names = {name for entry in log for name in entry if name.startswith("eval_") and "/" not in name}
    for name in sorted(name for name in names if name.endswith(f"_{metric}")):
        points = [(x, entry[name]) for x, entry in zip(positions, log, strict=True) if name in entry]
        axes.plot(*zip(*points, strict=True), "o--", color=color, markersize=5, markeredgecolor="white", linewidth=1)


def format_axes(axes: Axes, label: str, limits: tuple[float | None, float | None], x_label: str) -> None:
    """Label axes, and say so if nothing is drawn in them."""
    axes.set(xlabel=x_label, ylabel=label)
    axes.xaxis.set_major_formatter(lambda value, _: _short(value))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if not axes.lines:
        axes.text(0.5, 0.5, "not logged", color="0.5", ha="center", va="center", transform=axes.transAxes)
        axes.set(yticks=[])
        return
    axes.set_ylim(*limits)
    if label == _LABELS["truncated"][0]:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _short(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def add_style_legend(axes: Axes, styles: Mapping[str, Any]) -> None:
    """Add a legend of the line styles, in grey because colors stand for runs."""
    drawn = {line.get_linestyle() for line in axes.lines}
    handles = [
        Line2D([], [], color="0.4", linestyle=style, marker="o" if style == "--" else None, label=label)
        for label, style in styles.items()
        if style in drawn
    ]
    if handles:
        axes.legend(handles=handles, frameon=False)


def _draw_phases(axes: Axes, runs: Mapping[str, Log]) -> None:
    """Draw one bar per run: mean seconds per update, by phase."""
    totals = {name: _seconds_by_phase(log) for name, log in runs.items()}
    others = sorted({phase for phases in totals.values() for phase in phases} - set(_PHASES))
    left = dict.fromkeys(runs, 0.0)
    longest = max((sum(phases.values()) for phases in totals.values()), default=0.0)
    for i, phase in enumerate([*_PHASES, *others]):
        widths = [totals[name].get(phase, 0.0) for name in runs]
        if not any(widths):
            continue
        color = _PHASE_COLORS[i] if i < len(_PHASE_COLORS) else f"{0.3 + 0.1 * (i % 5):.1f}"
        bars = axes.barh(list(runs), widths, left=list(left.values()), color=color, label=phase, height=0.7)
        texts = [f"{width:.3g}" if width > 0.05 * longest else "" for width in widths]
        text_color = "white" if sum(to_rgb(color)) < 1.8 else "black"
        axes.bar_label(bars, texts, label_type="center", color=text_color, fontsize=9)
        left = {name: start + width for (name, start), width in zip(left.items(), widths, strict=True)}
    axes.invert_yaxis()
    axes.set(xlabel="mean seconds per update")
    axes.grid(alpha=0.3, axis="x")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if longest:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(_PHASES) + len(others), frameon=False)


def _seconds_by_phase(log: Log) -> dict[str, float]:
    """Compute the mean seconds per update by phase, over the updates of the log."""
    totals: dict[str, float] = {}
    for entry in log:
        for phase, seconds in _phases(entry):
            totals[phase] = totals.get(phase, 0.0) + seconds
    updates = max((entry["step"] for entry in log if "loss" in entry), default=1)
    return {phase: seconds / updates for phase, seconds in totals.items()}
