"""The tables of README and docs, and the charts, made of the committed results.

A table stands in a page between ``<!-- table: NAME DEVICE -->`` and ``<!-- end -->``; what is between is made of the
files in benchmarks/results/DEVICE and is not to be edited. Without options pages and charts are brought up to date;
``--check`` changes nothing, and the exit code is 1 when a page is not.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import (
    algorithms,
    claims,
    compile,
    endurance,
    flops,
    kernels,
    learn,
    memory,
    results,
    sparse,
    step,
    traffic,
    train_memory,
    trl_patch,
    tune,
)
from benchmarks.learn.table import SPEEDUP
from benchmarks.learn.variants import ALGORITHMS
from benchmarks.results import Row, markdown

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
PAGES = (
    "README.md",
    "docs/benchmarks.md",
    "docs/results.md",
    "docs/log-probabilities.md",
    "docs/few-entries.md",
    "docs/algorithms.md",
    "docs/trainers.md",
)
GIB = 1 << 30
VERSIONS = ("torch", "triton", "transformers", "python")
_TABLE = re.compile(r"(<!-- table: (\S+) (\S+) -->\n).*?(<!-- end -->)", re.S)

Report = dict[str, Any]


def load(folder: Path, suite: str) -> list[Report]:
    """The reports of a suite in a folder, in the order of their names."""
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [report for report in reports if report.get("suite") == suite]


def _one(folder: Path, suite: str) -> Report:
    reports = load(folder, suite)
    if len(reports) != 1:
        raise ValueError(f"{folder} holds {len(reports)} reports of the suite {suite}, where a table needs one")
    return reports[0]


# The tables


def memory_table(folder: Path) -> str:
    """A line a case, a column a size."""
    sizes: dict[str, dict[str, Row]] = {}
    for row in _one(folder, "memory")["rows"]:
        size = f"{row['tokens']:,} tokens, `H` = {row['hidden']:,}, `V` = {row['vocab']:,}"
        sizes.setdefault(size, {})[row["case"]] = row
    cases = list(dict.fromkeys(case for found in sizes.values() for case in found))
    columns: results.Columns = {"peak, GiB": lambda row: row["case"]}
    for size, found in sizes.items():
        columns[size] = lambda row, found=found: _peak(found.get(row["case"]))
    return markdown([{"case": case} for case in cases], columns)


def _peak(row: Row | None) -> str:
    if row is None:
        return ""
    kept = f" ({row['kept_bytes'] / GIB:.2f} kept)" if row["kept_bytes"] else ""
    return f"{row['peak_bytes'] / GIB:.2f}{kept}"


def learn_table(folder: Path) -> str:
    """A line a task and algorithm."""
    return markdown([line for line in _learned(folder) if line["variant"] in ALGORITHMS], learn.COLUMNS)


def learn_variants_table(folder: Path) -> str:
    """A line for each variant of an algorithm, after SPPO on its task."""
    lines = _learned(folder)
    tasks = {line["task"] for line in lines if line["variant"] not in ALGORITHMS}
    shown = [line for line in lines if line["task"] in tasks and line["variant"] not in set(ALGORITHMS) - {"sppo"}]
    return markdown(shown, learn.COLUMNS)


def learn_speedup_table(folder: Path) -> str:
    """A line a task for GRPO with as many responses as SPPO, and with as many prompts."""
    return markdown([line for line in _learned(folder) if line["variant"].startswith("grpo")], SPEEDUP)


def _learned(folder: Path) -> list[Row]:
    return learn.compared(learn.reported(_one(folder, "learn")))


def memory_train_table(folder: Path) -> str:
    """A line a step, with our operations and without."""
    return markdown(_one(folder, "memory-train")["rows"], train_memory.COLUMNS)


def files_table(folder: Path) -> str:
    """A line a file of results: when, on what and with which versions it was made."""
    reports = [{"file": path.name, **json.loads(path.read_text())} for path in sorted(folder.glob("*.json"))]
    columns: results.Columns = {
        "results": lambda row: f"`{row['file']}`",
        "date": lambda row: row["date"].partition("T")[0],
        "device": lambda row: row.get("device"),
        **{name: lambda row, name=name: row["versions"].get(name) for name in VERSIONS},
    }
    return markdown([report for report in reports if "versions" in report], columns)


def compile_table(folder: Path) -> str:
    """A line per kernel and version of Triton: the most registers that any of its launches takes, on each target."""
    found: dict[tuple[str, str], list[Row]] = {}
    for report in sorted(load(folder, "compile"), key=lambda report: report["versions"]["triton"]):
        for row in report["rows"]:
            kernel = f"`{row['module'].rpartition('.')[2]}.{row['kernel']}`"
            found.setdefault((kernel, report["versions"]["triton"]), []).append(row)
    targets = list(dict.fromkeys(row["target"] for rows in found.values() for row in rows))
    lines = [
        {
            "kernel": kernel,
            "Triton": version,
            "launches": len(rows),
            "spills": sum(row["spills"] for row in rows),
            **{target: max(row["registers"] for row in rows if row["target"] == target) for target in targets},
        }
        for (kernel, version), rows in found.items()
    ]
    order = list(dict.fromkeys(line["kernel"] for line in lines))
    lines.sort(key=lambda line: order.index(line["kernel"]))
    return markdown(lines, {key: lambda row, key=key: row[key] for key in lines[0]})


def emulated_table(folder: Path) -> str:
    """A line per kernel whose compiled code was executed on a CPU, two columns per target."""
    report = _one(folder, "emulated")
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


def passes_table(folder: Path) -> str:
    return markdown(_one(folder, "flops")["rows"], flops.COLUMNS)


def traffic_table(folder: Path) -> str:
    return markdown(_one(folder, "traffic")["rows"], traffic.COLUMNS)


def kernels_table(folder: Path) -> str:
    """A table for each operation at each point, and the claims that were judged."""
    texts = []
    for report in load(folder, "kernels"):
        for title, rows in kernels.by_item(report["rows"]).items():
            texts.append(f"**{title}**\n\n{markdown(rows, kernels.COLUMNS)}")
        if report["claims"]:
            texts.append(markdown(report["claims"], claims.COLUMNS))
    return "\n\n".join(texts)


def ways_table(folder: Path) -> str:
    """A line a point: ours beside the others, forward and backward together."""
    rows = [row for report in load(folder, "kernels") for row in report["rows"]]
    return markdown(kernels.summaries(rows), kernels.SUMMARY)


def quickstart_table(folder: Path) -> str:
    """A line a seed."""
    rows = [{"seed": path.stem.removeprefix("quickstart-seed"), **json.loads(path.read_text())}
            for path in sorted(folder.glob("quickstart-seed*.json"))]  # fmt: skip
    columns: results.Columns = {
        "seed": lambda row: row["seed"],
        "accuracy before": lambda row: f"{row['accuracy_before']:.3f}",
        "after": lambda row: f"{row['accuracy_after']:.3f}",
        "generated tokens": lambda row: f"{row['generated_tokens']:,}",
    }
    return markdown(rows, columns)


def _part_of_sparse(part: str) -> Callable[[Path], str]:
    return lambda folder: markdown(*sparse.tables(_one(folder, "sparse")["rows"])[part])


def _comparison(name: str) -> Callable[[Path], str]:
    """A line a variant of a comparison of algorithms."""

    def table(folder: Path) -> str:
        (report,) = (each for each in load(folder, "algorithms") if each["comparison"] == name)
        return markdown(algorithms.by_variant(report["rows"], report["threshold"]), algorithms.COLUMNS[name])

    return table


def step_table(folder: Path) -> str:
    """A line a case and algorithm."""
    return markdown(_steps(folder), step.COLUMNS)


def step_trl_table(folder: Path) -> str:
    """A line a case and algorithm that TRL has too."""
    return markdown(step.beside_trl(_steps(folder)), step.BESIDE_TRL)


def _steps(folder: Path) -> list[Row]:
    rows = [row for report in load(folder, "step") for row in report["rows"]]
    return sorted(rows, key=lambda row: row["lengths"] == "live")


def trl_table(folder: Path) -> str:
    """A line a way and kind of responses."""
    return markdown(_one(folder, "trl")["rows"], trl_patch.COLUMNS)


def endurance_table(folder: Path) -> str:
    """One line."""
    return markdown([_one(folder, "endurance")], endurance.COLUMNS)


TABLES: dict[str, Callable[[Path], str]] = {
    "memory": memory_table,
    "memory-train": memory_train_table,
    "learn": learn_table,
    "learn-variants": learn_variants_table,
    "learn-speedup": learn_speedup_table,
    "compile": compile_table,
    "emulated": emulated_table,
    "passes": passes_table,
    "files": files_table,
    "traffic": traffic_table,
    "quickstart": quickstart_table,
    "kernels": kernels_table,
    "ways": ways_table,
    "step": step_table,
    "step-trl": step_trl_table,
    "trl": trl_table,
    "endurance": endurance_table,
    **{name: _comparison(name) for name in algorithms.COMPARISONS},
    **{f"sparse-{part}": _part_of_sparse(part) for part in sparse.PARTS},
}
CHARTS = {
    "kernels": kernels,
    "memory": memory,
    "flops": flops,
    "traffic": traffic,
    "compile": compile,
    "tune": tune,
    "sparse": sparse,
    "algorithms": algorithms,
    "step": step,
    "trl": trl_patch,
}
DRAWINGS: dict[str, Callable[[Path, Report], None]] = {  # more than a bar a row
    "endurance": lambda path, report: endurance.draw(path, report["rows"]),
    "memory-train": lambda path, report: train_memory.draw(path, report["rows"]),
    "learn": learn.draw,
}


# Into the pages


def render(page: str, folder: Path) -> str:
    """A page with its tables made anew of the results under ``folder``."""

    def made(match: re.Match[str]) -> str:
        head, name, device, end = match.groups()
        if name not in TABLES:
            raise ValueError(f"there is no table {name!r}, only {', '.join(TABLES)}")
        return f"{head}{TABLES[name](folder / device)}\n{end}"

    return _TABLE.sub(made, page)


def draw_charts(folder: Path) -> None:
    """The chart of each report beside it."""
    for path in sorted(folder.glob("*/*.json")):
        report = json.loads(path.read_text())
        if report.get("suite") in CHARTS:
            results.draw(path.with_suffix(".png"), CHARTS[report["suite"]].chart(report["rows"]))
        elif report.get("suite") in DRAWINGS:
            DRAWINGS[report["suite"]](path.with_suffix(".png"), report)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--check", "--quick", action="store_true", help="change nothing, say which pages are out of date"
    )
    parser.add_argument("--out", type=Path, default=ROOT, metavar="DIR", help="where the pages are (the repository)")


def run(args: argparse.Namespace) -> int:
    """Entry of the suite."""
    stale = []
    for name in PAGES:
        page = args.out / name
        old = page.read_text()
        new = render(old, args.out / RESULTS.relative_to(ROOT))
        if new != old:
            stale.append(name)
            if not args.check:
                page.write_text(new)
        tables = len(_TABLE.findall(new))
        print(f"{name}: {tables} tables{', out of date' if new != old and args.check else ''}")
    if not args.check:
        draw_charts(args.out / RESULTS.relative_to(ROOT))
        return 0
    if stale:
        print(f"run python -m benchmarks report: {', '.join(stale)}", file=sys.stderr)
    return 1 if stale else 0
