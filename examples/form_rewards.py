"""Rewards of one's own, one by one: for a completion that gives its answer in a box, and for a brief one."""

import re

BOX = re.compile(r"\\boxed\{[^{}\n]+\}")


def text_of(completion):
    return completion if isinstance(completion, str) else completion[-1]["content"]


def boxed(completion):
    """1 with one box that closes, else 0."""
    return float(len(BOX.findall(text_of(completion))) == 1)


def brief(completion, characters=120):
    """1 up to so many characters, falling to 0 at twice as many."""
    return min(1.0, max(0.0, 2 - len(text_of(completion)) / characters))
