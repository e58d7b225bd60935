"""Figures of the suite signal, one per question."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness.palette import BLUE, CYAN, GREY, INK, MAGENTA, ORANGE, RED, TEAL, WIDTH
from benchmarks.harness.results import Row, save_figure
from benchmarks.signal.comparison import BEST, CONSTANT, EXPLAINED, REFERENCE
from benchmarks.signal.tables import LEAST_VARIANCE, base_of, predicted_times, walks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ALGORITHMS: dict[str, tuple[str, str, str]] = {
    REFERENCE: ("SPPO, ideal critic", BLUE, "o"),
    "sppo, values of other prompts": ("SPPO, values of other prompts", CYAN, "X"),
    BEST: ("best baseline", INK, "*"),
    "no baseline": ("no baseline", GREY, "v"),
    "ppo, ideal critic, lambda 1": ("PPO, ideal critic", RED, "s"),
    "rloo, 8 responses": ("RLOO, 8 responses", MAGENTA, "D"),
    "grpo, 8 responses": ("GRPO, 8 responses", TEAL, "^"),
    "remax": ("ReMax", ORANGE, "P"),
}


def _times(report: Row, name: str) -> tuple[float, float, float] | None:
    for row in report["rows"]:
        if row["estimator"] == name:
            return row["times"], row["times_low"], row["times_high"]
    return None


def _plot(axes: Axes, reports: Sequence[Row]) -> None:
    """Plot the signal of each algorithm relative to a constant baseline's, one place per report."""
    for offset, (name, (label, colour, marker)) in enumerate(_ALGORITHMS.items()):
        found = [(place, times) for place, report in enumerate(reports) if (times := _times(report, name))]
        if not found:
            continue
        x = [place + (offset - (len(_ALGORITHMS) - 1) / 2) * 0.085 for place, _ in found]
        y = [times[0] for _, times in found]
        spread = [[t[0] - t[1] for _, t in found], [t[2] - t[0] for _, t in found]]
        axes.errorbar(x, y, spread, fmt=marker, color=colour, label=label, markersize=5, linewidth=1)
    axes.axhline(1, color=GREY, linewidth=0.8, linestyle=":")
    axes.set_yscale("log")
    axes.set_yticks([0.1, 0.3, 1, 3, 10], ["0.1", "0.3", "1", "3", "10"])
    axes.minorticks_off()


def _drawn(path: Path, reports: Sequence[Row], labels: Sequence[str], title: str) -> None:
    if not reports:
        return

    def fill(figure: Figure) -> None:
        axes = figure.subplots()
        _plot(axes, reports)
        axes.set_xticks(range(len(reports)), labels)
        axes.set_ylabel("signal per response,\ntimes a constant baseline's")
        axes.set_xlabel(title)
        figure.legend(loc="outside upper center", ncols=4, frameon=False)

    save_figure(path, (WIDTH, 3.6), fill)


def spread(path: Path, report: Row) -> None:
    """Draw the signal against the spread of difficulty."""
    names = {
        "walks: even, 64 steps": "all 0.3",
        "walks: graded, 64 steps": "0.98 to 0.02",
        "walks: mixed, 64 steps": "0.9 and 0.1",
        "walks: extreme, 64 steps": "0.98 and 0.02",
    }
    found = {label: report["cases"][name] for name, label in names.items() if name in report["cases"]}
    if "smollm2" in report["cases"]:
        found["SmolLM2, sums"] = report["cases"]["smollm2"]
    _drawn(path, list(found.values()), list(found), "rates of success that the policy was taught, by prompt")


def horizon(path: Path, report: Row) -> None:
    """Draw the signal against the length of a response."""
    found = {
        f"{steps} steps": report["cases"][name]
        for steps in (16, 64, 256)
        if (name := f"walks: mixed, {steps} steps") in report["cases"]
    }
    _drawn(path, list(found.values()), list(found), "length of a response (rates of success 0.9 and 0.1)")


def explained(path: Path, report: Row) -> None:
    """Draw the signal against the share of the variance of success that the critic explains."""
    reports = {
        name: case for name, case in walks(report["cases"]).items() if case["success_variance"] >= LEAST_VARIANCE
    }

    def fill(figure: Figure) -> None:
        axes = figure.subplots()
        colours = (BLUE, TEAL, RED, ORANGE, MAGENTA, CYAN, GREY)
        for (name, case), colour in zip(reports.items(), colours, strict=False):
            points = [(0.0, CONSTANT), *((share, f"sppo, critic that explains {share:.0%}") for share in EXPLAINED)]
            points.append((1.0, REFERENCE))
            y = [times[0] for _, each in points if (times := _times(case, each))]
            label = name.removeprefix("walks: ").replace("smollm2", "SmolLM2, sums")
            axes.plot([share for share, _ in points], y, color=colour, marker="o", markersize=3, label=label)
            for critic, curves in case["explained_by_rollout"].items():
                for seed, curve in enumerate(curves):
                    times = _times(case, f"{critic}, seed {seed}")
                    if times and "probe" in critic:
                        axes.plot(curve[-1], times[0], "*", color=colour, markersize=9)
        axes.plot([], [], "*", color=INK, label="probe after 20 rollouts")
        axes.set_xlabel("share of the variance of success that the critic explains")
        axes.set_ylabel("signal per response,\ntimes a constant baseline's")
        axes.legend(frameon=False)

    if reports:
        save_figure(path, (WIDTH, 3.4), fill)


