"""Table and chart of the peaks, and the checks that fail."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness import results
from benchmarks.harness.allocations import GIB
from benchmarks.harness.palette import BLUE, CYAN, GREY, MAGENTA, ORANGE, PAPER, RED, TEAL
from benchmarks.train_memory.cases import SMALL_CRITIC, TOKEN_CRITIC
from benchmarks.train_memory.step import KINDS, OWNERS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEVICE = 80 * GIB
LEAST_SAVED = 11  # percentage points of DEVICE

COLUMNS: results.Columns = {
    "policy": lambda row: row["model"],
    "devices": lambda row: row["devices"],
    "step": lambda row: row["case"],
    "our operations": lambda row: "with" if row["operations"] else "without",
    "peak, GiB": lambda row: _gib(row["peak_bytes"]),
    "of 80 GiB": lambda row: f"{_percent(row):.1f}%",
    **{kind: lambda row, kind=kind: _gib(row["policy"][kind]) for kind in KINDS},
    "critic": lambda row: _gib(sum(row["critic"].values())) if row["critic"]["parameters"] else "",
    "before": lambda row: _gib(row["before_bytes"]),
}


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"


def _percent(row: results.Row) -> float:
    return 100 * row["peak_bytes"] / DEVICE


def failures_of(rows: Sequence[results.Row]) -> list[str]:
    """List the checks that the rows fail."""
    found = []
    ours = {(row["model"], row["case"]): row for row in rows if row["operations"]}
    for row in rows:
        with_ours = ours[row["model"], row["case"]]
        for name in ("peak_bytes", "before_bytes"):
            if with_ours[name] > row[name]:
                found.append(
                    f"{row['model']}, {row['case']}: {name} {with_ours[name]} with our operations, {row[name]} without"
                )
    small, token = (ours.get((case.policy, case.name)) for case in (SMALL_CRITIC, TOKEN_CRITIC))
    if small and token and (saved := _percent(token) - _percent(small)) < LEAST_SAVED:
        found.append(f"{small['case']}: {saved:.1f} points below {token['case']}, not {LEAST_SAVED}")
    return found


def draw(path: Path, rows: Sequence[results.Row]) -> None:
    """Draw stacked bars: the policy's kinds, then the critic's in the same colours, hatched."""

    def fill(figure: Figure) -> None:
        axes = figure.subplots()
        colours = (BLUE, ORANGE, TEAL, MAGENTA, CYAN, GREY)
        left = [0.0] * len(rows)
        for owner, hatch in zip(OWNERS, ("", "////"), strict=True):
            for kind, colour in zip(KINDS, colours, strict=True):
                sizes = [row[owner][kind] / GIB for row in rows]
                if any(sizes):
                    bars = {"color": colour, "hatch": hatch, "edgecolor": PAPER, "linewidth": 0}
                    axes.barh(range(len(rows)), sizes, left=left, label=f"{owner}: {kind}", **bars)
                left = [a + b for a, b in zip(left, sizes, strict=True)]
        labels = [
            f"{row['model']} on {row['devices']}: {row['case']}{'' if row['operations'] else ', without'}"
            for row in rows
        ]
        axes.set_yticks(range(len(rows)), labels, fontsize=8)
        axes.invert_yaxis()
        axes.axvline(DEVICE / GIB, color=RED, linewidth=1)
        axes.set_xlabel("peak of a training step on a device, GiB")
        axes.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.4, -0.1))

    results.save_figure(path, (11, 1.5 + 0.3 * len(rows)), fill)
