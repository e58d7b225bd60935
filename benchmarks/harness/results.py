"""Result files of the suites, and tables and charts of them.

Results are a JSON file with date, versions and all rows, a CSV file of the rows, and an SVG if the suite has a chart.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton

import sppo_kernels
from benchmarks.harness import palette

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
Columns = dict[str, Callable[[Row], object]]


class Chart(NamedTuple):
    """Horizontal bars, one per label, and a line at the limit if there is one."""

    unit: str
    bars: list[tuple[str, float]]
    limit: float | None = None


def add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path("runs/benchmarks"), metavar="DIR", help="folder of the results (%(default)s)"
    )


def this_device() -> torch.device:
    """Return the GPU if there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """Return the name of a device; of a CPU the model, on systems that report it."""
    if device.type != "cpu":
        return torch.cuda.get_device_name(device)
    about = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", about.read_text(), re.M) if about.exists() else None
    return f"{model[1] if model else platform.processor() or 'CPU'}, {os.cpu_count()} cores"


_QUERIED = (
    "uuid", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "power.draw", "power.limit",
    "temperature.gpu", "persistence_mode", "ecc.mode.current",
)  # fmt: skip


def gpu_facts() -> Row:
    """Return what times on this GPU depend on: its size, driver, current clocks in MHz and power in W.

    The result is empty without a GPU; fields that nvidia-smi does not report are omitted.
    """
    if not torch.cuda.is_available():
        return {}
    about = torch.cuda.get_device_properties(0)
    facts = {
        "name": about.name,
        "capability": f"{about.major}.{about.minor}",
        "multiprocessors": about.multi_processor_count,
        "memory_bytes": about.total_memory,
        "l2_bytes": getattr(about, "L2_cache_size", None),
        "cuda": torch.version.cuda,
    }
    return facts | _nvidia_smi(str(getattr(about, "uuid", "")))


def _nvidia_smi(uuid: str) -> Row:
    """Query nvidia-smi about the GPU with a UUID; about the first one if none has it."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERIED)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    # An error may be a sentence on stdout, with an exit code of 0.
    lines = [line for line in done.stdout.splitlines() if line.count(",") == len(_QUERIED) - 1]
    line = next((line for line in lines if uuid and uuid in line), next(iter(lines), "," * (len(_QUERIED) - 1)))
    values = zip(_QUERIED, (value.strip() for value in line.split(",")), strict=True)
    return {name: value for name, value in values if value.strip("[]") not in ("", "N/A", "ERR!", "Not Supported")}


def describe_gpu(facts: Row) -> str:
    """Return the facts in one line."""
    if not facts:
        return "no GPU"
    known = lambda name: facts.get(name, "?")
    return (
        f"{known('name')}, driver {known('driver_version')}, CUDA {known('cuda')}; "
        f"MHz: SM {known('clocks.sm')} of {known('clocks.max.sm')}, "
        f"memory {known('clocks.mem')} of {known('clocks.max.mem')}; "
        f"W: {known('power.draw')} of {known('power.limit')}; "
        f"persistence {known('persistence_mode')}, ECC {known('ecc.mode.current')}"
    )


def write(path: Path, suite: str, chart: Chart | None = None, **content: Any) -> None:
    """Write the results of a suite with date and versions: JSON at ``path``, CSV and SVG next to it, atomically."""
    head = {"suite": suite, "date": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions()}
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, lambda file: file.write_text(json.dumps({**head, **content}, indent=1, default=str) + "\n"))
    if rows := content.get("rows"):
        _replace(path.with_suffix(".csv"), lambda file: _write_csv(file, rows))
    if chart and chart.bars:
        draw(path.with_suffix(".svg"), chart)


def load_all(folder: Path, suite: str) -> list[Row]:
    """Read the reports of a suite in a folder, sorted by file name."""
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [report for report in reports if report.get("suite") == suite]


def load(folder: Path, suite: str) -> Row:
    """Read the only report of a suite in a folder.

    Raises:
        ValueError: there are none or several.
    """
    reports = load_all(folder, suite)
    if len(reports) != 1:
        raise ValueError(f"{folder} holds {len(reports)} reports of the suite {suite}, where a table needs one")
    return reports[0]


def table_of(suite: str, columns: Columns) -> Callable[[Path], str]:
    """Return a function that makes the Markdown table of the rows of a suite's only report in a folder."""
    return lambda folder: markdown(load(folder, suite)["rows"], columns)


