"""Error of cached gradients in half precision, against float64: probabilities with the label apart, or logit gradients.

backward="cache" keeps exp(z - base) of all tokens but the label, and the label's entry apart in float32. The
alternative is to keep the logit gradients onehot(label) - p, rounded. Both are multiplied here in float32, without the
final rounding of the gradients to half precision, which is the same for both. Errors are relative to the norm of the
gradient. The exit code is 1 if keeping probabilities is less exact on any distribution.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import library_seams, results
from benchmarks.harness.results import Row
from benchmarks.harness.suite import Suite

FULL, QUICK = (512, 256, 8192), (64, 32, 512)  # tokens, hidden size, vocabulary
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Problem(NamedTuple):
    """Hidden states [N, H], weight [V, H] and labels [N] of one distribution."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor


def _noise(tokens: int, width: int, vocab: int, *, spread: float) -> Problem:
    hidden, weight = torch.randn(tokens, width) / width**0.25, torch.randn(vocab, width) * spread / width**0.25
    return Problem(hidden, weight, torch.randint(vocab, (tokens,)))


def _likely(tokens: int, width: int, vocab: int, *, of_label: bool) -> Problem:
    """Make one token likely: the label, or another one."""
    problem = _noise(tokens, width, vocab, spread=1.0)
    top = problem.labels if of_label else (problem.labels + 1) % vocab
    row = problem.weight[top]
    return problem._replace(hidden=problem.hidden + 14.0 * row / row.square().sum(-1, keepdim=True))


DISTRIBUTIONS: dict[str, Callable[[int, int, int], Problem]] = {
    "label likely": lambda *size: _likely(*size, of_label=True),
    "another token likely": lambda *size: _likely(*size, of_label=False),
    "nearly uniform": lambda *size: _noise(*size, spread=1e-3),
    "noise, spread 1": lambda *size: _noise(*size, spread=1.0),
    "noise, spread 5": lambda *size: _noise(*size, spread=5.0),
}


def exact(problem: Problem, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Compute d hidden and d weight in float64."""
    hidden, weight = problem.hidden.double(), problem.weight.double()
    e = torch.nn.functional.one_hot(problem.labels, len(weight)) - (hidden @ weight.t()).softmax(-1)
    return _gradients(e, hidden, weight, upstream.double())


def rounded(problem: Problem, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Compute both from float32 logits whose gradients are rounded, and from hidden states times upstream, rounded."""
    hidden, weight, dtype = problem.hidden.float(), problem.weight.float(), problem.hidden.dtype
    logp = (hidden @ weight.t()).log_softmax(-1)
    e = -logp.exp()
    e.scatter_add_(-1, problem.labels[:, None], torch.ones_like(logp[:, :1]))
    e = e.to(dtype).float()
    return upstream[:, None] * (e @ weight), e.t() @ (upstream[:, None] * hidden).to(dtype).float()


def _gradients(e: Tensor, hidden: Tensor, weight: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    e = upstream[:, None] * e
    return e @ weight, e.t() @ hidden


def measure(name: str, dtype: str, size: tuple[int, int, int]) -> Row:
    """Return the errors of both on one distribution."""
    torch.manual_seed(0)
    problem = DISTRIBUTIONS[name](*size)
    problem = problem._replace(hidden=problem.hidden.to(DTYPES[dtype]), weight=problem.weight.to(DTYPES[dtype]))
    upstream = torch.randn(size[0])
    want = exact(problem, upstream)
    row: Row = {"distribution": name, "dtype": dtype}
    for method, got in (
        ("logit gradients", rounded(problem, upstream)),
        ("probabilities", library_seams.cached_gradients(*problem, upstream)),
    ):
        for gradient, x, y in zip(("d hidden", "d weight"), got, want, strict=True):
            row[f"{gradient}, {method}"] = float((x.double() - y).norm() / y.norm())
    return row


COLUMNS: results.Columns = {
    "distribution": lambda row: row["distribution"],
    "dtype": lambda row: row["dtype"],
    **{
        name: lambda row, name=name: f"{row[name]:.1e}"
        for gradient in ("d hidden", "d weight")
        for name in (f"{gradient}, logit gradients", f"{gradient}, probabilities")
    },
}


def failures_of(rows: list[Row]) -> list[str]:
    """Return where keeping probabilities is less exact, by more than a tenth."""
    return [
        f"{row['distribution']}, {row['dtype']}: {gradient} is less exact from probabilities"
        for row in rows
        for gradient in ("d hidden", "d weight")
        if row[f"{gradient}, probabilities"] > 1.1 * row[f"{gradient}, logit gradients"]
    ]


def chart(rows: list[Row]) -> results.Chart:
    """Chart by what factor the error of d hidden and d weight falls in bfloat16."""
    bars = [
        (f"{row['distribution']}: {gradient}", row[f"{gradient}, logit gradients"] / row[f"{gradient}, probabilities"])
        for row in rows
        if row["dtype"] == "bf16"
        for gradient in ("d hidden", "d weight")
    ]
    return results.Chart("error of logit gradients / error of probabilities, bf16", bars, limit=1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="a small size")
    results.add_out(parser)


def run(args: argparse.Namespace) -> int:
    """Entry of the suite."""
    size = QUICK if args.quick else FULL
    rows = [measure(name, dtype, size) for dtype in DTYPES for name in DISTRIBUTIONS]
    failures = failures_of(rows)
    path = args.out / "gradient_error.json"
    size_names = dict(zip(("tokens", "hidden_size", "vocabulary"), size, strict=True))
    results.write(path, "gradient_error", chart(rows), quick=args.quick, failures=failures, rows=rows, **size_names)
    return results.conclude(results.markdown(rows, COLUMNS), failures, path)


def published_table(folder) -> str:
    """Return the errors on each distribution."""
    rows = [row for report in results.load_all(folder, "gradient_error") for row in report["rows"]]
    return results.markdown(rows, COLUMNS)


SUITE = Suite(add_arguments, run, tables={"gradient_error": published_table}, draw=results.draw_bars(chart))
