"""Imports between the package's modules go one way, those under TYPE_CHECKING and inside functions included."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import sppo

ROOT = Path(sppo.__file__).parent
MODULES = {
    ".".join(["sppo", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}


def imported(name):
    """Modules of the package that a module names in its import statements."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found & MODULES.keys() - {name, "sppo"}


def test_no_circular_imports():
    TopologicalSorter({name: imported(name) for name in MODULES if name != "sppo"}).prepare()


def test_no_module_is_long():
    assert {name: n for name, path in MODULES.items() if (n := len(path.read_text().splitlines())) > 500} == {}