def versions() -> dict[str, str]:
    """Return the versions that results depend on; suites of the operations run without transformers too."""
    found = {
        "sppo_kernels": sppo_kernels.__version__,
        "triton": triton.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    with suppress(PackageNotFoundError):
        found["transformers"] = version("transformers")
    return found


def conclude(text: str, failures: Sequence[str], path: Path) -> int:
    """Print the results and failures of a suite, and return its exit code."""
    print(f"{text}\n\n{len(failures)} failures; written to {path}")
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if failures else 0


def _replace(path: Path, save: Callable[[Path], object]) -> None:
    """Replace ``path`` atomically: readers see the old or the new content, never a part of it."""
    unfinished = path.with_name(f".{path.name}.tmp")
    save(unfinished)
    unfinished.replace(path)


def _write_csv(path: Path, rows: Iterable[Row]) -> None:
    """Write a column for each key of any row; nested keys become ``outer.inner``."""
    flat = [dict(_flat(row)) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(flat)


def _flat(row: Row, prefix: str = "") -> Iterable[tuple[str, object]]:
    for key, value in row.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def draw(path: Path, chart: Chart) -> None:
    """Draw a chart to an SVG file."""
    labels, values = zip(*chart.bars, strict=True)

    def fill(figure: Figure) -> None:
        axes = figure.subplots()
        bars = axes.barh(range(len(labels)), values, color=palette.BLUE)
        axes.bar_label(bars, fmt="{:.3g}", padding=2, fontsize=7)
        axes.margins(x=0.1)
        axes.set_yticks(range(len(labels)), labels, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel(chart.unit)
        if chart.limit is not None:
            axes.axvline(chart.limit, color=palette.RED, linewidth=1)

    save_figure(path, (palette.WIDTH, 0.8 + 0.22 * len(labels)), fill)


def draw_bars(chart: Callable[[list[Row]], Chart]) -> Callable[[Path, Row], None]:
    """Return a function that draws the chart of a report's rows."""
    return lambda path, report: draw(path, chart(report["rows"]))


def save_figure(
    path: Path,
    size: tuple[float, float],
    fill: Callable[[Figure], None],
) -> None:
    """Draw and save an SVG that follows the reader's colour scheme; print a notice if matplotlib is missing.

    Args:
        path: the file.
        size: width and height in inches.
        fill: draws the axes of a figure.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        print("no chart: matplotlib is not installed (pip install 'sppo-kernels[bench]')", file=sys.stderr)
        return
    image = io.StringIO()
    with matplotlib.rc_context(palette.RC):
        figure = Figure(figsize=size, layout="constrained")
        fill(figure)
        figure.savefig(image, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    _replace(path, lambda file: file.write_text(palette.themed(image.getvalue()), encoding="utf-8", newline="\n"))


def table(rows: Iterable[Row], columns: Columns) -> str:
    """Format rows as a text table, numbers right-aligned."""
    cells = [[cell(value(row)) for value in columns.values()] for row in rows]
    lines = [list(columns), *cells]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    right = [all(_is_number(line[i]) for line in cells) for i in range(len(columns))]
    align = lambda text, i: text.rjust(widths[i]) if right[i] else text.ljust(widths[i])
    return "\n".join("  ".join(align(text, i) for i, text in enumerate(line)).rstrip() for line in lines)


def markdown(rows: Iterable[Row], columns: Columns) -> str:
    """Format rows as a Markdown table."""
    line: Callable[[Sequence[str]], str] = lambda texts: f"| {' | '.join(texts)} |"
    cells = [line([cell(value(row)) for value in columns.values()]) for row in rows]
    return "\n".join([line(list(columns)), f"|{'---|' * len(columns)}", *cells])


def cell(value: object) -> str:
    """Format a value: three or four digits of a number, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        size = abs(value)
        if size and (size < 1e-3 or size >= 1e5):
            return f"{value:.1e}"
        return f"{value:.{0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 1 else 3}f}"
    return str(value)


def _is_number(text: str) -> bool:
    return not text or re.fullmatch(r"[-+.\de]+", text) is not None
