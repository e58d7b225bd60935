"""Time, bandwidth and FLOP rate of every kernel of a call, relative to what the device reaches.

Profiles forward and backward of linear_logprobs ("cache", "recompute", "sparse") and of linear_policy_loss with
torch.profiler, and accounts for all of a call's time: each kernel, and the time in which the device has nothing to do.
That "idle" is the time of a call between two CUDA events, without the profiler and with an idle device before it, less
the kernels' sum; so it holds what the host takes to queue the first kernel, and the waits for the device.

Bytes are the least that a Triton kernel moves at this size, as benchmarks/traffic.py counts them, so GB/s is a lower
bound. Only _weighted_rows_kernel, which gathers, counts a row as often as it asks for it; part of that comes from the
L2 cache, and its GB/s may exceed the copy bandwidth. Operations are those of matrix products alone, from the shapes
that the profiler records; their sum is held against FlopCounterMode's. "of copy" and "of product" are shares of the
copy bandwidth and the product rate that were measured in the same run.

The table shows the matrix products of a call in one line, with the TFLOP/s of each kind, and folds small kernels into
"other", the largest of them with its ms; the JSON has them all. The exit code is 1 when a case fails, or when its bytes
or operations cannot be trusted. Results are saved after each case. On a CPU the sizes are tiny and a row is an
operation of PyTorch or, with TRITON_INTERPRET=1, a kernel.
"""

from __future__ import annotations

import argparse
import gc
import re
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

import sppo_kernels
from benchmarks.harness import results, timing
from benchmarks.harness.cases import BASE, HEADS
from benchmarks.harness.operations import OPERATIONS, Point, Problem
from benchmarks.harness.results import Row
from benchmarks.harness.suite import Suite
from sppo_kernels import _backend, _head, _sparse

SMALL = Point(16_384, *HEADS["1.5B"])  # where row passes weigh most beside the products
TINY = Point(12, 16, 256)
CALLS = 2  # profiled
LINES = 40  # of the printed table
LEAST_SHARE = 0.01  # of a call, below which a kernel has no line of its own
FLOAT = 4  # bytes of a float32


# What a call consists of


class Event(NamedTuple):
    """One kernel, copy or memset that the device ran."""

    name: str
    us: float


class Product(NamedTuple):
    """One matrix product [m, k] [k, n], and the kernels that it launched."""

    m: int
    k: int
    n: int
    kernels: tuple[Event, ...]

    @property
    def flops(self) -> int:
        return 2 * self.m * self.k * self.n


class Sizes(NamedTuple):
    """What the bytes and operations of a call depend on."""

    tokens: int  # that bear loss
    hidden: int
    vocab: int
    itemsize: int  # of the inputs
    kept: int = 0  # tokens whose logit gradient is kept
    again: int = 0  # tokens whose logits backward computes once more
    entries: int = 0  # selected, of all tokens
    columns: int = 0  # of the vocabulary in which these lie


class Profile(NamedTuple):
    """What was seen of some calls that are alike."""

    events: list[Event]
    products: list[Product]
    calls: int
    wall_ms: float  # of one call, without the profiler
    flops: float  # of one call, by FlopCounterMode


# Bytes by kernel: of one call, given its sizes and the number of launches. Each formula is that of the case in
# benchmarks/traffic.py in which the kernel is counted, and named after the function there.

BYTES: dict[str, Callable[[Sizes, float], float]] = {
    # _linear_cases: float32 logits read; the logit gradient, which has the inputs' dtype, written
    "_forward_kernel": lambda s, _: s.tokens * s.vocab * FLOAT,
    "_keep_kernel": lambda s, _: s.kept * s.vocab * (FLOAT + s.itemsize),
    "_backward_kernel": lambda s, _: s.again * s.vocab * (FLOAT + s.itemsize),
    # _sparse_case
    "_note_kernel": lambda s, _: s.tokens * (s.vocab * FLOAT + 28) + 4 * s.entries,
    "_fill_kernel": lambda s, _: 36 * s.tokens + (4 + 4 + 8) * s.entries,
    "_weighted_rows_kernel": lambda s, _: (
        2 * s.entries * (8 + 4)  # index and weight, by token and by column
        + 2 * s.entries * s.hidden * s.itemsize  # a row of the weight and one of the hidden states per entry
        # gradients of both read and written; bounds and places
        + (s.tokens - s.kept - s.again + s.columns) * (2 * FLOAT * s.hidden + 24)
    ),
    # _policy_cases, at token level: two inputs and the gradient, and here a mask, in each launch
    "_kernel": lambda s, launches: launches * s.tokens * (3 * FLOAT + 1),
}


