"""Walks: a chain of thought of a set length in which each token is one step, and whose end alone is graded.

    prompt      C37          rule C, and the first two digits
    completion  1e59ab...    as many steps as the horizon says; a to j are another way to write 0 to 9

Each digit follows from the two before it, ``x[t+1] = x[t-1] + rule(x[t]) mod 10``. That map can be undone, so what a
slip changes stays changed. The outcome is 1 where the last two digits are right and the length is; by chance that is
one in a hundred. How a digit is written makes no difference to the outcome: it is what a choice of words is to a proof,
randomness of each token that the policy gradient has to average away, the more of it the longer the chain.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

# The rewards' worker process may import this module; datasets is imported where it is needed to keep that quick.
if TYPE_CHECKING:
    from datasets import Dataset

RULES = "ABCDEFGH"
DIGITS, OTHERWISE = "0123456789", "abcdefghij"
ALPHABET = RULES + DIGITS + OTHERWISE
"""All characters of prompts and completions."""

_VALUE = {character: value for forms in (DIGITS, OTHERWISE) for value, character in enumerate(forms)}


@cache
def rule(name: str) -> tuple[int, ...]:
    """What a rule makes of each digit: ten digits, the same in every run."""
    rng = random.Random(f"rule {name}")
    return tuple(rng.randrange(10) for _ in DIGITS)


def prompts(split: str) -> list[str]:
    """All of ``"train"`` or ``"test"``, one in eight; no prompt is in both."""
    if split not in ("train", "test"):
        raise ValueError(f"split must be train or test, got {split!r}")
    every = [f"{name}{a}{b}" for name in RULES for a in DIGITS for b in DIGITS]
    held_out = lambda prompt: blake2b(prompt.encode(), digest_size=1).digest()[0] % 8 == 0
    return [prompt for prompt in every if held_out(prompt) == (split == "test")]


def dataset(split: str, horizon: int, copies: int = 1) -> Dataset:
    """Columns ``prompt``, ``answer``, the end of the right walk, and ``steps``; each prompt ``copies`` times."""
    from datasets import Dataset

    chosen = prompts(split) * copies
    answers = [walk(prompt, horizon)[-2:] for prompt in chosen]
    return Dataset.from_dict({"prompt": chosen, "answer": answers, "steps": [horizon] * len(chosen)})


def walk(prompt: str, horizon: int) -> str:
    """The right walk, written plainly."""
    name, *start = prompt
    step, (before, now) = rule(name), map(int, start)
    steps = []
    for _ in range(horizon):
        before, now = now, (before + step[now]) % 10
        steps.append(DIGITS[now])
    return "".join(steps)


def demonstration(prompt: str, horizon: int, slip: float, rng: random.Random) -> tuple[str, list[bool]]:
    """A walk in which some steps are drawn from all ten digits, and what follows goes on from there.

    Args:
        prompt: of this task.
        horizon: number of steps.
        slip: probability that a step is drawn.
        rng: of the draws and of how each digit is written.

    Returns:
        The walk, and of each step whether it was drawn.
    """
    text, drawn, state = "", [], prompt
    while len(text) < horizon:
        drawn.append(rng.random() < slip)
        digit = rng.randrange(10) if drawn[-1] else int(walk(state, 1))
        state = f"{state[0]}{state[2]}{digit}"
        text += (DIGITS if rng.random() < 0.5 else OTHERWISE)[digit]
    return text, drawn


def reward(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], steps: Sequence[int], **columns: Any
) -> list[float]:
    """1.0 where a completion has all its steps and ends in the right two digits, however written; else 0.0."""
    return [
        float(len(completion) == count and [_VALUE.get(c) for c in completion[-2:]] == [int(c) for c in end])
        for completion, end, count in zip(completions, answer, steps, strict=True)
    ]
