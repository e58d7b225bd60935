"""Chained sums modulo 10, computed step by step: a synthetic reasoning task of any length.

    prompt      7-3*2+1=
    completion  7-3=4;4*2=8;8+1=9;#9

Operators apply from left to right, modulo 10. Only the final answer, after ``#``, is graded.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

# The worker process of rewards imports this module; importing datasets only where it is needed keeps that fast.
if TYPE_CHECKING:
    from datasets import Dataset

ALPHABET = "0123456789+-*=;#"
"""All characters of prompts and completions."""

OPERATORS = "+-*"
OPERANDS = "123"
SPLITS = {"train": 7, "test": 1}
"""Eighths of all prompts in each split."""

_STEP = re.compile(r"([+*-])(\d)")
_ANSWER = re.compile(r"#(\d)\Z")


def dataset(split: str, size: int, length: int = 5, seed: int = 0) -> Dataset:
    """Generate distinct random prompts with their answers.

    Args:
        split: ``"train"`` or ``"test"``; the splits are disjoint for all seeds.
        size: number of prompts.
        length: steps per prompt.
        seed: random seed.

    Returns:
        A dataset with the text columns ``prompt`` and ``answer``.

    Raises:
        ValueError: an unknown split, a length below 1, or a size too large for the length.
    """
    from datasets import Dataset

    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    _check_length(length)
    # At most half of the split's prompts, so that rejecting duplicates below ends quickly.
    max_size = SPLITS[split] * 10 * (len(OPERATORS) * len(OPERANDS)) ** length // 16
    if not 1 <= size <= max_size:
        raise ValueError(f"size must be in [1, {max_size}] for prompts of length={length}, got {size}")
    rng = random.Random(seed)
    prompts: dict[str, str] = {}
    while len(prompts) < size:
        prompt = random_prompt(length, split, rng)
        prompts[prompt] = answer(prompt)
    return Dataset.from_dict({"prompt": list(prompts), "answer": list(prompts.values())})


def reward(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **columns: Any) -> list[float]:
    """Return 1.0 for a completion that ends in ``#`` and the correct answer, else 0.0; the steps are not graded."""
    matches = [_ANSWER.search(completion) for completion in completions]
    return [float(match is not None and match[1] == truth) for match, truth in zip(matches, answer, strict=True)]


def random_prompt(length: int, split: str, rng: random.Random) -> str:
    """Draw a prompt of ``length`` steps from a split."""
    while True:
        steps = (rng.choice(OPERATORS) + rng.choice(OPERANDS) for _ in range(length))
        prompt = f"{rng.randrange(10)}{''.join(steps)}="
        if split_of(prompt) == split:
            return prompt


def split_of(prompt: str) -> str:
    """Return the split of a prompt, ``"train"`` or ``"test"``, which depends on its hash."""
    return "test" if blake2b(prompt.encode(), digest_size=1).digest()[0] % 8 < SPLITS["test"] else "train"


def answer(prompt: str) -> str:
    """Return the correct last digit."""
    return worked_example(prompt).rpartition("#")[2]


def worked_example(prompt: str, slip: float = 0.0, rng: random.Random | None = None) -> str:
    """Write out the steps of a prompt, optionally with a teacher's mistakes in subtraction.

    Args:
        prompt: a prompt of this task.
        slip: probability that a difference ``a - b`` is computed as ``b - a``; later steps use the wrong result.
        rng: random generator of the mistakes; None for no mistakes.
    """
    value, steps = int(prompt[0]), []
    for operator, digit in _STEP.findall(prompt):
        slips = operator == "-" and rng is not None and rng.random() < slip
        result = (-1 if slips else 1) * _APPLY[operator](value, int(digit)) % 10
        steps.append(f"{value}{operator}{digit}={result};")
        value = result
    return f"{''.join(steps)}#{value}"


def prompt_tokens(length: int) -> int:
    """Return the number of characters of a prompt."""
    return 2 * length + 2


def completion_tokens(length: int) -> int:
    """Return the number of tokens of a worked example: its characters and the end of sequence."""
    _check_length(length)
    return 6 * length + 3


def _check_length(length: int) -> None:
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")


_APPLY = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
