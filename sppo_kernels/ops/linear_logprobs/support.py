"""The LM head over the sampler's support: only the logits of tokens that the sampler kept.

    forward     rows of W in the support --> logits [M] --(support pass)--> logprob, entropy
    backward    logits --(support pass)--> their gradients --> d hidden, d weight                  (weighted_rows.py)

Of V columns a token needs those of its support, often one to twenty. Three cases need less or more:

- A support of one token has a log-probability of 0 and no gradient. Nothing is read.
- A token without a support (an empty range) takes the dense path, with the tokens of calls without supports.
- Wide supports are read out of dense logits. Computing K logits on their own reads K rows of W per token. A dense
  product reads W once for all tokens, and each multiplication takes less time. So it is faster from some share of V on,
  if there are enough such tokens. Backward then puts the gradients into dense rows.

The host waits for the device once in forward and twice in backward, and for wide supports once more in each and once
per block.

Memory: indices and numbers of each entry, at most about 100 bytes at a time. Wide supports need those of one block, and
what dense blocks of ``chunk_bytes`` take.

With a process group each rank computes the logits of its own rows. They are summed over the ranks, M numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..row_passes import RowResults
from ..support_passes import SUPPORT_PASSES, Support
from . import indexing, vocab_parallel
from .entry_logits import ENTRY_LOGITS
from .gradients import GradientAccumulator
from .lm_head import LMHead
from .matmul import Projection, row_stride
from .weighted_rows import Entries

_log = logging.getLogger(__name__)

# From which share of V on a support is wide: on a CPU as measured (docs/concepts/sampling-support.md), on a GPU where K
# rows at 3 TB/s take as long as the dense products at 700 TFLOP/s.
WIDE_SHARE = {"torch": 1 / 20, "triton": 1 / 256}

_NUM_KINDS = 3
_DENSE, _NARROW, _WIDE = range(_NUM_KINDS)


def count_entries(selected: Tensor, ids: Tensor | None, offsets: Tensor | None) -> int:
    """Count the entries of the selected tokens that are computed, for FLOP formulas; all on tensors without values."""
    if ids is None or offsets is None:
        return 0
    sizes = offsets.diff()
    return indexing.total(torch.where(selected & (sizes > 1), sizes, 0), without_values=len(ids))


class Tokens(NamedTuple):
    """Indices of tokens by how their results are computed; a support of one token needs nothing."""

    dense: Tensor
    narrow: Tensor
    wide: Tensor


class LocalEntries(NamedTuple):
    """Entries of the supports of some tokens whose rows of the output embedding are on this rank."""

    entry: Tensor  # [E], indices among all M
    row: Tensor  # [E], which of the tokens
    column: Tensor  # [E], which of this rank's rows


class SupportHead:
    """An LM head and the supports of its tokens.

    Args:
        head: the LM head.
        support: the supports of its N tokens.
        labels: ``[N]``, numbers in the complete vocabulary or ``ignore_index``.
        ignore_index: marks a token without a loss.
        first_row: ``[1]`` int64, the number of this rank's first row.
    """

    def __init__(self, head: LMHead, support: Support, *, labels: Tensor, ignore_index: int, first_row: Tensor) -> None:
        self.head, self.labels, self.ignore_index = head, labels.contiguous(), ignore_index
        self.support = support.safe()
        self.sizes, self.token = self.support.sizes(), self.support.tokens()
        self.columns = self.support.token_ids - first_row if head.group else self.support.token_ids
        self.has_support = head.loss_mask & (self.sizes > 0)
        vocab = head.vocab * vocab_parallel.num_ranks(head.group)  # roughly: ranks need not agree on what is wide
        kind = torch.where(self.sizes > WIDE_SHARE[head.backend] * vocab, _WIDE, _NARROW)
        self._kind = kind.masked_fill(self.sizes <= 0, _DENSE)

    def partition(self, selected: Tensor) -> Tokens:
        """Return the selected tokens by kind. Too few wide ones for a dense product are narrow."""
        kinds = indexing.partition(selected & (self.sizes != 1), self._kind, _NUM_KINDS)
        dense, narrow, wide = kinds
        if len(wide) * WIDE_SHARE[self.head.backend] < 1:
            narrow, wide = torch.cat([narrow, wide]).sort().values if len(wide) else narrow, wide[:0]
        return Tokens(dense, narrow, wide)

    def forward(self, tokens: Tokens, results: RowResults, vocab: int) -> Tensor:
        """Set the results of the tokens with a support. Return the logits of all supports, [M].

        Args:
            tokens: tokens with a loss.
            results: of all N tokens; the others keep theirs.
            vocab: number of tokens in the complete vocabulary.
        """
        head = self.head
        counts = len(tokens.narrow), len(tokens.wide)
        _log.debug("forward: %d tokens over their supports with single logits, %d with dense products", *counts)
        logits = torch.empty(len(self.token), dtype=torch.float32, device=self.token.device)
        is_narrow = torch.zeros_like(self.has_support).index_fill(0, tokens.narrow, True)
        token = torch.where(is_narrow[self.token], self.token, -1)
        for i, (hidden, weight) in enumerate(zip(head.hiddens, head.weights, strict=True)):
            ENTRY_LOGITS[head.backend](
                out=logits,
                hidden=hidden,
                weight=weight,
                bias=None if i else head.bias,
                token=token,
                column=self.columns,
                add=i > 0,
            )
        if len(tokens.wide):
            self._read_wide(tokens.wide, logits)
        if head.group:
            vocab_parallel.all_reduce(logits, head.group)
        SUPPORT_PASSES[head.backend].forward(
            logits=logits,
            support=self.support,
            labels=self.labels,
            temperature=head.temperature,
            softcap=head.softcap,
            ignore_index=self.ignore_index,
            vocab=vocab,
            out=results,
        )
        return logits

    def count(self, num_entries: Tensor) -> Tensor:
        """Return ``num_entries`` with the sizes of the supports in place of those of tokens that have one."""
        return torch.where(self.has_support, self.sizes.int(), num_entries)

    def _read_wide(self, wide: Tensor, logits: Tensor) -> None:
        """Set the logits of wide supports, from dense logits."""
        head = self.head
        projection, batch = Projection(head.weights, head.bias), head.batch(wide)
        chunks = indexing.ranges(len(wide), max(1, head.block_size() // 4))
        workspace = projection.workspace(len(chunks[0]))
        for chunk, part in self._blocks_of_entries(wide, chunks):
            rows = projection.logits(batch.part(chunk.start, chunk.stop).hiddens(), workspace)[0]
            logits[part.entry] = rows[part.row, part.column]
            del rows  # before the next chunk's

    def _entries(self, index: Tensor, first: int = 0, last: int | None = None) -> LocalEntries:
        """Return the entries of tokens ``index`` whose rows are on this rank. The host waits for the device.

        They are searched from entry ``first`` to ``last``.
        """
        number = torch.full_like(self.labels, -1).index_copy(0, index, torch.arange(len(index), device=index.device))
        columns, row = self.columns[first:last], number[self.token[first:last]]
        found = indexing.nonzero_indices((row >= 0) & (columns >= 0) & (columns < self.head.vocab))
        return LocalEntries(found + first, row[found], columns[found])

    def _blocks_of_entries(self, index: Tensor, blocks: list[range]) -> Iterator[tuple[range, LocalEntries]]:
        """Yield blocks of tokens ``index``, each with its entries, whose rows count from the start of the block."""
        size = len(blocks[0])
        ends = torch.arange(size - 1, len(index) + size - 1, size, device=index.device).clamp_(max=len(index) - 1)
        spans = torch.cat([self.support.offsets[index[::size]], self.support.offsets[index[ends] + 1]]).tolist()
        for block, first, last in zip(blocks, spans[: len(blocks)], spans[len(blocks) :], strict=True):
            yield block, self._entries(index[block.start : block.stop], first, last)

    def backward(
        self,
        accumulator: GradientAccumulator,
        *,
        logits: Tensor,
        entropy: Tensor,
        row_stats: Tensor,
        grad_logprobs: Tensor,
        grad_entropy: Tensor | None,
        is_only_call: bool,
    ) -> None:
        """Add the gradients of the tokens with a support.

        Args:
            accumulator: receives the gradients.
            logits: ``[M]``, what ``forward`` returned.
            entropy, row_stats: of all N tokens.
            grad_logprobs: ``[N]``, divided by the accumulator's scale.
            grad_entropy: ``[N]``, divided likewise, or None for zeros.
            is_only_call: whether all gradients come from this call.
        """
        has_grad = grad_logprobs != 0 if grad_entropy is None else (grad_logprobs != 0) | (grad_entropy != 0)
        _, narrow, wide = self.partition(has_grad & self.has_support)

        def gradients(entry: Tensor) -> Tensor:
            return SUPPORT_PASSES[self.head.backend].backward(
                logits=logits,
                support=self.support,
                labels=self.labels,
                temperature=self.head.temperature,
                softcap=self.head.softcap,
                entry=entry,
                token=self.token[entry],
                entropy=entropy,
                row_stats=row_stats,
                grad_logprobs=grad_logprobs,
                grad_entropy=grad_entropy,
            )

        blocks = indexing.ranges(len(wide), self.head.block_size())
        accumulator.single_product = is_only_call and len(blocks) + bool(len(narrow)) == 1
        if len(wide):
            batch, vocab = self.head.batch(wide), self.head.vocab
            buffer = self.head.weights[0].new_empty(len(blocks[0]), row_stride(vocab))
            for block, part in self._blocks_of_entries(wide, blocks):
                logit_grads = buffer[: len(block), :vocab].zero_()
                logit_grads[part.row, part.column] = gradients(part.entry).to(buffer.dtype)
                rows = batch.part(block.start, block.stop)
                accumulator.add(rows.tokens, rows.hiddens(), logit_grads)
        # Entries last: they need d weight zeroed, whereas the first product creates it.
        if len(narrow):
            entries = self._entries(narrow)
            accumulator.add_sparse(
                narrow,
                Entries(entries.row, entries.column, weight=gradients(entries.entry)),
                tokens_per_block=self.head.tokens_per_hidden_block(),
            )
