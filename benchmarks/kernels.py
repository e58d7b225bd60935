"""Every operation against other ways to the same results, in one process and on the same tensors.

First each way is checked: its outputs and gradients may stray from float64 four times as far as eager PyTorch in the
same dtype does. One that strays further, ours or another's, gets no time. Errors are the largest, over the largest
magnitude.

Times are in ms, medians with their interquartile range: "forward" without gradients, as when scoring; "both" a training
step's forward and backward, "backward" the second part of it. On a GPU they are the device's own, and how long the host
takes to queue a step is in the JSON (host_ms). Peak is the most memory during a step beyond its inputs, the returned
gradients included, in GiB. Rate is the least work that forward and backward need, whatever was done, per second:
TFLOP/s or GB/s; "of ceiling" is that over what this device reached in the same run, in a large matrix product or a
copy. "bare products" are the matrix products that nothing can do without, alone: they are not checked, and not a way.

On a GPU some rows are held against claims, which are listed last. The exit code is 1 when one of ours is wrong, when
one of ours raises, or when a claim does not hold. Results are saved after each point.
"""

from __future__ import annotations

import argparse
import gc
import logging
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import results, timing
from benchmarks.operations import IGNORED, OPERATIONS, Function, Operation, Outputs, Point, Problem, Work
from benchmarks.peers import PEERS, Maker, Unavailable
from benchmarks.results import Row
from sppo_kernels import _common, tuning

TOLERANCE = 4.0  # times eager PyTorch's error in the same dtype
FLOOR = 1e-5  # besides, where eager PyTorch happens to be exact
LEAST_MAGNITUDE = 0.1  # of a single number, which may be a sum that cancels

HEADS = {"0.5B": (896, 151_936), "1.5B": (1536, 151_936), "7B": (3584, 152_064), "8B": (4096, 151_936)}  # Qwen
BASE = Point(8192, *HEADS["8B"])
MILLION = 1 << 20
BARE = "bare products"


# What is measured where


class Item(NamedTuple):
    """An operation at a point."""

    operation: str
    point: Point


def _linear(*points: Point) -> list[Item]:
    return [Item("linear_logprobs", point) for point in points]


POLICY = ("policy_loss, token", "policy_loss, sequence_mean")
REST = ("prompt_value_loss", "gae", "whiten", "group_advantages")


def _small(names: Iterable[str], *tokens: int) -> list[Item]:
    """Operations that have nothing to do with a vocabulary."""
    return [Item(name, Point(n, HEADS["1.5B"][0], 0)) for n, name in product(tokens, names)]


def _swept(base: Point) -> list[Point]:
    """One thing at a time: noise for distributions, tokens without loss, tokens without gradient."""
    changes: list[dict[str, Any]] = [
        {"logits": "uniform"}, {"ignored": 0.5}, {"ignored": 0.9}, {"clipped": 0.3}, {"clipped": 0.9},
    ]  # fmt: skip
    return [base._replace(**change) for change in changes]


_TINY = Point(512, 64, 1024)
_CPU = Point(512, 576, 49_152)  # SmolLM2-135M's head

PLANS: dict[str, list[Item]] = {
    # What the claims are about.
    "headline": [*_linear(BASE), Item("selective_logprobs", BASE), *_small(POLICY, MILLION)],
    "shapes": _linear(
        BASE._replace(tokens=4096),
        *(Point(8192, *HEADS[name]) for name in ("0.5B", "1.5B", "7B")),
        BASE._replace(tokens=32_768),
    ),
    "others": [
        Item("linear_logprobs + policy_loss", BASE),
        Item("linear_logprobs, mean NLL", BASE),
        *_small(REST, MILLION),
    ],
    "sweep": [
        *_linear(*(BASE._replace(tokens=n) for n in (1024, 2048, 16_384, 65_536)), *_swept(BASE)),
        *(Item("selective_logprobs", point) for point in (BASE._replace(tokens=1024), *_swept(BASE))),
        *_small((*POLICY, *REST), 8192, 65_536),
    ],
    "quick": [
        *_linear(_TINY, _TINY._replace(ignored=0.5, clipped=0.5)),
        *(Item(name, _TINY) for name in ("linear_logprobs, mean NLL", "linear_logprobs + policy_loss")),
        Item("selective_logprobs", _TINY),
        *_small((*POLICY, *REST), 4096),
    ],
    "dry": [
        *(Item(name, Point(24, 16, 97, ignored=0.2, clipped=0.2)) for name in OPERATIONS if "logprobs" in name),
        *_small((*POLICY, *REST), 64),
    ],
    "cpu": [
        *_linear(_CPU, _CPU._replace(ignored=0.9), _CPU._replace(clipped=0.9)),
        *(Item(name, _CPU) for name in ("linear_logprobs, mean NLL", "linear_logprobs + policy_loss")),
        Item("selective_logprobs", _CPU),
        *_small((*POLICY, *REST), 65_536),
    ],
}
PLANS["full"] = [*PLANS["headline"], *PLANS["shapes"], *PLANS["others"], *PLANS["sweep"]]


