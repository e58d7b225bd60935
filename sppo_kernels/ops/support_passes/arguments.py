"""The sampler's support as an argument: its form, and the checks of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._validation import check_device, check_integer, check_shape, reject, values_are_checked


class Support(NamedTuple):
    """The tokens that a sampler kept, in CSR form: those of token t are ``token_ids[offsets[t] : offsets[t + 1]]``.

    An empty range stands for the complete vocabulary: the sampler did not cut there.

    Attributes:
        token_ids: ``[M]`` integers, all supports in succession.
        offsets: ``[N + 1]`` integers, where each begins, and where the last one ends.
    """

    token_ids: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, kept: Sequence[Sequence[int]]) -> Support:
        """Make it from a list of token ids per token, as vLLM and SGLang return them: int32 and int64 on the CPU.

        An empty list stands for a token that was not cut.

        Raises:
            TypeError: the token ids are not integers.
        """
        ids = torch.tensor([token for tokens in kept for token in tokens], device="cpu")
        if ids.numel():  # torch.tensor([]) is float32
            check_integer(token_ids=ids)
        return cls(ids.int(), offsets_of(torch.tensor([len(tokens) for tokens in kept], device="cpu")))

    @classmethod
    def cat(cls, parts: Sequence[Support]) -> Support:
        """Concatenate the supports of successive tokens."""
        token_ids, sizes = zip(*((part.token_ids, part.sizes()) for part in parts), strict=True)
        return cls(torch.cat(token_ids), offsets_of(torch.cat(sizes)))

    def select(self, mask: Tensor) -> Support:
        """Return the supports of the tokens where ``mask`` ``[N]`` is set."""
        return Support(self.token_ids[mask[self.tokens()]], offsets_of(self.sizes()[mask]))

    def sizes(self) -> Tensor:
        """Return how many tokens each support has, ``[N]``; 0 where the sampler did not cut."""
        return self.offsets.diff()

    def tokens(self) -> Tensor:
        """Return which token each entry of ``token_ids`` belongs to, ``[M]``."""
        ends = self.offsets[1:].contiguous()
        entries = torch.arange(self.token_ids.shape[0], device=ends.device)
        return torch.searchsorted(ends, entries, right=True).clamp_(max=ends.shape[0] - 1)

    def has_labels(self, labels: Tensor) -> Tensor:
        """Return which of the ``labels`` ``[N]`` are in their support, or are not cut."""
        token = self.tokens()
        return (self.sizes() == 0).index_fill(0, token[self.token_ids == labels[token]], True)

    def safe(self) -> Support:
        """Return it with contiguous tensors, and with offsets that rise and do not point outside, whatever they are."""
        rising = self.offsets.clamp(0, len(self.token_ids)).cummax(0).values
        return Support(self.token_ids.contiguous(), rising)


def offsets_of(sizes: Tensor) -> Tensor:
    """Return where ranges of these sizes begin, and where the last one ends, int64 ``[N + 1]``."""
    return torch.cat([sizes.new_zeros(1, dtype=torch.int64), sizes.long().cumsum(0)])


def read_support(name: str, value: Any, completion: Sequence[int], vocab: int) -> Support:
    """Read and check the support of one completion, as a rollout engine returns it.

    Args:
        name: what ``value`` is, for errors.
        value: a list with the token ids that the sampler kept for each token (see ``Support.of``), or a tuple
            ``(token_ids, offsets)`` of tensors, arrays or lists.
        completion: the token ids of the completion.
        vocab: number of tokens in the vocabulary.

    Returns:
        int32 and int64 tensors on the CPU.

    Raises:
        ValueError: the value is no support, or does not fit the completion.
    """
    try:
        is_csr = isinstance(value, tuple)
        given = tuple(torch.as_tensor(x, device="cpu") for x in value) if is_csr else Support.of(value)
    except (TypeError, ValueError) as error:
        want = "a list with the token ids that the sampler kept for each token, or a tuple (token_ids, offsets)"
        raise ValueError(f"{name} must be {want}: {error}") from error
    labels = torch.tensor(completion, dtype=torch.long, device="cpu")
    try:
        support = check_support(given, labels)
        assert support is not None
        check_support_values(support, labels, vocab, ignore_index=-1)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}, for a completion of {len(labels)} tokens: {error}") from error
    return Support(support.token_ids.int(), support.offsets)


def check_support(support: tuple[Tensor, ...] | None, labels: Tensor) -> Support | None:
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
    token = support.tokens()
    counts = has_loss[token]
    token, ids = token[counts], token_ids[counts]
    outside = (ids < 0) | (ids >= vocab)
    if outside.any():
        where = f"{int(ids[outside][0])} in the support of token {int(token[outside][0])}"
        reject("support[0] (token_ids)", where, f"in [0, {vocab})")
    missing = has_loss & ~support.has_labels(labels)
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
