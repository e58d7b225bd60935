"""Host time of each operation: what Python, PyTorch and Triton take per call, compared with eager PyTorch.

Tensors are tiny and on a CPU, so that arithmetic takes next to no time. Launches of kernels go as far as the driver of
a GPU that Triton is told is there; what a driver takes to queue a launch or a matrix product is not included. Times are
medians in microseconds, all implementations taken in turn. Where the device needs longer, host time is hidden.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import triton
from triton.runtime.jit import JITFunction

from benchmarks.compile.launches import TARGETS, AbsentGPU
from benchmarks.harness import library_seams, results
from benchmarks.harness.cases import OURS, provider_name
from benchmarks.harness.operations import OPERATIONS
from benchmarks.harness.peers import PEERS
from benchmarks.harness.problem import ProblemSize
from benchmarks.harness.results import Row
from benchmarks.harness.suite import Suite

SIZE = ProblemSize(16, 64, 64)
DEVICE = torch.device("cpu")
EAGER = "eager PyTorch"
WITHOUT = ("auto",)  # chooses between the other modes by values, which kernels that do not run do not compute


class AnyGPU(AbsentGPU):
    """A GPU under a name of its own, because kernels that do nothing remain in Triton's cache of the device."""

    def __init__(self) -> None:
        super().__init__("host_time")

    def get_current_target(self) -> Any:
        return TARGETS["sm_90"].gpu


class NoKernel:
    """Take the place of a compiled kernel. Results stay what was in memory, but for numbers that the host reads."""

    function = None
    packed_metadata = ()

    def __init__(self, names: list[str]) -> None:
        self.read_by_host = [i for i, name in enumerate(names) if name == "count_ptr"]  # of sparse entries

    def launch_metadata(self, *_: object) -> None:
        return None

    def run(self, *arguments: Any) -> None:
        """Accept a grid, a stream, the properties above, two hooks, and the arguments of the kernel."""
        for i in self.read_by_host:
            arguments[i + 9].fill_(1)


def _compile_nothing(self: JITFunction, key: str, _: Any, device: str, *__: Any) -> NoKernel:
    return self.device_caches[device][0].setdefault(key, NoKernel(self.arg_names))


@contextmanager
def launches_without_gpu() -> Iterator[None]:
    """Launch kernels on CPU tensors as far as the driver, and check values as rarely as for tensors on a GPU."""
    triton.runtime.driver.set_active(AnyGPU())  # for good: there may be no driver to return to
    with (
        mock.patch.object(JITFunction, "_do_compile", _compile_nothing),
        library_seams.accept_cpu_tensors(),
        library_seams.values_are_not_checked(),
        library_seams.projection_selects(tokens=False),  # as where no label is very unlikely
    ):
        yield


def microseconds(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Time successive calls."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e6 * (time.perf_counter() - start))
    return times


def measure(name: str, repeats: int) -> list[Row]:
    """Return the host time of each implementation of an operation, in turns of a tenth of the repetitions."""
    operation = OPERATIONS[name]
    torch.manual_seed(0)
    problem = operation.inputs(SIZE, DEVICE, torch.float32)
    found = operation.implementations("triton")
    steps = {provider_name(mode): problem.step(call) for mode, call in found.items() if mode not in WITHOUT}
    steps[EAGER] = problem.step(PEERS[name][EAGER](DEVICE))
    times: dict[str, dict[str, list[float]]] = {provider: {} for provider in steps}
    for turn in range(11):  # the first one warms up
        for provider, step in steps.items():
            with launches_without_gpu():
                measured = microseconds(step, max(1, repeats // 10))
            for part, values in measured.items() if turn else ():
                times[provider].setdefault(part, []).extend(values)
    rows = []
    for provider, parts in times.items():
        row: Row = {"operation": name, "provider": provider}
        parts["both"] = [sum(together) for together in zip(*parts.values(), strict=True)]
        for part, values in parts.items():
            low, median, high = statistics.quantiles(values, n=4)
            row |= {f"{part}_us": median, f"{part}_iqr_us": high - low}
        rows.append(row)
    eager = rows[-1]["both_us"]
    return [row | {"of_eager": row["both_us"] / eager} for row in rows]


COLUMNS: results.Columns = {
    "operation": lambda row: row["operation"],
    "implementation": lambda row: row["provider"],
    "forward, us": lambda row: f"{row['forward_us']:.0f}",
    "backward, us": lambda row: f"{row['backward_us']:.0f}" if "backward_us" in row else "",
    "both, us": lambda row: f"{row['both_us']:.0f}",
    "of eager": lambda row: f"{row['of_eager']:.1f}" if row["provider"] != EAGER else "",
}


def chart(rows: list[Row]) -> results.Chart:
    """Chart the host time of forward and backward."""
    bars = [(f"{row['operation']}: {row['provider'].removeprefix(OURS + ', ')}", row["both_us"]) for row in rows]
    return results.Chart("host time of forward and backward, us", bars)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="few repetitions")
    parser.add_argument("--only", nargs="+", choices=OPERATIONS, default=list(OPERATIONS), metavar="OPERATION")
    results.add_out(parser)


def run(args: argparse.Namespace) -> int:
    """Entry of the suite."""
    if library_seams.is_interpreted():
        print("TRITON_INTERPRET is set, so kernels are interpreted and not launched; unset it", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    rows: list[Row] = []
    for name in args.only:
        print(name, file=sys.stderr, flush=True)
        rows += measure(name, repeats=20 if args.quick else 1000)
    path = args.out / "host_time.json"
    results.write(path, "host_time", chart(rows), quick=args.quick, device=results.device_name(DEVICE), rows=rows)
    return results.conclude(results.markdown(rows, COLUMNS), [], path)


SUITE = Suite(
    add_arguments, run, tables={"host_time": results.table_of("host_time", COLUMNS)}, draw=results.draw_bars(chart)
)
