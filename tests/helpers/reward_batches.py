"""A batch of three samples and how to score it, for the tests of rewards."""

from __future__ import annotations

import worker_rewards

from sppo.rewards import score

PROMPTS = ["one", "two", "three"]
COMPLETIONS = ["a", "bb", "ccc"]


def spec(name):
    """Return the ``path/to/file.py:name`` of a function in ``worker_rewards.py``."""
    return f"{worker_rewards.__file__}:{name}"


def score_batch(reward, columns=None, **settings):
    """Score the batch with one reward."""
    return score([reward], PROMPTS, COMPLETIONS, columns or {}, **settings)