class Case(NamedTuple):
    """A call, and the kernels without which it is not the call that it is taken for."""

    way: str
    point: Point
    kernels: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.way}, {self.point.tokens} x {self.point.hidden} x {self.point.vocab}"


ROLES = ("logits", "d hidden", "d weight")  # of products
IDLE, CALL = "idle", "the whole call"
POLICY = "linear_policy_loss"
KERNELS = {
    "cache": ("_forward_kernel", "_keep_kernel"),
    "recompute": ("_forward_kernel", "_backward_kernel"),
    "sparse": ("_forward_kernel", "_note_kernel", "_fill_kernel", "_weighted_rows_kernel"),
    POLICY: ("_forward_kernel", "_keep_kernel", "_kernel"),
}


def cases(quick: bool) -> list[Case]:
    """All ways at all points; "sparse" where a few tokens have all the mass, which it is for."""
    return [
        Case(way, point._replace(logits="sharp") if way == "sparse" else point, kernels)
        for point in ([TINY] if quick else [BASE, SMALL])
        for way, kernels in KERNELS.items()
    ]


# From events to rows


def short_name(name: str) -> str:
    """A kernel's name without return type, namespaces and template arguments, with the functor that tells it apart.

    Kernels that are alike but for template arguments share a name.
    """
    if found := re.match(r"_(?:[a-z]+_)*kernel(?![A-Za-z])", name):  # one of ours
        return found[0]
    if found := re.match(r"Memset|Memcpy \w+", name):
        return found[0]
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    base = re.split(r"[<(]", name, maxsplit=1)[0].rpartition("at::native::")[2]
    base = base if base.startswith("aten::") else base.rpartition("::")[2]
    inner = re.search(r"\w*Functor\w*|\w+_kernel_(?:cuda|impl)(?!_)|cutlass_\w+", name.partition("<")[2])
    return (f"{base} {inner[0]}" if inner else base)[:60]


def is_product(name: str) -> bool:
    """Whether a kernel's name is that of a matrix product of cuBLAS, CUTLASS or rocBLAS."""
    return re.search(r"nvjet|gemm|cutlass|xmma|Cijk_|aten::(?:add)?mm$", name, re.IGNORECASE) is not None


def is_ours(short: str) -> bool:
    return short.startswith("_") and short.endswith("kernel")


def role(product: Product, sizes: Sizes) -> str:
    """What a product is for: logits are [., V], the gradient of hidden sums over V, that of the weight is [V, .]."""
    sides = dict(zip((product.n, product.k, product.m), ROLES, strict=True))
    return sides.get(sizes.vocab, "product")


def rows_of(case: str, seen: Profile, sizes: Sizes, expected: Collection[str] = ()) -> tuple[list[Row], list[str]]:
    """The rows of a case, the whole call and its idle time last; and what makes them untrustworthy."""
    problems = [] if seen.events else ["the profiler saw nothing"]
    ms: defaultdict[str, float] = defaultdict(float)
    launches: Counter[str] = Counter()
    for event in seen.events:
        name = short_name(event.name)
        ms[name] += event.us / 1000 / seen.calls
        launches[name] += 1
    flops: dict[str, float] = {}
    problems += _split_products(seen, sizes, ms, launches, flops)
    rows = []
    for name in sorted(ms, key=ms.__getitem__, reverse=True):
        row: Row = {"case": case, "kernel": name, "launches": launches[name] / seen.calls, "ms": ms[name]}
        row["of_call"] = row["ms"] / seen.wall_ms
        if is_ours(name):
            if name in BYTES:
                row["bytes"] = BYTES[name](sizes, row["launches"])
                row["gb_s"] = row["bytes"] / row["ms"] / 1e6
            else:
                problems.append(f"nothing says how many bytes {name} moves")
        if name in flops:
            row |= _with_rate(flops[name], row["ms"])
        rows.append(row)
    problems += [f"{name} was not launched" for name in expected if name not in ms]
    busy, all_launches = sum(ms.values()), sum(row["launches"] for row in rows)
    idle = {"case": case, "kernel": IDLE, "ms": seen.wall_ms - busy, "of_call": 1 - busy / seen.wall_ms}
    call = {"case": case, "kernel": CALL, "launches": all_launches, "ms": seen.wall_ms, "of_call": 1.0}
    return [*rows, idle, call | _with_rate(sum(flops.values()), seen.wall_ms)], problems


