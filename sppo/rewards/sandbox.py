"""The built-in reward ``unit_tests``: run the completion's Python code against the tests of its row, in a sandbox.

It is the only reward that runs model output. ``docs/rewards.md`` describes what the sandbox prevents and what it does
not; ``jail.py`` implements it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sppo.rewards.builtin import text_after_thinking

_JAIL = Path(__file__).with_name("jail.py")
# The complete environment. Without it, libraries would start one thread per core, and each counts against the limits.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
_FENCE = re.compile(r"^[ \t]*+```[ \t]*+(\w*+)[ \t\r]*+$", re.MULTILINE)
_PYTHON = ("python", "python3", "py")
_STARTUP_SECONDS = 30.0
_KILL_SECONDS = 10.0


def unit_tests(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    *,
    tests: Sequence[str | Sequence[str]],
    seconds: float = 5.0,
    memory_mb: int = 512,
    partial: bool = False,
    isolation: str = "namespaces",
) -> list[float]:
    """Return 1.0 for a completion whose code passes all tests of its row, else 0.0.

    The code is the last closed block marked ``python`` after the thinking section. As many samples run concurrently as
    this process has cores.

    Args:
        prompts: text or chat messages.
        completions: text or chat messages.
        tests: the tests of each row: text of assert statements, or a list of such texts.
        seconds: time limit per sample, for solution and tests together.
        memory_mb: limit on the address space of each process, in MiB.
        partial: return the fraction of the texts in ``tests`` that pass.
        isolation: ``"namespaces"``: no network and no files except the interpreter's; or ``"limits"``: only limits on
            time, memory, files and processes, for use inside a container that isolates the rest and does not permit
            namespaces.

    Raises:
        ValueError: a row without tests, tests that are not valid Python, or another ``isolation``.
        RuntimeError: the sandbox cannot be set up on this machine; nothing was run.
    """
    if isolation not in ("namespaces", "limits"):
        raise ValueError(f"isolation must be 'namespaces' or 'limits', got {isolation!r}")

    def grade(prompt: Any, completion: Any, cell: str | Sequence[str]) -> float:
        row_tests = _check_tests(cell)
        code = last_code(prompt, completion)
        if code is None:
            return 0.0
        passed = count_passed(code, row_tests, seconds=seconds, memory_mb=memory_mb, isolation=isolation)
        return passed / len(row_tests) if partial else float(passed == len(row_tests))

    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1) as pool:
        return list(pool.map(grade, prompts, completions, tests))


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


def count_passed(code: str, tests: list[str], *, seconds: float, memory_mb: int, isolation: str) -> int:
    """Run the code and then the tests in a new sandbox, and return how many tests passed.

    Args:
        code: the solution.
        tests: texts of statements; each passes if it runs without an exception.
        seconds: time limit for all of it.
        memory_mb: limit on the address space of each process, in MiB.
        isolation: ``"namespaces"`` or ``"limits"``, as for :func:`unit_tests`.

    Raises:
        RuntimeError: the sandbox cannot be set up on this machine.
        subprocess.TimeoutExpired: the sandbox did not end by itself.
    """
    if sys.platform != "linux":
        raise RuntimeError(f"runs a model's code only on Linux, this is {sys.platform}; nothing was run")
    nonce = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, tempfile.NamedTemporaryFile() as verdict:
        job = {"solution": code, "tests": tests, "nonce": nonce, "folder": folder, "isolation": isolation}
        limits = {"seconds": seconds, "memory_mb": memory_mb}
        verdict_fd = os.open(verdict.name, os.O_WRONLY | os.O_APPEND)  # the jail can append to the file, not read it
        try:
            errors = _run_jail(json.dumps(job | limits).encode(), verdict_fd, seconds + _STARTUP_SECONDS)
        finally:
            os.close(verdict_fd)
        started_and_passed = verdict.read(len(nonce) * (len(tests) + 1)).count(nonce.encode())
    if not started_and_passed and errors:
        reason = (errors.decode(errors="replace").strip().splitlines() or ["no reason given"])[-1]
        raise RuntimeError(
            f"cannot set up its sandbox on this machine ({reason}); nothing was run. Isolating network and files "
            "requires Linux 5.12 and root or unprivileged user namespaces; in a container that is itself the sandbox, "
            "use unit_tests?isolation=limits"
        )
    return max(0, started_and_passed - 1)


def _run_jail(job: bytes, verdict_fd: int, seconds: float) -> bytes:
    """Run ``jail.py`` with standard output ``verdict_fd``, and return what it wrote to standard error.

    Unlike ``subprocess.run``, which waits for a killed process for ever: the kernel may not be able to end one.

    Raises:
        subprocess.TimeoutExpired: it took longer than ``seconds`` and was killed.
    """
    command = [sys.executable, "-IB", str(_JAIL)]
    jail = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=verdict_fd, stderr=subprocess.PIPE, env=_ENVIRONMENT)
    try:
        return jail.communicate(job, timeout=seconds)[1]
    except BaseException:
        jail.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            jail.wait(timeout=_KILL_SECONDS)
        raise
    finally:
        for pipe in (jail.stdin, jail.stderr):
            if pipe is not None:
                pipe.close()
