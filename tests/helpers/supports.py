"""Sampling supports for tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from against_float64 import DEVICE
from torch import Tensor

IGNORED = -100


def support_of(labels: Tensor, sizes: Sequence[int], vocab: int) -> tuple[Tensor, Tensor]:
    """Make supports of given sizes: distinct tokens in random order, the label anywhere among them; 0 for no cut."""
    ids = []
    for label, size in zip(labels.tolist(), sizes, strict=True):
        others = torch.randperm(vocab)
        own = torch.cat([torch.tensor([label]), others[others != label]]) if label >= 0 else others
        ids.append(own[:size][torch.randperm(min(size, vocab))])
    offsets = torch.tensor([0, *map(len, ids)]).cumsum(0)
    return torch.cat(ids).int().to(DEVICE), offsets.to(DEVICE)


def random_sizes(n: int, largest: int, vocab: int) -> list[int]:
    """Draw sizes: a quarter of 1, some of 0 and of everything, the others up to ``largest``."""
    drawn = torch.randint(1, largest + 1, (n,)).tolist()
    kinds = torch.rand(n).tolist()
    return [0 if k < 0.1 else 1 if k < 0.35 else vocab if k > 0.95 else d for k, d in zip(kinds, drawn, strict=True)]