# One way at one point


def errors_of(found: Outputs, truth: Outputs) -> dict[str, float]:
    """Largest error of each output and gradient that both have, over the largest magnitude."""
    return {name: _error(found[name], want) for name, want in truth.items() if name in found}


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Infinite where the shapes differ; NaN where there is one anywhere, which no bound allows."""
    if got.shape != want.shape:
        return float("inf")
    magnitude = float(want.abs().max())
    if want.ndim == 0:
        magnitude = max(magnitude, LEAST_MAGNITUDE)
    largest = [(g - w).abs().max() for g, w in zip(_parts(got), _parts(want), strict=True)]
    return float(torch.stack(largest).max()) / (magnitude or 1.0)


def _parts(x: torch.Tensor) -> Iterable[torch.Tensor]:
    """A float64 difference of two gradients of a whole embedding would not fit beside them."""
    return x.split(4096) if x.ndim else [x]


def truth_and_tolerance(operation: Operation, problem: Problem) -> tuple[Outputs, dict[str, float]]:
    """Results in float64, and how far each may be from them."""
    truth = operation.evaluate(problem, torch.float64)
    eager = errors_of(operation.evaluate(problem, problem.dtype), truth)
    return truth, {name: TOLERANCE * error + FLOOR for name, error in eager.items()}


def check(problem: Problem, function: Function, truth: Outputs, allowed: dict[str, float]) -> dict[str, Any]:
    """Errors of a way, with gradients and without, and whether all it must give is there and close enough."""
    errors = errors_of(problem.results(function), truth)
    needed = {*problem.upstream, *(f"d {name}" for name in problem.leaves)}
    with torch.no_grad():  # as when scoring, which is timed too and may take another path
        scored = errors_of(problem.forward(function), truth)
    right = needed <= errors.keys() and all(
        error <= allowed[name] for found in (errors, scored) for name, error in found.items()
    )  # NaN is not at most anything
    return {"errors": errors, "scored_errors": scored, "passed": bool(errors) and right}


def clock(problem: Problem, function: Function, device: torch.device, seconds: float) -> Row:
    """Times, and on a GPU the peak, of a way that was checked; as many repetitions as fit into some seconds."""

    def score() -> None:
        with torch.no_grad():
            problem.forward(function)

    alive: list[Outputs] = []
    step: dict[str, Callable[[], object]] = {"forward": lambda: alive.append(problem.forward(function))}
    if problem.leaves:
        step["backward"] = lambda: problem.backward(alive.pop())

    def both() -> None:
        for part in step.values():
            part()
        alive.clear()

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
        timing.synchronize(device)
    return row


def bare_products(problem: Problem) -> tuple[dict[str, Callable[[], object]], Callable[[], object]]:
    """The matrix products of forward and backward with float32 results, and that of forward alone.

    Where float32 cannot come of half-precision factors they are float32, as in the operation.
    """
    hidden, weight = (problem.tensors[name].detach() for name in ("hidden", "weight"))
    hidden = hidden[problem.tensors["labels"] != IGNORED]
    mixed = hidden.dtype != torch.float32 and hidden.is_cuda and torch.version.hip is None
    multiply = partial(torch.mm, out_dtype=torch.float32) if mixed else torch.mm
    if not mixed:
        hidden, weight = hidden.float(), weight.float()
    e = torch.randn(len(hidden), len(weight), device=hidden.device, dtype=hidden.dtype)
    logits = lambda: multiply(hidden, weight.t())

    def backward() -> None:
        multiply(e, weight)
        multiply(e.t(), hidden)

    return {"forward": logits, "backward": backward}, logits


# The suite


class Suite:
    """Measures one item after another, and saves after each."""

    def __init__(
        self, plan: list[Item], device: torch.device, seconds: float, without: Collection[str], path: Path
    ) -> None:
        self.plan, self.device, self.seconds, self.without, self.path = plan, device, seconds, without, path
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        # In Triton's interpreter a CPU runs the kernels; without, what the library runs on a CPU.
        self.backend = "triton" if _common.INTERPRETED else None
        self.ceilings: dict[str, float] = {}
        self.rows: list[Row] = []
        self.failures: list[str] = []
        self.claims: list[Row] = []

    def run(self) -> None:
        for i, item in enumerate(self.plan):
            print(f"[{i + 1}/{len(self.plan)}] {describe(item)}", file=sys.stderr, flush=True)
            try:
                self._measure(item)
            except Exception as error:  # the inputs or the float64 results did not fit, say: the next point may
                self._fail(f"{describe(item)}: {explain(error)}")
            self._free()
            self._relate()
            self.claims = claims(self.rows, self.ceilings["copy_gb_s"]) if self.device.type != "cpu" else []
            self.save()
        self.failures += [
            f"claim: {claim['claim']}: {claim['measured']:.3f}" for claim in self.claims if not claim["held"]
        ]
        self.save()

    def save(self) -> None:
        results.write(
            self.path,
            "kernels",
            chart=chart(self.rows),
            device=results.device_name(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
            backend=self.backend or "as the device has it",
            tolerance=TOLERANCE,
            ceilings=self.ceilings,
            failures=self.failures,
            claims=self.claims,
            rows=self.rows,
        )

    def _measure(self, item: Item) -> None:
        """All ways at one point: first all checks, and with them the float64 results, go by; then times are taken."""
        operation = OPERATIONS[item.operation]
        torch.manual_seed(0)
        problem = operation.make(item.point, self.device, self.dtype)
        ways: dict[str, Maker] = {
            **{f"ours, {mode}" if mode else "ours": _made(f) for mode, f in operation.ours(self.backend).items()},
            **{name: make for name, make in PEERS[item.operation].items() if name not in self.without},
        }
        start = len(self.rows)
        right = self._check_all(item, operation, problem, ways)
        if operation.work(item.point, problem.dtype).forward_flops:
            self._guarded({**_head(item), "way": BARE}, partial(self._bare, problem, item, operation))
        for function, row in right.values():
            self._guarded(row, partial(self._time, problem, function, operation.work(item.point, problem.dtype)))
        order = [BARE, *ways]
        self.rows[start:] = sorted(self.rows[start:], key=lambda row: order.index(row["way"]))

    def _check_all(
        self, item: Item, operation: Operation, problem: Problem, ways: dict[str, Maker]
    ) -> dict[str, tuple[Function, Row]]:
        """Those that are right. The others get their row at once, without a time."""
        truth, allowed = truth_and_tolerance(operation, problem)
        right: dict[str, tuple[Function, Row]] = {}
        for name, make in ways.items():
            row: Row = {**_head(item), "way": name, "allowed": allowed}

            def checked(row: Row, name: str = name, make: Maker = make) -> Row | None:
                function = make(self.device)
                row |= check(problem, function, truth, allowed)
                if row["passed"]:
                    right[name] = function, row
                    return None
                if name.startswith("ours"):
                    self._fail(f"{describe(item)}: {name} is wrong: errors {row['errors']}, allowed {allowed}")
                return row | {"note": "wrong, so no time"}

            self._guarded(row, checked)
        return right

    def _guarded(self, row: Row, work: Callable[[Row], Row | None]) -> None:
        """Adds the row that ``work`` makes; where it cannot, the row says why."""
        try:
            row = work(row)  # type: ignore[assignment]
        except Unavailable as why:
            row["note"] = str(why)
        except ModuleNotFoundError as why:
            row["note"] = f"{why.name} is not installed"
        except torch.OutOfMemoryError:
            row["note"] = "out of memory"
        except Exception as error:  # of another library, whatever it is; of ours, a failure
            row["note"] = explain(error)
            if row["way"].startswith("ours"):
                self._fail(f"{row['operation']}, {row['way']}: {row['note']}")
        if row:
            self.rows.append(row)
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
        parts, logits = bare_products(problem)
        repeats = 10
        forward = timing.measure_parts({"forward": logits}, self.device, repeats, warmup=2)["forward"]
        step = timing.measure_parts(parts, self.device, repeats, warmup=2)
        row |= {"repeats": repeats, "forward_ms": forward["ms"], "forward_iqr_ms": forward["iqr_ms"]}
        for name, key in (("backward", "backward"), ("both", "all")):
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
        held = [f"{c['claim']}: {c['measured']:.3f}, {'held' if c['held'] else 'NOT HELD'}" for c in self.claims]
        return "\n\n".join([*texts, *(["\n".join(held)] if held else [])])


COLUMNS: results.Columns = {
    "": lambda row: row["way"],
    "forward": lambda row: row.get("forward_ms"),
    "backward": lambda row: row.get("backward_ms"),
    "both": lambda row: row.get("both_ms"),
    "iqr": lambda row: row.get("both_iqr_ms"),
    "peak": lambda row: row["peak_bytes"] / 2**30 if row.get("peak_bytes") else None,
    "rate": lambda row: row.get("rate"),
    "of ceiling": lambda row: row.get("of_ceiling"),
    "error": lambda row: max(row["errors"].values()) if row.get("errors") else None,
    "note": lambda row: row.get("note"),
}


def explain(error: Exception) -> str:
    """In one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _made(function: Function) -> Maker:
    return lambda device: function


