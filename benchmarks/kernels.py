"""Time, memory and error of every operation compared with PyTorch, TRL, Liger and cut-cross-entropy.

First each way is checked: its outputs and gradients may stray from float64 four times as far as eager PyTorch in the
same dtype does; in float32, gradients of which a few entries were kept ("sparse") up to a thousandth. One that strays
further, ours or another's, gets no time. Errors are the largest, over the largest magnitude.

Times are in ms, medians with their interquartile range: "forward" without gradients, as when scoring; "both" a training
step's forward and backward, "backward" the second part of it. On a GPU they are the device's time, and the host's where
a call waits for the device or takes longer to queue than to run: host_ms and host_bound in the JSON. Peak is the most
memory during a step beyond its inputs, the returned gradients included, in GiB. Rate is the least work that forward and
backward need, whatever was done, per second: TFLOP/s or GB/s; "of ceiling" is that over what this device reached in the
same run, in a large matrix product or a copy. "bare products" are the matrix products that nothing can do without,
alone: they are not checked, and not a way.

On a GPU some rows decide claims, which are listed last. The exit code is 1 when one of ours is wrong or raises; a claim
that is not held is only listed. Results are saved after each row.
"""

from __future__ import annotations

import argparse
import gc
import logging
import sys
import time
import warnings
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

import torch

from benchmarks.harness import checking, claims, results, timing
from benchmarks.harness.cases import BARE, PLANS, Item, describe, head_of, item_of
from benchmarks.harness.operations import IGNORED, OPERATIONS, Function, Operation, Problem, Work
from benchmarks.harness.peers import PEERS, Maker, Unavailable
from benchmarks.harness.results import Row
from benchmarks.harness.suite import Suite
from sppo_kernels import _backend, tuning

OURS = "ours"
TUNED = "headline-tuned"  # the part of the suite gpu that launches what the suite tune chose

# One way at one point


def clock(problem: Problem, function: Function, device: torch.device, seconds: float) -> Row:
    """Times, and on a GPU the peak, of a way that was checked; as many repetitions as fit into some seconds."""

    def score() -> None:
        with torch.no_grad():
            problem.forward(function)

    step = problem.step(function)

    def both() -> None:
        for part in step.values():
            part()

    both()
    timing.synchronize(device)
    start = time.perf_counter()
    both()
    timing.synchronize(device)
    repeats = max(3, min(50, int(seconds / (time.perf_counter() - start))))
    row: Row = {"repeats": repeats, "peak_bytes": timing.peak_bytes(both, device)}
    times = timing.measure_parts({"forward": score}, device, repeats, warmup=1)
    if problem.leaves:
        step_times = timing.measure_parts(step, device, repeats, warmup=1)
        times |= {"backward": step_times["backward"], "both": step_times["all"]}
    for name, spread in times.items():
        row |= {f"{name}_{key}": value for key, value in spread.items()}
    if not problem.leaves:
        row |= {"both_ms": row["forward_ms"], "both_iqr_ms": row["forward_iqr_ms"]}
    if device.type != "cpu":
        row["host_ms"] = timing.host_ms(both, device, repeats)
        row["host_bound"] = row["host_ms"] >= times["both" if problem.leaves else "forward"]["ms"]
        timing.synchronize(device)
    return row


def bare_products(problem: Problem) -> dict[str, Callable[[], object]]:
    """The matrix products of forward and backward, with float32 results.

    Where float32 cannot come of half-precision factors they are float32, as in the operation.
    """
    hidden, weight = (problem.tensors[name].detach() for name in ("hidden", "weight"))
    hidden = hidden[problem.tensors["labels"] != IGNORED]
    mixed = hidden.dtype != torch.float32 and hidden.is_cuda and torch.version.hip is None
    multiply = partial(torch.mm, out_dtype=torch.float32) if mixed else torch.mm
    if not mixed:
        hidden, weight = hidden.float(), weight.float()
    e = torch.randn(len(hidden), len(weight), device=hidden.device, dtype=hidden.dtype)

    def backward() -> None:
        multiply(e, weight)
        multiply(e.t(), hidden)

    return {"forward": lambda: multiply(hidden, weight.t()), "backward": backward}


# The suite


