"""linear_logprobs against the bare matrix products that it cannot do without, at the size of one training step.

The claim: forward and backward together take at most 1.15 times the products alone. A product is 2 N H V operations;
cache needs three, recompute four, and what a call really multiplied is counted (auto decides by the memory that is
free). The bare products are torch.mm on whole matrices, with results of the dtype that the operation asks for.

First each mode computes a small case in many chunks: values and gradients may stray from float64 at most 1.5 times as
far as eager PyTorch in the same dtype does, plus a little; what fails has no time. Times are medians over repeated
calls, after as many to warm up, with their interquartile range; peak is all memory that PyTorch has allocated, inputs
and gradients included. The claim is judged on a GPU; a CPU gets a tiny size, to try the suite. Results are saved after
each part. The exit code is 1 where a check, a part or the claim fails.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import sppo_kernels
from benchmarks import results

LIMIT = 1.15
FULL, TINY, CHECKED = (8192, 4096, 151_936), (512, 64, 1024), (640, 256, 4096)  # tokens, hidden size, vocabulary
MODES = ("cache", "recompute", "auto")


class Inputs(NamedTuple):
    """Of one call, with a gradient for its log-probabilities."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    upstream: Tensor


def make_inputs(tokens: int, hidden: int, vocab: int, device: torch.device) -> Inputs:
    """bfloat16 of the magnitudes of a language model's last layer."""
    torch.manual_seed(0)
    randn = partial(torch.randn, device=device)
    return Inputs(
        randn(tokens, hidden, dtype=torch.bfloat16).requires_grad_(),
        randn(vocab, hidden, dtype=torch.bfloat16).mul_(hidden**-0.5).requires_grad_(),
        torch.randint(vocab, (tokens,), device=device),
        randn(tokens),
    )


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and (without gradient) entropies, the way they are usually written."""
    logp = torch.nn.functional.linear(hidden, weight).float().log_softmax(-1)
    with torch.no_grad():
        entropy = -(logp.exp() * logp).sum(-1)
    return logp.gather(-1, labels.unsqueeze(-1)).squeeze(-1), entropy


def forward_and_backward(function: Callable[..., Any], x: Inputs) -> tuple[Tensor, ...]:
    """Log-probabilities, entropies, and gradients of hidden and weight."""
    logprobs, entropy = function(x.hidden, x.weight, x.labels)
    grads = torch.autograd.grad(logprobs, (x.hidden, x.weight), x.upstream.to(logprobs.dtype))
    return logprobs.detach(), entropy.detach(), *grads


def check(mode: str, device: torch.device) -> dict[str, Any]:
    """Largest errors against float64, over the largest magnitude, and those of eager PyTorch."""
    x = make_inputs(*CHECKED, device)
    exact = Inputs(x.hidden.double(), x.weight.double(), x.labels, x.upstream)
    want = forward_and_backward(sppo_kernels.reference.linear_logprobs, exact)
    ours = partial(sppo_kernels.linear_logprobs, backward=mode, chunk_bytes=1 << 20)
    errors, allowed = {}, {}
    for name, w, e, o in zip(
        ("logprobs", "entropy", "d hidden", "d weight"),
        want, forward_and_backward(eager, x), forward_and_backward(ours, x), strict=True,
    ):  # fmt: skip
        error = lambda got, w=w: float((got - w).abs().max() / w.abs().max())
        errors[name], allowed[name] = error(o), 1.5 * error(e) + 1e-5
    return {"errors": errors, "allowed": allowed, "passed": all(errors[k] <= allowed[k] for k in errors)}


def forward_alone(x: Inputs) -> object:
    """What scoring without a gradient runs."""
    with torch.no_grad():
        return sppo_kernels.linear_logprobs(x.hidden, x.weight, x.labels)


def measure(call: Callable[[], object], device: torch.device, repeats: int) -> dict[str, Any]:
    """Median and interquartile range in ms, and on a GPU the peak in bytes."""
    for _ in range(repeats):
        call()
    if device.type == "cpu":
        marks = [time.perf_counter()]
        for _ in range(repeats):
            call()
            marks.append(time.perf_counter())
        times, peak = [1000 * (end - start) for start, end in pairwise(marks)], None
    else:
        torch.cuda.reset_peak_memory_stats()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        torch.cuda.synchronize()
        times = [start.elapsed_time(end) for start, end in pairwise(events)]
        peak = torch.cuda.max_memory_allocated()
    low, median, high = statistics.quantiles(times, n=4)
    return {"ms": median, "iqr_ms": high - low, "peak_bytes": peak}


def bare_products(size: tuple[int, int, int], device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """The three products; where float32 cannot come from bfloat16 factors, float32 factors as the operation has."""
    tokens, hidden, vocab = size
    mixed = device.type == "cuda" and torch.version.hip is None
    product = partial(torch.mm, out_dtype=torch.float32) if mixed else torch.mm
    h, w, e = (
        torch.randn(shape, device=device, dtype=torch.bfloat16 if mixed else torch.float32)
        for shape in ((tokens, hidden), (vocab, hidden), (tokens, vocab))
    )
    return {
        "logits": partial(product, h, w.t()),
        "d hidden": partial(product, e, w),
        "d weight": partial(product, e.t(), h),
    }


class Report:
    """Measures one part after another, and saves after each."""

    def __init__(self, out: Path, quick: bool) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        tiny = quick or self.device.type == "cpu"
        self.size, self.repeats, self.judged = (TINY, 5, False) if tiny else (FULL, 20, True)
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
        self.path = out / f"products-{re.sub('[^a-z0-9]+', '-', name.lower())}{'-quick' if quick else ''}.json"
        size = dict(zip(("tokens", "hidden", "vocab"), self.size, strict=True))
        self.failures: list[str] = []
        self.checks: dict[str, dict[str, Any]] = {}
        self.bare_ms: dict[str, float] = {}
        self.rows: list[dict[str, Any]] = []
        self.content = {
            "device": name, "quick": quick, **size, "dtype": "bfloat16", "limit": LIMIT,
            "failures": self.failures, "checks": self.checks, "bare_ms": self.bare_ms, "rows": self.rows,
        }  # fmt: skip

    def run(self) -> None:
        self._part("bare products", self._bare)
        for mode in MODES:
            self._part(f"check {mode}", partial(self._check, mode))
        for mode in MODES:
            if self._is_right(mode):
                ours = partial(sppo_kernels.linear_logprobs, backward=mode)
                self._part(mode, partial(self._time, mode, partial(forward_and_backward, ours), self.judged))
        if self._is_right("recompute"):
            self._part("forward alone", partial(self._time, "forward alone", forward_alone))
        self._part("eager", self._eager)

    def _part(self, name: str, work: Callable[[], None]) -> None:
        """Do it; say so, and go on, where it raises."""
        print(name, file=sys.stderr)
        try:
            work()
        except Exception as error:  # whatever it is belongs in the report
            self._fail(f"{name}: {type(error).__name__}: {error}")
        results.write(self.path, "products", **self.content)

    def _fail(self, why: str) -> None:
        self.failures.append(why)
        print(f"FAILED {why}", file=sys.stderr)

    def _bare(self) -> None:
        for name, call in bare_products(self.size, self.device).items():
            self.bare_ms[name] = measure(call, self.device, self.repeats)["ms"]

    def _check(self, mode: str) -> None:
        outcome = self.checks[mode] = check(mode, self.device)
        if not outcome["passed"]:
            self._fail(f"check {mode}: errors {outcome['errors']}, allowed {outcome['allowed']}")

    def _is_right(self, mode: str) -> bool:
        return mode in self.checks and self.checks[mode]["passed"]

    def _eager(self) -> None:
        try:
            self._time("eager", partial(forward_and_backward, eager))
        except torch.OutOfMemoryError:
            print("eager does not fit", file=sys.stderr)

    def _time(self, name: str, work: Callable[[Inputs], object], judged: bool = False) -> None:
        call = partial(work, make_inputs(*self.size, self.device))
        with FlopCounterMode(display=False) as counter:
            call()
        flops = counter.get_total_flops()
        row = {"part": name, "passes": flops / (2 * math.prod(self.size)), **measure(call, self.device, self.repeats)}
        self.rows.append(row)
        row["tflops"] = flops / row["ms"] / 1e9
        row["ratio"] = row["ms"] / self._least_ms(row["passes"]) if len(self.bare_ms) == 3 else None
        row["passed"] = row["ratio"] <= LIMIT if judged and row["ratio"] else None
        if row["passed"] is False:
            self._fail(f"{name}: {row['ratio']:.3f} times its bare products, the limit is {LIMIT}")

    def _least_ms(self, passes: float) -> float:
        """One pass is a forward alone; more of them are both products of a backward, and logits for the rest."""
        if passes <= 1:
            return passes * self.bare_ms["logits"]
        return (passes - 2) * self.bare_ms["logits"] + self.bare_ms["d hidden"] + self.bare_ms["d weight"]

    def table(self) -> str:
        """A line a measured part."""
        line = "{:14} {:>9} {:>7} {:>7} {:>8} {:>7} {:>9} {:>7}"
        number = lambda x: "" if x is None else f"{x:.2f}"
        lines = [line.format("part", "ms", "iqr", "passes", "TFLOP/s", "ratio", "peak GiB", "")]
        for row in self.rows:
            numbers = (number(row[key]) for key in ("ms", "iqr_ms", "passes", "tflops", "ratio"))
            peak = row["peak_bytes"] and row["peak_bytes"] / 2**30
            verdict = {None: "", True: "passed", False: "failed"}[row["passed"]]
            lines.append(line.format(row["part"], *numbers, number(peak), verdict).rstrip())
        bare = ", ".join(f"{name} {ms:.2f}" for name, ms in self.bare_ms.items())
        return "\n".join([*lines, f"bare products, ms: {bare}"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="a tiny size, for which the claim is not judged")
    results.add_out(parser)


def run(args: argparse.Namespace) -> int:
    """Entry of the suite."""
    report = Report(args.out, args.quick)
    report.run()
    print(f"{report.table()}\n\n{report.content['device']}; {len(report.failures)} failures; written to {report.path}")
    return 1 if report.failures else 0
