"""Measure which launch configuration of each kernel is fastest on this device, by class of shapes.

A kernel runs through its operation, forward or backward, with each of its candidates. A candidate whose results differ
from float64 by more than the suite kernels allows gets no time. The fastest is chosen if it saves at least 2 percent
compared with the default.

For the output embeddings of four models forward and backward with a cache are measured, with the vendor's product and
with each tile of the fused projection. If a tile saves at least 2 percent, projection="auto" is "fused" for embeddings
of this shape; otherwise it remains "vendor".

The choices are written to tuning.json, for ``sppo_kernels.tuning.load``, after each shape,
so that a killed run leaves what it has; all times are in tune.json.

Requires a GPU. Without one ``--quick`` tries the suite in Triton's interpreter with tiny sizes, where nothing is chosen
because an interpreter's times mean nothing. The exit code is 1 when a candidate is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.harness import checking, library_seams, results, timing
from benchmarks.harness.cases import LM_SHAPES, MILLION
from benchmarks.harness.interpreter import run_interpreted
from benchmarks.harness.operations import OPERATIONS
from benchmarks.harness.problem import Outputs, Problem, ProblemSize
from benchmarks.harness.results import Row
from benchmarks.harness.suite import Suite
from sppo_kernels import tuning
from sppo_kernels.tuning import TUNABLES, Tunable

GAIN = 0.02  # smaller savings are noise
PROJECTION = library_seams.PROJECTION.name
VENDOR = "vendor"  # in place of a tile: the product of the vendor's library, which is launched where none is chosen


class Shape(NamedTuple):
    """A kernel and the shape for which it is tuned.

    Attributes:
        kernel: name of the tunable.
        operation: the operation that launches it.
        mode: of the operation.
        part: what is timed, "forward", "backward" or "all".
        size: of the inputs.
        dtype: of the inputs.
        length: of a row, or the number of tokens of a policy loss.
        itemsize: bytes of a row's element.
    """

    kernel: str
    operation: str
    mode: str
    part: str
    size: ProblemSize
    dtype: torch.dtype
    length: int
    itemsize: int

    @property
    def where(self) -> str:
        """The class of shapes that a choice is for."""
        if self.kernel == PROJECTION:
            return library_seams.projection_class(self.size.vocab, self.size.hidden, self.dtype)
        return tuning.shape_class(self.length, self.itemsize)


class Candidate(NamedTuple):
    """What is measured: a configuration, or None for what is launched without one, and the mode of the operation."""

    config: tuple[int, ...] | None
    mode: str

    @property
    def title(self) -> str:
        """The configuration in one word."""
        return VENDOR if self.config is None else "/".join(map(str, self.config))


def candidates(shape: Shape) -> list[Candidate]:
    """Return what is measured for a shape, first what is launched if nothing is chosen."""
    if shape.kernel == PROJECTION:
        tiles = [Candidate(tile, "fused") for tile in library_seams.projection_candidates()]
        return [Candidate(None, VENDOR), *tiles]
    return [Candidate(config, shape.mode) for config in TUNABLES[shape.kernel].candidates]


VOCABULARIES = (151_936, 128_256, 49_152)


def shapes(
    tiny: bool, vocabularies: Sequence[int] = VOCABULARIES, heads: Sequence[str] = tuple(LM_SHAPES)
) -> list[Shape]:
    """Return rows of logits of some vocabularies, in half precision or float32, a policy loss, and some heads."""
    found = []
    for vocab in (97,) if tiny else vocabularies:
        # A small hidden size, so that the matrix products next to the row pass are short.
        size = ProblemSize(8 if tiny else 4096, 8 if tiny else 64, vocab)
        for part, dtype in product(("forward", "backward"), (torch.bfloat16, torch.float32)):
            kernel = f"selective_logprobs.{part}"
            found.append(Shape(kernel, "selective_logprobs", "", part, size, dtype, vocab, dtype.itemsize))
    tokens = 256 if tiny else MILLION
    size = ProblemSize(tokens, 0, 0)
    found.append(Shape("policy_loss", "policy_loss, token", "", "forward", size, torch.float32, tokens, 4))
    sizes = [ProblemSize(8, 16, 97)] if tiny else [ProblemSize(8192, *LM_SHAPES[head]) for head in heads]
    for size in sizes:
        found.append(Shape(PROJECTION, "linear_logprobs, projection", "", "all", size, torch.bfloat16, size.vocab, 2))
    return found


class Tuner:
    """Measures the candidates of one shape after another."""

    def __init__(self, device: torch.device, out: Path) -> None:
        self.device, self.out = device, out
        self.timed = device.type != "cpu"
        self.rows: list[Row] = []
        self.failures: list[str] = []

    def run(self, planned: list[Shape]) -> None:
        tuning.reset()
        for i, shape in enumerate(planned):
            print(f"[{i + 1}/{len(planned)}] {shape.kernel}, {shape.where}", file=sys.stderr, flush=True)
            self._tune(shape)
            self.save()
        self.save(chart(self.rows))

    def _tune(self, shape: Shape) -> None:
        tunable, operation, where = TUNABLES[shape.kernel], OPERATIONS[shape.operation], shape.where
        torch.manual_seed(0)
        problem = operation.inputs(shape.size, self.device, shape.dtype)
        functions = operation.implementations("triton")
        truth, allowed = checking.truth_and_tolerance(operation, problem)
        found = candidates(shape)
        rows: list[Row] = [
            {"kernel": shape.kernel, "shapes": where, "configuration": each.title, **_fields(each.config)}
            for each in found
        ]
        for each, row in zip(found, rows, strict=True):
            with _using(tunable, each.config):
                row |= checking.check(problem, functions[each.mode], truth, allowed)
        del truth
        for each, row in zip(found, rows, strict=True):
            if row["passed"]:
                with _using(tunable, each.config):
                    row |= self._time(problem, functions[each.mode], shape.part)
            else:
                self._fail(f"{shape.kernel}, {where}, {each.title}: errors {row['errors']}, allowed {allowed}")
        self._choose(tunable, where, found, rows)
        self.rows += rows

    def _time(self, problem: Problem, function: Callable[..., Outputs], part: str) -> dict[str, float]:
        repeats = 30 if self.timed else 2
        if part == "forward":
            return timing.measure(lambda: problem.forward(function), self.device, repeats)
        return timing.measure_parts(problem.step(function), self.device, repeats, warmup=2)[part]

    def _choose(self, tunable: Tunable[Any], where: str, found: list[Candidate], rows: list[Row]) -> None:
        """Choose the fastest candidate; the first one is launched if none is chosen."""
        timed = [i for i, row in enumerate(rows) if "ms" in row]
        if not self.timed or not timed:
            return
        best = min(timed, key=lambda i: rows[i]["ms"])
        config = found[best].config
        if config is not None and rows[best]["ms"] < (1 - GAIN) * rows[0].get("ms", float("inf")):
            tunable.choose(where, config)
            rows[best]["chosen"] = True
        else:
            rows[0]["chosen"] = True

    def _fail(self, why: str) -> None:
        self.failures.append(why)
        print(f"FAILED {why}", file=sys.stderr)

    def save(self, drawn: results.Chart | None = None) -> None:
        tuning.save(self.out / "tuning.json")
        results.write(
            self.out / "tune.json",
            "tune",
            drawn,
            device=results.device_name(self.device),
            failures=self.failures,
            rows=self.rows,
        )


def _using(tunable: Tunable[Any], config: tuple[int, ...] | None) -> AbstractContextManager[None]:
    return nullcontext() if config is None else tunable.using(config)


def _fields(config: tuple[int, ...] | None) -> Row:
    """Return the values of a configuration, which is a named tuple, by name."""
    return {} if config is None else config._asdict()  # type: ignore[attr-defined]


COLUMNS: results.Columns = {
    "kernel": lambda row: row["kernel"],
    "shapes": lambda row: row["shapes"],
    "configuration": lambda row: row["configuration"],
    "ms": lambda row: row.get("ms"),
    "iqr": lambda row: row.get("iqr_ms"),
    "": lambda row: "chosen" if row.get("chosen") else "wrong" if not row["passed"] else "",
}


def chart(rows: list[Row]) -> results.Chart:
    """Chart the times of the candidates."""
    name = lambda row: f"{row['kernel']}, {row['shapes']}: {row['configuration']}"
    return results.Chart("ms", [(name(row), row["ms"]) for row in rows if "ms" in row])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="tiny sizes; without a GPU in Triton's interpreter")
    parser.add_argument(
        "--vocab", nargs="+", type=int, default=VOCABULARIES, metavar="V", help="vocabularies (%(default)s)"
    )
    parser.add_argument(
        "--heads", nargs="*", choices=LM_SHAPES, default=list(LM_SHAPES), help="output embeddings (%(default)s)"
    )
    results.add_out(parser)


def run(args: argparse.Namespace) -> int:
    """Entry of the suite."""
    if not torch.cuda.is_available() and not library_seams.is_interpreted():
        if args.quick:
            return run_interpreted(args)
        print("there is no GPU here; --quick tries the suite in Triton's interpreter", file=sys.stderr)
        return 2
    device = results.this_device()
    tuner = Tuner(device, args.out)
    tuner.run(shapes(tiny=args.quick or device.type == "cpu", vocabularies=args.vocab, heads=args.heads))
    print(results.table(tuner.rows, COLUMNS))
    note = "" if tuner.timed else " (interpreted: times mean nothing and nothing is chosen)"
    print(f"\n{results.device_name(device)}{note}; {len(tuner.failures)} failures; written to {args.out}/tuning.json")
    return 1 if tuner.failures else 0


SUITE = Suite(add_arguments, run, draw=results.draw_bars(chart), needs="a GPU")
