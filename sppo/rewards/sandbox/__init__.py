"""The built-in rewards that execute what a model wrote, or what a dataset contains, and the sandbox that they do it in.

``run.py`` starts the sandbox. ``inside/`` is what happens in it: ``jail.py`` sets it up and executes one of the
programs beside it. ``docs/guides/rewards.md`` describes what the sandbox prevents and what it does not.
"""

from sppo.rewards.sandbox.asserts import unit_tests
from sppo.rewards.sandbox.reasoning import reasoning_gym
from sppo.rewards.sandbox.standard_io import stdin_stdout

__all__ = ["reasoning_gym", "stdin_stdout", "unit_tests"]
