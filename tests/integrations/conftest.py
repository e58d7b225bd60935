"""Skip the tests of trainers that this environment lacks; the Makefile builds the environments that have them."""

from importlib.util import find_spec
from pathlib import Path

_MISSING = [name for name in ("openrlhf", "trl", "verl") if find_spec(name) is None]
collect_ignore = [file.name for name in _MISSING for file in Path(__file__).parent.glob(f"test_{name}*.py")]
