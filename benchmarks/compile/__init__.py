"""Registers, spills, instructions per element and occupancy of every Triton kernel, compiled for five GPUs.

No launch of a kernel is described here. The public functions run, forward and backward, on small CPU tensors while
Triton believes that a given GPU is present, and each launch is recorded instead of made: constants, argument types,
alignment, warps and stages are those of the real call. Each distinct launch is then compiled for that GPU.

Registers are per thread (vector registers on AMD); spills are 32-bit registers kept in memory. Scalar registers of AMD
GPUs that lanes of vector registers hold are counted apart, as scalars_in_lanes. Shared memory is in bytes per block,
stack in bytes per thread. In a configuration, w8s3 means 8 warps and 3 stages.

Code for NVIDIA's GPUs is disassembled. The hot path is what a warp executes for one whole block of elements: one pass
of a loop, or the kernel from start to end (see machine_code.py). Its instructions are counted by class, per element.
Of kernels that multiply matrices the instructions outside of the main loop are counted, per element of a tile of
results (see products.py).

Programs per multiprocessor and occupancy follow from registers, warps and shared memory. For an H100 the times of whole
operations are predicted, from the launches that they make at real sizes (see time_model.py and predictions.py): lower
bounds that say what bounds each kernel, not measurements. "sparse" is assumed to keep 62 entries of every token. The
fused projection is compared with the vendor's product under assumptions that projection_predictions.py states.

The exit code is 1 when a kernel spills, does not compile, needs more shared memory than a block may have, exceeds its
budget (see budgets.py and products.py), lacks the instructions of fast products, or is launched by no case.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import triton

import sppo_kernels
from benchmarks.compile import (
    budgets,
    predictions,
    products,
    projection_cases,
    projection_predictions,
    roofline_figure,
)
from benchmarks.compile.binaries import Binary, compile_all
from benchmarks.compile.cases import all_cases
from benchmarks.compile.launches import TARGETS, Case, Launch, first_of_each_kernel, launches, uncovered
from benchmarks.compile.machine_code import OTHER
from benchmarks.compile.predictions import PredictedCall
from benchmarks.compile.time_model import H100
from benchmarks.harness import results
from benchmarks.harness.results import Row
from benchmarks.harness.suite import Suite


def table(rows: list[Binary], width: int = 120) -> str:
    """Format one line per row; cells that repeat the line above are blank."""
    numbers = "{:>7} {:>9} {:>6} {:>7} {:>6}"
    heads = numbers.format("target", "registers", "spills", "shared", "stack")
    operation = max([9, *(len(row.launch.operation) for row in rows)])
    kernel = max([6, *(len(row.launch.kernel) for row in rows)])
    space = width - len(heads) - operation - kernel - 3
    lines = [f"{'operation':{operation}} {'kernel':{kernel}} {'configuration':{space}} {heads}", "-" * width]
    above: tuple[str, ...] = ()
    for row in rows:
        launch = row.launch
        head = (launch.operation, launch.kernel, textwrap.shorten(launch.configuration(), space, placeholder=" ..."))
        shown = head if head != above else ("", "", "")
        above = head
        figures = numbers.format(launch.target, row.registers, row.spills, row.shared, row.stack)
        mark = figures if not row.error else f"{launch.target:>7} failed"
        lines.append(f"{shown[0]:{operation}} {shown[1]:{kernel}} {shown[2]:{space}} {mark}".rstrip())
    return "\n".join(lines)


def report(
    cases: Iterable[Case],
    package: ModuleType,
    targets: list[str],
    quick: bool,
    out: Path,
    predict: Callable[[], list[PredictedCall]] = list,
    predict_projections: Callable[[], list[Row]] = list,
) -> int:
    """Compile the cases, print and write the report with the calls of ``predict``, and return the exit code."""
    found = launches(cases, targets)
    missing = uncovered(package, found)
    chosen = first_of_each_kernel(found) if quick else found
    rank = {key: i for i, key in enumerate(dict.fromkeys(map(_place, chosen)))}
    rows = compile_all(sorted(chosen, key=lambda launch: rank[_place(launch)]))
    failures = [
        *(f"{launch.operation} {launch.kernel} {launch.configuration()} {launch.target}: {row.failure()}"
          for row in rows if row.failure() for launch in [row.launch]),
        *(f"{kernel}: no case launches it" for kernel in missing),
        *budgets.exceeded(rows),
        *products.failures(rows),
    ]  # fmt: skip
    print(table(rows))
    path = out / f"compile-triton-{triton.__version__}.json"
    lines = [_as_json(row) for row in rows]
    print(f"\n{hot_tables(lines)}\n\n{product_table(lines)}")
    calls, projections = predict(), predict_projections()
    times = {
        "calls": [call.row(H100) for call in calls],
        "kernels": [row for call in calls for row in call.kernel_rows()],
    }
    if calls:
        print(f"\n{predictions.tables(**times)}")
    if projections:
        print(f"\n{projection_predictions.tables(projections)}")
    content = {"failures": failures, "predicted": {**times, "projections": projections}, "rows": lines}
    results.write(path, "compile", chart(lines), quick=quick, targets=targets, **content)
    return results.conclude(f"\n{len(rows)} compiled", failures, path)


def check_budgets(out: Path) -> int:
    """Compile the launches with a budget, print and write what they cost, and return the exit code."""
    limited = [*budgets.BUDGETS, *products.BUDGETS]
    labels = {label for _, label in limited}
    cases = (case for case in all_cases() if case.label in labels)
    found = [launch for launch in launches(cases, [budgets.TARGET]) if (launch.kernel, launch.case) in limited]
    rows = compile_all(found)
    errors = [f"{row.launch.kernel} {row.launch.case}: {row.failure()}" for row in rows if row.failure()]
    failures = [*errors, *budgets.exceeded(rows), *products.failures(rows), *budgets.without_launch(rows, limited)]
    path = out / "budgets.json"
    lines = [_as_json(row) for row in rows]
    results.write(path, "budgets", failures=failures, rows=lines)
    return results.conclude(f"{hot_tables(lines)}\n\n{product_table(lines)}", failures, path)


SHOWN = {
    "fp32": ("fp32",),
    "mufu": ("special",),
    "conv": ("conversion",),
    "load": ("load",),
    "store": ("store",),
    "smem": ("shared",),
    "bar": ("barrier",),
    "int": ("integer",),
    "other": ("branch", OTHER),
}
"""Columns of the table of instructions, and the classes that they sum up."""

KERNEL_COLUMNS: results.Columns = {
    "kernel": lambda row: row["kernel"].removesuffix("_kernel"),
    "case": lambda row: row["case"],
}
HOT_COLUMNS: results.Columns = {
    **{
        name: lambda row, kinds=kinds: f"{sum(row['per_element'].get(kind, 0) for kind in kinds):.1f}"
        for name, kinds in SHOWN.items()
    },
    "sum": lambda row: f"{sum(row['per_element'].values()):.1f}",
}
RESOURCE_COLUMNS: results.Columns = {
    "registers": lambda row: row["registers"],
    "per SM": lambda row: row["programs_per_sm"],
    "occupancy": lambda row: f"{row['occupancy']:.0%}",
    "barriers": lambda row: row["hot"]["barriers"],
    "load B": lambda row: row["hot"]["load_width"],
    "store B": lambda row: row["hot"]["store_width"],
}


def hot_tables(rows: Iterable[Row]) -> str:
    """Return the instructions per element of the rows of ``hot_rows`` by class, and what they take of a GPU."""
    chosen = hot_rows(rows)
    return (
        f"hot path on {budgets.TARGET}, instructions per element\n\n"
        f"{results.table(chosen, {**KERNEL_COLUMNS, **HOT_COLUMNS})}\n\n"
        f"{results.table(chosen, {**KERNEL_COLUMNS, **RESOURCE_COLUMNS})}"
    )


PRODUCT_COLUMNS: results.Columns = {
    "mode": lambda row: row["case"].rpartition(" fused ")[2],
    "tile": lambda row: projection_predictions.tile_name(row),
    "target": lambda row: row["target"],
    "instructions": lambda row: row["product"]["outside"] / row["product"]["elements"],
    "of it special": lambda row: row["product"]["special"] / row["product"]["elements"],
    "registers": lambda row: row["registers"],
    "shared": lambda row: row["shared"],
    "for matrices and copies": lambda row: ", ".join(row["product"]["found"]),
}


def product_table(rows: Iterable[Row]) -> str:
    """Return the instructions of kernels that multiply matrices, outside of the main loop."""
    chosen = product_rows(rows)
    return f"instructions outside of the main loop, per element of a tile\n\n{results.table(chosen, PRODUCT_COLUMNS)}"


def product_rows(rows: Iterable[Row]) -> list[Row]:
    """Return the rows of the fused projection of the plain head, without "maximum", whose tiles are as cheap."""
    labels = {projection_cases.label_of("bf16", projection_cases.PLAIN, mode) for mode in projection_cases.MODES}
    return [
        row for row in rows
        if row["case"] in labels and row.get("product") and row["constants"].get("MODE") != "maximum"
    ]  # fmt: skip


def hot_rows(rows: Iterable[Row]) -> list[Row]:
    """Return the disassembled rows with a budget, and the first row of each kernel without one."""
    known = [row for row in rows if row["target"] == budgets.TARGET and row.get("hot")]
    has_budget = lambda row: (row["kernel"], row["case"]) in budgets.BUDGETS
    budgeted = {row["kernel"] for row in known if has_budget(row)}
    first = {row["kernel"]: row for row in reversed(known) if row["kernel"] not in budgeted}
    return [row for row in known if has_budget(row) or row is first.get(row["kernel"])]


def _place(launch: Launch) -> tuple[str, str, str]:
    """Return the sort key that puts rows next to each other that differ only in the target."""
    return launch.operation, launch.kernel, launch.case


def _as_json(row: Binary) -> dict[str, Any]:
    fields = asdict(row)
    launch = fields.pop("launch")
    options = launch.pop("options")
    aligned = [i for (i,), hints in launch.pop("attributes").items() if hints]
    warps_and_stages = {name: options[name] for name in ("num_warps", "num_stages")}
    per_element = row.hot.per_element(options["num_warps"]) if row.hot else {}
    return {**launch, **warps_and_stages, "aligned_arguments": aligned, **fields, "per_element": per_element}


def chart(rows: list[dict[str, Any]]) -> results.Chart:
    """Chart the most registers of each kernel and target, with the limit of NVIDIA's threads."""
    most: dict[str, float] = {}
    for row in rows:
        name = f"{row['kernel']}: {row['target']}"
        most[name] = max(most.get(name, 0), row["registers"])
    return results.Chart("registers per thread", sorted(most.items()), limit=255)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=list(TARGETS), help="GPUs to compile for (all)")
    parser.add_argument("--quick", action="store_true", help="only one configuration of each kernel")
    parser.add_argument("--budgets", action="store_true", help="only the launches with a budget, on their target")
    results.add_out(parser)