def critics(path: Path, report: Row) -> None:
    """Draw what trained critics explain, by rollout."""
    wanted = ("walks: mixed, 64 steps", "walks: graded, 64 steps", "smollm2")
    found = {name: report["cases"][name] for name in wanted if name in report["cases"]}
    colours = (GREY, ORANGE, RED, MAGENTA, BLUE)

    def fill(figure: Figure) -> None:
        panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
        for (name, case), axes in zip(found.items(), panels, strict=True):
            curves = case["explained_by_rollout"]
            for critic, colour in zip(curves, [*colours[: len(curves) - 1], BLUE], strict=True):
                mean = [statistics.fmean(points) for points in zip(*curves[critic], strict=True)]
                label = critic.removeprefix("sppo, ")
                axes.plot(
                    range(1, len(mean) + 1), mean, color=colour, label=label, marker="." if colour == BLUE else ""
                )
            axes.axhline(0.5, color=GREY, linestyle=":", linewidth=0.8)
            axes.set_title(name.removeprefix("walks: ").replace("smollm2", "SmolLM2, sums"))
            axes.set_xlabel("rollouts of 64 responses")
            axes.set_xticks(range(0, len(mean) + 1, 5))
            axes.set_ylim(-0.6, 1.05)
            axes.legend(frameon=False, fontsize=7, loc="lower right")
        panels[0].set_ylabel("share of the variance of\nsuccess that is explained")

    if found:
        save_figure(path, (WIDTH, 3.0), fill)


def ratios(path: Path, report: Row) -> None:
    """Draw the signal of each level of the ratio, by the number of updates since the responses were sampled."""
    found = [case for name, case in report["cases"].items() if name.startswith("ratios")]
    if not found:
        return
    rows = found[0]["rows"]
    names = list(dict.fromkeys(row["estimator"] for row in rows))
    updates = sorted({row["updates"] for row in rows})

    def fill(figure: Figure) -> None:
        axes = figure.subplots()
        for number, (count, colour) in enumerate(zip(updates, (BLUE, RED, TEAL), strict=False)):
            of_count = {row["estimator"]: row for row in rows if row["updates"] == count}
            y = [place + (number - (len(updates) - 1) / 2) * 0.25 for place in range(len(names))]
            x = [of_count[name]["times"] for name in names]
            low = [max(0.0, of_count[name]["times"] - of_count[name]["times_low"]) for name in names]
            high = [max(0.0, of_count[name]["times_high"] - of_count[name]["times"]) for name in names]
            axes.errorbar(
                x, y, xerr=[low, high], fmt="o", color=colour, label=f"after {count} update{'s' if count > 1 else ''}"
            )
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlabel("signal per response, times that of responses of the updated policy")
        axes.legend(frameon=False)

    save_figure(path, (WIDTH, 3.2), fill)


def predictions(path: Path, report: Row) -> None:
    """Draw measured against predicted signals, relative to a constant baseline's."""
    reports = walks(report["cases"])

    def fill(figure: Figure) -> None:
        axes = figure.subplots()
        colours = (BLUE, TEAL, RED, ORANGE, MAGENTA, CYAN, GREY)
        for (name, case), colour in zip(reports.items(), colours, strict=False):
            rows = [row for row in case["rows"] if predicted_times(case, row) and row is not base_of(case)]
            x = [predicted_times(case, row) for row in rows]
            y = [row["times"] for row in rows]
            bars = [
                [row["times"] - row["times_low"] for row in rows],
                [row["times_high"] - row["times"] for row in rows],
            ]
            label = name.removeprefix("walks: ").replace("smollm2", "SmolLM2, sums")
            style: dict[str, Any] = {"fmt": "o", "markersize": 3, "linewidth": 0.6}
            axes.errorbar(x, y, [[max(0.0, each) for each in bar] for bar in bars], color=colour, label=label, **style)
        limits = (0.03, 20)
        axes.plot(limits, limits, color=GREY, linewidth=0.8, linestyle=":")
        axes.set(xscale="log", yscale="log", xlim=limits, ylim=limits, aspect="equal")
        axes.set_xlabel("predicted, times a constant baseline's")
        axes.set_ylabel("measured, times a constant baseline's")
        axes.legend(frameon=False, fontsize=7)

    if reports:
        save_figure(path, (4.6, 4.2), fill)


FIGURES: Mapping[str, Callable[[Path, Row], None]] = {
    "spread": spread,
    "horizon": horizon,
    "explained": explained,
    "critics": critics,
    "ratios": ratios,
    "predictions": predictions,
}
