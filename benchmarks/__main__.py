"""Command line of the benchmark suites: ``python -m benchmarks SUITE [options]``.

A suite is a module with a docstring, ``add_arguments(parser)`` and ``run(args) -> exit code``. It is imported when it
is chosen: suites of the kernels need torch, triton and numpy alone, those of the trainer what the trainer needs.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import sys
import time
from pathlib import Path

SUITES = {
    "kernels": "kernels",
    "compile": "compile",
    "traffic": "traffic",
    "flops": "flops",
    "memory": "memory",
    "sparse": "sparse",
    "learn": "learn",
    "algorithms": "algorithms",
    "step": "step",
    "trl": "trl_patch",
    "endurance": "endurance",
    "tune": "tune",
    "roofline": "roofline",
    "gpu": "gpu",
    "report": "report",
}


def docstring(module: str) -> str:
    """The docstring of a module of this package, which is not imported for it."""
    path = Path(__file__).parent / module
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.get_docstring(ast.parse(source.read_text())) or ""


def main(argv: list[str] | None = None) -> int:
    started = time.monotonic()  # before torch is imported, which takes seconds
    given = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Benchmark suites of sppo_kernels.")
    suites = parser.add_subparsers(title="suites", metavar="SUITE")
    for name, module in SUITES.items():
        description = docstring(module)
        suite = suites.add_parser(
            name,
            help=description.partition("\n")[0],
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if given[:1] == [name]:
            chosen = importlib.import_module(f"benchmarks.{module}")
            chosen.add_arguments(suite)
            suite.set_defaults(run=chosen.run, started=started)
    args = parser.parse_args(given)
    if "run" not in args:
        parser.print_help()
        return 0
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