def _with_rate(flops: float, ms: float) -> Row:
    return {"flops": flops, "tflops": flops / ms / 1e9}


def _split_products(
    seen: Profile, sizes: Sizes, ms: dict[str, float], launches: Counter[str], flops: dict[str, float]
) -> list[str]:
    """Names the kernels of products in ``ms`` and ``launches`` by what the product is for, and puts its operations into
    ``flops``. Where shapes or kernels are missing all products share the operations of the call, by their time."""
    products = [product for product in seen.products if product.flops]
    lost = [product for product in products if not product.kernels]
    if lost or not products:
        names = {short_name(event.name) for event in seen.events if is_product(event.name)}
        total = sum(ms[name] for name in names)
        flops |= {name: seen.flops * ms[name] / total for name in names}
        problems = [] if bool(names) == bool(seen.flops) else ["no kernel of its matrix products was found"]
        return problems + ["only some of its matrix products have kernels"] * (0 < len(lost) < len(products))
    for product in products:
        longest = max(product.kernels, key=lambda event: event.us)  # the others clear and reduce
        for event in product.kernels:
            short = short_name(event.name)
            name = f"{role(product, sizes)}: {short}"
            for key, sign in ((short, -1), (name, 1)):
                ms[key] += sign * event.us / 1000 / seen.calls
                launches[key] += sign
            if event is longest:
                flops[name] = flops.get(name, 0.0) + product.flops / seen.calls
    for short in [name for name, count in launches.items() if not count]:
        del ms[short]
    found = sum(product.flops for product in products) / seen.calls
    if abs(found - seen.flops) > 0.01 * seen.flops:
        return [f"products of {found:.4g} operations by their shapes, {seen.flops:.4g} by FlopCounterMode"]
    return []


def relate(rows: Iterable[Row], ceilings: dict[str, float]) -> None:
    """Adds what share of the measured ceilings each row reaches."""
    for row in rows:
        if "gb_s" in row:
            row["of_copy"] = row["gb_s"] / ceilings["copy_gb_s"]
        if "tflops" in row:
            row["of_product"] = row["tflops"] / ceilings["matmul_tflops"]


# From a call to events


def problem_of(case: Case, device: torch.device, dtype: torch.dtype) -> Problem:
    name = "linear_logprobs + policy_loss" if case.way == POLICY else "linear_logprobs"
    torch.manual_seed(0)
    return OPERATIONS[name].make(case.point, device, dtype)


