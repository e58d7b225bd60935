"""Peak memory of linear_logprobs and of eager PyTorch at real sizes, without a GPU.

The bodies of the registered operations run on fake tensors, which have sizes and no data, with the Triton backend,
whose kernels allocate nothing and are not launched. Every storage that PyTorch allocates counts until it is freed.
Peaks are what is needed at once beyond the inputs and the returned gradients, in bfloat16, when every token has a label
and only the log-probabilities have gradients (in one row of eager PyTorch the entropies do too).

With projection="fused" no token's label is so unlikely that its probabilities are computed a second time, in blocks of
256 tokens.

Not counted: the workspace of the vendor's matrix products (tens of MiB) and what the allocator loses by rounding. The
default, backward="auto", keeps a quarter of the device memory that is free at the time, beyond the peak of "recompute".
The exit code is 1 when a peak exceeds its limit. The suite train_memory has the peaks of a whole training step.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.harness import library_seams, results
from benchmarks.harness.allocations import GIB, Allocations
from benchmarks.harness.operations import eager
from benchmarks.harness.results import Row
from benchmarks.harness.suite import Suite


class Size(NamedTuple):
    """Tokens, hidden size and vocabulary."""

    tokens: int
    hidden: int
    vocab: int


FULL = Size(32_768, 3584, 151_936)  # a 7B policy
SMALL = Size(8192, 4096, 151_936)
SUPPORT = 20  # as with top_k=20


class Setting(NamedTuple):
    """How linear_logprobs is called, and the most bytes that it may take at the full size."""

    limit: int | None = None
    backward: str = "recompute"
    logits_budget_bytes: int | None = None
    chunk_bytes: int = library_seams.ACCELERATOR_CHUNK_BYTES
    gradients: bool = True
    support: int = 0  # tokens that the sampler kept, for each token; 0 for all
    projection: str = "vendor"


SETTINGS = {
    "forward without gradients": Setting(1 * GIB, gradients=False),
    "recompute": Setting(3 * GIB // 2),
    "recompute, chunk_bytes=2**28": Setting(5 * GIB // 2, chunk_bytes=2**28),
    "cache, everything kept": Setting(backward="cache"),
    "cache, logits_budget_bytes=2**32": Setting(backward="cache", logits_budget_bytes=2**32),
    f"support of {SUPPORT}": Setting(1 * GIB, support=SUPPORT),
    "fused, forward without gradients": Setting(GIB // 10, gradients=False, projection="fused"),
    "fused, recompute": Setting(1 * GIB, projection="fused"),
    "fused, cache, everything kept": Setting(backward="cache", projection="fused"),
    "fused, cache, logits_budget_bytes=2**32": Setting(backward="cache", logits_budget_bytes=2**32, projection="fused"),
}


def _inputs(size: Size, gradients: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.empty(size.tokens, size.hidden, dtype=torch.bfloat16, requires_grad=gradients)
    weight = torch.empty(size.vocab, size.hidden, dtype=torch.bfloat16, requires_grad=gradients)
    return hidden, weight, torch.empty(size.tokens, dtype=torch.int64)


def _support(size: Size, entries: int) -> tuple[Tensor, Tensor]:
    ids = torch.empty(size.tokens * entries, dtype=torch.int64)
    return ids, torch.empty(size.tokens + 1, dtype=torch.int64)


def linear_logprobs_peak(size: Size, setting: Setting) -> tuple[int, int]:
    """Measure the peak in bytes, and how many of them are kept for backward."""
    with FakeTensorMode():
        hidden, weight, labels = _inputs(size, setting.gradients)
        is_cached = setting.backward == "cache"
        kept = library_seams.num_cached(size.tokens, size.vocab, setting.logits_budget_bytes) if is_cached else 0
        selection = library_seams.selection_by_tokens(size.tokens, cached=kept)
        support = None
        if setting.support:
            selection = library_seams.selection_by_supports(size.tokens, setting.support)
            support = _support(size, setting.support)
        with (
            library_seams.on_cuda_without_kernels(selection),
            Allocations([hidden, weight, labels, *(support or ())]) as allocations,
        ):
            out = library_seams.linear_logprobs(
                hidden,
                weight,
                labels,
                backward=setting.backward,
                logits_budget_bytes=setting.logits_budget_bytes,
                chunk_bytes=setting.chunk_bytes,
                support=support,
                projection=setting.projection,
            )
            kept_bytes = out.cached_probs.untyped_storage().nbytes()
            grads: tuple[Tensor, ...] = ()
            if setting.gradients:
                grads = torch.autograd.grad(out.logprobs.sum(), (hidden, weight))
        return allocations.peak(apart_from=grads), kept_bytes


def linear_policy_loss_peak(size: Size, projection: str = "vendor") -> int:
    """Measure the peak in bytes of the whole token-level loss in one call."""
    with FakeTensorMode():
        hidden, weight, labels = _inputs(size)
        old_logprobs, advantages = (torch.empty(size.tokens) for _ in range(2))
        cu_seqlens = torch.empty(9, dtype=torch.int32)
        chunk_bytes = library_seams.ACCELERATOR_CHUNK_BYTES
        block = library_seams.block_size(hidden, weight, labels, chunk_bytes)
        with (
            library_seams.on_cuda_without_kernels(library_seams.selection_by_blocks(size.tokens, block)),
            Allocations([hidden, weight, labels, old_logprobs, advantages, cu_seqlens]) as allocations,
        ):
            out = library_seams.linear_policy_loss(
                hidden,
                weight,
                labels,
                old_logprobs=old_logprobs,
                advantages=advantages,
                cu_seqlens=cu_seqlens,
                chunk_bytes=chunk_bytes,
                projection=projection,
            )
        return allocations.peak(apart_from=out.grads)


def eager_peak(size: Size, entropy_gradient: bool) -> int:
    """Measure the peak in bytes of plain PyTorch: logits in the dtype of the inputs, then float32."""
    with FakeTensorMode():
        hidden, weight, labels = _inputs(size)
        leaves = hidden, weight
        with Allocations([*leaves, labels]) as allocations:
            logp = torch.nn.functional.linear(*leaves).float().log_softmax(-1)
            total = logp.gather(-1, labels[:, None]).sum()
            with torch.set_grad_enabled(entropy_gradient):
                entropy = -(logp.exp() * logp).sum(-1)
            del logp
            grads = torch.autograd.grad(total + entropy.sum(), leaves)
        return allocations.peak(apart_from=grads)


def masked_peak(size: Size) -> int:
    """Measure the peak in bytes of plain PyTorch with supports: all logits, those outside of the supports masked."""
    with FakeTensorMode():
        hidden, weight, labels = _inputs(size)
        ids, offsets = _support(size, SUPPORT)
        with Allocations([hidden, weight, labels, ids, offsets]) as allocations:
            out = eager.masked_logprobs(hidden, weight, labels, ids, offsets)
            grads = torch.autograd.grad(out["logprobs"].sum(), (hidden, weight))
        return allocations.peak(apart_from=grads)


def _rows(sizes: Iterable[Size]) -> Iterator[Row]:
    for size in sizes:
        print(f"{size.tokens} tokens, hidden size {size.hidden}, vocabulary {size.vocab}", file=sys.stderr)
        for case, entropy_gradient in (("eager", False), ("eager, gradient of entropy too", True)):
            peak = eager_peak(size, entropy_gradient)
            yield {**size._asdict(), "case": case, "peak_bytes": peak, "kept_bytes": 0, "limit_bytes": None}
        case = f"eager, masked to a support of {SUPPORT}"
        yield {**size._asdict(), "case": case, "peak_bytes": masked_peak(size), "kept_bytes": 0, "limit_bytes": None}
        for case, setting in SETTINGS.items():
            peak, kept = linear_logprobs_peak(size, setting)
            limit = setting.limit if size == FULL else None
            yield {**size._asdict(), "case": case, "peak_bytes": peak, "kept_bytes": kept, "limit_bytes": limit}
        limit = 4 * GIB if size == FULL else None
        for case, projection in (("linear_policy_loss", "vendor"), ("fused, linear_policy_loss", "fused")):
            peak = linear_policy_loss_peak(size, projection)  # keeps only the gradients until backward
            yield {**size._asdict(), "case": case, "peak_bytes": peak, "kept_bytes": 0, "limit_bytes": limit}


def table(rows: Iterable[Row]) -> str:
    """Return one line per row, in GiB."""
    line = "{:>7} {:>6} {:>7} {:39} {:>6} {:>12} {:>6}"
    gib = lambda size: f"{size / GIB:.2f}" if size else ""
    lines = [line.format("tokens", "hidden", "vocab", "case", "peak", "of it, kept", "limit")]
    for row in rows:
        *size, case, peak, kept, limit = row.values()
        lines.append(line.format(*size, case, gib(peak), gib(kept), gib(limit)).rstrip())
    return "\n".join(lines)


LABELS = {
    "eager": "PyTorch, all logits",
    "eager, masked to a support of 20": "PyTorch, masked to a support of 20",
    "cache, everything kept": 'linear_logprobs, "cache", all kept',
    "cache, logits_budget_bytes=2**32": 'linear_logprobs, "cache", 4 GiB kept',
    "linear_policy_loss": "linear_policy_loss",
    "recompute": 'linear_logprobs, "recompute"',
    "support of 20": "linear_logprobs, support of 20",
}
"""Labels of the cases that are drawn."""


def chart(rows: Iterable[Row]) -> results.Chart:
    """Chart the peaks of the main cases at the larger number of tokens."""
    rows = list(rows)
    tokens = max(row["tokens"] for row in rows)
    peaks = {row["case"]: row["peak_bytes"] / GIB for row in rows if row["tokens"] == tokens}
    bars = [(label, peaks[case]) for case, label in LABELS.items() if case in peaks]
    return results.Chart(f"peak beyond inputs and returned gradients for {tokens:,} tokens, GiB", bars)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="only the smaller size, which has no limits")
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
    sizes: dict[str, dict[str, Row]] = {}
    for row in results.load(folder, "memory")["rows"]:
        size = f"{row['tokens']:,} tokens, `H` = {row['hidden']:,}, `V` = {row['vocab']:,}"
        sizes.setdefault(size, {})[row["case"]] = row
    cases = list(dict.fromkeys(case for found in sizes.values() for case in found))
    columns: results.Columns = {"peak, GiB": lambda row: row["case"]}
    for size, found in sizes.items():
        columns[size] = lambda row, found=found: _peak(found.get(row["case"]))
    return results.markdown([{"case": case} for case in cases], columns)


def _peak(row: Row | None) -> str:
    if row is None:
        return ""
    kept = f" ({row['kept_bytes'] / GIB:.2f} kept)" if row["kept_bytes"] else ""
    return f"{row['peak_bytes'] / GIB:.2f}{kept}"


SUITE = Suite(add_arguments, run, tables={"memory": published_table}, draw=results.draw_bars(chart))
