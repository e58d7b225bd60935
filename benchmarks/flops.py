"""Passes over the vocabulary that linear_logprobs takes, counted on a CPU, compared with its design.

A pass is here one product of all tokens, masked ones included, with the LM head, 2 N H V FLOPs. The forward needs one,
the gradients of hidden and weight one each. They are counted in two ways: with FlopCounterMode, which uses the
operation's registered formula, and with the profiler, which records the matrix products themselves. The exit code is 1
when either differs from the design by more than a hundredth of a pass.

Labels are drawn at random. In the cases of projection="fused" they are the likeliest tokens. In one they are the
unlikeliest: tokens whose label is very unlikely are multiplied twice, which the formula, without their values, does not
count.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import results
from benchmarks.harness.operations import eager
from benchmarks.harness.problem import IGNORE_INDEX
from benchmarks.harness.results import Row
from benchmarks.harness.suite import Suite
from sppo_kernels import linear_logprobs, linear_policy_loss

FULL, QUICK = (1536, 64, 4096), (512, 16, 512)  # tokens, hidden size, vocabulary
SUPPORT = 4
RANK = 1 / 16  # of the adapter, over the hidden size


class Case(NamedTuple):
    """A call, and the passes that it should take."""

    name: str
    passes: float
    backward: str | None = "recompute"  # None: eager PyTorch
    keep: float | None = None  # share of the tokens whose logit gradients fit into the budget
    ignored: float = 0.0
    clipped: float = 0.0
    frozen: str = ""
    adapter: bool = False
    entropy: bool = False
    gradients: bool = True
    spread: float = 1.0  # of the logits: large for peaked distributions, small for flat ones
    loss: bool = False  # linear_policy_loss in place of linear_logprobs
    support: int = 0  # tokens that the sampler kept; the products are then not matrix products
    projection: str = "vendor"
    labels: str = "random"  # or "likeliest", or "unlikeliest"
    again: float = 0.0  # passes that are taken a second time because of values, which only the profiler sees


def _fused(name: str, passes: float, backward: str = "recompute", **settings: Any) -> Case:
    return Case(f"fused, {name}", passes, backward, **{"projection": "fused", "labels": "likeliest", **settings})


CASES = [
    Case("eager PyTorch", 3, backward=None),
    Case("recompute", 4),
    Case("cache", 3, "cache"),
    Case("cache, a budget for half of the tokens", 3.5, "cache", keep=0.5),
    Case("auto, noise, a budget for half of the tokens", 3.5, "auto", keep=0.5, spread=0.01),
    Case("forward alone", 1, gradients=False),
    Case("recompute, a third of the tokens without loss", 4 * 2 / 3, ignored=1 / 3),
    Case("cache, a third of the tokens without loss", 3 * 2 / 3, "cache", ignored=1 / 3),
    Case("recompute, a third of the tokens clipped", 1 + 3 * 2 / 3, clipped=1 / 3),
    Case("cache, a third of the tokens clipped", 1 + 2 * 2 / 3, "cache", clipped=1 / 3),
    Case("recompute, weight frozen", 3, frozen="weight"),
    Case("cache, weight frozen", 2, "cache", frozen="weight"),
    Case("cache, hidden frozen", 2, "cache", frozen="hidden"),
    Case("cache, weight frozen, low-rank adapter", 2 + 3 * RANK, "cache", frozen="weight", adapter=True),
    Case("recompute, gradient of the entropy", 4, entropy=True),
    Case("sparse, peaked distributions", 1, "sparse", spread=100.0),
    Case("sparse, noise", 4, "sparse", spread=0.01),
    Case("auto, once it has seen peaked distributions", 1, "auto", spread=100.0),
    Case("linear_policy_loss", 3, "cache", loss=True),
    Case("linear_policy_loss, a third of the tokens clipped", 1 + 2 * 2 / 3, "cache", clipped=1 / 3, loss=True),
    Case(f"support of {SUPPORT}", 0, support=SUPPORT),
    Case(f"linear_policy_loss, support of {SUPPORT}", 0, "cache", loss=True, support=SUPPORT),
    _fused("recompute", 4),
    _fused("cache", 3, "cache"),
    _fused("forward alone", 1, gradients=False),
    _fused("sparse, peaked distributions", 1, "sparse", spread=100.0),
    _fused("linear_policy_loss", 3, "cache", loss=True),
    _fused("forward alone, every label the unlikeliest token", 1, gradients=False, labels="unlikeliest", again=1),
    Case("cache, gradient of the entropy: nothing kept is of use", 4, "cache", entropy=True),
]


def step(case: Case, size: tuple[int, int, int]) -> Callable[[], object]:
    """Return a call of forward and backward, in several blocks."""
    tokens, hidden_size, vocab = size
    torch.manual_seed(0)
    hidden, weight = torch.randn(tokens, hidden_size), torch.randn(vocab, hidden_size)
    labels = {
        "random": lambda: torch.randint(vocab, (tokens,)),
        "likeliest": lambda: (hidden @ weight.t()).argmax(-1),
        "unlikeliest": lambda: (hidden @ weight.t()).argmin(-1),
    }[case.labels]()
    labels[: round(case.ignored * tokens)] = IGNORE_INDEX
    hidden *= case.spread
    upstream = torch.randn(tokens)
    upstream[: round(case.clipped * tokens)] = 0.0
    leaves = {"hidden": hidden, "weight": weight}
    if case.adapter:
        rank = round(RANK * hidden_size)
        leaves |= {"u": torch.randn(tokens, rank), "b": torch.randn(vocab, rank)}
    wanted = [x.requires_grad_() for name, x in leaves.items() if name != case.frozen and case.gradients]

    support = None
    if case.support:
        others = labels[:, None] + torch.arange(case.support)
        support = (others % vocab).flatten(), case.support * torch.arange(tokens + 1)
    with torch.no_grad():
        old = linear_logprobs(hidden, weight, labels, support=support, backend="torch").logprobs
    policy_loss = partial(
        linear_policy_loss,
        labels=labels,
        old_logprobs=old,
        advantages=upstream,
        cu_seqlens=torch.tensor([0, tokens], dtype=torch.int32),
        support=support,
        **_settings(case, size),
    )

    def run() -> None:
        if case.loss:
            torch.autograd.grad(policy_loss(hidden, weight).loss, wanted)
            return
        logprobs, entropy = _call(case, size, labels, support, **leaves)
        if wanted:
            loss = (logprobs * upstream).sum() + (entropy.sum() if case.entropy else 0.0)
            torch.autograd.grad(loss, wanted)

    return run


def _call(
    case: Case,
    size: tuple[int, int, int],
    labels: Tensor,
    support: tuple[Tensor, Tensor] | None,
    hidden: Tensor,
    weight: Tensor,
    **adapter: Tensor,
) -> Any:
    if case.backward is None:
        return eager.linear_logprobs(hidden, weight, labels).values()
    pair = (adapter["u"], adapter["b"]) if adapter else None
    return linear_logprobs(hidden, weight, labels, adapter=pair, support=support, **_settings(case, size))


def _settings(case: Case, size: tuple[int, int, int]) -> dict[str, Any]:
    tokens, _, vocab = size
    return {
        "backward": case.backward,
        "logits_budget_bytes": None if case.keep is None else round(case.keep * tokens) * vocab * 4,
        "max_entries": vocab // 8,
        "chunk_bytes": 1,  # the smallest block, so that there are several
        "projection": case.projection,
        "backend": "torch",
    }


def count(case: Case, size: tuple[int, int, int]) -> Row:
    """Count the passes of a case and return its row."""
    tokens, hidden, vocab = size
    one_pass = 2 * tokens * hidden * vocab
    run = step(case, size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the cache was useless, which one case is about
        run()  # "auto" chooses by the previous call
        with FlopCounterMode(display=False) as counter:
            run()
        with profile(activities=[ProfilerActivity.CPU], with_flops=True) as profiler:
            run()
    products = sum(event.flops for event in profiler.events() if event.name in ("aten::mm", "aten::addmm"))
    counted, seen = counter.get_total_flops() / one_pass, products / one_pass
    # Forward and both gradients multiply the entries of the supports, one by one.
    of_entries = 3 * case.support / vocab
    designed = {"designed": case.passes + of_entries, "designed_products": float(case.passes + case.again)}
    return {"case": case.name, **designed, "counted": counted, "products": seen}


COLUMNS: results.Columns = {
    "case": lambda row: row["case"],
    "designed": lambda row: row["designed"],
    "counted": lambda row: row["counted"],
    "seen by the profiler": lambda row: row["products"],
}


def chart(rows: list[Row]) -> results.Chart:
    """Chart the passes of the cases."""
    return results.Chart("passes over the vocabulary", [(row["case"], row["counted"]) for row in rows])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    results.add_out(parser)


def run(args: argparse.Namespace) -> int:
    """Entry of the suite."""
    size = QUICK if args.quick else FULL
    rows: list[Row] = []
    for i, case in enumerate(CASES):
        print(f"[{i + 1}/{len(CASES)}] {case.name}", file=sys.stderr, flush=True)
        rows.append(count(case, size))
    failures = [
        f"{row['case']}: {row['counted']:.3f} passes counted, {row['products']:.3f} seen, not {row['designed']:.3f}"
        for row in rows
        if max(abs(row["counted"] - row["designed"]), abs(row["products"] - row["designed_products"])) > 0.01
    ]
    names = dict(zip(("tokens", "hidden", "vocab"), size, strict=True))
    results.write(
        args.out / "flops.json", "flops", chart(rows), quick=args.quick, **names, failures=failures, rows=rows
    )
    return results.conclude(results.table(rows, COLUMNS), failures, args.out / "flops.json")


SUITE = Suite(add_arguments, run, tables={"flops": results.table_of("flops", COLUMNS)}, draw=results.draw_bars(chart))