def step(case: Case, problem: Problem, backend: str | None) -> Callable[[], Tensor]:
    """Forward and backward; returns the ``entries`` of the certificate."""
    tensors = problem.tensors
    hidden, weight, labels = (tensors[name] for name in ("hidden", "weight", "labels"))
    (upstream,) = problem.upstream.values()

    def logprobs() -> Tensor:
        out = sppo_kernels.linear_logprobs(hidden, weight, labels, backward=case.way, backend=backend)
        torch.autograd.grad(out.logprobs, (hidden, weight), upstream)
        return out.certificate.entries

    def loss() -> Tensor:
        out = sppo_kernels.linear_policy_loss(
            hidden,
            weight,
            labels,
            tensors["old_logprobs"],
            tensors["advantages"],
            cu_seqlens=cu_seqlens,
            backward="cache",
            backend=backend,
        )
        torch.autograd.grad(out.loss, (hidden, weight), upstream)
        return out.certificate.entries

    if case.way != POLICY:
        return logprobs
    sequences = len(tensors["advantages"])
    starts = torch.arange(sequences + 1, dtype=torch.int32, device=labels.device)
    cu_seqlens = starts * (len(labels) // sequences)
    return loss


def count(run: Callable[[], Tensor], problem: Problem) -> tuple[Sizes, float]:
    """Sizes and operations of a call, which is made for it, and warms up."""
    columns: list[int] = []
    by_column = _sparse.by_column

    def noted(entries: Any) -> Any:
        found = by_column(entries)
        columns.append(len(found.column))
        return found

    with FlopCounterMode(display=False) as counter, mock.patch.object(_sparse, "by_column", noted):
        entries = run()
    hidden, weight = problem.tensors["hidden"], problem.tensors["weight"]
    how_many = lambda mask: int(mask.sum())
    sizes = Sizes(
        tokens=how_many(entries != 0),
        hidden=hidden.shape[1],
        vocab=weight.shape[0],
        itemsize=hidden.itemsize,
        kept=how_many(entries == _head.EXACT_FROM_KEPT),
        again=how_many(entries == _head.EXACT),
        entries=how_many(entries.clamp(min=0)),
        columns=sum(columns),
    )
    return sizes, float(counter.get_total_flops())


def observe(run: Callable[[], object], device: torch.device, flops: float) -> Profile:
    """Some calls without the profiler, and some with it."""
    wall_ms = statistics.median(_wall_ms(run, device) for _ in range(3))
    on_gpu = device.type != "cpu"
    seen = profiled(run, device)
    return Profile(events_of(seen, on_gpu), products_of(seen, on_gpu), CALLS, wall_ms, flops)


def profiled(run: Callable[[], object], device: torch.device) -> list[Any]:
    """The profiler's events of some calls."""
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (device.type != "cpu")]
    with named_by_kernel(), profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(CALLS):
            run()
        timing.synchronize(device)
    return list(profiler.events())


def _wall_ms(run: Callable[[], object], device: torch.device) -> float:
    """Of one call that finds the device idle."""
    timing.synchronize(device)
    if device.type == "cpu":
        start = time.perf_counter()
        run()
        return 1000 * (time.perf_counter() - start)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    timing.synchronize(device)
    return first.elapsed_time(last)


def events_of(seen: Iterable[Any], on_gpu: bool) -> list[Event]:
    """The device's work among a profiler's events; on a CPU what each operation does itself."""
    if on_gpu:
        on_device = (e for e in seen if e.device_type != DeviceType.CPU and not e.is_user_annotation)
        return [Event(e.name, e.time_range.elapsed_us()) for e in on_device]
    return [Event(e.name, e.self_cpu_time_total) for e in seen if e.self_cpu_time_total > 0]


def products_of(seen: Iterable[Any], on_gpu: bool) -> list[Product]:
    """The matrix products among a profiler's events; addmm has what is added to the product first."""
    products = []
    for e in seen:
        if e.device_type == DeviceType.CPU and e.name in ("aten::mm", "aten::addmm"):
            first = 1 if e.name == "aten::addmm" else 0
            (m, k), (_, n) = e.input_shapes[first : first + 2]
            kernels = [Event(kernel.name, kernel.duration) for kernel in e.kernels]
            products.append(Product(m, k, n, tuple(kernels if on_gpu else [Event(e.name, e.self_cpu_time_total)])))
    return products


@contextmanager
def named_by_kernel() -> Iterator[None]:
    """In Triton's interpreter, lets the profiler know which kernel runs."""
    if not _backend.INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    executor = interpreter.GridExecutor
    launch = executor.__call__

    def annotated(self: Any, *args: Any, **kwargs: Any) -> None:
        with record_function(self.fn.__name__):
            launch(self, *args, **kwargs)

    with mock.patch.object(executor, "__call__", annotated):
        yield


# The suite


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
    """At most so many lines, header included, unless the cases alone need more. What does not fit is folded: first
    kernels that are not ours, then ours, the smallest share of a call first."""
    large = [row for row in rows if row["of_call"] >= LEAST_SHARE]
    large.sort(key=lambda row: ("bytes" in row, row["of_call"]), reverse=True)
    while len(shown := folded(rows, large)) + 1 > lines and large:
        large.pop()
    named = [
        row if i == 0 or shown[i - 1]["case"] != row["case"] else row | {"case": ""} for i, row in enumerate(shown)
    ]
    return results.table(named, COLUMNS)


