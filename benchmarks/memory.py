"""Peak memory of linear_logprobs and of eager PyTorch at real sizes, without a GPU.

The bodies of the registered operations run on fake tensors, which have sizes and no data, with the Triton backend,
whose kernels allocate nothing and are left out. Every storage that PyTorch makes counts until it is let go of.
Peaks are what is needed at once beyond the inputs and the returned gradients, in bfloat16, when every token bears loss
and only the log-probabilities have gradients (in one of eager PyTorch's rows the entropies do too).

Not counted: the workspace of the vendor's matrix products (tens of MiB) and what the allocator loses by rounding. The
default, backward="auto", keeps a quarter of the device memory that is free at the time, beyond the peak of "recompute".
The exit code is 1 when a peak passes its limit. The suite train_memory has the peaks of a whole training step.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.harness import results
from benchmarks.harness.allocations import GIB, Allocations, without_values
from benchmarks.harness.suite import Suite
from sppo_kernels import _head as head
from sppo_kernels.ops import linear_logprobs as linear
from sppo_kernels.ops import linear_policy_loss as linear_policy
from sppo_kernels.ops import policy_loss as policy


class Size(NamedTuple):
    """Tokens, hidden size and vocabulary."""

    tokens: int
    hidden: int
    vocab: int


FULL = Size(32_768, 3584, 151_936)  # a 7B policy
SMALL = Size(8192, 4096, 151_936)


class Setting(NamedTuple):
    """How linear_logprobs is called, and the most that it may take at the full size, in bytes."""

    limit: int | None = None
    backward: str = "recompute"
    logits_budget_bytes: int | None = None
    chunk_bytes: int = linear._CHUNK_BYTES_ACCELERATOR
    gradients: bool = True


SETTINGS = {
    "forward without gradients": Setting(1 * GIB, gradients=False),
    "recompute": Setting(5 * GIB),
    "recompute, chunk_bytes=2**28": Setting(5 * GIB // 2, chunk_bytes=2**28),
    "cache, everything kept": Setting(backward="cache"),
    "cache, logits_budget_bytes=2**32": Setting(backward="cache", logits_budget_bytes=2**32),
}


def _inputs(size: Size) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.empty(size.tokens, size.hidden, dtype=torch.bfloat16)
    weight = torch.empty(size.vocab, size.hidden, dtype=torch.bfloat16)
    return hidden, weight, torch.empty(size.tokens, dtype=torch.int64)


def linear_logprobs_peak(size: Size, setting: Setting) -> tuple[int, int]:
    """Peak bytes, and how many of them are kept for backward."""
    _, backward, budget, chunk_bytes, gradients = setting
    with FakeTensorMode():
        hidden, weight, labels = _inputs(size)
        temperature, *upstream = (torch.empty(size.tokens) for _ in range(3))
        row_bytes = size.vocab * weight.dtype.itemsize
        kept = head.tokens_to_keep(backward, budget, size.tokens, row_bytes, hidden.device)
        # Which bear loss; in backward the same, of which E is of use, which are left.
        spans = [(0, size.tokens), (0, size.tokens), *([(0, kept)] if kept else []), (kept, size.tokens)]
        with (
            without_values(spans),
            Allocations([hidden, weight, labels, temperature, *upstream]) as allocations,
        ):
            given = [hidden], [weight], None, labels, temperature
            made = linear._forward(*given, 0.0, -100, backward, budget, chunk_bytes, 1e-4, 1, "", "triton")
            grads: list[Tensor] = []
            if gradients:
                needs = [True, True, False]
                saved = *made[1:3], *made[5:]
                rest = needs, 0.0, -100, backward, chunk_bytes, "", "triton"
                grads = linear._backward(*upstream, *given, *saved, *rest)
        return allocations.peak(apart_from=grads), made[5].untyped_storage().nbytes()


def linear_policy_loss_peak(size: Size) -> tuple[int, int]:
    """The same of the whole token-level loss in one call; kept until backward are the gradients alone."""
    with FakeTensorMode():
        hidden, weight, labels = _inputs(size)
        temperature, old_logprobs, advantages = (torch.empty(size.tokens) for _ in range(3))
        cu_seqlens = torch.empty(9, dtype=torch.int32)
        settings = policy.Settings("token", 0.2, 0.2, None, "token-mean", 0.0, "k3", "none", 2.0)
        given = [hidden], [weight], None, labels, temperature
        chunk_bytes = linear._CHUNK_BYTES_ACCELERATOR
        block = head.Head(*given, 0.0, -100, chunk_bytes, "", "triton").block()
        # Which bear loss; of each block, of which E is of use, which are left.
        spans = [(0, size.tokens)]
        for first in range(0, size.tokens, block):
            spans += [(0, min(block, size.tokens - first)), (0, 0)]
        with (
            without_values(spans),
            Allocations([hidden, weight, labels, temperature, old_logprobs, advantages, cu_seqlens]) as allocations,
        ):
            of_head = 0.0, -100, "cache", None, chunk_bytes, 1e-4, 1, "", "triton"
            of_loss = old_logprobs, advantages, None, cu_seqlens, None, None, None, True
            *_, grads = linear_policy._forward(*given, *of_head, [True, True, False], *of_loss, *settings)
        return allocations.peak(apart_from=grads), 0


def eager_peak(size: Size, entropy_gradient: bool) -> int:
    """Peak bytes of the same in plain PyTorch, logits in the dtype of the inputs, then float32."""
    with FakeTensorMode():
        hidden, weight, labels = _inputs(size)
        leaves = hidden.requires_grad_(), weight.requires_grad_()
        with Allocations([*leaves, labels]) as allocations:
            logp = torch.nn.functional.linear(*leaves).float().log_softmax(-1)
            total = logp.gather(-1, labels[:, None]).sum()
            with torch.set_grad_enabled(entropy_gradient):
                entropy = -(logp.exp() * logp).sum(-1)
            del logp
            grads = torch.autograd.grad(total + entropy.sum(), leaves)
        return allocations.peak(apart_from=grads)


def _rows(sizes: Iterable[Size]) -> Iterator[dict[str, Any]]:
    for size in sizes:
        print(f"{size.tokens} tokens, hidden size {size.hidden}, vocabulary {size.vocab}", file=sys.stderr)
        for case, entropy_gradient in (("eager", False), ("eager, gradient of entropy too", True)):
            peak = eager_peak(size, entropy_gradient)
            yield {**size._asdict(), "case": case, "peak_bytes": peak, "kept_bytes": 0, "limit_bytes": None}
        for case, setting in SETTINGS.items():
            peak, kept = linear_logprobs_peak(size, setting)
            limit = setting.limit if size == FULL else None
            yield {**size._asdict(), "case": case, "peak_bytes": peak, "kept_bytes": kept, "limit_bytes": limit}
        peak, kept = linear_policy_loss_peak(size)
        limit = 5 * GIB if size == FULL else None
        yield {
            **size._asdict(), "case": "linear_policy_loss", "peak_bytes": peak, "kept_bytes": kept, "limit_bytes": limit
        }  # fmt: skip


def table(rows: Iterable[dict[str, Any]]) -> str:
    """A line a row, in GiB."""
    line = "{:>7} {:>6} {:>7} {:34} {:>6} {:>12} {:>6}"
    gib = lambda size: f"{size / GIB:.2f}" if size else ""
    lines = [line.format("tokens", "hidden", "vocab", "case", "peak", "of it, kept", "limit")]
    for row in rows:
        *size, case, peak, kept, limit = row.values()
        lines.append(line.format(*size, case, gib(peak), gib(kept), gib(limit)).rstrip())
    return "\n".join(lines)


def chart(rows: Iterable[dict[str, Any]]) -> results.Chart:
    """Peaks of the cases, size by size."""
    bars = [(f"{row['tokens']} tokens: {row['case']}", row["peak_bytes"] / GIB) for row in rows]
    return results.Chart("peak beyond inputs and returned gradients, GiB", bars)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="the smaller size alone, for which there are no limits")
    results.add_out(parser)


def run(args: argparse.Namespace) -> int:
    """Entry of the suite."""
    rows = list(_rows([SMALL] if args.quick else [FULL, SMALL]))
    over = [row for row in rows if row["limit_bytes"] and row["peak_bytes"] > row["limit_bytes"]]
    failures = [f"{row['case']}: {row['peak_bytes']} bytes, the limit is {row['limit_bytes']}" for row in over]
    path = args.out / "memory.json"
    device = "none (fake tensors)"
    results.write(path, "memory", chart(rows), device=device, quick=args.quick, failures=failures, rows=rows)
    return results.conclude(f"{table(rows)}\n\nGiB", failures, path)


def published_table(folder: Path) -> str:
    """Return one line per case, one column per size."""
    sizes: dict[str, dict[str, results.Row]] = {}
    for row in results.load(folder, "memory")["rows"]:
        size = f"{row['tokens']:,} tokens, `H` = {row['hidden']:,}, `V` = {row['vocab']:,}"
        sizes.setdefault(size, {})[row["case"]] = row
    cases = list(dict.fromkeys(case for found in sizes.values() for case in found))
    columns: results.Columns = {"peak, GiB": lambda row: row["case"]}
    for size, found in sizes.items():
        columns[size] = lambda row, found=found: _peak(found.get(row["case"]))
    return results.markdown([{"case": case} for case in cases], columns)


def _peak(row: results.Row | None) -> str:
    if row is None:
        return ""
    kept = f" ({row['kept_bytes'] / GIB:.2f} kept)" if row["kept_bytes"] else ""
    return f"{row['peak_bytes'] / GIB:.2f}{kept}"


SUITE = Suite(add_arguments, run, tables={"memory": published_table}, draw=results.draw_bars(chart))
