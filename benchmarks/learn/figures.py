"""Figures of the study, one per question: curves over tokens, ratios to SPPO's costs, differences from its rewards.

Colours are Paul Tol's vibrant ones; variants also differ in their markers or lines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness.learning.comparison import compared
from benchmarks.harness.learning.curves_figure import Style, Variants, draw_curves
from benchmarks.harness.learning.intervals import Cost, mean, mean_reward
from benchmarks.harness.palette import BLUE, CYAN, GREY, INK, MAGENTA, ORANGE, PAPER, RED, TEAL, WIDTH
from benchmarks.harness.results import Row, save_figure
from benchmarks.learn.run_plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D


ALGORITHMS: Variants = {
    "sppo": Style("SPPO", BLUE),
    "ppo": Style("PPO", RED, "--"),
    "ppo, lambda 0.95": Style("PPO, lambda 0.95", ORANGE, "--"),
    "grpo": Style("GRPO", TEAL, "-."),
    "rloo": Style("RLOO", MAGENTA, "-."),
    "remax": Style("ReMax", GREY, (0, (5, 1, 1, 1, 1, 1))),
    "reinforce, running mean": Style("REINFORCE, running mean", INK, ":"),
    "reinforce, mean per prompt": Style("REINFORCE, mean per prompt", CYAN, ":"),
}
HORIZON: Variants = {
    "sppo": Style("SPPO", BLUE),
    "ppo": Style("PPO, lambda 1", RED, "--", "s"),
    "ppo, lambda 0.95": Style("PPO, lambda 0.95", ORANGE, ":", "D"),
}
CENTRING: Variants = {
    "sppo": Style("SPPO", BLUE),
    "sppo, centred": Style("SPPO, centred", TEAL, "-."),
    "ppo": Style("PPO (whitened)", RED, "--"),
    "reinforce, 0.3": Style("constant 0.3", ORANGE, ":"),
    "reinforce, running mean": Style("running mean", GREY, (0, (5, 1, 1, 1, 1, 1))),
}
DIFFICULTY: Variants = {
    "reinforce, mean per rule": Style("baseline that knows the rules", TEAL, marker="D"),
    "sppo, critic reads other prompts": Style("critic reads other prompts", BLUE),
    "sppo, critic's rate 1e-3": Style("critic's rate 1e-3", BLUE),
    "sppo, critic's rate 1e-3, alone for 10 rollouts": Style("critic's rate 1e-3, alone at first", BLUE),
    "sppo, critic of one layer": Style("critic of one layer", BLUE),
    "reinforce, mean per prompt": Style("mean per prompt, no critic", ORANGE, marker="s"),
    "reinforce, running mean": Style("running mean, no critic", ORANGE, marker="s"),
}
GROUPS: Variants = {
    "sppo, centred": Style("SPPO, centred: 64 x 1", BLUE),
    "grpo": Style("GRPO: 8 x 8", BLUE),
    "rloo": Style("RLOO: 16 x 4", BLUE),
    "grpo, 64 prompts": Style("GRPO: 64 x 8", BLUE),
}
UPDATES: Variants = {
    "sppo": Style("1 update", BLUE),
    "sppo, 4 updates, ratio of sum": Style("4, ratio of sum", TEAL, (0, (8, 2))),
    "sppo, 4 updates, ratio of mean, GSPO's clip": Style(
        "4, ratio of mean, clip 3e-4", MAGENTA, (0, (5, 1, 1, 1, 1, 1))
    ),
    "sppo, 4 updates, clip 0.05": Style("4, ratio per token, clip 0.05", ORANGE, "-."),
    "sppo, 4 updates per rollout": Style("4, ratio per token, clip 0.2", RED, "--"),
    "sppo, 4 updates, clip 0.8": Style("4, ratio per token, clip 0.8", GREY, ":"),
}
OF_HORIZON = {4: (GREY, "v"), 16: (TEAL, "o"), 64: (BLUE, "s"), 256: (ORANGE, "D")}


def algorithms(path: Path, plans: Sequence[Plan]) -> None:
    """Draw rewards of all algorithms on all tasks."""
    draw_curves(path, [plan for plan in plans if plan.counted()], ALGORITHMS, intervals=False)


def horizon(path: Path, plans: Sequence[Plan]) -> None:
    """Draw SPPO's and PPO's tokens to the threshold over the length of the chain, and their ratios."""
    lines = _lines(plans, HORIZON)
    if not any(name == "ppo" for name, _ in lines):
        return
    thresholds = {length: line["threshold"] for (_, length), line in sorted(lines.items(), key=lambda item: item[0][1])}

    def fill(figure: Figure) -> None:
        panels = figure.subplots(1, 2)
        for axes, cost, factor in zip(panels, ("tokens", "tokens_to_sppo"), (1e-3, 1.0), strict=True):
            for i, (name, style) in enumerate(HORIZON.items()):
                found = {length: line[cost] for (other, length), line in lines.items() if other == name and line[cost]}
                apart = 1.06 ** (i - 1)  # markers at the same length stand side by side
                for alike in set(thresholds.values()):  # costs of different thresholds are not connected
                    joined = sorted(length for length in found if thresholds[length] == alike)
                    costs = [found[length].value * factor for length in joined]
                    axes.plot([x * apart for x in joined], costs, linestyle=style.line, color=style.colour)
                for length, spent in found.items():
                    _point(axes, length * apart, spent.times(factor), style.colour, style.marker, upright=True)
            axes.set(xscale="log", yscale="log", xlabel="steps of the chain (reward at the threshold)")
            _plain_ticks(axes.xaxis, {length: f"{length} ({threshold})" for length, threshold in thresholds.items()})
            axes.margins(x=0.15)
        panels[0].set_title("thousands of tokens to the threshold", loc="left")
        panels[1].set_title("times SPPO's tokens, paired by seed", loc="left")
        _plain_ticks(panels[0].yaxis, (10, 30, 100, 300, 1000))
        _plain_ticks(panels[1].yaxis, (0.7, 1, 1.5, 2, 3, 4))
        panels[1].axhline(1, color=BLUE, linewidth=1)
        panels[0].legend(handles=[_key(style) for style in HORIZON.values()], loc="upper left", frameon=False)
        panels[1].legend(handles=[_key(Style("at least", GREY, "", "^"))], loc="upper left", frameon=False)

    save_figure(path, (WIDTH, 3.2), fill)


def centring(path: Path, plans: Sequence[Plan]) -> None:
    """Draw rewards of SPPO, of SPPO with centred advantages, and of baselines that leave a mean or do not."""
    draw_curves(path, [plan for plan in plans if "sppo, centred" in plan.counted()], CENTRING)


def updates(path: Path, plans: Sequence[Plan]) -> None:
    """Draw rewards of one and of four updates per rollout, by level and clip of the ratio."""
    draw_curves(path, [plan for plan in plans if "sppo, 4 updates per rollout" in plan.counted()], UPDATES)


def difficulty(path: Path, plans: Sequence[Plan]) -> None:
    """Draw differences of mean rewards from SPPO's where prompts differ in difficulty: each seed, mean and interval."""
    found = next((plan.counted() for plan in plans if plan.task.difficulty == "mixed"), {})
    of_sppo = {run["seed"]: mean_reward(run) for run in found.get("sppo", [])}
    less = {
        name: [mean_reward(run) - of_sppo[run["seed"]] for run in found.get(name, []) if run["seed"] in of_sppo]
        for name in DIFFICULTY
    }
    shown = [name for name in DIFFICULTY if less[name]]
    if not shown:
        return

    def fill(figure: Figure) -> None:
        axes = figure.subplots()
        for row, name in enumerate(shown):
            style = DIFFICULTY[name]
            axes.plot(less[name], [row + 0.22] * len(less[name]), ".", color=style.colour, alpha=0.5, markersize=4)
            _point(axes, row, mean(less[name]), style.colour, style.marker)
        _rows(axes, [DIFFICULTY[name].label for name in shown])
        axes.axvline(0, color=GREY, linewidth=1)
        axes.set_xlabel("mean reward less SPPO's, paired by seed")

    save_figure(path, (WIDTH, 1.0 + 0.32 * len(shown)), fill)