def run(args: argparse.Namespace) -> int:
    """Entry of the suite."""
    if triton.knobs.runtime.interpret:
        print("TRITON_INTERPRET is set, so kernels are interpreted and not compiled; unset it", file=sys.stderr)
        return 2
    if args.budgets:
        return check_budgets(args.out)
    is_predicted = H100.target in args.arch and not args.quick
    predict = predictions.predicted_calls if is_predicted else list
    projections = projection_predictions.predicted_projections if is_predicted else list
    return report(all_cases(), sppo_kernels, args.arch, args.quick, args.out, predict, projections)


def published_table(folder: Path) -> str:
    """Return one line per kernel and version of Triton: the most registers of any launch, on each target."""
    found: dict[tuple[str, str], list[Row]] = {}
    for report in sorted(results.load_all(folder, "compile"), key=lambda report: report["versions"]["triton"]):
        for row in report["rows"]:
            kernel = f"`{row['kernel']}`"
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
    return results.markdown(lines, {key: lambda row, key=key: row[key] for key in lines[0]})


def published_hot_table(folder: Path) -> str:
    """Return one line per kernel with a budget, or the first case of others, and version of Triton."""
    rows = [
        {**row, "triton": report["versions"]["triton"]}
        for report in sorted(results.load_all(folder, "compile"), key=lambda report: report["versions"]["triton"])
        for row in hot_rows(report["rows"])
    ]
    order = list(dict.fromkeys((row["kernel"], row["case"]) for row in rows))
    rows.sort(key=lambda row: order.index((row["kernel"], row["case"])))
    columns: results.Columns = {
        "kernel": lambda row: f"`{row['kernel']}`",
        "case": lambda row: row["case"],
        "Triton": lambda row: row["triton"],
        "instructions per element": HOT_COLUMNS["sum"],
        "of it FP32": HOT_COLUMNS["fp32"],
        "integer": HOT_COLUMNS["int"],
        **RESOURCE_COLUMNS,
    }
    return results.markdown(rows, columns)


