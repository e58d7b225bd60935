"""Imports within each package go one way, those under TYPE_CHECKING and inside functions included."""

import ast
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ["sppo_kernels", "sppo", "benchmarks"]


def modules_of(package):
    """Return the modules of a package and their files, by dotted name."""
    paths = sorted((ROOT / package).rglob("*.py"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imported(name, modules):
    """Return the modules that a module names in its import statements."""
    found, path = set(), modules[name]
    parent = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), parent)
            names = {f"{module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules else module for name in names}
    return found & modules.keys() - {name}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circular_imports(package):
    """A package's own name is left out: it collects what users import, after everything else."""
    modules = modules_of(package)
    graph = {name: imported(name, modules) - {package} for name in modules if name != package}
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("package", [*PACKAGES, "tests"])
def test_no_module_is_long(package):
    assert {name: n for name, p in modules_of(package).items() if (n := len(p.read_text().splitlines())) > 500} == {}