def groups(path: Path, plans: Sequence[Plan]) -> None:
    """Draw costs of groups to the threshold, relative to SPPO's: tokens and updates."""
    lines = _lines(plans, GROUPS)
    names = [name for name in GROUPS if any(name == other for other, _ in lines)]
    lengths = sorted({length for _, length in lines})
    if not any(line["tokens_to_sppo"] for line in lines.values()):
        return

    def fill(figure: Figure) -> None:
        panels = figure.subplots(1, 2, sharex=True, sharey=True)
        for axes, cost in zip(panels, ("tokens", "updates"), strict=True):
            for (name, length), line in lines.items():
                if ratio := line[f"{cost}_to_sppo"]:
                    row = names.index(name) + 0.22 * (lengths.index(length) - (len(lengths) - 1) / 2)
                    _point(axes, row, ratio, *OF_HORIZON[length])
            axes.set_xscale("log")
            axes.set_xlabel(f"times SPPO's {cost} to the threshold")
            _plain_ticks(axes.xaxis, (0.3, 0.5, 1, 2, 4))
            axes.axvline(1, color=GREY, linewidth=1)
        _rows(panels[0], [GROUPS[name].label for name in names])
        keys = [_key(Style(f"{length} steps", OF_HORIZON[length][0], "", OF_HORIZON[length][1])) for length in lengths]
        panels[0].legend(handles=keys, loc="upper left", frameon=False)

    save_figure(path, (WIDTH, 1.1 + 0.5 * len(names)), fill)


