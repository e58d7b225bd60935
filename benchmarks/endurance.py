"""Memory and seconds per update over 500 updates: whether either grows.

The quickstart's model is trained for 500 updates; after each one the resident memory of the process and the seconds of
the update are recorded. The exit code is 1 when the median of the last fifth exceeds that of the second fifth by more
than 5% in memory, or by more than 25% in seconds, which other processes affect.
"""

from __future__ import annotations

import argparse
import gc
import resource
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.harness import results
from benchmarks.harness.recipe_trainer import build_quiet_trainer
from benchmarks.harness.results import Row
from benchmarks.harness.suite import Suite

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LIMITS = {"resident_mb": 1.05, "seconds": 1.25}


def train(updates: int, folder: Path) -> list[Row]:
    """Train, and return a row per update."""
    from transformers import TrainerCallback

    rows: list[Row] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            rows.append({"update": state.global_step, "resident_mb": resident_mb(), "at": time.perf_counter()})

    saved = {"save_strategy": "steps", "save_steps": 50, "save_total_limit": 2, "output_dir": folder}
    # Far below the rate that learns, so that the lengths of responses, and with them the work, stay constant.
    run = {"max_steps": updates, "learning_rate": 1e-6, "logging_steps": 10}
    trainer = build_quiet_trainer("quickstart", {**saved, **run})
    trainer.add_callback(Watch())
    start = time.perf_counter()
    trainer.train()
    for row, before in zip(rows, [start, *(row["at"] for row in rows)], strict=False):
        row["seconds"] = row["at"] - before
    return [{name: value for name, value in row.items() if name != "at"} for row in rows]


def resident_mb() -> float:
    """Return the resident memory of this process; its maximum so far on systems without /proc."""
    gc.collect()
    about = Path("/proc/self/statm")
    if about.exists():
        return int(about.read_text().split()[1]) * resource.getpagesize() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def growth(rows: Sequence[Row]) -> dict[str, float]:
    """Return the median of the last fifth over that of the second, when caches are full."""
    pairs = {name: _medians(rows, name) for name in LIMITS}
    return {name: last / second for name, (second, last) in pairs.items()}


def _medians(rows: Sequence[Row], name: str) -> tuple[float, float]:
    fifth = len(rows) // 5
    second, last = ([row[name] for row in part] for part in (rows[fifth : 2 * fifth], rows[-fifth:]))
    return statistics.median(second), statistics.median(last)


COLUMNS: results.Columns = {
    "updates": lambda report: len(report["rows"]),
    "resident memory at the second fifth, MB": lambda report: round(_medians(report["rows"], "resident_mb")[0]),
    "at the last, MB": lambda report: round(_medians(report["rows"], "resident_mb")[1]),
    "seconds per update at the second fifth": lambda report: _medians(report["rows"], "seconds")[0],
    "at the last": lambda report: _medians(report["rows"], "seconds")[1],
}


def failures_of(rows: Sequence[Row]) -> list[str]:
    """List the quantities that exceeded their growth limit."""
    return [f"{name} grew {by:.2f} times" for name, by in growth(rows).items() if by > LIMITS[name]]


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Draw memory and seconds against updates."""

    def fill(figure: Figure) -> None:
        for axes, (name, label) in zip(
            figure.subplots(2, sharex=True),
            (("resident_mb", "resident memory, MB"), ("seconds", "seconds per update")),
            strict=True,
        ):
            axes.plot([row["update"] for row in rows], [row[name] for row in rows], linewidth=1)
            axes.set(ylabel=label, ylim=(0, None))
            axes.grid(alpha=0.3)
        axes.set_xlabel("update")

    results.save_figure(path, (7, 5), fill)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="five updates")
    parser.add_argument("--updates", type=int, default=500, help="number of updates (%(default)s)")
    results.add_out(parser)


def run(args: argparse.Namespace) -> int:
    """Entry of the suite."""
    path = args.out / "endurance.json"
    rows = train(5 if args.quick else args.updates, args.out / "runs" / f"endurance-{time.time_ns()}")
    failures, grown = [] if args.quick else failures_of(rows), growth(rows)
    results.write(
        path,
        "endurance",
        device=results.device_name(results.this_device()),
        threads=torch.get_num_threads(),
        quick=args.quick,
        growth=grown,
        failures=failures,
        rows=rows,
    )
    draw(path.with_suffix(".svg"), rows)
    said = ", ".join(f"{name} {by:.3f} times" for name, by in grown.items())
    return results.conclude(f"{len(rows)} updates, last fifth over second: {said}", failures, path)


def table(folder: Path) -> str:
    """Return one line for the run."""
    return results.markdown([results.load(folder, "endurance")], COLUMNS)


SUITE = Suite(
    add_arguments,
    run,
    tables={"endurance": table},
    draw=lambda path, report: draw(path, report["rows"]),
    needs="the trainer",
)
