"""The digit-walk task: a chain of thought of fixed length, one step per token, of which only the end is graded.

    prompt      C37          rule C, and the first two digits
    completion  1e59ab...    ``horizon`` steps; a to j are another way to write 0 to 9

Each digit follows from the two before it, ``x[t+1] = x[t-1] + rule(x[t]) mod 10``. The map is invertible, so a wrong
step changes all later states. The outcome is 1 if the last two digits and the length are right; by chance that is one
in a hundred. How a digit is written does not affect the outcome: like the choice of words in a proof, it is randomness
per token that the policy gradient has to average out, and there is more of it in a longer chain.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

# The worker process of rewards may import this module, so datasets is imported only where it is needed.
if TYPE_CHECKING:
    from datasets import Dataset

RULES = "ABCDEFGH"
DIGITS, LETTERS = "0123456789", "abcdefghij"
ALPHABET = RULES + DIGITS + LETTERS
"""All characters of prompts and completions."""

_VALUE = {character: value for forms in (DIGITS, LETTERS) for value, character in enumerate(forms)}


@cache
def rule(name: str) -> tuple[int, ...]:
    """Return the image of each digit under a rule, the same in every run."""
    rng = random.Random(f"rule {name}")
    return tuple(rng.randrange(10) for _ in DIGITS)


def prompts(split: str) -> list[str]:
    """List the prompts of "train" or "test", one in eight; the two are disjoint."""
    if split not in ("train", "test"):
        raise ValueError(f"split must be train or test, got {split!r}")
    every = [f"{name}{a}{b}" for name in RULES for a in DIGITS for b in DIGITS]
    held_out = lambda prompt: blake2b(prompt.encode(), digest_size=1).digest()[0] % 8 == 0
    return [prompt for prompt in every if held_out(prompt) == (split == "test")]


def dataset(split: str, horizon: int, copies: int = 1) -> Dataset:
    """Make a dataset of ``prompt``, ``answer`` (the end of the right walk) and ``steps``, each ``copies`` times."""
    from datasets import Dataset

    chosen = prompts(split) * copies
    answers = [walk(prompt, horizon)[-2:] for prompt in chosen]
    return Dataset.from_dict({"prompt": chosen, "answer": answers, "steps": [horizon] * len(chosen)})


def walk(prompt: str, horizon: int) -> str:
    """Return the right walk, written in digits."""
    name, *start = prompt
    step, (before, now) = rule(name), map(int, start)
    steps = []
    for _ in range(horizon):
        before, now = now, (before + step[now]) % 10
        steps.append(DIGITS[now])
    return "".join(steps)


def demonstration(prompt: str, horizon: int, slip: float, rng: random.Random) -> tuple[str, list[bool]]:
    """Return a walk in which some steps are drawn from all ten digits, and later steps continue from there.

    Args:
        prompt: a prompt of this task.
        horizon: number of steps.
        slip: probability that a step is drawn.
        rng: random numbers for the draws and for how each digit is written.

    Returns:
        The walk, and for each step whether it was drawn.
    """
    text, drawn, state = "", [], prompt
    while len(text) < horizon:
        drawn.append(rng.random() < slip)
        digit = rng.randrange(10) if drawn[-1] else int(walk(state, 1))
        state = f"{state[0]}{state[2]}{digit}"
        text += (DIGITS if rng.random() < 0.5 else LETTERS)[digit]
    return text, drawn


def reward(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], steps: Sequence[int], **columns: Any
) -> list[float]:
    """Return 1.0 for completions with all steps and the right last two digits, however written, otherwise 0.0."""
    return [
        float(len(completion) == count and [_VALUE.get(c) for c in completion[-2:]] == [int(c) for c in end])
        for completion, end, count in zip(completions, answer, steps, strict=True)
    ]
