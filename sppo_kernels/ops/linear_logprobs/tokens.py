"""Tokens of a call: their hidden states, results and upstream gradients, and parts of them."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor

from ..row_passes import RowResults
from . import indexing


class TokenResults(NamedTuple):
    """Results of N tokens."""

    row: RowResults
    dropped_mass: Tensor  # [N], probability that is in no sparse entry
    num_entries: Tensor  # [N] int32: entries on this rank, or RECOMPUTED, or CACHED

    @classmethod
    def zeros(cls, num_tokens: int, device: torch.device) -> TokenResults:
        """Allocate results of tokens without a loss."""
        row = RowResults.empty(num_tokens, device)
        for field in row:
            field.zero_()
        num_entries = torch.zeros(num_tokens, dtype=torch.int32, device=device)
        return cls(row, dropped_mass=torch.zeros(num_tokens, device=device), num_entries=num_entries)

    def set(self, tokens: Tensor, results: TokenResults) -> None:
        """Set the results of ``tokens``."""
        for mine, theirs in zip(
            (*self.row, self.dropped_mass, self.num_entries),
            (*results.row, results.dropped_mass, results.num_entries),
            strict=True,
        ):
            mine.index_copy_(-1, tokens, theirs)

    def among(self, num_tokens: int, tokens: Tensor) -> TokenResults:
        """Return the results of ``num_tokens`` tokens, of which only ``tokens`` have a loss."""
        if len(tokens) == num_tokens:
            return self
        everyone = TokenResults.zeros(num_tokens, tokens.device)
        everyone.set(tokens, self)
        return everyone


class SavedForBackward(NamedTuple):
    """Results of all N tokens that backward reads."""

    entropy: Tensor  # [N]
    row_stats: Tensor  # [2, N]
    num_entries: Tensor  # [N]


class Batch:
    """Tokens of a call, in its order, with labels and temperatures ``[n]``.

    Args:
        hiddens: ``[N, H]``, and ``[N, r]`` of an adapter.
        labels: ``[N]``.
        temperature: ``[N]``.
        tokens: ``[n]``, indices among these.
    """

    def __init__(self, hiddens: list[Tensor], labels: Tensor, temperature: Tensor, tokens: Tensor) -> None:
        self.start = 0  # of these tokens, among those of the call
        self.tokens = tokens
        self.labels, self.temperature = (indexing.take(x, tokens) for x in (labels, temperature))
        self._hiddens = hiddens
        self._adjacent = len(tokens) == len(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, first: int, last: int) -> Batch:
        """Return tokens ``first`` to ``last`` of these."""
        part = copy.copy(self)
        part.start = self.start + first
        part.tokens, part.labels, part.temperature = (
            x[first:last] for x in (self.tokens, self.labels, self.temperature)
        )
        return part

    def hiddens(self) -> list[Tensor]:
        """Return their hidden states [n, H]: a view if the call has all N tokens."""
        rows = slice(self.start, self.start + len(self)) if self._adjacent else self.tokens
        return [hidden[rows] for hidden in self._hiddens]


class Upstream:
    """Upstream gradients of tokens, and what the row pass needs of their results."""

    def __init__(
        self, tokens: Tensor, saved: SavedForBackward, *, grad_logprobs: Tensor, grad_entropy: Tensor | None
    ) -> None:
        self.grad_logprobs, self.entropy, self.row_stats = (
            indexing.take(x, tokens) for x in (grad_logprobs, saved.entropy, saved.row_stats)
        )
        self.has_entropy = grad_entropy is not None
        self.grad_entropy = (
            torch.zeros_like(self.entropy) if grad_entropy is None else indexing.take(grad_entropy, tokens)
        )

    def part(self, first: int, last: int) -> Upstream:
        """Return those of tokens ``first`` to ``last`` of these."""
        part = copy.copy(self)
        for name, field in vars(self).items():
            if isinstance(field, Tensor):
                setattr(part, name, field[..., first:last])
        return part