def _head(item: Item) -> Row:
    return {"operation": item.operation, **item.point._asdict()}


def _point(row: Row) -> Point:
    return Point(*(row[name] for name in Point._fields))


def describe(item: Item) -> str:
    """In a few words; what is as usual is left out."""
    point = item.point
    size = f"{point.tokens} tokens" + (f", H {point.hidden}, V {point.vocab}" if point.vocab else "")
    changed = [f"{name} {getattr(point, name)}" for name in ("ignored", "clipped") if getattr(point, name)]
    return ", ".join([f"{item.operation}: {size}", *changed, *(["uniform"] if point.logits == "uniform" else [])])


def chart(rows: list[Row]) -> results.Chart:
    """How much of what the device can do each way makes use of, at the first point of each operation."""
    first = {row["operation"]: _point(row) for row in reversed(rows)}
    shown = [row for row in rows if row.get("of_ceiling") and first[row["operation"]] == _point(row)]
    bars = [(f"{row['operation']}: {row['way']}", row["of_ceiling"]) for row in shown]
    return results.Chart("least work per second, over what the device reached in a large product or copy", bars)


def by_item(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of each operation at each point, and where there are parts of each part."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        title = describe(Item(row["operation"], _point(row)))
        found.setdefault(f"{title} ({row['part']})" if "part" in row else title, []).append(row)
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


# The claims, in the words of the documentation


def claims(rows: list[Row], copy_gb_s: float) -> list[Row]:
    """Those of them that the rows decide."""
    timed = {(row["operation"], _point(row), row["way"]): row for row in rows if "both_ms" in row}
    judged: list[Row] = []

    def judge(claim: str, measured: float, held: bool) -> None:
        judged.append({"claim": claim, "measured": measured, "held": held})

    bare = timed.get(("linear_logprobs", BASE, BARE))
    for mode, again in (("cache", 0), ("recompute", 1)):
        ours = timed.get(("linear_logprobs", BASE, f"ours, {mode}"))
        if bare and ours:
            least = bare["both_ms"] + again * bare["forward_ms"]
            ratio = ours["both_ms"] / least
            judge(f"linear_logprobs, {mode}: at most 1.15 times its bare products", ratio, ratio <= 1.15)
    for (operation, point, way), row in timed.items():
        if operation.startswith("policy_loss") and point.tokens == MILLION and way == "ours":
            eager = timed.get((operation, point, "eager PyTorch"))
            if eager:
                ratio = eager["both_ms"] / row["both_ms"]
                judge(f"{operation}, {MILLION} tokens: at least 10 times as fast as eager", ratio, ratio >= 10)
        if operation == "selective_logprobs" and point == BASE and way == "ours":
            share = row["forward_of_copy"]
            judge(
                f"{operation}: forward at least 0.85 of the copy bandwidth, {copy_gb_s:.0f} GB/s", share, share >= 0.85
            )
            share = row["of_ceiling"]
            judge(f"{operation}: forward and backward at least 0.85 of it", share, share >= 0.85)
    return judged


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plan", choices=PLANS, help="which operations at which points (full; on a CPU cpu)")
    parser.add_argument("--quick", action="store_true", help="the plan quick: tiny sizes")
    parser.add_argument(
        "--only", nargs="+", choices=OPERATIONS, metavar="OPERATION", help=f"of {', '.join(OPERATIONS)}"
    )
    ways = sorted({way for peers in PEERS.values() for way in peers})
    parser.add_argument("--without", nargs="+", default=[], choices=ways, metavar="WAY", help=f"of {', '.join(ways)}")
    parser.add_argument(
        "--tuning", type=Path, metavar="FILE", help="launch configurations that the suite tune measured"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="about how long to repeat each way (%(default)s)")
    results.add_out(parser)


def run(args: argparse.Namespace) -> int:
    """Entry of the suite."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = "quick" if args.quick else args.plan or ("full" if device.type != "cpu" else "cpu")
    if args.tuning:
        tuning.load(args.tuning)
    for noisy in ("torch._dynamo", "torch._inductor"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", category=UserWarning)
    items = [item for item in PLANS[plan] if not args.only or item.operation in args.only]
    seconds = 0.05 if plan in ("quick", "dry") else args.seconds
    suite = Suite(items, device, seconds, args.without, args.out / f"kernels-{plan}.json")
    suite.run()
    print(f"{suite.table()}\n\n{suite.about()}")
    print(f"{len(suite.failures)} failures; written to {suite.path}")
    return 1 if suite.failures else 0
