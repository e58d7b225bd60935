"""Each operation at a small size through pytest-benchmark, to compare runs over time.

Every implementation is checked against float64 before it is timed. Further options go to pytest: with
``--benchmark-autosave`` a run is kept, with ``--benchmark-compare`` the next one is compared with it, and
``--benchmark-histogram`` draws both. Sizes are small; the suite kernels has the real ones, with peaks and rates.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.harness.suite import Suite


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="at most a tenth of a second per operation")
    parser.add_argument("options", nargs=argparse.REMAINDER, metavar="...", help="options of pytest-benchmark")


def run(args: argparse.Namespace) -> int:
    """Run the tests of this folder and return pytest's exit code."""
    import pytest

    quick = ["--benchmark-max-time=0.1", "--benchmark-columns=median,iqr,rounds"] if args.quick else []
    folder = Path(__file__).parent
    return int(pytest.main([str(folder), "--benchmark-only", "-p", "no:cacheprovider", *quick, *args.options]))


SUITE = Suite(add_arguments, run, needs="pytest, pytest-benchmark")
