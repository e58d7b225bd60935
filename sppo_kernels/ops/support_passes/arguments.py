"""The sampler's support as an argument: its form, and the checks of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._validation import check_device, check_integer, check_shape, reject, values_are_checked


class Support(NamedTuple):
    """The tokens that a sampler kept, in CSR form: those of token t are ``token_ids[offsets[t] : offsets[t + 1]]``.

    An empty range stands for the complete vocabulary: the sampler did not cut there.
    """

    token_ids: Tensor  # [M] int64
    offsets: Tensor  # [N + 1] int64

    def sizes(self) -> Tensor:
        """Return how many tokens each support has, ``[N]``; 0 where the sampler did not cut."""
        return self.offsets.diff()

    def tokens(self) -> Tensor:
        """Return which token each entry of ``token_ids`` belongs to, ``[M]``."""
        entries = torch.arange(self.token_ids.shape[0], device=self.offsets.device)
        return torch.searchsorted(self.offsets[1:].contiguous(), entries, right=True).clamp_(
            max=self.offsets.shape[0] - 2
        )

    def safe(self) -> Support:
        """Return it with contiguous tensors, and with offsets that rise and do not point outside, whatever they are."""
        rising = self.offsets.clamp(0, len(self.token_ids)).cummax(0).values
        return Support(self.token_ids.contiguous(), rising)


def check_support(support: tuple[Tensor, Tensor] | None, labels: Tensor) -> Support | None:
    """Check types, shapes and devices of ``support``, and return it as int64. Values are checked where they are used.

    Raises:
        ValueError: a shape or device does not fit the labels.
        TypeError: it is not a pair of integer tensors.
    """
    if support is None:
        return None
    pair = "a pair of integer tensors (token_ids [M], offsets [N + 1]), or None"
    if not isinstance(support, tuple | list) or len(support) != 2:
        got = f"{len(support)} elements" if isinstance(support, tuple | list) else type(support).__name__
        reject("support", got, pair, TypeError)
    for name, x in zip(("support[0] (token_ids)", "support[1] (offsets)"), support, strict=True):
        if not isinstance(x, Tensor):
            reject(name, type(x).__name__, "a torch.Tensor (convert with torch.as_tensor)", TypeError)
        if x.numel():  # torch.tensor([]) is float32
            check_integer(**{name: x})
        check_device(labels.device, **{name: x})
    token_ids, offsets = support
    if token_ids.ndim != 1:
        reject("support[0] (token_ids)", f"shape {tuple(token_ids.shape)}", "of shape [M], all supports in succession")
    check_shape((labels.numel() + 1,), "one per label, and the end", **{"support[1] (offsets)": offsets})
    if not labels.numel() and token_ids.numel():
        reject("support[0] (token_ids)", f"{token_ids.numel()} tokens", "empty without labels")
    return Support(token_ids.long(), offsets.long())


def check_support_values(support: Support, labels: Tensor, vocab: int, ignore_index: int) -> None:
    """Check that offsets rise from 0 to M, and that each support is a set in ``[0, vocab)`` with its label.

    The supports of tokens without a loss are not looked at. Reads the values.
    """
    if not values_are_checked(labels):
        return
    token_ids, offsets = support
    if offsets[0] != 0 or offsets[-1] != len(token_ids):
        got = f"from {int(offsets[0])} to {int(offsets[-1])}"
        reject("support[1] (offsets)", got, f"from 0 to {len(token_ids)}, the number of token_ids")
    sizes = support.sizes()
    if (sizes < 0).any():
        first = int((sizes < 0).nonzero()[0])
        reject("support[1] (offsets)", f"{offsets[first : first + 2].tolist()} at token {first}", "ascending")
    has_loss = labels != ignore_index
    token = support.safe().tokens()
    counts = has_loss[token]
    token, ids = token[counts], token_ids[counts]
    outside = (ids < 0) | (ids >= vocab)
    if outside.any():
        where = f"{int(ids[outside][0])} in the support of token {int(token[outside][0])}"
        reject("support[0] (token_ids)", where, f"in [0, {vocab})")
    has_label = torch.zeros_like(has_loss).index_fill(0, token[ids == labels[token]], True)
    missing = has_loss & (sizes > 0) & ~has_label
    if missing.any():
        first = int(missing.nonzero()[0])
        raise ValueError(
            f"support: label {int(labels[first])} of token {first} is not among the {int(sizes[first])} tokens of its "
            "support; pass the supports with which the tokens were sampled, in the order of the labels"
        )
    keys = (token * vocab + ids).sort().values
    twice = keys[1:] == keys[:-1]
    if twice.any():
        key = int(keys[1:][twice][0])
        got = f"{key % vocab} twice in the support of token {key // vocab}"
        reject("support[0] (token_ids)", got, "without repetition")