def folded(rows: Iterable[Row], large: Collection[Row]) -> list[Row]:
    """Of each case the whole call with its idle time, its products in one line, those of its kernels that are
    ``large``, and the others in one line."""
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
    """Which they are, the two largest with their ms; rows come by time."""
    names = [f"{row['kernel'].split()[-1][:32]} {results.cell(row['ms'])}" for row in rows[:2]]
    return "other: " + ", ".join([*names, *[f"{len(rows) - 2} more"] * (len(rows) > 2)])


def _rates(products: Sequence[Row]) -> str:
    """How fast the products of each role are."""
    roles: dict[str, list[Row]] = {name: [] for name in ROLES}
    for row in products:
        roles.setdefault(_role_of(row), []).append(row)
    rates = {name: _sum("", name, parts) for name, parts in roles.items() if parts}
    return "products: " + ", ".join(f"{name} {row['tflops']:.0f}" for name, (row,) in rates.items())


def _role_of(row: Row) -> str:
    return row["kernel"].partition(":")[0]


def _sum(case: str, name: str, rows: Sequence[Row]) -> list[Row]:
    """One row of several; none of none."""
    if not rows:
        return []
    row: Row = {"case": case, "kernel": name}
    row |= {key: sum(part[key] for part in rows) for key in ("launches", "ms", "of_call")}
    if flops := sum(part.get("flops", 0.0) for part in rows):
        row |= _with_rate(flops, row["ms"])
        shares = [part["of_product"] / part["tflops"] for part in rows if "of_product" in part]
        row["of_product"] = row["tflops"] * shares[0] if shares else None
    return [row]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="tiny sizes, as on a CPU")
    results.add_out(parser)


class RooflineRun:
    """Profiles one case after another, and saves after each."""

    def __init__(self, device: torch.device, path: Path) -> None:
        self.device, self.path = device, path
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self.backend = "triton" if _backend.INTERPRETED else None
        self.by_triton = _backend.INTERPRETED or device.type != "cpu"
        self.ceilings: dict[str, float] = {}
        self.rows: list[Row] = []
        self.sizes: dict[str, dict[str, int]] = {}
        self.failures: list[str] = []

    def run(self, todo: Iterable[Case]) -> None:
        profiled(lambda: torch.ones(1, device=self.device), self.device)  # the first time takes seconds to set up
        for case in todo:
            print(case.name, file=sys.stderr, flush=True)
            try:
                self._measure(case)
            except Exception as error:  # it does not fit into memory, say: the next one may
                self.failures.append(f"{case.name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
            gc.collect()
            if self.device.type != "cpu":
                torch.cuda.empty_cache()
            self._relate()
            self.save()

    def save(self) -> None:
        results.write(
            self.path,
            "roofline",
            device=results.device_name(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
            ceilings=self.ceilings,
            sizes=self.sizes,
            failures=self.failures,
            rows=self.rows,
        )

    def _measure(self, case: Case) -> None:
        problem = problem_of(case, self.device, self.dtype)
        run = step(case, problem, self.backend)
        sizes, flops = count(run, problem)
        self.sizes[case.name] = sizes._asdict()
        seen = observe(run, self.device, flops)
        rows, problems = rows_of(case.name, seen, sizes, case.kernels if self.by_triton else ())
        self.rows += rows
        self.failures += [f"{case.name}: {why}" for why in problems]

    def _relate(self) -> None:
        """To the best that the device has shown by now: something else may have slowed it."""
        for name, reached in timing.ceilings(self.device, self.dtype).items():
            self.ceilings[name] = max(reached, self.ceilings.get(name, 0.0))
        relate(self.rows, self.ceilings)

    def about(self) -> str:
        """Device and ceilings, in a line."""
        copy, product = self.ceilings["copy_gb_s"], self.ceilings["matmul_tflops"]
        return f"{results.device_name(self.device)}: copy {copy:.0f} GB/s, product {product:.2f} TFLOP/s ({self.dtype})"


def run(args: argparse.Namespace) -> int:
    """Entry of the suite."""
    device = results.this_device()
    suite = RooflineRun(device, args.out / "roofline.json")
    suite.run(cases(args.quick or device.type == "cpu"))
    return results.conclude(f"{table(suite.rows)}\n{suite.about()}", suite.failures, suite.path)


SUITE = Suite(add_arguments, run, needs="a GPU")
