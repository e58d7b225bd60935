"""Vocabulary parallelism: an output embedding split by rows over a process group.

Every rank projects the same hidden states on its own rows, and computes log-sum-exp, entropy and, if the label is in
its shard, the target logit. Two all-reduces per chunk of tokens combine these, of one and then four floats per token.
At the end of backward one all-reduce per factor of the logits (hidden, and the adapter's) sums the ranks' gradients.
The sizes of the shards, the certificate and the choice of "auto" take a few numbers more. Nothing of the size of the
vocabulary is communicated.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..row_passes import RowResults


def sizes(group: str, rows: int, device: torch.device) -> list[int]:
    """Return how many rows each rank has; they may differ."""
    if not group:
        return [rows]
    members = _members(group)
    counts = torch.zeros(members.size(), dtype=torch.int64, device=device)
    counts[members.rank()] = rows
    return all_reduce(counts, group).tolist()


def num_ranks(group: str) -> int:
    """Return how many ranks have a shard; 1 without a group."""
    return _members(group).size() if group else 1


def first_row(group: str, shards: list[int]) -> int:
    """Return the number of the first row of this rank."""
    return sum(shards[: _members(group).rank()]) if group else 0


def local_labels(labels: Tensor, ignore_index: int, first_row: Tensor, rows: int) -> tuple[Tensor, int]:
    """Return labels as row numbers of this shard, and the new ignore_index, -1.

    A label on another rank becomes ``rows``.
    """
    local = labels - first_row
    local = torch.where((local >= 0) & (local < rows), local, rows)
    return torch.where(labels == ignore_index, -1, local), -1


def combine(group: str, results: RowResults, *, temperature: Tensor, is_local: Tensor) -> Tensor:
    """Replace the results over each shard by those over the complete vocabulary. Return this shard's probability.

    Args:
        group: name of the process group.
        results: of C tokens over this shard's rows.
        temperature: ``[C]``.
        is_local: ``[C]``, whether a token's label is one of this shard's rows.
    """
    logprobs, entropy, (maximum, log_sum) = results
    top = all_reduce(maximum.clone(), group, dist.ReduceOp.MAX)
    # exp(z - top) summed over the shard, and times (z - top): the mean of z - m is log_sum - entropy. A shard in which
    # all logits are -inf has neither a maximum nor a mean.
    gap = (maximum - top) / temperature
    share = torch.where(maximum == float("-inf"), 0.0, (gap + log_sum).exp())
    weighted = torch.where(share > 0, share * (log_sum - entropy + gap), 0.0)
    target = torch.where(is_local, logprobs + log_sum + gap, 0.0)
    total, weighted, target, owners = all_reduce(torch.stack([share, weighted, target, is_local.float()]), group)
    log_total = total.log()
    # A label that no shard has becomes NaN, as without a group.
    logprobs.copy_(torch.where(owners > 0, target - log_total, float("nan")))
    entropy.copy_(log_total - weighted / total)
    maximum.copy_(top)
    log_sum.copy_(log_total)
    return share / total


def all_reduce(x: Tensor, group: str, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Reduce ``x`` over the ranks in place, by default to the sum."""
    dist.all_reduce(x, operation, group=_members(group))
    return x


def _members(group: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]
