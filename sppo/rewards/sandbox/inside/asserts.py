"""Tests of a solution that runs in another interpreter: a program for the sandbox, executed after ``calls.py``."""

from __future__ import annotations

import ast
import builtins
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sppo.rewards.sandbox.inside.calls import TESTS_NAME, Peer, SolutionEnded


def run(report: Callable[[], None], *, solution: str, tests: list[str], source: str) -> None:
    """Run the tests, and call ``report`` after each that passes.

    Args:
        report: function without arguments.
        solution: Python source.
        tests: texts of statements, which share their variables; each passes if it raises nothing.
        source: the text of ``calls.py``, for the process of the solution.
    """
    sys.set_int_max_str_digits(0)
    pid = os.getpid()
    try:
        peer = start(solution, source)
    except SolutionEnded:
        return
    trees = [ast.parse(test) for test in tests]
    used = sorted({node.id for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Name)})
    if any(_is_of_the_solution(name, trees) for name in used):
        used = [name for name in used if not hasattr(builtins, name)]
    sys.modules["solution"] = _Solution(peer)
    names: dict[str, Any] = {"__name__": TESTS_NAME, "__builtins__": builtins}
    ours: dict[str, Any] = {}
    for tree in trees:
        try:
            for name, value in peer.request("names", used).items():
                if name not in names or (name in ours and names[name] is ours[name]):  # the tests did not redefine it
                    names[name] = ours[name] = value
            exec(compile(tree, "<test>", "exec"), names)
            passed = True
        except BaseException:
            passed = False
        if os.getpid() != pid or peer.has_ended:  # a process that a test forked must not report
            return
        if passed:
            report()


def _is_of_the_solution(name: str, trees: list[ast.Module]) -> bool:
    """Whether the tests use a name that neither they nor Python define.

    If there is one, a solution's own ``sum`` does not replace the built-in function. If there is none, it is ``sum``
    that they test.
    """
    if hasattr(builtins, name):
        return False
    for node in (node for tree in trees for node in ast.walk(tree)):
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


class _Solution(ModuleType):
    """The module ``solution`` in the process of the tests."""

    def __init__(self, peer: Peer) -> None:
        super().__init__("solution")
        self._peer = peer

    def __getattr__(self, name: str) -> Any:
        try:
            return self._peer.request("names", [name])[name]
        except KeyError:
            raise AttributeError(f"the solution defines no {name!r}") from None


def start(solution: str, source: str) -> Peer:
    """Start the process of the solution, and wait until it has defined its names.

    Raises:
        SolutionEnded: it raised an error or ended.
    """
    (requests, to_solution), (from_solution, replies) = os.pipe(), os.pipe()
    for end in (requests, replies):
        os.set_inheritable(end, True)
    command = [sys.executable, "-IB", "-c", source, str(requests), str(replies)]
    os.posix_spawn(sys.executable, command, os.environ)
    for end in (requests, replies):
        os.close(end)
    peer = Peer(from_solution, to_solution, is_of_tests=True)
    peer.send(solution)
    peer.receive()
    return peer
