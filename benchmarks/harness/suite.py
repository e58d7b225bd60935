"""Registration of suites: each module of :mod:`benchmarks` declares a ``SUITE`` and has the name of its command.

Names and summaries are read from the file system without an import, because suites need different packages: those of
the kernels need torch, triton and numpy, those of the trainer need what the trainer needs.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import benchmarks

NOT_SUITES = ("harness", "__main__")


@dataclass(frozen=True)
class Suite:
    """What a suite module declares.

    Attributes:
        add_arguments: adds the options of the command to a parser.
        run: runs the suite with the parsed options and returns its exit code.
        tables: functions from a folder of results to a Markdown table, by the name that pages use in
            ``<!-- table: NAME DEVICE -->``.
        draw: saves the chart of a report (the parsed JSON) to a path; None if the suite has no chart of that kind.
        figures: functions like ``draw`` for further charts, by the names that their files have after the report's.
        needs: what the suite requires beyond torch, triton and numpy.
    """

    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    tables: Mapping[str, Callable[[Path], str]] = field(default_factory=dict)
    draw: Callable[[Path, dict[str, Any]], None] | None = None
    figures: Mapping[str, Callable[[Path, dict[str, Any]], None]] = field(default_factory=dict)
    needs: str = ""

    def charts(self, report: Path) -> dict[Path, Callable[[Path, dict[str, Any]], None]]:
        """Return what draws each chart of a report, by the chart's path: ``REPORT.svg`` and ``REPORT-FIGURE.svg``."""
        named = {report.with_name(f"{report.stem}-{name}.svg"): figure for name, figure in self.figures.items()}
        return ({report.with_suffix(".svg"): self.draw} if self.draw else {}) | named


def names() -> list[str]:
    """List the suites, sorted by name, without importing any of them."""
    return sorted(_sources())


def docstring(name: str) -> str:
    """Read the docstring of a suite without importing it."""
    return ast.get_docstring(ast.parse(_sources()[name].read_text())) or ""


def summary(name: str) -> str:
    """Read the first line of the docstring of a suite without importing it."""
    return docstring(name).partition("\n")[0]


def load(name: str) -> Suite:
    """Import a suite."""
    return importlib.import_module(f"benchmarks.{name}").SUITE


def _sources() -> dict[str, Path]:
    """Find the source file of each suite."""
    specs = (each.module_finder.find_spec(each.name, None) for each in pkgutil.iter_modules(benchmarks.__path__))
    return {spec.name: Path(spec.origin) for spec in specs if spec and spec.origin and spec.name not in NOT_SUITES}
