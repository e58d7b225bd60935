"""Skip the tests of trainers that this environment lacks; the Makefile builds the environments that have them."""

from importlib.util import find_spec

collect_ignore = [f"test_{name}.py" for name in ("openrlhf", "trl", "verl") if find_spec(name) is None]
