"""Sampling supports of completions: from what a rollout engine returns to the argument of one call."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from .._validation import reject
from ..ops.support_passes import Support, check_support, check_support_values

NO_SUCH_TOKEN = -1


def completion_supports(name: str, values: Any, completions: Sequence[Sequence[int]], vocab: int) -> list[Support]:
    """Read and check the supports of a rollout's completions.

    Args:
        name: the field's name, for errors.
        values: one support per completion. It is a list with the token ids that the sampler kept for each token, where
            an empty list stands for the complete vocabulary, or a tuple ``(token_ids, offsets)`` as
            :func:`sppo_kernels.linear_logprobs` takes it. None means that no token of this completion was cut.
        completions: the token ids of each completion.
        vocab: number of entries of the vocabulary.

    Raises:
        ValueError: the number of supports is wrong, or one of them does not fit its completion.
    """
    want = f"a list of {len(completions)} supports, one per completion"
    if not isinstance(values, list | tuple):
        reject(name, type(values).__name__, want)
    if len(values) != len(completions):
        reject(name, f"{len(values)} supports", want)
    return [
        _completion_support(f"{name}[{i}]", value, completion, vocab)
        for i, (value, completion) in enumerate(zip(values, completions, strict=True))
    ]


def _completion_support(name: str, value: Any, completion: Sequence[int], vocab: int) -> Support:
    labels = torch.tensor(completion, dtype=torch.long, device="cpu")
    try:
        support = check_support(_pair(value, len(labels)), labels)
        assert support is not None
        check_support_values(support, labels, vocab, ignore_index=NO_SUCH_TOKEN)
    except (TypeError, ValueError) as error:
        want = "a list with the token ids that the sampler kept for each token, a tuple (token_ids, offsets), or None"
        raise ValueError(f"{name}, of a completion of {len(labels)} tokens, must be {want}: {error}") from error
    return support


def _pair(value: Any, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Return token_ids [M] and offsets [N + 1] on the CPU."""
    if isinstance(value, tuple) and len(value) == 2 and (num_tokens != 2 or len(value[1]) == 3):
        return torch.as_tensor(value[0], device="cpu"), torch.as_tensor(value[1], device="cpu")
    rows = [[]] * num_tokens if value is None else value
    token_ids = list(chain.from_iterable(rows))
    offsets = [0, *accumulate(map(len, rows))]
    dtype = None if token_ids else torch.long  # else inferred, so that floats are rejected and not truncated
    return torch.tensor(token_ids, dtype=dtype, device="cpu"), torch.tensor(offsets, device="cpu")


def batch_support(supports: Sequence[Support], mask: Tensor) -> Support:
    """Concatenate the supports of the unmasked tokens of completions, row by row.

    Args:
        supports: one per completion.
        mask: ``[B, T]`` bool on the CPU; completions begin in column 0.
    """
    token_ids, sizes = [], []
    for support, row in zip(supports, mask, strict=True):
        kept = row[: len(support.offsets) - 1]
        token_ids.append(support.token_ids[kept[support.tokens()]])
        sizes.append(support.sizes()[kept])
    offsets = torch.cat([torch.zeros(1, dtype=torch.long, device="cpu"), torch.cat(sizes).cumsum(0)])
    return Support(torch.cat(token_ids), offsets)