FIGURES: Mapping[str, Callable[[Path, Sequence[Plan]], None]] = {
    "algorithms": algorithms,
    "horizon": horizon,
    "centring": centring,
    "difficulty": difficulty,
    "groups": groups,
    "updates": updates,
}
"""Figures by name; each draws what the plans hold, and nothing if that does not bear on its question."""


def draw_all(results: Path, plans: Sequence[Plan]) -> None:
    """Draw every figure next to a results file, as ``RESULTS-NAME.svg``."""
    for name, figure in FIGURES.items():
        figure(results.with_name(f"{results.stem}-{name}.svg"), plans)


def _lines(plans: Sequence[Plan], variants: Variants) -> dict[tuple[str, int], Row]:
    """Return the comparison of variants on tasks of one difficulty, by variant and length of the chain."""
    even = [plan for plan in plans if plan.task.difficulty == "even"]
    return {
        (line["variant"], plan.task.horizon): line
        for plan in even
        for line in compared([plan])
        if line["variant"] in variants
    }


def _point(axes: Axes, at: float, cost: Cost, colour: str, marker: str, upright: bool = False) -> None:
    """Draw a value with its interval; a bound as a hollow triangle that points to larger values."""
    if cost.is_bound:
        marker = "^" if upright else ">"
    elif cost.low is not None:
        ends, across = [cost.low, cost.high], [at, at]
        axes.plot(*((across, ends) if upright else (ends, across)), "-", color=colour, linewidth=1.2)
    position = (at, cost.value) if upright else (cost.value, at)
    axes.plot(*position, marker, color=colour, markersize=5, markerfacecolor=PAPER if cost.is_bound else colour)


def _rows(axes: Axes, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)


def _plain_ticks(axis: Axis, values: Sequence[float] | Mapping[int, str]) -> None:
    """Label a logarithmic axis with plain numbers, or with the texts of a mapping."""
    axis.set_ticks(list(values), list(values.values()) if isinstance(values, Mapping) else [f"{x:g}" for x in values])
    axis.set_ticks([], minor=True)


def _key(style: Style) -> Line2D:
    from matplotlib.lines import Line2D

    hollow = {"markerfacecolor": PAPER} if style.marker == "^" else {}
    return Line2D(
        [], [], color=style.colour, linestyle=style.line, marker=style.marker, label=style.label, markersize=5, **hollow
    )
