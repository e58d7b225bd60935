"""The table of a terminal, folded to a number of lines."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from benchmarks.harness import results
from benchmarks.harness.results import Row
from benchmarks.roofline.rows import CALL, IDLE, ROLES, with_rate

LINES = 40
LEAST_SHARE = 0.01  # of a call, below which a kernel has no line of its own

COLUMNS: results.Columns = {
    "": lambda row: row["case"],
    "kernel": lambda row: row["kernel"],
    "launches": lambda row: None if "launches" not in row else f"{row['launches']:g}",
    "ms": lambda row: row["ms"],
    "of call": lambda row: row["of_call"],
    "GB/s": lambda row: row.get("gb_s"),
    "of copy": lambda row: row.get("of_copy"),
    "TFLOP/s": lambda row: row.get("tflops"),
    "of product": lambda row: row.get("of_product"),
}


def table(rows: Sequence[Row], lines: int = LINES) -> str:
    """Return a table of at most ``lines`` lines, header included, unless the cases need more.

    What does not fit is folded: first kernels of other libraries, then this library's, the smallest share of a call
    first.
    """
    large = [row for row in rows if row["of_call"] >= LEAST_SHARE]
    large.sort(key=lambda row: ("bytes" in row, row["of_call"]), reverse=True)
    while len(shown := folded(rows, large)) + 1 > lines and large:
        large.pop()
    named = [
        row if i == 0 or shown[i - 1]["case"] != row["case"] else row | {"case": ""} for i, row in enumerate(shown)
    ]
    return results.table(named, COLUMNS)


def folded(rows: Iterable[Row], large: Collection[Row]) -> list[Row]:
    """Return for each case the whole call with its idle time, the products in one line, the ``large`` kernels, and all
    other kernels in one line.
    """
    by_case: dict[str, list[Row]] = {}
    for row in rows:
        by_case.setdefault(row["case"], []).append(row)
    shown = []
    for case, all_rows in by_case.items():
        ends = {row["kernel"]: row for row in all_rows if row["kernel"] in (IDLE, CALL)}
        kernels = [row for row in all_rows if row["kernel"] not in ends]
        products = [row for row in kernels if "flops" in row or _role_of(row) in ROLES]
        rest = [row for row in kernels if row not in products]
        small = [row for row in rest if row not in large]
        shown.append({**ends[CALL], "kernel": f"{CALL}, {results.cell(ends[IDLE]['ms'])} ms idle"})
        shown += _sum(case, _rates(products), products)
        shown += [row for row in rest if row in large]
        shown += _sum(case, _largest(small), small)
    return shown


def _largest(rows: Sequence[Row]) -> str:
    """Name a folded group: its two largest kernels with their ms. Rows are sorted by time."""
    names = [f"{row['kernel'].split()[-1].removesuffix('_kernel')[:40]} {results.cell(row['ms'])}" for row in rows[:2]]
    return "other: " + ", ".join([*names, *[f"{len(rows) - 2} more"] * (len(rows) > 2)])


def _rates(products: Sequence[Row]) -> str:
    """Name the group of products, with the TFLOP/s of each role."""
    roles: dict[str, list[Row]] = {name: [] for name in ROLES}
    for row in products:
        roles.setdefault(_role_of(row), []).append(row)
    rates = {name: _sum("", name, parts) for name, parts in roles.items() if parts}
    return "products: " + ", ".join(f"{name} {row['tflops']:.0f}" for name, (row,) in rates.items())


def _role_of(row: Row) -> str:
    return row["kernel"].partition(":")[0]


def _sum(case: str, name: str, rows: Sequence[Row]) -> list[Row]:
    """Sum up rows into one; none if there are none."""
    if not rows:
        return []
    row: Row = {"case": case, "kernel": name}
    row |= {key: sum(part[key] for part in rows) for key in ("launches", "ms", "of_call")}
    if flops := sum(part.get("flops", 0.0) for part in rows):
        row |= with_rate(flops, row["ms"])
        shares = [part["of_product"] / part["tflops"] for part in rows if "of_product" in part]
        row["of_product"] = row["tflops"] * shares[0] if shares else None
    return [row]
