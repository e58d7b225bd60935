"""Packed tokens by sequence: sums and means."""

from __future__ import annotations

import torch
from torch import Tensor


class Segments:
    """N packed tokens of B sequences, with a loss mask ``[N]`` or None: sums and means over tokens and sequences."""

    def __init__(self, cu_seqlens: Tensor, mask: Tensor | None, num_tokens: int, dtype: torch.dtype) -> None:
        self.mask, self.num_tokens, self.dtype = mask, num_tokens, dtype
        self.offsets = cu_seqlens.long()
        self.all_lengths = self.offsets.diff()  # [B], masked tokens included
        # [B], unmasked tokens per sequence
        self.lengths = self.all_lengths.to(dtype) if mask is None else self.sum(mask.to(dtype))
        self.tokens = self.lengths.sum()  # [], unmasked tokens
        self.sequences = (self.lengths > 0).sum().to(dtype)  # [], sequences that have unmasked tokens

    def fill_masked(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """Replace masked tokens of ``[N]`` by ``fill``."""
        return x if self.mask is None else torch.where(self.mask, x, fill)

    def difference(self, a: Tensor, b: Tensor) -> Tensor:
        """Return ``a - b`` per token, 0 where masked."""
        return self.fill_masked(a.to(self.dtype) - b.to(self.dtype))

    def sum(self, x: Tensor) -> Tensor:
        """Sum ``[N]`` within each sequence to ``[B]``."""
        return torch.segment_reduce(x, "sum", offsets=self.offsets, initial=0)

    def expand(self, x: Tensor) -> Tensor:
        """Give each token its sequence's value: ``[B]`` to ``[N]``."""
        return torch.repeat_interleave(x, self.all_lengths, output_size=self.num_tokens)

    def token_mean(self, x: Tensor) -> Tensor:
        """Average ``[N]``, which is 0 where masked, over all unmasked tokens; 0 without tokens."""
        return x.sum() / self.tokens.clamp(min=1)
