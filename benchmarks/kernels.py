"""Time, memory and error of every operation compared with PyTorch, TRL, Liger, verl, quack and cut-cross-entropy.

All providers run in one process on the same tensors. First each is checked: its outputs and gradients may differ from
float64 by at most four times the error of eager PyTorch in the same dtype; in float32, sparse gradients by at most a
thousandth. A provider with a larger error gets no time. Errors are the largest one over the largest magnitude.

Times are in ms, medians with their interquartile range: "forward" without gradients, as when scoring; "both" is the
forward and backward of a training step, "backward" its second part. On a GPU they are the device's time, and the host's
where a call waits for the device or takes longer to queue than to run: host_ms and host_bound in the JSON. Peak is the
most memory during a step beyond its inputs, the returned gradients included, in GiB. Rate is the minimal work of
forward and backward per second, whatever was done: TFLOP/s or GB/s; "of ceiling" divides it by what this device reached
in the same run in a large matrix product or a copy. "matmuls only" is a lower bound: the matrix products that every
provider needs. It is not checked.

On a GPU some rows decide claims, which are listed last. The exit code is 1 when an implementation of this library is
wrong or raises; a claim that does not hold is only listed. Results are saved after each row.
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

from benchmarks.harness import checking, claims, library_seams, results, timing
from benchmarks.harness.cases import GEMM_ONLY, OURS, PLANS, BenchmarkCase, is_ours, provider_name
from benchmarks.harness.operations import OPERATIONS
from benchmarks.harness.peers import PEERS, PeerFactory, explain, on_any_device
from benchmarks.harness.problem import IGNORE_INDEX, Implementation, MinimalCost, Outputs, Problem
from benchmarks.harness.results import Row
from benchmarks.harness.suite import Suite
from sppo_kernels import tuning

TUNED = "headline-tuned"  # the part of the suite gpu that launches what the suite tune chose

# One provider in one case


def clock(problem: Problem, implementation: Implementation, device: torch.device, seconds: float) -> Row:
    """Measure times, and on a GPU the peak, with as many repetitions as fit into some seconds."""

    def score() -> None:
        with torch.no_grad():
            problem.forward(implementation)

    step = problem.step(implementation)

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


def matrix_products(problem: Problem) -> dict[str, Callable[[], object]]:
    """Return the matrix products of forward and backward, with float32 results.

    Where half-precision factors cannot give float32 results, the factors are float32, as in the operation.
    """
    hidden, weight = (problem.tensors[name].detach() for name in ("hidden", "weight"))
    hidden = hidden[problem.tensors["labels"] != IGNORE_INDEX]
    mixed = hidden.dtype != torch.float32 and hidden.is_cuda and torch.version.hip is None
    multiply = partial(torch.mm, out_dtype=torch.float32) if mixed else torch.mm
    if not mixed:
        hidden, weight = hidden.float(), weight.float()
    logit_grad = torch.randn(len(hidden), len(weight), device=hidden.device, dtype=hidden.dtype)

    def backward() -> None:
        multiply(logit_grad, weight)
        multiply(logit_grad.t(), hidden)

    return {"forward": lambda: multiply(hidden, weight.t()), "backward": backward}


def rate(cost: MinimalCost, row: Row) -> Row:
    """Return the minimal work per second: TFLOP/s if there are matrix products, otherwise GB/s."""
    flops, size = cost.forward_flops + cost.backward_flops, cost.forward_bytes + cost.backward_bytes
    amount, unit = (flops / 1e9, "TFLOP/s") if flops else (size / 1e6, "GB/s")
    return {
        "rate": amount / row["both_ms"],
        "unit": unit,
        "forward_gb_s": cost.forward_bytes / row["forward_ms"] / 1e6 or None,
    }


# The suite


class KernelComparison:
    """Measures one case after another, and saves after each row."""

    def __init__(
        self, plan: list[BenchmarkCase], device: torch.device, seconds: float, without: Collection[str], path: Path
    ) -> None:
        self.plan, self.device, self.seconds, self.without, self.path = plan, device, seconds, without, path
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        # In Triton's interpreter a CPU runs the kernels; otherwise what the library runs on a CPU.
        self.backend = "triton" if library_seams.is_interpreted() else None
        self.ceilings: dict[str, float] = {}
        self.rows: list[Row] = []
        self.failures: list[str] = []
        self.claims: list[Row] = []
        self.gpu = [results.gpu_facts()]  # clocks change: one entry at the start, one after each case

    def run(self) -> None:
        for i, case in enumerate(self.plan):
            print(f"[{i + 1}/{len(self.plan)}] {case.title}", file=sys.stderr, flush=True)
            try:
                self._measure(case)
            except Exception as error:  # such as inputs that do not fit into memory: the next case may fit
                self._fail(f"{case.title}: {explain(error)}")
            self._release_memory()
            self._relate_to_ceilings()
            self.claims = claims.judge(self.rows) if self.device.type != "cpu" else []
            self.gpu.append(results.gpu_facts())
            self.save()
        self.save(chart(self.rows))

    def save(self, drawn: results.Chart | None = None) -> None:
        """Write all results; with a chart when they are complete."""
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

    def _measure(self, case: BenchmarkCase) -> None:
        """Check all providers, which needs the float64 results in memory; then release those and take times."""
        operation = OPERATIONS[case.operation]
        torch.manual_seed(0)
        problem = operation.inputs(case.size, self.device, self.dtype)
        cost = operation.minimal_cost(case.size, problem.dtype)
        providers = self._providers(case)
        start = len(self.rows)
        right = self._check_all(case, problem, providers)
        if OURS not in self.without and cost.forward_flops:
            unclipped = operation.minimal_cost(case.size._replace(clipped=0.0), problem.dtype)
            self._record(case, GEMM_ONLY, partial(self._time_products, problem, unclipped))
        for name, (implementation, row) in right.items():
            self._record(case, name, partial(self._time, problem, implementation, cost, row), known=row)
        order = [GEMM_ONLY, *providers]
        self.rows[start:] = sorted(self.rows[start:], key=lambda row: order.index(row["provider"]))

    def _providers(self, case: BenchmarkCase) -> dict[str, PeerFactory]:
        found: dict[str, PeerFactory] = {}
        if OURS not in self.without:
            for mode, implementation in OPERATIONS[case.operation].implementations(self.backend).items():
                found[provider_name(mode)] = on_any_device(implementation)
        return found | {name: build for name, build in PEERS[case.operation].items() if name not in self.without}

    def _check_all(
        self, case: BenchmarkCase, problem: Problem, providers: dict[str, PeerFactory]
    ) -> dict[str, tuple[Implementation, Row]]:
        """Return the providers whose results are right; the others get their row at once, without a time."""
        truth, tolerances = checking.truth_and_tolerance(OPERATIONS[case.operation], problem)
        right: dict[str, tuple[Implementation, Row]] = {}
        for name, build in providers.items():
            allowed = checking.allowed_of(name, problem.dtype, tolerances)
            self._record(
                case,
                name,
                partial(
                    self._check,
                    case,
                    name,
                    build=build,
                    problem=problem,
                    truth=truth,
                    allowed=allowed,
                    right=right,
                ),
                known={"allowed": allowed},
            )
        return right

    def _check(
        self,
        case: BenchmarkCase,
        name: str,
        *,
        build: PeerFactory,
        problem: Problem,
        truth: Outputs,
        allowed: dict[str, float],
        right: dict[str, tuple[Implementation, Row]],
    ) -> Row | None:
        """Return the row of a wrong provider; add a right one to ``right`` and return None."""
        implementation = build(self.device)
        if name.endswith("auto"):  # its choice depends on the call before; check the one that is timed
            problem.results(implementation)
        row = {"allowed": allowed, **checking.check(problem, implementation, truth, allowed)}
        if row["passed"]:
            right[name] = implementation, row
            return None
        if is_ours(name):
            self._fail(f"{case.title}: {name} is wrong: errors {row['errors']}, allowed {allowed}")
        return row | {"note": "wrong, so no time"}

    def _record(
        self, case: BenchmarkCase, provider: str, measure: Callable[[], Row | None], *, known: Row | None = None
    ) -> None:
        """Add the row that ``measure`` returns, or what is ``known`` and why it raised."""
        row: Row | None
        try:
            row = measure()
        except Exception as error:  # whatever another library raises; of this library it is a failure
            row = {**(known or {}), "note": explain(error)}
            if is_ours(provider):
                self._fail(f"{case.title}: {provider}: {row['note']}")
        if row is not None:
            self.rows.append({**case.row_key(), "provider": provider, **row})
            self.save()
        self._release_memory()

    def _release_memory(self) -> None:
        gc.collect()
        if self.device.type != "cpu":
            torch.cuda.empty_cache()

    def _fail(self, why: str) -> None:
        self.failures.append(why)
        print(f"FAILED {why}", file=sys.stderr)

    def _time(self, problem: Problem, implementation: Implementation, cost: MinimalCost, checked: Row) -> Row:
        row = checked | clock(problem, implementation, self.device, self.seconds)
        return row | rate(cost, row)

    def _time_products(self, problem: Problem, cost: MinimalCost) -> Row:
        repeats = 10
        step = timing.measure_parts(matrix_products(problem), self.device, repeats, warmup=2)
        row: Row = {"repeats": repeats}
        for name, key in (("forward", "forward"), ("backward", "backward"), ("both", "all")):
            row |= {f"{name}_ms": step[key]["ms"], f"{name}_iqr_ms": step[key]["iqr_ms"]}
        return row | rate(cost, row)

    def _relate_to_ceilings(self) -> None:
        """Divide rates by ceilings, which are the best so far: another process may have slowed the device."""
        for name, reached in timing.ceilings(self.device, self.dtype).items():
            self.ceilings[name] = max(reached, self.ceilings.get(name, 0.0))
        copy, product = self.ceilings["copy_gb_s"], self.ceilings["matmul_tflops"]
        for row in self.rows:
            if "rate" in row:
                row["of_ceiling"] = row["rate"] / (product if row["unit"] == "TFLOP/s" else copy)
                row["forward_of_copy"] = row["forward_gb_s"] and row["forward_gb_s"] / copy

    def about(self) -> str:
        """Return device, dtype and ceilings in one line."""
        copy, product = self.ceilings["copy_gb_s"], self.ceilings["matmul_tflops"]
        name = results.device_name(self.device)
        return f"{name}, {self.dtype}; ceilings: copy {copy:.0f} GB/s, product {product:.2f} TFLOP/s"

    def table(self) -> str:
        """Return a text table per case, and the judged claims."""
        texts = [f"{title}\n{results.table(rows, COLUMNS)}" for title, rows in by_case(self.rows).items()]
        judged = [results.table(self.claims, claims.COLUMNS)] if self.claims else []
        return "\n\n".join([*texts, *judged])


def _worst_error(row: Row) -> float | None:
    errors = [*row.get("errors", {}).values(), *row.get("scored_errors", {}).values()]
    return checking.worst(errors) if errors else None


COLUMNS: results.Columns = {
    "": lambda row: row["provider"],
    "forward": lambda row: row.get("forward_ms"),
    "backward": lambda row: row.get("backward_ms"),
    "both": lambda row: row.get("both_ms"),
    "iqr": lambda row: row.get("both_iqr_ms"),
    "peak": lambda row: row["peak_bytes"] / 2**30 if row.get("peak_bytes") else None,
    "rate": lambda row: row.get("rate"),
    "of ceiling": lambda row: row.get("of_ceiling"),
    "error": _worst_error,
    "note": lambda row: row.get("note"),
}


def chart(rows: list[Row]) -> results.Chart:
    """Chart the share of the ceiling that each provider reaches in the first case of each operation."""
    first = {row["operation"]: BenchmarkCase.of_row(row) for row in reversed(rows)}
    shown = [row for row in rows if row.get("of_ceiling") and first[row["operation"]] == BenchmarkCase.of_row(row)]
    bars = [(f"{row['operation']}: {row['provider']}", row["of_ceiling"]) for row in shown]
    return results.Chart("minimal work per second, over what the device reached in a large product or copy", bars)


def by_case(rows: list[Row]) -> dict[str, list[Row]]:
    """Group rows by case; those of the tuned part of the suite gpu are a group of their own."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        title = BenchmarkCase.of_row(row).title
        found.setdefault(f"{title} ({TUNED})" if row.get("part") == TUNED else title, []).append(row)
    return found


