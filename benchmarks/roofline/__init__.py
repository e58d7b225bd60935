"""Time, bandwidth and FLOP rate of every kernel of a call, relative to what the device reaches.

Profiles forward and backward of linear_logprobs ("cache", "recompute", "sparse") and of linear_policy_loss with
torch.profiler, and accounts for all of a call's time: each kernel, and the time in which the device is idle. The latter
is the time of a call between two CUDA events, without the profiler and with an idle device before it, minus the sum of
the kernels. It contains the host's time to queue the first kernel, and waits for the device.

Bytes are the least that a Triton kernel moves at this size, as benchmarks/traffic/ counts them, so GB/s is a lower
bound. Only the kernel that gathers weighted rows counts a row as often as it reads it; part of that comes from the L2
cache, and its GB/s may exceed the copy bandwidth. FLOPs are those of matrix products only, from the shapes that the
profiler records; their sum is compared with FlopCounterMode's. "of copy" and "of product" are shares of the copy
bandwidth and the product rate measured in the same run.

The table shows the matrix products of a call in one line, with the TFLOP/s of each kind, and folds small kernels into
"other", the largest of them with their ms; the JSON has all. The exit code is 1 when a case fails, or when its bytes or
FLOPs cannot be trusted. Results are saved after each case. On a CPU the sizes are tiny, and a row is an operation of
PyTorch or, with TRITON_INTERPRET=1, a kernel.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from benchmarks.harness import library_seams, results, timing
from benchmarks.harness.cases import BASE, LM_SHAPES
from benchmarks.harness.peers import explain
from benchmarks.harness.problem import ProblemSize
from benchmarks.harness.results import Row
from benchmarks.harness.suite import Suite
from benchmarks.roofline.profiling import LINEAR_POLICY_LOSS, Case, count, inputs, observe, profiled, step
from benchmarks.roofline.rows import relate, rows_of
from benchmarks.roofline.terminal_table import table

SMALL = ProblemSize(16_384, *LM_SHAPES["1.5B"])  # where row passes weigh most compared with the products
TINY = ProblemSize(12, 16, 256)
_FROM_CACHE = (
    "selective_logprobs_fwd_kernel",
    "linear_logprobs_scaled_rows_kernel",
    "linear_logprobs_weighted_rows_kernel",
)
KERNELS = {
    "cache": _FROM_CACHE,
    "recompute": (
        "selective_logprobs_fwd_kernel",
        "selective_logprobs_bwd_kernel",
        "linear_logprobs_scaled_rows_kernel",
    ),
    "sparse": (
        "selective_logprobs_fwd_kernel",
        "linear_logprobs_candidates_kernel",
        "linear_logprobs_select_kernel",
        "linear_logprobs_weighted_rows_kernel",
        "linear_logprobs_scaled_rows_kernel",
    ),
    LINEAR_POLICY_LOSS: (*_FROM_CACHE, "policy_loss_fwd_bwd_kernel"),
}


def cases(quick: bool) -> list[Case]:
    """Return all modes at all sizes; "sparse" with all mass on a few tokens, which it is made for."""
    return [
        Case(mode, size._replace(logits="sharp") if mode == "sparse" else size, kernels)
        for size in ([TINY] if quick else [BASE, SMALL])
        for mode, kernels in KERNELS.items()
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="tiny sizes, as on a CPU")
    results.add_out(parser)


class RooflineRun:
    """Profiles one case after another, and saves after each."""

    def __init__(self, device: torch.device, path: Path) -> None:
        self.device, self.path = device, path
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self.backend = "triton" if library_seams.is_interpreted() else None
        self.by_triton = library_seams.is_interpreted() or device.type != "cpu"
        self.ceilings: dict[str, float] = {}
        self.rows: list[Row] = []
        self.sizes: dict[str, dict[str, int]] = {}
        self.failures: list[str] = []

    def run(self, todo: Iterable[Case]) -> None:
        profiled(lambda: torch.ones(1, device=self.device), self.device)  # the first profile takes seconds to set up
        for case in todo:
            print(case.name, file=sys.stderr, flush=True)
            try:
                self._measure(case)
            except Exception as error:  # such as a case that does not fit into memory: the next may
                self.failures.append(f"{case.name}: {explain(error)}")
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
        problem = inputs(case, self.device, self.dtype)
        run = step(case, problem, self.backend)
        sizes, flops = count(run, problem)
        self.sizes[case.name] = sizes._asdict()
        seen = observe(run, self.device, flops)
        rows, problems = rows_of(case.name, seen, sizes, case.kernels if self.by_triton else ())
        self.rows += rows
        self.failures += [f"{case.name}: {why}" for why in problems]

    def _relate(self) -> None:
        """Divide rates by ceilings, which are the best so far: another process may have slowed the device."""
        for name, reached in timing.ceilings(self.device, self.dtype).items():
            self.ceilings[name] = max(reached, self.ceilings.get(name, 0.0))
        relate(self.rows, self.ceilings)

    def about(self) -> str:
        """Return device and ceilings in one line."""
        copy, product = self.ceilings["copy_gb_s"], self.ceilings["matmul_tflops"]
        return f"{results.device_name(self.device)}: copy {copy:.0f} GB/s, product {product:.2f} TFLOP/s ({self.dtype})"


def run(args: argparse.Namespace) -> int:
    """Entry of the suite."""
    device = results.this_device()
    suite = RooflineRun(device, args.out / "roofline.json")
    suite.run(cases(args.quick or device.type == "cpu"))
    return results.conclude(f"{table(suite.rows)}\n{suite.about()}", suite.failures, suite.path)


SUITE = Suite(add_arguments, run, needs="a GPU")
