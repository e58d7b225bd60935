"""Sums of different difficulty, of which SmolLM2-135M-Instruct solves from few to most before training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sppo.data import load_prompts

if TYPE_CHECKING:
    from datasets import Dataset

SUMS = ((2, 1), (3, 1), (4, 1), (2, 2))
"""Terms and digits of the kinds of sums."""

Kinds = Sequence[tuple[int, int]]


def prompts(size: int, seed: int, kinds: Kinds = SUMS) -> Dataset:
    """Make sums by reasoning-gym, the kinds in turn.

    Args:
        size: number of prompts.
        seed: random seed.
        kinds: terms and digits of each kind.

    Returns:
        A dataset with the text columns ``prompt``, ``answer`` and ``kind``, terms and digits such as ``"3x1"``.
    """
    from datasets import Dataset

    rows_by_kind = []
    for terms, digits in kinds:
        of_kind = {"min_terms": terms, "max_terms": terms, "min_digits": digits, "max_digits": digits}
        made = load_prompts(
            {"name": "reasoning_gym:chain_sum", "size": -(-size // len(kinds)), "seed": seed, **of_kind}
        )
        rows_by_kind.append(
            [{"prompt": row["prompt"], "answer": row["answer"], "kind": f"{terms}x{digits}"} for row in made]
        )
    return Dataset.from_list([row for rows in zip(*rows_by_kind, strict=True) for row in rows][:size])


def training_prompts(size: int, seed: int, held_out: Dataset, kinds: Kinds = SUMS) -> Dataset:
    """Make sums like :func:`prompts` and drop those of ``held_out``; fewer than ``size`` remain."""
    from datasets import Dataset

    kept_out = set(held_out["prompt"])
    return Dataset.from_list([row for row in prompts(size, seed, kinds) if row["prompt"] not in kept_out])