def summary(rows: list[Row]) -> str:
    """Return a text table with a line per case: the fastest mode of this library and the fastest peer."""
    return results.table(summaries(rows), SUMMARY)


def summaries(rows: list[Row]) -> list[Row]:
    """Return the lines of :func:`summary`."""
    return [{"case": title, **_summary(group)} for title, group in by_case(rows).items()]


def _summary(rows: list[Row]) -> Row:
    ms = {row["provider"]: row["both_ms"] for row in rows if "both_ms" in row}
    ours = min(filter(is_ours, ms), key=ms.__getitem__, default=None)
    peers = [name for name in ms if not is_ours(name) and name != GEMM_ONLY]
    peer = min(peers, key=ms.__getitem__, default=None)
    columns = {"our_ms": ours, "peer_ms": peer, "gemm_ms": GEMM_ONLY, "eager_ms": "eager PyTorch"}
    return {"ours": ours, "peer": peer, **{name: ms.get(provider) for name, provider in columns.items()}}


SUMMARY: results.Columns = {
    "forward and backward, ms": lambda row: row["case"],
    "our fastest": lambda row: row["ours"],
    "ms": lambda row: row["our_ms"],
    "fastest peer": lambda row: row["peer"],
    "its ms": lambda row: row["peer_ms"],
    "eager": lambda row: row["eager_ms"],
    GEMM_ONLY: lambda row: row["gemm_ms"],
}


