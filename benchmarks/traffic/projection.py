"""Traffic of the fused projection, whose kernel the interpreter runs with pointers in place of tensor descriptors.

A program reads a tile of hidden states again for each tile of columns, and the programs that run at the same time share
both: on a GPU these reads are from the L2 cache. The columns of a tile are read once by all tokens of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import sppo_kernels
from benchmarks.harness import library_seams
from benchmarks.harness.operations import OPERATIONS
from benchmarks.harness.problem import ProblemSize
from benchmarks.traffic.counter import Case, Kernel

FLOAT, INDEX = 4, 8  # bytes
TOKENS, HIDDEN = 128, 64  # one tile of tokens
VOCAB = 30_011  # nothing but the number of tiles depends on it
OF_TOKEN = INDEX + 2 * FLOAT  # label, temperature and base, which each tile of columns reads again


def cases(dtype: torch.dtype, vocab: int = VOCAB) -> Iterator[Case]:
    """Yield every mode but "maximum", which few tokens need: forward alone, and with a gradient of the logits."""
    problem = OPERATIONS["linear_logprobs"].inputs(ProblemSize(TOKENS, HIDDEN, vocab), torch.device("cpu"), dtype)
    leaves, labels = (problem.tensors["hidden"], problem.tensors["weight"]), problem.tensors["labels"]
    tiles = -(-vocab // library_seams.PROJECTION.default.block_v)
    logits = TOKENS * vocab * dtype.itemsize
    factors = (vocab + TOKENS) * HIDDEN * dtype.itemsize

    def forward(backward: str) -> Callable[[], object]:
        return lambda: _call(*leaves, labels, backward)

    def step() -> None:
        torch.autograd.grad(_call(*leaves, labels, "recompute").logprobs.sum(), leaves)

    def kernel(fields: int, passes: int, results: float = 0.0) -> Kernel:
        """Return the kernel in some modes, of which one writes parts for each tile of columns."""
        again = (tiles - 1) * TOKENS * (HIDDEN * dtype.itemsize + OF_TOKEN)
        least = passes * (factors + TOKENS * OF_TOKEN) + results
        parts = FLOAT * fields * tiles * TOKENS
        # The factor of the gradient is read per tile.
        return Kernel(
            library_seams.PROJECTION_KERNEL,
            least,
            least + passes * again + parts + (passes - 1) * tiles * TOKENS * FLOAT,
        )

    def others(fields: int, entries: int) -> tuple[Kernel, ...]:
        of_entry = 2 * INDEX + FLOAT + 2 * HIDDEN * dtype.itemsize
        return (
            Kernel("linear_logprobs_add_tiles_kernel", FLOAT * fields * TOKENS * (tiles + 1)),
            Kernel("linear_logprobs_entry_logits_kernel", entries * of_entry),
        )

    name = str(dtype).removeprefix("torch.")
    case = lambda label, call, *kernels: Case("linear_logprobs", f"fused, {label}, {name}", call, kernels)
    yield case("scoring", torch.no_grad()(forward("recompute")), kernel(2, 1), *others(2, TOKENS))
    yield case("cache, forward", forward("cache"), kernel(2, 1, logits), *others(2, TOKENS))
    scaled = Kernel("linear_logprobs_scaled_rows_kernel", TOKENS * (HIDDEN * (FLOAT + dtype.itemsize) + FLOAT + INDEX))
    yield case("recompute", step, kernel(2, 2, logits), *others(2, 2 * TOKENS), scaled)
    yield _sparse_case(case, vocab, dtype, kernel(3, 1, TOKENS * vocab / 8), others(3, 2 * TOKENS))


def _sparse_case(
    case: Callable[..., Case], vocab: int, dtype: torch.dtype, kernel: Kernel, others: tuple[Kernel, ...]
) -> Case:
    """Give each token one candidate beside its label, whose logit is computed apart. A column has one bit."""
    half = HIDDEN // 2
    labels = torch.arange(TOKENS) % half
    weight = torch.zeros(vocab, HIDDEN, dtype=dtype)
    weight[:HIDDEN] = torch.eye(HIDDEN, dtype=dtype)
    hidden = torch.zeros(TOKENS, HIDDEN, dtype=dtype)
    hidden[torch.arange(TOKENS), labels], hidden[torch.arange(TOKENS), labels + half] = 40.0, 38.0
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    return case("sparse, forward", lambda: _call(*leaves, labels, "sparse"), kernel, *others)


def _call(hidden: Tensor, weight: Tensor, labels: Tensor, backward: str) -> Any:
    return sppo_kernels.linear_logprobs(
        hidden, weight, labels, backward=backward, logits_budget_bytes=None, projection="fused", backend="triton"
    )