def published_predictions(folder: Path) -> str:
    """Return one line per operation and size, with the newest version of Triton that was predicted for."""
    reports = sorted(results.load_all(folder, "compile"), key=lambda report: report["versions"]["triton"])
    rows = [report["predicted"]["calls"] for report in reports if report.get("predicted")]
    return results.markdown(rows[-1] if rows else [], predictions.CALL_COLUMNS)


def published_product_table(folder: Path) -> str:
    """Return one line per mode of the fused projection, target and version of Triton."""
    reports = sorted(results.load_all(folder, "compile"), key=lambda report: report["versions"]["triton"])
    rows = [
        {**row, "triton": report["versions"]["triton"]} for report in reports for row in product_rows(report["rows"])
    ]
    order = list(dict.fromkeys((row["case"], row["target"]) for row in rows))
    rows.sort(key=lambda row: order.index((row["case"], row["target"])))
    head = {name: PRODUCT_COLUMNS[name] for name in ("mode", "tile", "target")}
    columns = {**head, "Triton": lambda row: row["triton"], **PRODUCT_COLUMNS}
    return results.markdown(rows, columns)


def published_projections(folder: Path) -> str:
    """Return one line per head and part, with the newest version of Triton that was predicted for."""
    return results.markdown(_projections(folder), projection_predictions.COLUMNS)


def published_break_even(folder: Path) -> str:
    """Return one line per part: at which hidden sizes the fused projection is predicted to be faster."""
    found = projection_predictions.break_even(_projections(folder))
    return results.markdown(found, projection_predictions.BREAK_EVEN_COLUMNS)


def _projections(folder: Path) -> list[Row]:
    reports = sorted(results.load_all(folder, "compile"), key=lambda report: report["versions"]["triton"])
    rows = [found for report in reports if (found := report.get("predicted", {}).get("projections"))]
    return rows[-1] if rows else []


SUITE = Suite(
    add_arguments,
    run,
    tables={
        "compile": published_table,
        "hot-paths": published_hot_table,
        "products": published_product_table,
        "predicted-times": published_predictions,
        "predicted-projections": published_projections,
        "predicted-break-even": published_break_even,
    },
    draw=results.draw_bars(chart),
    figures={"roofline": roofline_figure.draw},
)