def all_providers() -> list[str]:
    """List this library, with all its modes, and the peers."""
    return [OURS, *sorted({name for peers in PEERS.values() for name in peers})]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plan", choices=PLANS, help="operations and sizes (full; on a CPU cpu)")
    parser.add_argument("--quick", action="store_true", help="the plan quick: tiny sizes")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=OPERATIONS,
        metavar="OPERATION",
        help=f"some of {', '.join(map(repr, OPERATIONS))}",
    )
    providers = all_providers()
    parser.add_argument(
        "--without",
        nargs="+",
        default=[],
        choices=providers,
        metavar="PROVIDER",
        help=f"leave out some of {', '.join(providers)}",
    )
    parser.add_argument("--tuning", type=Path, metavar="FILE", help="launch configurations from the suite tune")
    parser.add_argument("--seconds", type=float, default=1.0, help="how long to repeat each provider (%(default)s)")
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
    cases = [case for case in PLANS[plan] if not args.only or case.operation in args.only]
    if not cases:
        known = ", ".join(sorted({repr(case.operation) for case in PLANS[plan]}))
        print(f"the plan {plan} has no case of {', '.join(map(repr, args.only))}; it has {known}", file=sys.stderr)
        return 2
    seconds = 0.05 if plan in ("quick", "dry") else args.seconds
    comparison = KernelComparison(cases, device, seconds, args.without, args.out / f"kernels-{plan}.json")
    comparison.run()
    print(f"{comparison.table()}\n\n{comparison.about()}")
    print(f"{len(comparison.failures)} failures; written to {comparison.path}")
    return 1 if comparison.failures else 0


def published_table(folder: Path) -> str:
    """Return a table per case, and the judged claims."""
    texts = []
    for report in results.load_all(folder, "kernels"):
        for title, rows in by_case(report["rows"]).items():
            texts.append(f"**{title}**\n\n{results.markdown(rows, COLUMNS)}")
        if report["claims"]:
            texts.append(results.markdown(report["claims"], claims.COLUMNS))
    return "\n\n".join(texts)


def published_summary(folder: Path) -> str:
    """Return one line per case: the fastest mode of this library and the fastest peer."""
    rows = [row for report in results.load_all(folder, "kernels") for row in report["rows"]]
    return results.markdown(summaries(rows), SUMMARY)


SUITE = Suite(
    add_arguments,
    run,
    tables={"kernels": published_table, "kernels-summary": published_summary},
    draw=results.draw_bars(chart),
    needs="a GPU for the sizes that matter",
)
