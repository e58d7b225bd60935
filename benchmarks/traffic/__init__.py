"""Bytes that every Triton kernel loads and stores, counted in Triton's interpreter, over the minimum.

The minimum is each input that the result depends on read once and each result written once. An address that one
instruction accesses twice counts once, as on a GPU; an access by another program or instruction counts again, though a
cache may hold the data. If a kernel is designed to move more than the minimum, the column "designed" has the ratio, and
a comment at its case the reason. Matrix products of the vendor and elementwise steps of PyTorch are not counted.

The exit code is 1 when a kernel moves over 5 percent more than it is designed to, or so much less that the count must
be wrong, or when no case launches a kernel.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

import sppo_kernels
from benchmarks.harness import library_seams, results
from benchmarks.harness.interpreter import run_interpreted
from benchmarks.harness.operations import OPERATIONS
from benchmarks.harness.operations.losses import PolicyLoss
from benchmarks.harness.problem import IGNORE_INDEX, Problem, ProblemSize
from benchmarks.harness.results import Row
from benchmarks.harness.suite import Suite
from benchmarks.traffic import projection
from benchmarks.traffic.counter import Case, Kernel, Traffic, counted

__all__ = ["SUITE", "Case", "Kernel", "counted", "launched_by_none", "measure"]

SLACK = 1.05
FLOAT, INDEX = 4, 8  # bytes
GROUP = 4  # float32 logits of which the forward pass leaves the maximum
TILE = 8192  # columns whose maxima a program reads again where one of them is a candidate's
CPU = torch.device("cpu")


# The cases


def cases(quick: bool) -> Iterator[Case]:
    """Yield calls of every kernel, on rows and responses of real lengths."""
    vocab = 30_011 if quick else 151_936
    yield from _row_cases(vocab)
    yield from _linear_cases(vocab)
    yield from _policy_cases(8192 if quick else 40_000)
    yield from _prompt_value_cases()
    yield from _advantage_cases(2048 if quick else 8192)


def _row_cases(vocab: int) -> Iterator[Case]:
    """Use four rows: one ignored, which no kernel reads, and one without a gradient, which backward does not read."""
    rows = 4
    for dtype in (torch.bfloat16, torch.float32):
        problem = OPERATIONS["selective_logprobs"].inputs(ProblemSize(rows, 0, vocab), CPU, dtype)
        problem.tensors["labels"][0] = IGNORE_INDEX
        problem.upstream["logprobs"][1] = 0.0
        work = lambda clipped, dtype=dtype: OPERATIONS["selective_logprobs"].minimal_cost(
            ProblemSize(rows, 0, vocab, ignored=1 / rows, clipped=clipped), dtype
        )
        yield Case(
            "selective_logprobs",
            f"{_name(dtype)}, 1 of 4 rows ignored, 1 without gradient",
            _step(problem, OPERATIONS["selective_logprobs"].implementations("triton")[""]),
            (
                Kernel("selective_logprobs_fwd_kernel", work(0.0).forward_bytes),
                Kernel("selective_logprobs_bwd_kernel", work(1 / 3).backward_bytes),
            ),
        )


def _linear_cases(vocab: int) -> Iterator[Case]:
    """Run the row passes over float32 logits; what they leave for the products has the dtype of the inputs."""
    tokens, hidden, dtype = 3, 64, torch.bfloat16
    logits, kept = tokens * vocab * FLOAT, tokens * vocab * dtype.itemsize
    forward = "selective_logprobs_fwd_kernel"
    from_logits = Kernel("linear_logprobs_scaled_rows_kernel", tokens * _scaled_row(hidden, dtype))
    passes = {
        "recompute": (
            Kernel(forward, logits),
            Kernel("selective_logprobs_bwd_kernel", logits + kept),
            from_logits,
        ),
        # The probabilities are written in the same read of the logits.
        "cache": (Kernel(forward, logits + kept), *_label_kernels(tokens, hidden, dtype)),
    }
    for mode, kernels in passes.items():
        problem = OPERATIONS["linear_logprobs"].inputs(ProblemSize(tokens, hidden, vocab), CPU, dtype)
        call = _step(problem, OPERATIONS["linear_logprobs"].implementations("triton")[mode])
        yield Case("linear_logprobs", f"{mode}, {_name(dtype)}", call, kernels)
    yield _sharded_case(tokens, vocab, dtype)
    yield _equal_labels_case(dtype)
    yield _sparse_case(tokens, vocab, dtype)
    yield _support_case(tokens, vocab, dtype)
    yield from projection.cases(dtype)


def _scaled_row(hidden: int, dtype: torch.dtype) -> int:
    """Return the bytes of a float32 row scaled into one of ``dtype``, with its factor and its place."""
    return hidden * (FLOAT + dtype.itemsize) + FLOAT + INDEX


def _label_kernels(tokens: int, hidden: int, dtype: torch.dtype, places: int | None = None) -> tuple[Kernel, ...]:
    """Return the kernels that surround the products of "cache", where the labels are in ``places`` rows, or all differ.

    d hidden is scaled, and a row of the weight is added to it, which on a CPU is a float32 copy. The hidden states are
    scaled for d weight, to which those of each label are added in place.
    """
    d_hidden = _scaled_row(hidden, dtype) + hidden * FLOAT + FLOAT + INDEX
    scaled_hidden = 2 * hidden * dtype.itemsize + FLOAT + INDEX
    entries = tokens * (2 * INDEX + FLOAT + hidden * dtype.itemsize)
    sums = 2 * FLOAT * hidden * (tokens if places is None else places)
    return (
        Kernel("linear_logprobs_scaled_rows_kernel", tokens * (d_hidden + scaled_hidden)),
        Kernel("linear_logprobs_weighted_rows_kernel", entries + sums),
    )


def _sharded_case(tokens: int, vocab: int, dtype: torch.dtype) -> Case:
    """Cache with a process group: the probabilities need the log-sum-exp over all ranks, and a second read."""
    hidden = 64
    problem = OPERATIONS["linear_logprobs"].inputs(ProblemSize(tokens, hidden, vocab), CPU, dtype)
    tensors = problem.tensors
    leaves = tensors["hidden"], tensors["weight"]

    def call() -> None:
        with library_seams.one_rank() as group:
            out = sppo_kernels.linear_logprobs(
                *leaves, tensors["labels"], backward="cache", group=group, backend="triton"
            )
            torch.autograd.grad(out.logprobs.sum(), leaves)

    logits = tokens * vocab * FLOAT
    # Until it is summed over the ranks, the gradient of the hidden states is float32.
    d_hidden = tokens * hidden * (FLOAT - dtype.itemsize)
    scaled, weighted = _label_kernels(tokens, hidden, dtype)
    return Case(
        "linear_logprobs",
        f"cache, {_name(dtype)}, process group",
        call,
        (
            Kernel("selective_logprobs_fwd_kernel", logits),
            Kernel("linear_logprobs_cache_kernel", logits + tokens * vocab * dtype.itemsize),
            scaled._replace(least=scaled.least + d_hidden),
            weighted,
        ),
    )


def _equal_labels_case(dtype: torch.dtype) -> Case:
    """Give all tokens of three pieces of the list one label: each piece leaves its sum to the program that adds them.

    A row is so short that its label, temperature and results count.
    """
    tokens, hidden, vocab, pieces = 130, 64, 97, 3
    problem = OPERATIONS["linear_logprobs"].inputs(ProblemSize(tokens, hidden, vocab), CPU, dtype)
    problem.tensors["labels"].fill_(5)
    row = INDEX + FLOAT + 2 * FLOAT + 4 * FLOAT + 2 * FLOAT + dtype.itemsize  # label, tau, its logit twice, results
    scaled, weighted = _label_kernels(tokens, hidden, dtype, places=0)
    sums = pieces * FLOAT * hidden
    return Case(
        "linear_logprobs",
        f"cache, {_name(dtype)}, equal labels",
        _step(problem, OPERATIONS["linear_logprobs"].implementations("triton")["cache"]),
        (
            Kernel("selective_logprobs_fwd_kernel", tokens * (vocab * (FLOAT + dtype.itemsize) + row)),
            scaled,
            weighted._replace(least=weighted.least + sums),
            Kernel("linear_logprobs_open_rows_kernel", sums + 2 * FLOAT * hidden + 6 * INDEX),
        ),
    )


def _sparse_case(tokens: int, vocab: int, dtype: torch.dtype) -> Case:
    """Select entries from the maxima that the forward pass leaves, and gather weighted rows.

    Each entry gathers a row of the weight, which no other entry has, and one of the hidden states, which is in the
    cache; a gradient's row is added to in place.
    """
    hidden_size, entries = 64, 2 * tokens
    labels, others = torch.arange(tokens), torch.arange(tokens, 2 * tokens)
    weight = torch.zeros(vocab, hidden_size, dtype=dtype)
    weight[: 2 * tokens, : 2 * tokens] = torch.eye(2 * tokens, dtype=dtype)
    hidden = torch.zeros(tokens, hidden_size, dtype=dtype)
    hidden[labels, labels], hidden[labels, others] = 40.0, 38.0  # all mass is on two columns
    leaves = hidden.requires_grad_(), weight.requires_grad_()

    def call() -> None:
        out = sppo_kernels.linear_logprobs(*leaves, labels, backward="sparse", backend="triton")
        torch.autograd.grad(out.logprobs.sum(), leaves)

    maxima = tokens * vocab // GROUP * dtype.itemsize  # bfloat16
    groups = len({(t, column // GROUP) for t in range(tokens) for column in (t, t + tokens)})
    candidates = maxima + tokens * 32 + groups * (GROUP * FLOAT + 2 * 4) + 4 * entries
    again = tokens * TILE // GROUP * 2  # the maxima of the first tile, which has all candidates, are read twice
    lists = 2 * entries * (2 * INDEX + FLOAT)  # token, column and weight, once in each order
    gathered = 2 * entries * hidden_size * dtype.itemsize
    sums = FLOAT * hidden_size * (tokens + entries)  # written where zeros were
    return Case(
        "linear_logprobs",
        f"sparse, {_name(dtype)}",
        call,
        (
            Kernel("selective_logprobs_fwd_kernel", tokens * (vocab * FLOAT + 28) + maxima),
            Kernel("linear_logprobs_candidates_kernel", candidates, candidates + again),
            Kernel("linear_logprobs_select_kernel", tokens * 36 + (4 + 4 + 8) * entries),
            Kernel("linear_logprobs_weighted_rows_kernel", lists + gathered + sums),
            Kernel("linear_logprobs_scaled_rows_kernel", tokens * _scaled_row(hidden_size, dtype)),
        ),
    )


def _support_case(tokens: int, vocab: int, dtype: torch.dtype) -> Case:
    """Compute the logits of supports as large as a program's share of entries, so that each reads one hidden state.

    Each entry gathers a row of the weight in forward and backward, and adds a hidden state to its gradient.
    """
    hidden_size, size = 64, 16
    problem = OPERATIONS["linear_logprobs"].inputs(ProblemSize(tokens, hidden_size, vocab), CPU, dtype)
    labels = torch.arange(tokens)
    ids = (labels[:, None] + tokens * torch.arange(size)).flatten()  # no token has an entry of another
    leaves = problem.tensors["hidden"], problem.tensors["weight"]
    support = ids, size * torch.arange(tokens + 1)

    def call() -> None:
        out = sppo_kernels.linear_logprobs(*leaves, labels, support=support, backend="triton")
        torch.autograd.grad(out.logprobs.sum(), leaves)

    entries, row = tokens * size, hidden_size * dtype.itemsize
    # Label, temperature and four results; the offsets are read from and to.
    of_token = INDEX + FLOAT + 4 * FLOAT
    least = tokens * of_token + (tokens + 1) * INDEX + entries * (INDEX + FLOAT)
    # The largest logit is found in one read, the sums in a second one, from the cache.
    designed = tokens * (of_token + 2 * INDEX) + 2 * entries * (INDEX + FLOAT)
    lists = 2 * entries * (2 * INDEX + FLOAT)  # token, column and weight, once in each order
    sums = FLOAT * hidden_size * (tokens + entries)  # written where zeros were
    return Case(
        "linear_logprobs",
        f"support, {_name(dtype)}",
        call,
        (
            Kernel("linear_logprobs_entry_logits_kernel", entries * (2 * INDEX + FLOAT + row) + tokens * row),
            Kernel("support_fwd_kernel", least, designed),
            Kernel("support_bwd_kernel", entries * (3 * INDEX + 2 * FLOAT) + tokens * (INDEX + 4 * FLOAT)),
            Kernel("linear_logprobs_weighted_rows_kernel", lists + 2 * entries * row + sums),
            Kernel("linear_logprobs_scaled_rows_kernel", tokens * _scaled_row(hidden_size, dtype)),
        ),
    )


def _policy_cases(tokens: int) -> Iterator[Case]:
    """Compute loss and gradient in one launch at token level, and in two at sequence level.

    The ratio of a sequence has to be known before the loss of its first token. So the first launch reads the two
    inputs, and the second, whose terms are those of the sequence, only writes the gradient.
    """
    size = ProblemSize(tokens, 0, 0)
    for level in ("token", "sequence_mean"):
        name = f"policy_loss, {level}"
        problem = OPERATIONS[name].inputs(size, CPU, torch.float32)
        work = OPERATIONS[name].minimal_cost(size, torch.float32)
        kernels = (Kernel("policy_loss_fwd_bwd_kernel", work.forward_bytes + work.backward_bytes),)
        if level != "token":
            sums = Kernel("policy_loss_sums_kernel", work.forward_bytes)
            # Each program searches its sequence, and writes its part of the metrics.
            programs = tokens // 1024 + PolicyLoss.num_responses(tokens)
            designed = work.backward_bytes + 150 * programs
            kernels = (sums, Kernel("policy_loss_fwd_bwd_kernel", work.backward_bytes, designed))
        yield Case("policy_loss", level, _step(problem, OPERATIONS[name].implementations("triton")[""]), kernels)


def _prompt_value_cases() -> Iterator[Case]:
    """Read the last token of each prompt among 1,024 tokens.

    Every program reads the weight, or the gradients and indices of all prompts: kilobytes, which the cache holds.
    """
    tokens, hidden, dtype = 1024, 1536, torch.bfloat16
    prompts = tokens // 256
    rows, weight = prompts * hidden * dtype.itemsize, hidden * dtype.itemsize
    problem = OPERATIONS["prompt_value_loss"].inputs(ProblemSize(tokens, hidden, 0), CPU, dtype)
    programs = prompts * -(-hidden // 1024)  # of the gradient of hidden; 24 of the gradient of the weight
    yield Case(
        "prompt_value_loss",
        _name(dtype),
        _step(problem, OPERATIONS["prompt_value_loss"].implementations("triton")[""]),
        (
            Kernel("prompt_value_fwd_kernel", rows + weight, rows + prompts * weight),
            Kernel("prompt_value_bwd_hidden_kernel", rows + weight, rows + prompts * weight + programs * prompts * 12),
            Kernel("prompt_value_bwd_weight_kernel", rows + weight, rows + weight + hidden // 64 * prompts * 12),
        ),
    )


def _advantage_cases(length: int) -> Iterator[Case]:
    """Use padded responses: masked places have a result, but need not be read."""
    size, tokens = ProblemSize(2 * length, 0, 0), 2 * length
    gae, whiten = (OPERATIONS[name].inputs(size, CPU, torch.float32) for name in ("gae", "whiten"))
    kept = {name: int(problem.tensors["mask"].sum()) for name, problem in (("gae", gae), ("whiten", whiten))}
    # Reward and value are read for masked places too, and value and mask of the next token in addition: the same lines
    # of memory again, shifted by one element.
    kernel = Kernel("gae_fwd_kernel", tokens + 8 * kept["gae"] + 8 * tokens, (1 + 8 + 8 + 5) * tokens)
    yield Case("gae", "", _step(gae, OPERATIONS["gae"].implementations("triton")[""]), (kernel,))
    # Loads of 16 bytes do not depend on the mask, so x is read for masked places too.
    least, designed = tokens + 4 * kept["whiten"], 5 * tokens
    kernels = (
        Kernel("whiten_moments_kernel", least, designed),
        Kernel("whiten_normalize_kernel", least + 4 * tokens, designed + 4 * tokens),
    )
    yield Case("whiten", "", _step(whiten, OPERATIONS["whiten"].implementations("triton")[""]), kernels)
    # Least: reward, id and advantage. Each program reads its place in the order, its id and the one before; the first
    # of a group of 8 searches its end in 9 steps and reads the first reward once more.
    rewards, groups = torch.rand(512), torch.arange(512) // 8
    call = lambda: sppo_kernels.group_advantages(rewards, groups, backend="triton")
    designed = 512 * (4 + 8 + 8 + 8 + 4) + 512 // 8 * (9 * 8 + 8 + 4)
    kernel = Kernel("group_advantages_fwd_kernel", 512 * (4 + 8 + 4), designed)
    yield Case("group_advantages", "512 responses", call, (kernel,))


def _step(problem: Problem, function: Callable[..., dict[str, Tensor]]) -> Callable[[], object]:
    return lambda: problem.results(function)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# The suite


def measure(case: Case) -> list[Row]:
    """Return a row for each kernel that the case launches, in the expected order."""
    with counted() as traffic:
        case.call()
    expected = {kernel.name: kernel for kernel in case.kernels}
    return [
        _row(case, expected.get(name) or Kernel(name, 0.0), traffic)
        for name in dict.fromkeys([*expected, *traffic.loaded, *traffic.stored])
    ]


def _row(case: Case, kernel: Kernel, traffic: Traffic) -> Row:
    loaded, stored = traffic.loaded[kernel.name], traffic.stored[kernel.name]
    ratio = (loaded + stored) / kernel.least if kernel.least else float("inf")
    designed = 1.0 if kernel.designed is None else kernel.designed / kernel.least
    return {
        "operation": case.operation,
        "case": case.label,
        "kernel": kernel.name,
        "loaded": loaded,
        "stored": stored,
        "least": kernel.least,
        "ratio": ratio,
        "designed": designed,
        "passed": 0.9 * designed < ratio <= SLACK * designed,  # much less would be a miscount
    }


def launched_by_none(rows: list[Row]) -> list[str]:
    """List the kernels of the package that no case launches."""
    return sorted(library_seams.kernel_names() - {row["kernel"] for row in rows})


def _title(row: Row) -> str:
    return ", ".join(filter(None, [row["operation"], row["case"]]))


COLUMNS: results.Columns = {
    "operation": _title,
    "kernel": lambda row: row["kernel"],
    "loaded": lambda row: row["loaded"],
    "stored": lambda row: row["stored"],
    "over the minimum": lambda row: f"{row['ratio']:.3f}",
    "designed": lambda row: f"{row['designed']:.3f}",
}


def chart(rows: list[Row]) -> results.Chart:
    """Chart the ratios of the kernels."""
    bars = [(f"{_title(row)}: {row['kernel']}", row["ratio"]) for row in rows]
    return results.Chart("bytes loaded and stored, over the minimum", bars, limit=SLACK)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="shorter rows and responses")
    results.add_out(parser)


def run(args: argparse.Namespace) -> int:
    """Entry of the suite."""
    if not library_seams.is_interpreted():
        return run_interpreted(args)
    np.seterr(all="ignore")  # from the contents of masked lanes
    rows: list[Row] = []
    torch.manual_seed(0)
    for case in cases(args.quick):
        print(f"{case.operation} {case.label}", file=sys.stderr, flush=True)
        rows += measure(case)
    failures = [
        f"{_title(row)}, {row['kernel']}: {row['ratio']:.3f} times the minimum, not {row['designed']:.3f}"
        for row in rows
        if not row["passed"]
    ]
    failures += [f"{name}: no case launches it" for name in launched_by_none(rows)]
    path = args.out / "traffic.json"
    results.write(path, "traffic", chart(rows), quick=args.quick, failures=failures, rows=rows)
    return results.conclude(f"{results.table(rows, COLUMNS)}\n\nbytes", failures, path)


SUITE = Suite(
    add_arguments, run, tables={"traffic": results.table_of("traffic", COLUMNS)}, draw=results.draw_bars(chart)
)
