"""The order in which a run reads its prompts."""

from __future__ import annotations

from typing import Any

import datasets
import torch

from sppo.rollout.engine import rollout_seed


class Prompts:
    """An endless row of the dataset's rows: each epoch all of them, in an order that its number and the seed decide."""

    def __init__(self, dataset: datasets.Dataset, *, seed: int, shuffle: bool) -> None:
        self.dataset = dataset
        self.seed = seed
        self.shuffle = shuffle
        self._epoch = -1
        self._order: list[int] = []

    def take(self, start: int, count: int) -> list[dict[str, Any]]:
        """Rows ``start`` to ``start + count`` of the endless row."""
        return [self.dataset[self._index(position)] for position in range(start, start + count)]

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, len(self.dataset))
        if not self.shuffle:
            return place
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(rollout_seed(self.seed, epoch))
            self._epoch, self._order = epoch, torch.randperm(len(self.dataset), generator=generator).tolist()
        return self._order[place]