class KernelComparison:
    """Measures one item after another, and saves after each."""

    def __init__(
        self, plan: list[Item], device: torch.device, seconds: float, without: Collection[str], path: Path
    ) -> None:
        self.plan, self.device, self.seconds, self.without, self.path = plan, device, seconds, without, path
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        # In Triton's interpreter a CPU runs the kernels; without, what the library runs on a CPU.
        self.backend = "triton" if _backend.INTERPRETED else None
        self.ceilings: dict[str, float] = {}
        self.rows: list[Row] = []
        self.failures: list[str] = []
        self.claims: list[Row] = []
        self.gpu = [results.gpu_facts()]  # clocks change: one at the start, one after each item

    def run(self) -> None:
        for i, item in enumerate(self.plan):
            print(f"[{i + 1}/{len(self.plan)}] {describe(item)}", file=sys.stderr, flush=True)
            try:
                self._measure(item)
            except Exception as error:  # the inputs or the float64 results did not fit, say: the next point may
                self._fail(f"{describe(item)}: {explain(error)}")
            self._free()
            self._relate()
            self.claims = claims.judge(self.rows) if self.device.type != "cpu" else []
            self.gpu.append(results.gpu_facts())
            self.save()
        self.save(chart(self.rows))

    def save(self, drawn: results.Chart | None = None) -> None:
        results.write(
            self.path,
            "kernels",
            chart=drawn,
            device=results.device_name(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
            backend=self.backend or "as the device has it",
            tolerance=checking.TOLERANCE,
            ceilings=self.ceilings,
            gpu=self.gpu,
            failures=self.failures,
            claims=self.claims,
            rows=self.rows,
        )

    def _measure(self, item: Item) -> None:
        """All ways at one point: first all checks, and with them the float64 results, go by; then times are taken."""
        operation = OPERATIONS[item.operation]
        torch.manual_seed(0)
        problem = operation.make(item.point, self.device, self.dtype)
        ours = {f"ours, {mode}" if mode else "ours": _made(f) for mode, f in operation.ours(self.backend).items()}
        ways: dict[str, Maker] = {
            **(ours if OURS not in self.without else {}),
            **{name: make for name, make in PEERS[item.operation].items() if name not in self.without},
        }
        start = len(self.rows)
        right = self._check_all(item, operation, problem, ways)
        if OURS not in self.without and operation.work(item.point, problem.dtype).forward_flops:
            self._guarded({**head_of(item), "way": BARE}, partial(self._bare, problem, item, operation))
        for function, row in right.values():
            self._guarded(row, partial(self._time, problem, function, operation.work(item.point, problem.dtype)))
        order = [BARE, *ways]
        self.rows[start:] = sorted(self.rows[start:], key=lambda row: order.index(row["way"]))

    def _check_all(
        self, item: Item, operation: Operation, problem: Problem, ways: dict[str, Maker]
    ) -> dict[str, tuple[Function, Row]]:
        """Those that are right. The others get their row at once, without a time."""
        truth, allowed = checking.truth_and_tolerance(operation, problem)
        right: dict[str, tuple[Function, Row]] = {}
        for name, make in ways.items():
            bounds = checking.allowed_of(name, problem.dtype, allowed)
            row: Row = {**head_of(item), "way": name, "allowed": bounds}

            def checked(
                row: Row, name: str = name, make: Maker = make, bounds: dict[str, float] = bounds
            ) -> Row | None:
                function = make(self.device)
                if name.endswith("auto"):  # which goes by the call before, and is to be checked as it will be timed
                    problem.results(function)
                row |= checking.check(problem, function, truth, row["allowed"])
                if row["passed"]:
                    right[name] = function, row
                    return None
                if name.startswith("ours"):
                    self._fail(f"{describe(item)}: {name} is wrong: errors {row['errors']}, allowed {row['allowed']}")
                return row | {"note": "wrong, so no time"}

            self._guarded(row, checked)
        return right

    def _guarded(self, row: Row, work: Callable[[Row], Row | None]) -> None:
        """Adds the row that ``work`` makes; where it cannot, the row says why."""
        try:
            row = work(row)  # type: ignore[assignment]
        except Exception as error:  # of another library, whatever it is; of ours, a failure
            row["note"] = explain(error)
            if row["way"].startswith("ours"):
                self._fail(f"{describe(item_of(row))}: {row['way']}: {row['note']}")
        if row:
            self.rows.append(row)
            self.save()
        self._free()

    def _free(self) -> None:
        """What one way had is there for the next."""
        gc.collect()
        if self.device.type != "cpu":
            torch.cuda.empty_cache()

    def _fail(self, why: str) -> None:
        self.failures.append(why)
        print(f"FAILED {why}", file=sys.stderr)

    def _time(self, problem: Problem, function: Function, work: Work, row: Row) -> Row:
        row |= clock(problem, function, self.device, self.seconds)
        return row | self._rate(work, row)

    def _bare(self, problem: Problem, item: Item, operation: Operation, row: Row) -> Row:
        repeats = 10
        step = timing.measure_parts(bare_products(problem), self.device, repeats, warmup=2)
        row["repeats"] = repeats
        for name, key in (("forward", "forward"), ("backward", "backward"), ("both", "all")):
            row |= {f"{name}_ms": step[key]["ms"], f"{name}_iqr_ms": step[key]["iqr_ms"]}
        return row | self._rate(operation.work(item.point._replace(clipped=0.0), problem.dtype), row)

    def _rate(self, work: Work, row: Row) -> Row:
        flops, size = work.forward_flops + work.backward_flops, work.forward_bytes + work.backward_bytes
        rate, unit = (flops / 1e9, "TFLOP/s") if flops else (size / 1e6, "GB/s")
        return {
            "rate": rate / row["both_ms"],
            "unit": unit,
            "forward_gb_s": work.forward_bytes / row["forward_ms"] / 1e6 or None,
        }

    def _relate(self) -> None:
        """Rates to ceilings, which are the best that the device has shown by now: something else may have slowed it."""
        for name, reached in timing.ceilings(self.device, self.dtype).items():
            self.ceilings[name] = max(reached, self.ceilings.get(name, 0.0))
        copy, product = self.ceilings["copy_gb_s"], self.ceilings["matmul_tflops"]
        for row in self.rows:
            if "rate" in row:
                row["of_ceiling"] = row["rate"] / (product if row["unit"] == "TFLOP/s" else copy)
                row["forward_of_copy"] = row["forward_gb_s"] and row["forward_gb_s"] / copy

    def about(self) -> str:
        """Device, dtype and ceilings, in a line."""
        copy, product = self.ceilings["copy_gb_s"], self.ceilings["matmul_tflops"]
        name = results.device_name(self.device)
        return f"{name}, {self.dtype}; ceilings: copy {copy:.0f} GB/s, product {product:.2f} TFLOP/s"

    def table(self) -> str:
        """A block of lines an item."""
        texts = [f"{title}\n{results.table(rows, COLUMNS)}" for title, rows in by_item(self.rows).items()]
        held = [results.table(self.claims, claims.COLUMNS)] if self.claims else []
        return "\n\n".join([*texts, *held])


COLUMNS: results.Columns = {
    "": lambda row: row["way"],
    "forward": lambda row: row.get("forward_ms"),
    "backward": lambda row: row.get("backward_ms"),
    "both": lambda row: row.get("both_ms"),
    "iqr": lambda row: row.get("both_iqr_ms"),
    "peak": lambda row: row["peak_bytes"] / 2**30 if row.get("peak_bytes") else None,
    "rate": lambda row: row.get("rate"),
    "of ceiling": lambda row: row.get("of_ceiling"),
    "error": lambda row: _worst_of(row),
    "note": lambda row: row.get("note"),
}


def _worst_of(row: Row) -> float | None:
    errors = [*row.get("errors", {}).values(), *row.get("scored_errors", {}).values()]
    return checking.worst(errors) if errors else None


def explain(error: Exception) -> str:
    """Why something was not measured, in one line."""
    if isinstance(error, Unavailable):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _made(function: Function) -> Maker:
    return lambda device: function


def chart(rows: list[Row]) -> results.Chart:
    """How much of what the device can do each way makes use of, at the first point of each operation."""
    first = {row["operation"]: item_of(row) for row in reversed(rows)}
    shown = [row for row in rows if row.get("of_ceiling") and first[row["operation"]] == item_of(row)]
    bars = [(f"{row['operation']}: {row['way']}", row["of_ceiling"]) for row in shown]
    return results.Chart("least work per second, over what the device reached in a large product or copy", bars)


def by_item(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of each operation at each point; those of the tuned part of the suite gpu apart."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        title = describe(item_of(row))
        found.setdefault(f"{title} ({TUNED})" if row.get("part") == TUNED else title, []).append(row)
    return found


def summary(rows: list[Row]) -> str:
    """A line a point: our fastest way beside the fastest of the others."""
    return results.table(summaries(rows), SUMMARY)


def summaries(rows: list[Row]) -> list[Row]:
    return [{"at": title, **_summary_of(group)} for title, group in by_item(rows).items()]


def _summary_of(rows: list[Row]) -> Row:
    ms = {row["way"]: row["both_ms"] for row in rows if "both_ms" in row}
    ours = min((way for way in ms if way.startswith("ours")), key=ms.__getitem__, default=None)
    other = min((way for way in ms if not way.startswith("ours") and way != BARE), key=ms.__getitem__, default=None)
    of = {"our_ms": ours, "other_ms": other, "bare_ms": BARE, "eager_ms": "eager PyTorch"}
    return {"ours": ours, "other": other, **{name: ms.get(way) for name, way in of.items()}}


SUMMARY: results.Columns = {
    "forward and backward, ms": lambda row: row["at"],
    "our fastest": lambda row: row["ours"],
    "ms": lambda row: row["our_ms"],
    "fastest other": lambda row: row["other"],
    "its ms": lambda row: row["other_ms"],
    "eager": lambda row: row["eager_ms"],
    "bare products": lambda row: row["bare_ms"],
}


def all_ways() -> list[str]:
    """Ours, in all its modes, and those of the others."""
    return [OURS, *sorted({way for peers in PEERS.values() for way in peers})]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plan", choices=PLANS, help="which operations at which points (full; on a CPU cpu)")
    parser.add_argument("--quick", action="store_true", help="the plan quick: tiny sizes")
    parser.add_argument(
        "--only", nargs="+", choices=OPERATIONS, metavar="OPERATION", help=f"of {', '.join(OPERATIONS)}"
    )
    ways = all_ways()
    parser.add_argument("--without", nargs="+", default=[], choices=ways, metavar="WAY", help=f"of {', '.join(ways)}")
    parser.add_argument(
        "--tuning", type=Path, metavar="FILE", help="launch configurations that the suite tune measured"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="about how long to repeat each way (%(default)s)")
    results.add_out(parser)


def run(args: argparse.Namespace) -> int:
    """Entry of the suite."""
    device = results.this_device()
    plan = "quick" if args.quick else args.plan or ("full" if device.type != "cpu" else "cpu")
    if args.tuning:
        tuning.load(args.tuning)
    for noisy in ("torch._dynamo", "torch._inductor"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", category=UserWarning)
    items = [item for item in PLANS[plan] if not args.only or item.operation in args.only]
    seconds = 0.05 if plan in ("quick", "dry") else args.seconds
    suite = KernelComparison(items, device, seconds, args.without, args.out / f"kernels-{plan}.json")
    suite.run()
    print(f"{suite.table()}\n\n{suite.about()}")
    print(f"{len(suite.failures)} failures; written to {suite.path}")
    return 1 if suite.failures else 0


def published_table(folder: Path) -> str:
    """Return a table for each operation at each size, and the judged claims."""
    texts = []
    for report in results.load_all(folder, "kernels"):
        for title, rows in by_item(report["rows"]).items():
            texts.append(f"**{title}**\n\n{results.markdown(rows, COLUMNS)}")
        if report["claims"]:
            texts.append(results.markdown(report["claims"], claims.COLUMNS))
    return "\n\n".join(texts)


def published_summary(folder: Path) -> str:
    """Return one line per size: ours compared with the others, forward and backward together."""
    rows = [row for report in results.load_all(folder, "kernels") for row in report["rows"]]
    return results.markdown(summaries(rows), SUMMARY)


SUITE = Suite(
    add_arguments,
    run,
    tables={"kernels": published_table, "ways": published_summary},
    draw=results.draw_bars(chart),
    needs="a GPU for the sizes that matter",
)
