"""Tests of a solution that runs in another interpreter: a program for the sandbox, executed after ``calls.py``."""

from __future__ import annotations

import ast
import builtins
import os
import symtable
import sys
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sppo.rewards.sandbox.inside.calls import TESTS_NAME, Peer, SolutionEnded


def run(report: Callable[[], None], *, solution: str, tests: list[str], sources: list[str]) -> None:
    """Run the tests, and call ``report`` after each that passes.

    Args:
        report: function without arguments.
        solution: Python source.
        tests: texts of statements, which share their variables; each passes if it raises nothing.
        sources: the texts of ``remote.py`` and ``calls.py``, for the process of the solution.
    """
    sys.set_int_max_str_digits(0)
    pid = os.getpid()
    names: dict[str, Any] = {"__name__": TESTS_NAME, "__builtins__": builtins}
    trees = [ast.parse(test) for test in tests]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    used = {node.id for node in nodes if isinstance(node, ast.Name) and not node.id.startswith("__")}
    own = {name for name in used if not hasattr(builtins, name)}
    try:
        peer = start(solution, sources, names, defines_classes=any(isinstance(node, ast.ClassDef) for node in nodes))
    except SolutionEnded:
        return
    sys.modules["solution"] = _Solution(peer)
    if (
        _imports_solution(nodes)
        or any(_is_of_the_solution(name, nodes) for name in own)
        or peer.request("names", [*own])
    ):
        used = own  # what is tested has a name of its own, so built-in functions are Python's
    for test, tree in zip(tests, trees, strict=True):
        before, peer.has_failed = dict(names), False
        try:
            found = peer.request("names", sorted(used))
            names.update({name: found[name] for name in used & found.keys()})
            before = dict(names)
            used -= _defined(test)
            exec(compile(tree, "<test>", "exec", dont_inherit=True), names)
            passed = not peer.has_failed
        except BaseException:
            passed = False
        used -= {name for name, x in names.items() if name not in before or before[name] is not x}
        if os.getpid() != pid or peer.has_ended:  # a process that a test forked must not report
            return
        if passed:
            report()


def _defined(test: str) -> set[str]:
    """Return the names that a test gives a meaning of its own."""
    symbols = symtable.symtable(test, "<test>", "exec").get_symbols()
    return {symbol.get_name() for symbol in symbols if symbol.is_assigned() or symbol.is_imported()}


def _is_of_the_solution(name: str, nodes: list[ast.AST]) -> bool:
    """Whether a name that is no built-in's is not the tests' own either."""
    for node in nodes:
        if isinstance(node, ast.Name) and node.id == name and not isinstance(node.ctx, ast.Load):
            return False
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node.name == name:
            return False
        if isinstance(node, ast.arg) and node.arg == name:
            return False
        if isinstance(node, ast.ExceptHandler) and node.name == name:
            return False
        if isinstance(node, ast.alias) and (node.asname or node.name.split(".")[0]) == name:
            return False
    return True


def _imports_solution(nodes: list[ast.AST]) -> bool:
    return any(
        (isinstance(node, ast.ImportFrom) and node.module == "solution")
        or (isinstance(node, ast.Import) and any(alias.name == "solution" for alias in node.names))
        for node in nodes
    )


class _Solution(ModuleType):
    """The module ``solution`` in the process of the tests."""

    def __init__(self, peer: Peer) -> None:
        super().__init__("solution")
        self._peer = peer

    def __getattr__(self, name: str) -> Any:
        if name == "__all__":
            return [str(found) for found in self._peer.request("names", None)]
        if name.startswith("__"):  # with a __path__ files of the solution would be imported
            raise AttributeError(name)
        try:
            return self._peer.request("names", [name])[name]
        except KeyError:
            raise AttributeError(f"the solution defines no {name!r}") from None


def start(solution: str, sources: list[str], names: dict[str, Any], *, defines_classes: bool) -> Peer:
    """Start the process of the solution, and wait until it has defined its names.

    Args:
        solution: Python source.
        sources: what the process executes before.
        names: variables of the tests; their classes are also the solution's.
        defines_classes: whether there may be any.

    Raises:
        SolutionEnded: it raised an error or ended.
    """
    (requests, to_solution), (from_solution, replies) = os.pipe(), os.pipe()
    for end in (requests, replies):
        os.set_inheritable(end, True)
    program = f"for text in {sources!r}: exec(compile(text, '<program>', 'exec', dont_inherit=True))"
    os.posix_spawn(sys.executable, [sys.executable, "-IB", "-c", program, str(requests), str(replies)], os.environ)
    for end in (requests, replies):
        os.close(end)
    peer = Peer(from_solution, to_solution, is_of_tests=True, names=names)
    peer.send(solution, defines_classes)
    peer.receive()
    return peer
