"""Chained sums modulo 10, worked out step by step: a reasoning task of any length that a program can grade.

    prompt      7-3*2+1=
    completion  7-3=4;4*2=8;8+1=9;#9

Operators apply from left to right and only last digits are written. The outcome alone is graded: what follows ``#``.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

# The rewards' worker process imports this module; datasets is imported where it is needed to keep that quick.
if TYPE_CHECKING:
    from datasets import Dataset

ALPHABET = "0123456789+-*=;#"
"""All characters of prompts and completions."""

OPERATORS = "+-*"
OPERANDS = "123"
SPLITS = {"train": 7, "test": 1}
"""How many prompts in eight belong to each."""

_STEP = re.compile(r"([+*-])(\d)")
_ANSWER = re.compile(r"#(\d)\Z")


def dataset(split: str, size: int, length: int = 5, seed: int = 0) -> Dataset:
    """Distinct random prompts with their answers.

    Args:
        split: ``"train"`` or ``"test"``; no prompt is in both, whatever the seeds.
        size: number of prompts.
        length: steps of each.
        seed: of the draw.

    Returns:
        Columns ``prompt`` and ``answer``, both text.

    Raises:
        ValueError: an unknown split, a length below 1, or more prompts than there are of that length.
    """
    from datasets import Dataset

    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    _check_length(length)
    # Half of the split's prompts, so that the draw below ends, and soon.
    most = SPLITS[split] * 10 * (len(OPERATORS) * len(OPERANDS)) ** length // 16
    if not 1 <= size <= most:
        raise ValueError(f"size must be in [1, {most}] for prompts of length={length}, got {size}")
    rng = random.Random(seed)
    prompts: dict[str, str] = {}
    while len(prompts) < size:
        prompt = random_prompt(length, split, rng)
        prompts[prompt] = answer(prompt)
    return Dataset.from_dict({"prompt": list(prompts), "answer": list(prompts.values())})


def reward(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **columns: Any) -> list[float]:
    """1.0 where a completion ends in ``#`` and the right answer, 0.0 elsewhere; how it got there is not looked at."""
    found = [_ANSWER.search(completion) for completion in completions]
    return [float(match is not None and match[1] == right) for match, right in zip(found, answer, strict=True)]


def random_prompt(length: int, split: str, rng: random.Random) -> str:
    """A prompt of ``length`` steps that belongs to ``split``."""
    while True:
        steps = (rng.choice(OPERATORS) + rng.choice(OPERANDS) for _ in range(length))
        prompt = f"{rng.randrange(10)}{''.join(steps)}="
        if split_of(prompt) == split:
            return prompt


def split_of(prompt: str) -> str:
    """The split that a prompt belongs to, by its hash: one in eight is held out."""
    return "test" if blake2b(prompt.encode(), digest_size=1).digest()[0] % 8 < SPLITS["test"] else "train"


def answer(prompt: str) -> str:
    """The right last digit."""
    return worked(prompt).rpartition("#")[2]


def worked(prompt: str, slip: float = 0.0, rng: random.Random | None = None) -> str:
    """A worked example, as a teacher writes it who may have learned subtraction the wrong way round.

    Args:
        prompt: of this task.
        slip: probability that a difference ``a - b`` is worked out as ``b - a``; what follows goes on from there.
        rng: of the slips; not needed without them.
    """
    value, lines = int(prompt[0]), []
    for operator, digit in _STEP.findall(prompt):
        slips = operator == "-" and rng is not None and rng.random() < slip
        result = (-1 if slips else 1) * _APPLY[operator](value, int(digit)) % 10
        lines.append(f"{value}{operator}{digit}={result};")
        value = result
    return f"{''.join(lines)}#{value}"


def prompt_tokens(length: int) -> int:
    """Characters of a prompt."""
    return 2 * length + 2


def completion_tokens(length: int) -> int:
    """Characters of a worked example, and its end."""
    _check_length(length)
    return 6 * length + 3


def _check_length(length: int) -> None:
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")


_APPLY = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
