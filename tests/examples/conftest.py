"""Make the examples importable, which are scripts that import their neighbours."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
