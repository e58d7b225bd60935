"""What forward keeps for backward, and the row pass that computes the logit gradients it keeps.

The logit gradient of token t, up to its upstream gradient c_t and temperature, is (onehot(label) - p) cap'(logit). It
does not depend on the loss, so forward can compute and keep it: all V elements per token ("cache"), or only the few
largest ("sparse", see sparse.py). Tokens for which nothing is kept are recomputed from their logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..._backend import HAS_TRITON
from ...tuning import Config, Tunable
from .._row_kernels import rows_per_block, safe_labels, scaled_rows, softcap_derivative
from .auto_mode import MIN_VOCAB_PER_ENTRY, AutoBackward
from .matmul import row_stride

if HAS_TRITON:
    import triton
    import triton.language as tl

    from ..._triton_utils import launch
    from .._row_kernels import launch_shape, scaled_block, store_block

_AUTO_BUDGET_CPU = 1 << 30


class CachePlan(NamedTuple):
    """What forward keeps of its tokens: sparse logit gradients of all, or dense ones of the first ``num_dense``."""

    sparse: bool
    max_entries: int  # per token
    mass_tolerance: float  # probability that the entries of a token may leave out
    num_dense: int = 0
    monitor: AutoBackward | None = None  # records how many tokens need the dense path


class CachedLogitGrads(NamedTuple):
    """Logit gradients that forward keeps, one row per token, in the order of the tokens with a loss."""

    dense: Tensor  # [num_dense, row_stride(V)], of which the first V columns are used
    sparse_index: Tensor  # [tokens or 0, max_entries] int32
    sparse_value: Tensor  # [tokens or 0, max_entries] float32


def plan_cache(
    *,
    weight: Tensor,
    backward: str,
    monitor: AutoBackward | None,
    logits_budget_bytes: int | None,
    num_tokens: int,
    mass_tolerance: float,
    max_entries: int,
    shards: list[int],
    entropies: bool,
) -> CachePlan:
    """Decide what a call keeps of ``num_tokens`` tokens. In "auto" this waits for the previous call.

    Args:
        weight: ``[V, H]``, this rank's rows of the output embedding.
        backward: "recompute", "cache", "sparse" or "auto".
        monitor: remembers earlier calls for "auto"; None for the other modes.
        logits_budget_bytes: bytes of dense logit gradients to keep at most, or None for the default.
        num_tokens: number of tokens with a loss.
        mass_tolerance: probability that sparse entries of a token may leave out.
        max_entries: most sparse entries per token.
        shards: rows of the output embedding on each rank.
        entropies: whether the entropies can have gradients.
    """
    sparse, recording = backward == "sparse", monitor
    if monitor is not None:
        if entropies and monitor.needs_logits():
            return CachePlan(False, max_entries, mass_tolerance)
        if min(shards) >= MIN_VOCAB_PER_ENTRY * max_entries:
            sparse = monitor.use_sparse()
        else:
            recording = None
    row_bytes = row_stride(weight.shape[0]) * weight.itemsize
    num_dense = 0 if sparse else _num_cacheable(backward, logits_budget_bytes, num_tokens, row_bytes, weight.device)
    if monitor is not None and not sparse:
        num_dense = min(num_tokens, monitor.num_cached(num_dense))
    return CachePlan(sparse, max_entries, mass_tolerance, num_dense, recording)


def _num_cacheable(
    backward: str, budget: int | None, num_tokens: int, bytes_per_token: int, device: torch.device
) -> int:
    """Return how many tokens' logit gradients fit in the cache budget."""
    if backward == "recompute":
        return 0
    if budget is None and backward == "cache":
        return num_tokens
    if budget is None:
        budget = _AUTO_BUDGET_CPU if device.type == "cpu" else _free_memory(device) // 4
    return min(num_tokens, budget // bytes_per_token)


def _free_memory(device: torch.device) -> int:
    """Return the bytes that PyTorch can still allocate: free in the driver, or unused in its allocator."""
    accelerator = torch.get_device_module(device)
    free, _ = accelerator.mem_get_info(device)
    return free + accelerator.memory_reserved(device) - accelerator.memory_allocated(device)


def allocate(weight: Tensor, plan: CachePlan, num_tokens: int) -> CachedLogitGrads:
    """Allocate what ``plan`` keeps of ``num_tokens`` tokens."""
    entries = num_tokens if plan.sparse else 0, plan.max_entries
    return CachedLogitGrads(
        dense=weight.new_empty(plan.num_dense, row_stride(weight.shape[0])),
        sparse_index=torch.empty(entries, dtype=torch.int32, device=weight.device),
        sparse_value=torch.empty(entries, dtype=torch.float32, device=weight.device),
    )


# The row pass that computes logit gradients, right after the forward pass that computed the statistics of the rows


def _torch_logit_grads(*, logits, labels, temperature, row_stats, softcap, out):
    """Compute the logit gradients of the first ``len(out)`` rows of logits [1, C, V] into ``out`` [rows, V]."""
    inside, label = safe_labels(labels, out.shape[1])
    for rows in torch.arange(len(out), device=out.device).split(rows_per_block(out.shape[1])):
        z, ratio = scaled_rows(logits[0, rows], temperature[rows], softcap)
        grad = (z - row_stats[0, rows, None] - row_stats[1, rows, None]).exp_().neg_()
        grad.scatter_add_(-1, label[rows, None], inside[rows, None].float())
        if ratio is not None:
            grad *= softcap_derivative(ratio)
        out[rows] = grad.to(out.dtype)


LOGIT_GRADS: dict[str, Callable[..., None]] = {"torch": _torch_logit_grads}


if HAS_TRITON:
    # One program per row and block of columns. Reads 4 bytes per element and writes one element of out.
    @triton.jit(do_not_specialize=["C"])
    def linear_logprobs_logit_grads_kernel(
        x_ptr,
        label_ptr,
        tau_ptr,
        stat_ptr,
        out_ptr,
        stride_x,
        stride_out,
        stride_tau,
        C,
        V,
        softcap,
        HAS_SOFTCAP: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        start = tl.program_id(1) * BLOCK
        tau = tl.load(tau_ptr + row * stride_tau)
        z, slope = scaled_block(x_ptr + row * stride_x, start, 1, V, softcap, tau, HAS_SOFTCAP, BLOCK)
        p = tl.exp(z - tl.load(stat_ptr + row) - tl.load(stat_ptr + C + row))
        is_label = start + tl.arange(0, BLOCK) == tl.load(label_ptr + row)
        grad = tl.where(is_label, 1.0 - p, -p)
        if HAS_SOFTCAP:
            grad *= slope
        store_block(out_ptr + row * stride_out, start, grad, V, BLOCK)

    # The candidates of selective_logprobs's backward, which does the same to the same rows.
    LOGIT_GRADS_CONFIGS = Tunable(
        "linear_logprobs.logit_grads", Config(2048, 8), Config(1024, 4), Config(2048, 4), Config(4096, 8)
    )

    def _triton_logit_grads(*, logits, labels, temperature, row_stats, softcap, out):
        """Compute what ``_torch_logit_grads`` does."""
        n, vocab = out.shape
        if n:
            shape = launch_shape(LOGIT_GRADS_CONFIGS, logits)
            launch(
                linear_logprobs_logit_grads_kernel,
                (n, triton.cdiv(vocab, shape["BLOCK"])),
                x_ptr=logits,
                label_ptr=labels,
                tau_ptr=temperature,
                stat_ptr=row_stats,
                out_ptr=out,
                stride_x=logits.stride(1),
                stride_out=out.stride(0),
                stride_tau=temperature.stride(0),
                C=row_stats.shape[1],
                V=vocab,
                softcap=softcap,
                HAS_SOFTCAP=softcap > 0,
                **shape,
            )

    LOGIT_GRADS["triton"] = _triton_logit_grads
