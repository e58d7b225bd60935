"""The predicted roofline: how near each kernel comes to the limits of an H100, by its machine code and its bytes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness.palette import BLUE, GREY, INK, ORANGE, WIDTH
from benchmarks.harness.results import Row, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEAST_MS = 0.005  # shorter kernels are left out


def draw(path: Path, report: Row) -> None:
    """Draw one point per kernel, in its longest predicted call; nothing without predictions."""
    longest: dict[str, Row] = {}
    for row in report.get("predicted", {}).get("kernels", []):
        if row["ms"] >= max(LEAST_MS, longest.get(row["kernel"], {"ms": 0})["ms"]):
            longest[row["kernel"]] = row
    if not longest:
        return
    rows = sorted(longest.values(), key=lambda row: -row["ms"])

    def fill(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot([0.02, 1, 40], [0.02, 1, 1], color=GREY)
        axes.text(0.03, 0.036, "memory bandwidth", color=GREY, rotation=38, fontsize=8)
        axes.text(38, 1.06, "instruction issue", color=GREY, ha="right", fontsize=8)
        for number, row in enumerate(rows, 1):
            x, y = row["issue"] / row["memory"], row["issue"] / row["ms"]
            name = row["kernel"].removesuffix("_kernel").removeprefix("linear_logprobs_")
            label = f"{number}  {name}, {row['ms']:.2g} ms"
            axes.plot(x, y, "o", color=BLUE if row["bound"] == "memory" else ORANGE, markersize=5, label=label)
            place = (-9, 4) if number % 2 else (4, -9)
            axes.annotate(str(number), (x, y), place, textcoords="offset points", color=INK, fontsize=7)
        axes.set(xscale="log", yscale="log", xlim=(0.02, 40), ylim=(0.01, 1.6))
        axes.set_xlabel("instructions per byte, 1 = an H100's balance")
        axes.set_ylabel("share of the instruction rate")
        axes.set_title("Predicted from machine code and bytes, not measured;\norange: not limited by memory")
        figure.legend(loc="outside right upper", handlelength=0.6, fontsize=7)

    save_figure(path, (WIDTH, 3.6), fill)
