"""Generate the tables of README and docs, the charts and the diagrams, from the committed results.

In a page a table stands between ``<!-- table: NAME DEVICE -->`` and ``<!-- end -->`` and must not be edited. It is
generated from the files in benchmarks/results/DEVICE, or without a device from the code. Without options pages and
charts are brought up to date; ``--check`` changes nothing, and the exit code is 1 when a page is out of date.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.harness import results, suite
from benchmarks.harness.results import Row, markdown
from benchmarks.harness.suite import Suite
from benchmarks.report import diagrams, overview, reference

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"
VERSIONS = ("torch", "triton", "transformers", "python")
_TABLE = re.compile(r"(^<!-- table: (\S+)(?: (\S+))? -->\n).*?(<!-- end -->)", re.S | re.M)


def files_table(folder: Path) -> str:
    """Return one line per results file: its date, device and versions."""
    reports = [{"file": path.name, **json.loads(path.read_text())} for path in sorted(folder.glob("*.json"))]
    columns: results.Columns = {
        "results": lambda row: f"`{row['file']}`",
        "date": lambda row: row["date"].partition("T")[0],
        "device": lambda row: row.get("device"),
        **{name: lambda row, name=name: row["versions"].get(name) for name in VERSIONS},
    }
    return markdown([report for report in reports if "versions" in report], columns)


def emulated_table(folder: Path) -> str:
    """Return one line per kernel whose compiled code was executed on a CPU, two columns per target."""
    report = results.load(folder, "emulated")
    found: dict[str, dict[str, Row]] = {}
    for row in report["rows"]:
        found.setdefault(row["kernel"], {})[row["target"]] = row
    lines = [
        {
            "kernel": f"`{kernel}`",
            **{
                f"{target}, {what}": rows[target][what]
                for target in report["targets"]
                for what in ("launches", "programs")
            },
            "violations": sum(row["violations"] for row in rows.values()),
        }
        for kernel, rows in found.items()
    ]
    return markdown(lines, {key: lambda row, key=key: row[key] for key in lines[0]})


def quickstart_table(folder: Path) -> str:
    """Return one line per seed."""
    files = sorted(folder.glob("quickstart-seed*.json"))
    rows = [{"seed": file.stem.removeprefix("quickstart-seed"), **json.loads(file.read_text())} for file in files]
    columns: results.Columns = {
        "seed": lambda row: row["seed"],
        "accuracy before": lambda row: f"{row['accuracy_before']:.3f}",
        "after": lambda row: f"{row['accuracy_after']:.3f}",
        "generated tokens": lambda row: f"{row['generated_tokens']:,}",
        "installation, s": lambda row: row["seconds_of_installation"],
        "`make quickstart`, s": lambda row: row["seconds_of_quickstart"],
    }
    return markdown(rows, columns)


def suites_table(folder: Path) -> str:
    """Return one line per suite: its command, the first line of its docstring and its requirements."""
    rows = [{"name": name, "summary": suite.summary(name), "needs": suite.load(name).needs} for name in suite.names()]
    columns: results.Columns = {
        "suite": lambda row: f"`{row['name']}`",
        "measures": lambda row: row["summary"].rstrip("."),
        "requires": lambda row: row["needs"],
    }
    return markdown(rows, columns)


@functools.cache
def tables() -> dict[str, Callable[[Path], str]]:
    """Collect the tables of all suites."""
    return {name: table for each in suite.names() for name, table in suite.load(each).tables.items()}


def pages(root: Path) -> list[Path]:
    """List README and the pages of docs that hold generated tables."""
    found = [root / "README.md", *sorted(root.glob("docs/**/*.md"))]
    return [page for page in found if page.exists() and _TABLE.search(page.read_text(encoding="utf-8"))]


def render(page: str, folder: Path) -> str:
    """Generate the tables of a page again from the results under ``folder``.

    Raises:
        ValueError: the page asks for a table that no suite has.
    """

    def generate(match: re.Match[str]) -> str:
        head, name, device, end = match.groups()
        if name not in tables():
            raise ValueError(f"there is no table {name!r}, only {', '.join(tables())}")
        return f"{head}{tables()[name](folder / (device or ''))}\n{end}"

    return _TABLE.sub(generate, page)


def draw_charts(folder: Path) -> None:
    """Draw the charts of each report next to it."""
    for path in sorted(folder.glob("*/*.json")):
        report = json.loads(path.read_text())
        if report.get("suite") in suite.names():
            for chart, draw in suite.load(report["suite"]).charts(path).items():
                draw(chart, report)


def draw_figures(images: Path, folder: Path) -> None:
    """Draw the figures of the docs that belong to no single suite into ``images``."""
    images.mkdir(parents=True, exist_ok=True)
    overview.draw(images / "overview.svg", folder / "cpu")
    diagrams.modes(images / "modes.svg")
    diagrams.data_flow(images / "data-flow.svg")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--check", "--quick", action="store_true", help="change nothing, report pages out of date")
    parser.add_argument("--out", type=Path, default=ROOT, metavar="DIR", help="where the pages are (the repository)")


def run(args: argparse.Namespace) -> int:
    """Entry of the suite."""
    folder = args.out / RESULTS.relative_to(ROOT)
    stale = []
    for page in pages(args.out):
        name, old = str(page.relative_to(args.out)), page.read_text(encoding="utf-8")
        new = render(old, folder)
        if new != old:
            stale.append(name)
            if not args.check:
                page.write_text(new, encoding="utf-8", newline="\n")
        count = len(_TABLE.findall(new))
        print(f"{name}: {count} tables{', out of date' if new != old and args.check else ''}")
    if not args.check:
        draw_charts(folder)
        draw_figures(args.out / "docs/images", folder)
        return 0
    if stale:
        print(f"run python -m benchmarks report: {', '.join(stale)}", file=sys.stderr)
    return 1 if stale else 0


SUITE = Suite(
    add_arguments,
    run,
    tables={
        "files": files_table,
        "emulated": emulated_table,
        "quickstart": quickstart_table,
        "suites": suites_table,
        "settings": reference.settings_table,
        "commands": reference.commands_table,
    },
    needs="what all suites need",
)
