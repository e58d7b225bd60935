"""The LM head in chunks of tokens: hidden states to log-probabilities, and their gradients back.

    forward     hidden --(W^T)--> logits --(row pass)--> logprob, entropy, row maximum, log-sum; and probabilities of as
                                                         many tokens as the budget allows, or sparse logit gradients
    backward    cached:           probabilities, factors, c
                sparse:           entries, c                   (weighted_rows.py)
                recomputed:       hidden --(W^T)--> logits --(row pass)--> logit gradient times c, and the entropy's
                logit gradient --(W)--> d hidden      logit gradient^T --(hidden)--> d weight

With ``projection="fused"`` a product and the row pass after it are one kernel, and no logits are stored (projection).

c is the upstream gradient of a token's log-probability, cap' the derivative of the softcap (1 without one). The logit
gradient (onehot(label) - p) cap'(logit) does not depend on the loss: any function of the log-probabilities reaches
token t's logits as c_t times it, divided by the temperature. Only the gradient of an entropy is not of this form, so a
token that has one is recomputed from its logits.

Logit gradients and probabilities have the dtype of the inputs. d weight is accumulated in float32 and rounded to its
own dtype at the end; where a single product makes it, it is computed in its own dtype.

Memory besides inputs and gradients: ``chunk_bytes`` for the logits and logit gradients of one block, 4 V H bytes for d
weight where it has several contributions, and what is cached (in the PyTorch backend's forward with a cache up to a
third of ``chunk_bytes`` more). A block of logit gradients comes from four chunks of logits: d weight is read and
written once per block, 8 V H bytes, which has to hide behind the 6 H V FLOPs per token of the block.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..row_passes import ROW_PASSES, RowResults
from . import indexing, sparse, vocab_parallel
from .auto_mode import PROBE_EVERY
from .cache import Cache, CachePlan, allocate
from .gradients import GradientAccumulator, same_dtype
from .matmul import Projection, row_stride
from .output import CACHED, RECOMPUTED
from .projection import Factors, FusedProjection
from .projection import block_size as fused_block_size
from .tokens import Batch, SavedForBackward, TokenResults, Upstream
from .weighted_rows import gather_entries

_log = logging.getLogger(__name__)

# Of a block of the vocabulary. With fewer, the traffic of the sums of d hidden takes a tenth of the products' time.
_LEAST_COLUMNS = 4096
_NUM_KINDS = 3
_RECOMPUTED, _CACHED, _SPARSE = range(_NUM_KINDS)  # where the gradient of a token comes from


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
        projection: "vendor" or "fused".
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
        projection: str,
        group: str,
        backend: str,
        first_row: Tensor,
    ) -> None:
        self.hiddens, self.weights = hiddens, weights
        self.bias = None if bias is None else bias.contiguous()  # kernels read it without a stride
        self.vocab = weights[0].shape[0]
        if group:
            labels, ignore_index = vocab_parallel.local_labels(labels, ignore_index, first_row, self.vocab)
        self.labels, self.ignore_index = labels.contiguous(), ignore_index
        self.loss_mask = labels != ignore_index
        self.temperature, self.softcap = temperature, softcap
        self.chunk_bytes, self.is_fused = chunk_bytes, projection == "fused"
        self.group, self.backend = group, backend

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
            hiddens=self.hiddens,
            weights=self.weights,
            bias=self.bias,
            needs=needs,
            hidden_dtype=hidden_dtype,
            backend=self.backend,
        )

    def batch(self, tokens: Tensor) -> Batch:
        """Return ``tokens`` with their hidden states, labels and temperatures."""
        return Batch(self.hiddens, self.labels, self.temperature, tokens)

    def _fused(
        self, batch: Batch, hiddens: list[Tensor] | None = None, columns: slice = slice(None)
    ) -> FusedProjection:
        """Return the fused projection of a batch, with its hidden states if given, onto some columns of the logits."""
        factors = Factors(batch.hiddens() if hiddens is None else hiddens, self.weights, self.bias, self.softcap)
        labels = batch.labels - columns.start if columns.start else batch.labels
        return FusedProjection(
            factors.columns(columns),
            labels=labels,
            temperature=batch.temperature,
            backend=self.backend,
            group=self.group,
        )

    # Forward

    def forward(self, tokens: Tensor, plan: CachePlan, shards: list[int]) -> tuple[TokenResults, Cache]:
        """Compute the results of ``tokens``, and what is kept of them.

        Args:
            tokens: indices of tokens with a loss, in ascending order.
            plan: what to keep.
            shards: the numbers of rows on each rank.
        """
        n, device = len(tokens), tokens.device
        cached = allocate(self.weights[0], plan, n)
        results = TokenResults(
            RowResults.empty(n, device),
            dropped_mass=torch.zeros(n, device=device),
            num_entries=torch.full((n,), RECOMPUTED, dtype=torch.int32, device=device),
        )
        results.num_entries[: plan.num_dense] = CACHED
        batch = self.batch(tokens)
        num_seen = 0
        num_need_dense = results.num_entries.new_zeros((), dtype=torch.int64)  # among those seen
        if self.is_fused:
            size = fused_block_size(self.hiddens, max(shards), self.backend)
        else:
            # The PyTorch backend is for CPUs, where a matrix product copies the weight in every call, so small chunks
            # cost more per token. Without the logit gradients that backward also holds, twice as many logits fit.
            size = self.block_size(max(shards)) // (2 if self.backend == "torch" else 4)
        chunks = indexing.ranges(n, size)
        projection = Projection(self.weights, self.bias)
        workspace = projection.workspace(len(chunks[0])) if chunks and not self.is_fused else None
        # The number of chunks is the same on each rank, whatever the size of its shard: all communicate in each chunk.
        for chunk in chunks:
            part = batch.part(chunk.start, chunk.stop)
            logits = None if self.is_fused else projection.logits(part.hiddens(), workspace)
            if plan.sparse:
                self._select(logits, part, results=results, cached=cached, plan=plan, num_ranks=len(shards))
                continue
            self._row_pass(logits, part, results.row, cached)
            if plan.monitor is not None:
                part = part.part(0, -(-len(chunk) // PROBE_EVERY))
                logits = projection.logits(part.hiddens()) if logits is None else logits[:, : len(part)]
                num_need_dense += self._count_dense(logits, part, plan, len(shards))
                num_seen += len(part)
            del logits  # before the next chunk's
        if plan.monitor is not None and plan.sparse:
            num_need_dense, num_seen = (results.num_entries < 0).sum(), n
        if plan.monitor is not None and num_seen:
            plan.monitor.record(num_need_dense, num_seen, self.group)
        return results, cached

    def _row_pass(self, logits: Tensor | None, batch: Batch, results: RowResults, cached: Cache) -> None:
        """Compute the results of a chunk over the complete vocabulary, and what is cached of its first tokens.

        Without logits the projection is fused.
        """
        row_pass, start, n = ROW_PASSES[self.backend], batch.start, len(batch)
        num_cached = min(max(len(cached.probs) - start, 0), n)
        probs = cached.rows(start, num_cached, self.vocab)
        out = results.rows(start, start + n)
        if logits is None:
            self._fused(batch).forward(out, probs if num_cached else None)
            return
        for first, last, target in ((0, num_cached, probs), (num_cached, n, None)):
            if first < last:
                row_pass.forward(
                    logits=logits[:, first:last],
                    labels=batch.labels[first:last],
                    temperature=batch.temperature[first:last],
                    softcap=self.softcap,
                    ignore_index=self.ignore_index,
                    out=out.rows(first, last),
                    cached=None if self.group else target,
                )
        if self.group:
            self._combine(batch, out)
            row_pass.cache(
                logits=logits[:, :num_cached],
                labels=batch.labels[:num_cached],
                temperature=batch.temperature[:num_cached],
                softcap=self.softcap,
                row_stats=out.row_stats[:, :num_cached],
                cached=probs,
            )

    def _combine(self, batch: Batch, results: RowResults) -> Tensor:
        """Combine results over all ranks, in place. Return the probability of this shard."""
        return vocab_parallel.combine(
            self.group, results, temperature=batch.temperature, is_local=batch.labels < self.vocab
        )

    def _select(
        self,
        logits: Tensor | None,
        batch: Batch,
        *,
        results: TokenResults,
        cached: Cache,
        plan: CachePlan,
        num_ranks: int,
    ) -> None:
        """Compute the results of a chunk, and select its sparse logit gradients.

        Without logits the projection is fused. The PyTorch backend overwrites the logits.
        """
        rows = slice(batch.start, batch.start + len(batch))
        given: dict[str, Any] = {
            "out": results.row.rows(rows.start, rows.stop),
            "mass_tolerance": plan.mass_tolerance / num_ranks,
            "index": cached.sparse_index[rows],
            "value": cached.sparse_value[rows],
        }
        if logits is None:
            selected = self._fused(batch).select(**given)
        else:
            selected = sparse.SELECT[self.backend](
                **given,
                logits=logits,
                labels=batch.labels,
                temperature=batch.temperature,
                softcap=self.softcap,
                combine=functools.partial(self._combine, batch) if self.group else None,
            )
        results.num_entries[rows], results.dropped_mass[rows] = selected.num_entries, selected.dropped_mass

    def _count_dense(self, logits: Tensor, batch: Batch, plan: CachePlan, num_ranks: int) -> Tensor:
        """Count how many of the chunk's first tokens would need the dense path."""
        n, plan = len(batch), plan._replace(sparse=True, num_dense=0)
        batch.start = 0  # in results of their own
        results = TokenResults.zeros(n, logits.device)
        probed = logits[:, :n]
        self._select(
            probed.clone() if self.backend == "torch" else probed,  # which selection overwrites
            batch,
            results=results,
            cached=allocate(self.weights[0], plan, n),
            plan=plan,
            num_ranks=num_ranks,
        )
        return (results.num_entries < 0).sum()

    # Backward

    def backward(
        self,
        tokens: Tensor,
        *,
        accumulator: GradientAccumulator,
        cached: Cache,
        saved: SavedForBackward,
        grad_logprobs: Tensor,
        grad_entropy: Tensor | None,
        is_only_call: bool,
    ) -> int:
        """Add the gradients of ``tokens`` to ``accumulator``. The host waits for the device once.

        Args:
            tokens: indices of the tokens that ``forward`` was called with.
            accumulator: receives the gradients.
            cached: what ``forward`` returned.
            saved: results of all N tokens.
            grad_logprobs: ``[N]``, divided by the accumulator's scale.
            grad_entropy: ``[N]``, divided likewise, or None for zeros.
            is_only_call: whether all gradients come from this call.

        Returns:
            The number of tokens whose gradient came from ``cached``.
        """
        has_grad = indexing.take(grad_logprobs, tokens) != 0
        kind: Tensor | int
        if not len(cached.probs) and not len(cached.sparse_index):
            kind = _RECOMPUTED
        elif len(cached.probs) == len(tokens) and grad_entropy is None:
            kind = _CACHED
        else:
            kind = torch.where(indexing.take(saved.num_entries, tokens) >= 0, _SPARSE, _RECOMPUTED)
            kind[: len(cached.probs)] = _CACHED
        if grad_entropy is not None:
            # What is kept does not cover the entropy: a token whose entropy has a gradient needs its logits again.
            has_entropy_grad = indexing.take(grad_entropy, tokens) != 0
            has_grad |= has_entropy_grad
            kind = kind if isinstance(kind, int) else kind.masked_fill(has_entropy_grad, _RECOMPUTED)
        recomputed, from_cache, from_sparse = indexing.partition(has_grad, kind, _NUM_KINDS)
        _log.debug(
            "backward: %d tokens cached, %d sparse, %d recomputed", len(from_cache), len(from_sparse), len(recomputed)
        )
        # The cache is read in place, in blocks as large as their hidden states allow, if all of it is used in the dtype
        # that is multiplied. Otherwise blocks of rows are gathered.
        in_place = len(from_cache) == len(cached.probs) and accumulator.projection.accepts(cached.probs.dtype)
        cache_size = self.tokens_per_hidden_block() if in_place else self.block_size()
        cache_blocks = indexing.ranges(len(from_cache), cache_size)
        recomputed_blocks = indexing.ranges(len(recomputed), self.block_size())
        columns = self._columns_per_block(len(recomputed), needs_weights=any(accumulator.needs_weights))
        num_products = len(cache_blocks) + bool(len(from_sparse)) + (1 if columns else len(recomputed_blocks))
        accumulator.single_product = is_only_call and num_products == 1
        # Sparse entries last: they need d weight zeroed, whereas the first product of the others creates it.
        if len(recomputed):
            index = indexing.take(tokens, recomputed)
            given = Upstream(index, saved, grad_logprobs=grad_logprobs, grad_entropy=grad_entropy)
            batch = self.batch(index)
            if columns:
                self._add_by_columns(batch, given, accumulator, columns)
            else:
                self._add_by_tokens(batch, given, accumulator, recomputed_blocks)
        coefficient = grad_logprobs / self.temperature
        for block in cache_blocks:
            rows = from_cache[block.start : block.stop]
            index = indexing.take(tokens, rows)
            accumulator.add_cached(
                index,
                (cached.probs[block.start : block.stop] if in_place else cached.probs[rows])[:, : self.vocab],
                factors=indexing.take(cached.factors, rows) * indexing.take(coefficient, index),
                labels=indexing.take(self.labels, index),
            )
        if len(from_sparse):
            index = tokens[from_sparse]
            entries = gather_entries(
                cached.sparse_index[from_sparse],
                cached.sparse_value[from_sparse],
                saved.num_entries[index],
                coefficient[index],
            )
            accumulator.add_sparse(index, entries, tokens_per_block=self.tokens_per_hidden_block())
        return len(from_cache) + len(from_sparse)

    def _add_by_tokens(
        self, batch: Batch, given: Upstream, accumulator: GradientAccumulator, blocks: Sequence[range]
    ) -> None:
        """Add the gradients of tokens whose logits are computed again, block by block of tokens."""
        largest = max(map(len, blocks))
        size = self.block_size() if self.is_fused else max(1, self.block_size() // 4)
        workspace = None if self.is_fused else accumulator.projection.workspace(min(size, largest))
        buffer = self.weights[0].new_empty(largest, row_stride(self.vocab))
        for block in blocks:
            logit_grads = buffer[: len(block), : self.vocab]
            for first in range(block.start, block.stop, size):
                last = min(first + size, block.stop)
                self._logit_grads(
                    accumulator.projection,
                    batch.part(first, last),
                    given.part(first, last),
                    logit_grads[first - block.start : last - block.start],
                    hiddens=batch.part(first, last).hiddens(),
                    workspace=workspace,
                )
            rows = batch.part(block.start, block.stop)
            accumulator.add(rows.tokens, rows.hiddens(), logit_grads)

    def _add_by_columns(self, batch: Batch, given: Upstream, accumulator: GradientAccumulator, size: int) -> None:
        """Add the gradients of tokens whose logits are computed again, block by block of the vocabulary.

        The log-sum-exp is known, so a block of columns needs no other. It completes its rows of d weight in one
        product, and d hidden accumulates.
        """
        n, hiddens = len(batch), batch.hiddens()
        workspace = None if self.is_fused else accumulator.projection.workspace(n, size)
        buffer = self.weights[0].new_empty(n, row_stride(size))
        sums = accumulator.begin_columns()
        for first in range(0, self.vocab, size):
            columns = slice(first, min(first + size, self.vocab))
            logit_grads = buffer[:, : columns.stop - columns.start]
            self._logit_grads(
                accumulator.projection,
                batch,
                given,
                logit_grads,
                hiddens=hiddens,
                columns=columns,
                workspace=workspace,
            )
            accumulator.add_columns(hiddens, logit_grads, columns, sums)
        accumulator.finish_columns(batch.tokens, sums)

    def _columns_per_block(self, num_tokens: int, *, needs_weights: bool) -> int:
        """Return how many columns of the logits of ``num_tokens`` tokens to compute again at a time.

        Each block of columns reads and writes the sums of d hidden, 8 H bytes per token, which has to hide behind the
        6 H FLOPs per token and column. 0 if blocks of tokens are better: d weight is not needed, or there are too many
        tokens for blocks of columns that are wide enough.
        """
        if not num_tokens or not needs_weights:
            return 0
        row = num_tokens * (4 + self.weights[0].itemsize)
        fit = max(self.chunk_bytes // 4, min(self.chunk_bytes, _LEAST_COLUMNS * row)) // row
        return min(fit // 64 * 64, self.vocab) if fit >= min(_LEAST_COLUMNS, self.vocab) else 0

    def _logit_grads(
        self,
        projection: Projection,
        batch: Batch,
        given: Upstream,
        logit_grads: Tensor,
        *,
        hiddens: list[Tensor],
        columns: slice = slice(None),
        workspace: Tensor | None,
    ) -> None:
        """Compute logits of a batch again from its hidden states, and set ``logit_grads`` to their gradients."""
        if self.is_fused:
            self._fused(batch, hiddens, columns).gradient(
                row_stats=given.row_stats,
                entropy=given.entropy,
                grad_logprobs=given.grad_logprobs,
                grad_entropy=given.grad_entropy if given.has_entropy else None,
                out=logit_grads,
            )
            return
        ROW_PASSES[self.backend].backward(
            grad_logprobs=given.grad_logprobs,
            grad_entropy=given.grad_entropy,
            logits=projection.logits(hiddens, workspace, columns),
            labels=batch.labels - columns.start if columns.start else batch.labels,
            temperature=batch.temperature,
            entropy=given.entropy,
            row_stats=given.row_stats,
            softcap=self.softcap,
            ignore_index=sparse.NO_IGNORE_INDEX,
            grad_logits=logit_grads.unsqueeze(0),
        )

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

    def tokens_per_hidden_block(self) -> int:
        """Return how many tokens' hidden states and gradients fit in ``chunk_bytes``, at 16 H bytes per token."""
        return max(256, self.chunk_bytes // (16 * sum(hidden.shape[1] for hidden in self.hiddens)))
