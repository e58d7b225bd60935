"""Sampling supports of completions: from what a rollout function returns to the argument of one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .._validation import reject
from ..ops.support_passes import Support, read_support


def completion_supports(name: str, values: Any, completions: Sequence[Sequence[int]], vocab: int) -> list[Support]:
    """Read and check the supports of a rollout's completions.

    Args:
        name: the field's name, for errors.
        values: one support per completion, as ``read_support`` takes it, or None where no token was cut.
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
        read_support(f"{name}[{i}]", [[]] * len(completion) if value is None else value, completion, vocab)
        for i, (value, completion) in enumerate(zip(values, completions, strict=True))
    ]


def batch_support(supports: Sequence[Support], mask: Tensor) -> Support:
    """Concatenate the supports of the unmasked tokens of completions, row by row.

    Args:
        supports: one per completion.
        mask: ``[B, T]`` bool on the CPU; completions begin in column 0.
    """
    return Support.cat([s.select(row[: len(s.offsets) - 1]) for s, row in zip(supports, mask, strict=True)])
