"""Custom rewards, called once per completion: one for an answer in a box, one for a brief answer."""

import re

BOX = re.compile(r"\\boxed\{[^{}\n]+\}")


def text_of(completion):
    return completion if isinstance(completion, str) else completion[-1]["content"]


def boxed(completion):
    """Return 1 if the completion has exactly one closed box, else 0."""
    return float(len(BOX.findall(text_of(completion))) == 1)


def brief(completion, characters=120):
    """Return 1 up to the given number of characters, falling linearly to 0 at twice as many."""
    return min(1.0, max(0.0, 2 - len(text_of(completion)) / characters))
