"""Each file needs its trainer, which not every environment has: the Makefile makes those that the files are run in."""

from importlib.util import find_spec

collect_ignore = [f"test_{name}.py" for name in ("openrlhf", "trl", "verl") if find_spec(name) is None]
