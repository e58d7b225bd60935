"""The order in which a run reads its prompts."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import datasets
import torch

from sppo.rollout.engine import rollout_seed


class Prompts:
    """An infinite view of the dataset, shuffled in each epoch by the epoch's number and the seed."""

    def __init__(self, dataset: datasets.Dataset, *, seed: int, shuffle: bool) -> None:
        self.dataset = dataset
        self.seed = seed
        self.shuffle = shuffle
        self._epoch = -1
        self._order: list[int] = []

    def take(self, start: int, count: int) -> list[dict[str, Any]]:
        """Return rows ``start`` to ``start + count`` of the infinite view."""
        return [self.dataset[self._index(position)] for position in range(start, start + count)]

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, len(self.dataset))
        if not self.shuffle:
            return place
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(rollout_seed(self.seed, epoch))
            self._epoch, self._order = epoch, torch.randperm(len(self.dataset), generator=generator).tolist()
        return self._order[place]


def prompt_hash(prompt_ids: Sequence[int]) -> str:
    """Return a short name of a prompt's tokens, the same in each rollout and process."""
    return blake2b(repr(list(prompt_ids)).encode(), digest_size=8).hexdigest()
