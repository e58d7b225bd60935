"""What ``backward="auto"`` remembers of earlier calls; ``cache.plan_cache`` decides with it.

A token whose logit gradient fits in a few entries takes one pass over the vocabulary. Any other takes 1 + 1 + g: g for
the gradients of hidden and weight, and the logits again. If half of the tokens are of the second kind that makes
1 + (1 + g) / 2: as many as the 1 + g of the dense cache for g = 1, and half a pass fewer for g = 2. Sparse begins at a
third and ends at a half, so that a share that moves between the two does not change the mode, and with it the last
bits, every few calls.
"""

from __future__ import annotations

import uuid
import weakref

import torch
import torch.distributed as dist
from torch import Tensor

from . import vocab_parallel

ENTER, LEAVE = 1 / 3, 1 / 2  # share of the tokens that need the dense path
PROBE_EVERY = 16  # without sparse selection, it is tried on one row in 16
MIN_VOCAB_PER_ENTRY = 8  # with a smaller vocabulary a dense row costs next to nothing

_instances: weakref.WeakValueDictionary[str, AutoBackward] = weakref.WeakValueDictionary()
_defaults: dict[tuple[object, ...], AutoBackward] = {}


class AutoBackward:
    """Chooses between "cache" and "sparse" for each call of ``linear_logprobs(..., backward=auto)``.

    It remembers how peaked the distributions of the calls so far were, so gradients differ in their last bits from
    call to call where the choice changes. One object serves one output embedding; use one per model, or per stream of
    calls that should not influence each other. ``backward="auto"`` uses a default one per shape, dtype and device of
    the weight, for the life of the process (see ``reset_defaults``).

    A copy, by ``copy`` or ``pickle``, is a new object that has seen no calls. With reentrant checkpointing nothing is
    learned, and the mode remains "cache": there every forward that records is a recomputation.

    The sums are kept on the device until they are read, which the next call does.
    """

    def __init__(self) -> None:
        self.key = uuid.uuid4().hex  # names the object in the registered operation, which takes no objects
        _instances[self.key] = self
        self.reset()

    def __reduce__(self) -> tuple[type[AutoBackward], tuple[()]]:
        """Copy and pickle as a new object: the key belongs to this one."""
        return type(self), ()

    def reset(self) -> None:
        """Forget all calls."""
        self._sparse = self._logits = False
        self._num_cached: int | None = None  # tokens that the last forward had memory for
        self._num_dense: Tensor | None = None  # how many of the tokens seen need the dense path
        self._num_seen = 0
        self._entropy_share: Tensor | None = None  # share of the tokens with gradients whose entropy had one

    def use_sparse(self) -> bool:
        """Return whether the call that begins should select sparse entries. Waits for the previous call."""
        if _is_recomputation():
            return self._sparse
        num_dense, num_seen = self._num_dense, self._num_seen
        self._num_dense, self._num_seen = None, 0
        if num_dense is not None:
            self._sparse = float(num_dense) <= (LEAVE if self._sparse else ENTER) * num_seen
        return self._sparse

    def needs_logits(self) -> bool:
        """Return whether most entropies had gradients in the last call, for which anything cached is useless."""
        if self._entropy_share is not None and not _is_recomputation():
            self._logits = float(self._entropy_share) > 1 / 2
            self._entropy_share = None
        return self._logits

    def num_cached(self, num_cacheable: int) -> int:
        """Return how many tokens to cache: as many as memory allows now, or in a recomputation as before."""
        if self._num_cached is None or not _is_recomputation():
            self._num_cached = num_cacheable
        return self._num_cached

    def record(self, num_dense: Tensor, num_seen: int, group: str) -> None:
        """Record that ``num_dense`` (0-d) of ``num_seen`` tokens need the dense path.

        With ``group`` the largest count of any rank is recorded, so that all ranks decide alike.
        """
        if group:
            num_dense = vocab_parallel.all_reduce(num_dense, group, dist.ReduceOp.MAX)
        self._num_dense = num_dense if self._num_dense is None else self._num_dense + num_dense
        self._num_seen += num_seen

    def record_entropies(self, has_entropy_grad: Tensor | None, has_grad: Tensor) -> None:
        """Record the share of tokens with a gradient whose entropy has one: boolean masks, or None for no entropy."""
        none = has_grad.new_zeros((), dtype=torch.float32)
        self._entropy_share = none if has_entropy_grad is None else has_entropy_grad.sum() / has_grad.sum().clamp(min=1)


def find(key: str, weight: Tensor) -> AutoBackward | None:
    """Return the object with this key, or None if it is gone; for "" the default of this weight.

    Defaults are found by shape, dtype and device, since a parameter is another tensor under autocast and after each
    gathering of its shards.
    """
    if key:
        return _instances.get(key)
    identity = (weight.device, weight.dtype, *weight.shape)
    if identity not in _defaults:
        _defaults[identity] = AutoBackward()
    return _defaults[identity]


def reset_defaults() -> None:
    """Discard the default of every weight."""
    _defaults.clear()


def _is_recomputation() -> bool:
    """Return whether autograd is running: a checkpointed module's second forward must decide as the first did."""
    return torch._C._current_graph_task_id() != -1
