"""The LM head in chunks of tokens: hidden states to log-probabilities, and their gradients back.

    forward     hidden --(W^T)--> logits --(row pass)--> logprob, entropy, row maximum, log-sum
                                  logits --(row pass)--> logit gradients: dense ones of as many tokens as the budget
                                                         allows, or sparse ones of every token
    backward    dense cached:     logit gradient, c
                sparse:           entries, c                   (weighted_rows.py)
                recomputed:       hidden --(W^T)--> logits --(row pass)--> logit gradient times c, and the entropy's
                logit gradient --(W)--> d hidden      logit gradient^T --(hidden)--> d weight, accumulated in float32

c is the upstream gradient of a token's log-probability, cap' the derivative of the softcap (1 without one). The logit
gradient (onehot(label) - p) cap'(logit) does not depend on the loss: any function of the log-probabilities reaches
token t's logits as c_t times it, divided by the temperature. Only the gradient of an entropy is not of this form, so a
token that has one is recomputed from its logits.

Logit gradients have the dtype of the inputs, as in eager PyTorch. d weight is rounded to its own dtype at the end.

Memory besides inputs and gradients: ``chunk_bytes`` for the logits and logit gradients of one block, 4 V H bytes for d
weight where it is needed, and what is cached (in the PyTorch backend's forward with a dense cache up to a third of
``chunk_bytes`` more). A block of logit gradients comes from four chunks of logits: d weight is read and written once
per block, 8 V H bytes, which has to hide behind the 6 H V FLOPs per token of the block.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._row_kernels import ROW_PASSES, RowResults
from . import indexing, sparse, vocab_parallel
from .auto_mode import PROBE_EVERY
from .cache import LOGIT_GRADS, CachedLogitGrads, CachePlan, allocate
from .gradients import GradientAccumulator, same_dtype
from .matmul import Projection, row_stride
from .output import CACHED, RECOMPUTED
from .weighted_rows import gather_entries

_log = logging.getLogger(__name__)


class TokenResults(NamedTuple):
    """Results of all N tokens; zeros for tokens that ``LMHead.forward`` has not computed."""

    logprobs: Tensor  # [N]
    entropy: Tensor  # [N]
    row_stats: Tensor  # [2, N], row maximum and log-sum
    dropped_mass: Tensor  # [N], probability that is in no sparse entry
    num_entries: Tensor  # [N] int32: entries on this rank, or RECOMPUTED, or CACHED

    @classmethod
    def zeros(cls, num_tokens: int, device: torch.device) -> TokenResults:
        """Allocate results of tokens without a loss."""
        logprobs, entropy, dropped_mass = (torch.zeros(num_tokens, device=device) for _ in range(3))
        return cls(
            logprobs=logprobs,
            entropy=entropy,
            row_stats=torch.zeros(2, num_tokens, device=device),
            dropped_mass=dropped_mass,
            num_entries=torch.zeros(num_tokens, dtype=torch.int32, device=device),
        )


class SavedForBackward(NamedTuple):
    """Fields of ``TokenResults`` that ``LMHead.backward`` reads."""

    entropy: Tensor
    row_stats: Tensor
    num_entries: Tensor


class LMHead:
    """An output embedding and the hidden states of N tokens, with chunked forward and backward passes.

    Args:
        hiddens: ``[N, H]``, and ``[N, r]`` of an adapter.
        weights: ``[V, H]``, and ``[V, r]`` of an adapter; this rank's rows.
        bias: ``[V]`` or None.
        labels: ``[N]`` int64, numbers in the complete vocabulary or ``ignore_index``.
        temperature: ``[N]`` float32.
        softcap: 0 for none.
        ignore_index: marks a token without a loss.
        chunk_bytes: memory for one block.
        group: name of the process group over which the weights are split, "" for none.
        backend: "torch" or "triton".
        first_row: ``[1]`` int64, the number of this rank's first row; read only with ``group``.
    """

    def __init__(
        self,
        *,
        hiddens: list[Tensor],
        weights: list[Tensor],
        bias: Tensor | None,
        labels: Tensor,
        temperature: Tensor,
        softcap: float,
        ignore_index: int,
        chunk_bytes: int,
        group: str,
        backend: str,
        first_row: Tensor,
    ) -> None:
        self.hiddens, self.weights, self.bias = hiddens, weights, bias
        self.vocab = weights[0].shape[0]
        if group:
            labels, ignore_index = vocab_parallel.local_labels(labels, ignore_index, first_row, self.vocab)
        self.labels, self.ignore_index = labels, ignore_index
        self.loss_mask = labels != ignore_index
        self.temperature, self.softcap = temperature, softcap
        self.chunk_bytes, self.group, self.backend = chunk_bytes, group, backend

    def block_size(self, vocab: int | None = None) -> int:
        """Return how many tokens' logit gradients, with float32 logits for a quarter of them, fit in ``chunk_bytes``.

        The result is rounded down to a multiple of 256 for efficient matrix products. ``vocab`` is that of the largest
        shard where all ranks communicate in every block.
        """
        row = row_stride(vocab or self.vocab) * (self.weights[0].itemsize + 1)
        return max(256, self.chunk_bytes // row // 256 * 256)

    def accumulator(self, needs: Sequence[bool], hidden_dtype: torch.dtype) -> GradientAccumulator:
        """Create the accumulator of the gradients of hiddens, weights and bias that are needed."""
        return GradientAccumulator(
            hiddens=self.hiddens, weights=self.weights, bias=self.bias, needs=needs, hidden_dtype=hidden_dtype
        )

    # Forward

    def forward(self, tokens: Tensor, results: TokenResults, plan: CachePlan, shards: list[int]) -> CachedLogitGrads:
        """Compute the results of ``tokens`` into ``results``. ``shards`` are the numbers of rows on each rank."""
        cached = allocate(self.weights[0], plan, len(tokens))
        results.num_entries[tokens] = RECOMPUTED
        results.num_entries[tokens[: plan.num_dense]] = CACHED
        projection = Projection(self.weights, self.bias)
        # The PyTorch backend is for CPUs, where a matrix product copies the weight in every call, so small chunks cost
        # more per token. Without the logit gradients that backward also holds, twice as many logits fit.
        chunk_size = self.block_size(max(shards)) // (2 if self.backend == "torch" else 4)
        workspace = projection.workspace(min(chunk_size, len(tokens)))
        done = num_seen = 0
        num_need_dense = results.num_entries.new_zeros((), dtype=torch.int64)  # among those seen
        # The number of chunks is the same on each rank, whatever the size of its shard: all communicate in each chunk.
        for index in indexing.chunks(tokens, chunk_size):
            logits = projection.logits([hidden[index] for hidden in self.hiddens], workspace)
            rows = slice(done, done + len(index))
            if plan.sparse:
                row = self._sparse_row_pass(
                    logits,
                    index,
                    results=results,
                    mass_tolerance=plan.mass_tolerance / len(shards),
                    sparse_index=cached.sparse_index[rows],
                    sparse_value=cached.sparse_value[rows],
                )
            else:
                row = self._row_pass(logits, index)
                if plan.monitor is not None:
                    num_probed = -(-len(index) // PROBE_EVERY)
                    num_need_dense += self._count_dense(logits, index[:num_probed], row, plan, len(shards))
                    num_seen += num_probed
                LOGIT_GRADS[self.backend](
                    logits=logits,
                    labels=self.labels[index],
                    temperature=self.temperature[index],
                    row_stats=row.row_stats,
                    softcap=self.softcap,
                    out=cached.dense[rows, : self.vocab],
                )
            results.logprobs[index], results.entropy[index], results.row_stats[:, index] = row
            done += len(index)
            del logits  # before the next chunk's
        if plan.monitor is not None and plan.sparse:
            num_need_dense, num_seen = (results.num_entries[tokens] < 0).sum(), len(tokens)
        if plan.monitor is not None and num_seen:
            plan.monitor.record(num_need_dense, num_seen, self.group)
        return cached

    def _row_pass(self, logits: Tensor, index: Tensor) -> RowResults:
        """Compute the results of tokens ``index``, over the complete vocabulary."""
        row = ROW_PASSES[self.backend].forward(
            logits=logits,
            labels=self.labels[index],
            temperature=self.temperature[index],
            softcap=self.softcap,
            ignore_index=self.ignore_index,
        )
        if self.group:
            row = vocab_parallel.combine(self.group, row, is_local=self.labels[index] < self.vocab)
        return row

    def _sparse_row_pass(
        self,
        logits: Tensor,
        index: Tensor,
        *,
        results: TokenResults,
        mass_tolerance: float,
        sparse_index: Tensor,
        sparse_value: Tensor,
    ) -> RowResults:
        """Compute the results of tokens ``index``, and select their sparse logit gradients.

        Selection computes the statistics of the rows itself, unless their sums come from other ranks.
        """
        row = self._row_pass(logits, index) if self.group else None
        selected = self._select(
            logits,
            index,
            row_stats=None if row is None else row.row_stats,
            mass_tolerance=mass_tolerance,
            sparse_index=sparse_index,
            sparse_value=sparse_value,
        )
        results.num_entries[index], results.dropped_mass[index] = selected.num_entries, selected.dropped_mass
        return RowResults(selected.logprobs, selected.entropy, selected.row_stats) if row is None else row

    def _select(
        self,
        logits: Tensor,
        index: Tensor,
        *,
        row_stats: Tensor | None,
        mass_tolerance: float,
        sparse_index: Tensor,
        sparse_value: Tensor,
    ) -> sparse.Selected:
        """Select sparse logit gradients. The PyTorch backend overwrites the logits."""
        return sparse.SELECT[self.backend](
            logits=logits,
            labels=self.labels[index],
            temperature=self.temperature[index],
            softcap=self.softcap,
            mass_tolerance=mass_tolerance,
            row_stats=row_stats,
            index=sparse_index,
            value=sparse_value,
        )

    def _count_dense(self, logits: Tensor, index: Tensor, row: RowResults, plan: CachePlan, num_ranks: int) -> Tensor:
        """Count how many of the chunk's first tokens, ``index``, would need the dense path.

        Selection runs on a copy of their logits.
        """
        scratch = allocate(self.weights[0], plan._replace(sparse=True, num_dense=0), len(index))
        selected = self._select(
            logits[:, : len(index)].clone(),
            index,
            row_stats=row.row_stats[:, : len(index)],
            mass_tolerance=plan.mass_tolerance / num_ranks,
            sparse_index=scratch.sparse_index,
            sparse_value=scratch.sparse_value,
        )
        return (selected.num_entries < 0).sum()

    # Backward

    def backward(
        self,
        tokens: Tensor,
        *,
        accumulator: GradientAccumulator,
        cached: CachedLogitGrads,
        saved: SavedForBackward,
        grad_logprobs: Tensor,
        grad_entropy: Tensor,
    ) -> int:
        """Add the gradients of ``tokens`` to ``accumulator``.

        Args:
            tokens: indices of the tokens that ``forward`` was called with.
            accumulator: receives the gradients.
            cached: what ``forward`` returned.
            saved: results of all N tokens.
            grad_logprobs: ``[N]``, divided by the accumulator's scale.
            grad_entropy: ``[N]``, divided likewise.

        Returns:
            The number of tokens whose gradient came from ``cached``.
        """
        has_grad = (grad_logprobs[tokens] != 0) | (grad_entropy[tokens] != 0)
        # The cache does not cover the entropy: a token whose entropy has a gradient needs its logits again.
        usable = has_grad & (grad_entropy[tokens] == 0)
        in_dense = usable & (torch.arange(len(tokens), device=tokens.device) < len(cached.dense))
        in_sparse = usable & (saved.num_entries[tokens] >= 0)
        from_dense = indexing.nonzero_indices(in_dense) if len(cached.dense) else tokens[:0]
        from_sparse = indexing.nonzero_indices(in_sparse) if len(cached.sparse_index) else tokens[:0]
        recomputed = tokens[indexing.nonzero_indices(has_grad & ~in_dense & ~in_sparse)]
        _log.debug(
            "backward: %d tokens cached, %d sparse, %d recomputed", len(from_dense), len(from_sparse), len(recomputed)
        )
        coefficient = grad_logprobs / self.temperature
        # Sparse entries last: they need d weight zeroed, whereas the first product of the others creates it.
        self._add_recomputed(recomputed, accumulator, saved, grad_logprobs, grad_entropy)
        self._add_cached(tokens, from_dense, accumulator, cached.dense, coefficient)
        if len(from_sparse):
            index = tokens[from_sparse]
            entries = gather_entries(
                cached.sparse_index[from_sparse],
                cached.sparse_value[from_sparse],
                saved.num_entries[index],
                coefficient[index],
            )
            accumulator.add_sparse(
                index, entries, backend=self.backend, tokens_per_block=self._tokens_per_hidden_block()
            )
        return len(from_dense) + len(from_sparse)

    def _add_cached(
        self, tokens: Tensor, rows: Tensor, accumulator: GradientAccumulator, dense: Tensor, coefficient: Tensor
    ) -> None:
        """Add the gradients of rows of the dense cache.

        It is read in place, in blocks as large as their hidden states allow, if all of it is used in the dtype that is
        multiplied. Otherwise blocks of rows are gathered.
        """
        in_place = len(rows) == len(dense) and accumulator.projection.accepts(dense.dtype)
        size = self._tokens_per_hidden_block() if in_place else self.block_size()
        for i, part in enumerate(indexing.chunks(rows, size)):
            block = dense[i * size : (i + 1) * size] if in_place else dense[part]
            accumulator.add(tokens[part], block[:, : self.vocab], coefficient[tokens[part]].unsqueeze(-1))
            del block  # before the next one

    def _add_recomputed(
        self,
        tokens: Tensor,
        accumulator: GradientAccumulator,
        saved: SavedForBackward,
        grad_logprobs: Tensor,
        grad_entropy: Tensor,
    ) -> None:
        """Add the gradients of tokens whose logits are computed again."""
        size = self.block_size()
        workspace = accumulator.projection.workspace(min(size // 4, len(tokens)))
        blocks = self.weights[0].new_empty(min(size, len(tokens)), row_stride(self.vocab))
        for index in indexing.chunks(tokens, size):
            logit_grads = blocks[: len(index), : self.vocab]
            for part, rows in zip(index.split(size // 4), logit_grads.split(size // 4), strict=True):
                logits = accumulator.projection.logits([hidden[part] for hidden in self.hiddens], workspace)
                ROW_PASSES[self.backend].backward(
                    grad_logprobs=grad_logprobs[part],
                    grad_entropy=grad_entropy[part],
                    logits=logits,
                    labels=self.labels[part],
                    temperature=self.temperature[part],
                    entropy=saved.entropy[part],
                    row_stats=saved.row_stats[:, part],
                    softcap=self.softcap,
                    ignore_index=self.ignore_index,
                    grad_logits=rows.unsqueeze(0),
                )
                del logits  # before the next chunk's, and before the products
            accumulator.add(index, logit_grads)

    def reduce_hidden_grads(
        self,
        grads: list[Tensor],
        needs: Sequence[bool],
        dtype_of: Callable[[Tensor], torch.dtype] = same_dtype,
    ) -> list[Tensor]:
        """Sum the gradients of the hidden states over the ranks, each of which has its rows' contribution."""
        for i, hidden in enumerate(self.hiddens):
            if self.group and needs[i]:
                grads[i] = vocab_parallel.all_reduce(grads[i], self.group).to(dtype_of(hidden))
        return grads

    def _tokens_per_hidden_block(self) -> int:
        """Return how many tokens' hidden states and gradients fit in ``chunk_bytes``, at 16 H bytes per token."""
        return max(256, self.chunk_bytes // (16 * sum(hidden.shape[1] for hidden in self.hiddens)))
