"""An output embedding split by rows over a process group: which labels are here, and what makes the results whole.

Every rank projects the same hidden states on its own rows and takes log-sum-exp, entropy and, where it has it, the
target logit over them. Two all-reduces a chunk of tokens join these, one float and then four a token; one more at the
end of backward adds up the ranks' gradients of the hidden states. Nothing of the size of the vocabulary travels.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def sizes(group: str, rows: int, device: torch.device) -> list[int]:
    """How many rows each rank has; they may differ."""
    if not group:
        return [rows]
    members = _members(group)
    counts = torch.zeros(members.size(), dtype=torch.int64, device=device)
    counts[members.rank()] = rows
    return all_reduce(counts, group).tolist()


def first_row(group: str, shards: list[int]) -> int:
    """Where this rank's rows begin."""
    return sum(shards[: _members(group).rank()]) if group else 0


def local_labels(labels: Tensor, ignore_index: int, first_row: Tensor, rows: int) -> tuple[Tensor, int]:
    """Labels as row numbers of this shard: ``rows`` for one on another rank, -1, the new ignore_index, for ignored."""
    local = labels - first_row
    local = torch.where((local >= 0) & (local < rows), local, rows)
    return torch.where(labels == ignore_index, -1, local), -1


def combine(
    group: str, logprobs: Tensor, entropy: Tensor, stats: Tensor, *, here: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, entropies and stats over the whole vocabulary from those over each shard.

    Args:
        logprobs, entropy: ``[C]``, over this shard's rows.
        stats: ``[2, C]``: maximum ``m`` and ``log s``, ``s = sum exp(z - m)``, over this shard's rows.
        here: ``[C]``, whether a token's label is one of this shard's rows.
    """
    maximum, log_sum = stats
    top = all_reduce(maximum.clone(), group, dist.ReduceOp.MAX)
    # exp(z - top) summed over the shard, and times (z - top): mean z - m is log_sum - entropy. A shard of forbidden
    # tokens alone has neither a maximum nor a mean.
    share = torch.where(maximum == float("-inf"), 0.0, (maximum - top + log_sum).exp())
    weighted = torch.where(share > 0, share * (log_sum - entropy + maximum - top), 0.0)
    target = torch.where(here, logprobs + log_sum + (maximum - top), 0.0)
    sums = torch.stack([share, weighted, target, here.float()])
    share, weighted, target, owners = all_reduce(sums, group)
    log_total = share.log()
    # A label that no shard has is NaN, as it is where nothing is split.
    logprobs = torch.where(owners > 0, target - log_total, float("nan"))
    return logprobs, log_total - weighted / share, torch.stack([top, log_total])


def all_reduce(x: Tensor, group: str, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """The sum of ``x``, or what else, over the ranks, in its place."""
    dist.all_reduce(x, operation, group=_members(group))
    return x


def _members(group: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]
