"""What every suite does with its results: where they go, and what stands at their head."""

from __future__ import annotations

import argparse
import json
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import triton

import sppo_kernels


def add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path("runs/benchmarks"), metavar="DIR", help="where the JSON goes (%(default)s)"
    )


def write(path: Path, suite: str, **content: Any) -> None:
    """The results of a suite, with date and versions, as JSON."""
    versions = {
        "sppo_kernels": sppo_kernels.__version__,
        "triton": triton.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    head = {"suite": suite, "date": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**head, **content}, indent=1, default=str) + "\n")
