"""The reward ``unit_tests``: code against assert statements."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from sppo.rewards.builtin import text_after_thinking
from sppo.rewards.sandbox.run import Limits, map_concurrently, read_inside, run_program

_FENCE = re.compile(r"^[ \t]*+```[ \t]*+(\w*+)[ \t\r]*+$", re.MULTILINE)
_PYTHON = ("python", "python3", "py")


def unit_tests(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    *,
    tests: Sequence[str | Sequence[str]],
    seconds: float = 5.0,
    memory_mb: int = 512,
    partial: bool = False,
    isolation: str = "namespaces",
    same_user: bool = False,
) -> list[float | Exception]:
    """Return 1.0 for a completion whose code passes all tests of its row, else 0.0.

    The code is the last closed block marked ``python`` after the thinking section. It runs in an interpreter of its
    own, in which the tests call its functions. As many samples run concurrently as this process has cores.

    Args:
        prompts: text or chat messages.
        completions: text or chat messages.
        tests: the tests of each row: text of assert statements, or a list of such texts.
        seconds: time limit per sample, for solution and tests together.
        memory_mb: limit on the address space of each process, in MiB.
        partial: return the fraction of the texts in ``tests`` that pass.
        isolation: ``"namespaces"``: no network and no files except the interpreter's; or ``"limits"``: only limits on
            time, memory, files, processes and system calls, for use inside a container that isolates the rest and does
            not permit namespaces.
        same_user: permit ``isolation="limits"`` to run code as the user of this process, where there is no other.

    Returns:
        A score per completion, or a ValueError for a row without tests or with tests that are not valid Python.

    Raises:
        ValueError: another ``isolation``.
        RuntimeError: the sandbox cannot be set up on this machine; nothing was run.
    """
    limits = Limits(seconds=seconds, memory_mb=memory_mb, isolation=isolation, same_user=same_user)

    def grade(prompt: Any, completion: Any, cell: str | Sequence[str]) -> float:
        row_tests = _check_tests(cell)
        code = last_code(prompt, completion)
        if code is None:
            return 0.0
        passed = count_passed(code, row_tests, limits)
        return passed / len(row_tests) if partial else float(passed == len(row_tests))

    return map_concurrently(grade, prompts, completions, tests)


def last_code(prompt: Any, completion: Any) -> str | None:
    """Return the last closed block marked ``python`` after the thinking section, or None if there is none."""
    parts = _FENCE.split(text_after_thinking(prompt, completion) or "")  # prose, language, text, language, text, ...
    languages, texts = parts[1::2], parts[2::2]
    codes = [
        code
        for language, code, following in zip(languages, texts, languages[1:], strict=False)
        if language.lower() in _PYTHON and not following  # a closing fence names no language
    ]
    return codes[-1] if codes else None


def _check_tests(cell: str | Sequence[str]) -> list[str]:
    tests = [cell] if isinstance(cell, str) else list(cell)
    if not any(test.strip() for test in tests):
        raise ValueError("the column 'tests' is empty; give text of assert statements, or a list of such texts")
    for test in tests:
        try:
            compile(test, "<test>", "exec")
        except SyntaxError as error:
            raise ValueError(f"the column 'tests' is not valid Python ({error}): {test[:80]!r}") from error
    return tests


def count_passed(code: str, tests: list[str], limits: Limits) -> int:
    """Run the tests of a solution in a new sandbox, and return how many passed.

    Args:
        code: the solution.
        tests: texts of statements; each passes if it runs without an exception.
        limits: of the sandbox; ``limits.seconds`` is for all of it.

    Raises:
        RuntimeError: the sandbox cannot be set up on this machine.
        subprocess.TimeoutExpired: the sandbox did not end by itself.
    """
    sources = [read_inside(name) for name in ("remote.py", "calls.py")]
    arguments = {"solution": code, "tests": tests, "sources": sources}
    return len(run_program("remote.py", "calls.py", "asserts.py", arguments=arguments, limits=limits))
