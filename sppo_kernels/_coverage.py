"""What ``backward="auto"`` goes by: how peaked the distributions of the calls before were.

A token that a few entries do for takes one pass over the vocabulary, any other 1 + 1 + g: g of the gradients of hidden
and weight, and the logits again. If half of them are of the other kind that makes 1 + (1 + g) / 2, which is never more
than the 1 + g with all of E kept: there entries cease to pay. They are taken up at a third, so that a share that moves
about between the two does not change the way, and with it the last bits, every few calls.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from . import _vocab_shard as vocab_shard

ENTER, LEAVE = 1 / 3, 1 / 2  # share of the tokens that entries do not do for
PROBED = 16  # where nothing is selected, selection is tried on one row of so many
LEAST_VOCAB = 8  # times the most entries a token: with fewer columns a row of E costs next to nothing


class Coverage:
    """Of one head: sums over the tokens of its last call, on the device until they are read."""

    def __init__(self) -> None:
        self._by_entries = self._by_logits = False
        self._exact: Tensor | None = None  # how many of the seen ones entries do not do for
        self._seen = 0
        self._entropies: Tensor | None = None  # share of the tokens with gradients whose entropy had one

    def take_entries(self) -> bool:
        """Whether the call that begins should. Waits for the call before."""
        if _forward_again():
            return self._by_entries
        exact, seen = self._exact, self._seen
        self._exact, self._seen = None, 0
        if exact is not None:
            self._by_entries = float(exact) <= (LEAVE if self._by_entries else ENTER) * seen
        return self._by_entries

    def wants_logits(self) -> bool:
        """Whether most entropies had gradients the last time: then whatever is kept is of no use."""
        entropies = self._entropies
        if entropies is not None and not _forward_again():
            self._by_logits = float(entropies) > 1 / 2
            self._entropies = None
        return self._by_logits

    def note(self, exact: Tensor, seen: int, group: str) -> None:
        """That entries do not do for ``exact``, 0-d, of ``seen`` tokens; the most of any rank, so that all agree."""
        if group:
            exact = vocab_shard.all_reduce(exact, group, dist.ReduceOp.MAX)
        self._exact = exact if self._exact is None else self._exact + exact
        self._seen += seen

    def note_entropies(self, having_gradients: Tensor, all_with_gradients: Tensor) -> None:
        """Masks."""
        self._entropies = having_gradients.sum() / all_with_gradients.sum().clamp(min=1)


def _forward_again() -> bool:
    """Whether this is the second forward of a checkpointed module, which has to keep what the first did: autograd is
    under way."""
    return torch._C._current_graph_task_id() != -1


_coverages: dict[tuple[object, ...], Coverage] = {}


def of(weight: Tensor) -> Coverage:
    """That of the head with this weight: of its shape, dtype and device, since a parameter is another tensor under
    autocast, and after every gathering of its shards."""
    return _coverages.setdefault((weight.device, weight.dtype, *weight.shape), Coverage())


def forget() -> None:
    """As if there had been no call yet."""
    _coverages.clear()
