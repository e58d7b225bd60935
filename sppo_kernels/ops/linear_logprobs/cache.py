"""What forward keeps for backward.

The logit gradient of token t, up to its upstream gradient c_t and temperature, is (onehot(label) - p) cap'(logit). It
does not depend on the loss, so forward can keep what it is made of: the probabilities of all V columns and two factors
per token ("cache", see ``CachedRows``), or only its few largest entries ("sparse", see sparse.py). Tokens for which
nothing is kept are recomputed from their logits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..row_passes import CachedRows
from . import vocab_parallel
from .auto_mode import MIN_VOCAB_PER_ENTRY, AutoBackward
from .matmul import row_stride

_AUTO_BUDGET_CPU = 1 << 30


class CachePlan(NamedTuple):
    """What forward keeps: sparse logit gradients of all tokens, or probabilities of the first ``num_dense``."""

    sparse: bool
    max_entries: int  # per token
    mass_tolerance: float  # probability that the entries of a token may leave out
    num_dense: int = 0
    monitor: AutoBackward | None = None  # records how many tokens need the dense path


class Cache(NamedTuple):
    """What forward keeps, one row per token, in the order of the tokens with a loss."""

    probs: Tensor  # [num_dense, row_stride(V)], of which the first V columns are used
    factors: Tensor  # [2, num_dense] float32
    sparse_index: Tensor  # [tokens or 0, max_entries] int32
    sparse_value: Tensor  # [tokens or 0, max_entries] float32

    def rows(self, first: int, count: int, vocab: int) -> CachedRows:
        """Return where the probabilities and factors of ``count`` tokens from ``first`` on are kept."""
        return CachedRows(self.probs[first : first + count, :vocab], self.factors[:, first : first + count])


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
    agree_in: str = "",
) -> CachePlan:
    """Decide what a call keeps of ``num_tokens`` tokens. In "auto" this waits for the previous call.

    Args:
        weight: ``[V, H]``, this rank's rows of the output embedding.
        backward: "recompute", "cache", "sparse" or "auto".
        monitor: remembers earlier calls for "auto"; None for the other modes.
        logits_budget_bytes: bytes of probabilities to keep at most, or None for the default.
        num_tokens: number of tokens with a loss.
        mass_tolerance: probability that sparse entries of a token may leave out.
        max_entries: most sparse entries per token.
        shards: rows of the output embedding on each rank.
        entropies: whether the entropies can have gradients.
        agree_in: name of a process group whose ranks are to cache the same tokens, "" for none.
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
    if agree_in and backward != "recompute" and not sparse:
        least = torch.tensor(num_dense, device=weight.device)
        num_dense = int(vocab_parallel.all_reduce(least, agree_in, dist.ReduceOp.MIN))
    return CachePlan(sparse, max_entries, mass_tolerance, num_dense, recording)


def _num_cacheable(
    backward: str, budget: int | None, num_tokens: int, bytes_per_token: int, device: torch.device
) -> int:
    """Return how many tokens' probabilities fit in the cache budget."""
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


def allocate(weight: Tensor, plan: CachePlan, num_tokens: int) -> Cache:
    """Allocate what ``plan`` keeps of ``num_tokens`` tokens."""
    entries = num_tokens if plan.sparse else 0, plan.max_entries
    return Cache(
        probs=weight.new_empty(plan.num_dense, row_stride(weight.shape[0])),
        factors=torch.empty(2, plan.num_dense, dtype=torch.float32, device=weight.device),
        sparse_index=torch.empty(entries, dtype=torch.int32, device=weight.device),
        sparse_value=torch.empty(entries, dtype=torch.float32, device=weight.device),
    )
