"""The built-in reward ``unit_tests``: the completion's Python code passes the tests of its row, run in a sandbox.

Nothing that a model wrote is run unless this reward was chosen. What the sandbox holds off, and what it cannot, is told
in ``docs/rewards.md``; how it does so in ``jail.py``.
"""

from __future__ import annotations

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

from sppo.rewards.builtin import after_thoughts

_JAIL = Path(__file__).with_name("jail.py")
# No environment but this: libraries would start a thread a core, each of which counts against the limits.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
_FENCE = re.compile(r"^[ \t]*+```[ \t]*+(\w*+)[ \t\r]*+$", re.MULTILINE)
_PYTHON = ("python", "python3", "py")
_START = 30.0


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
    """1.0 where the last closed block marked ``python`` after the thoughts passes all its tests, else 0.0.

    As many samples run at a time as this process has cores.

    Args:
        tests: a row's tests: text of assert statements, or a list of such texts.
        seconds: the limit on a sample's time, solution and tests together.
        memory_mb: the limit on the address space of a process, in MiB.
        partial: give the share of the texts in ``tests`` that pass.
        isolation: ``"namespaces"``: no network and no files but the interpreter's; or ``"limits"``: those on time,
            memory, files and processes alone, where a container around all of it does the rest and forbids namespaces
            inside.

    Raises:
        ValueError: a row without tests, tests that are no Python, or another ``isolation``.
        RuntimeError: the sandbox cannot be set up here; nothing was run.
    """
    if isolation not in ("namespaces", "limits"):
        raise ValueError(f"isolation must be 'namespaces' or 'limits', got {isolation!r}")

    def grade(prompt: Any, completion: Any, texts: str | Sequence[str]) -> float:
        row = _read_tests(texts)
        code = last_code(prompt, completion)
        if code is None:
            return 0.0
        passed = count_passed(code, row, seconds=seconds, memory_mb=memory_mb, isolation=isolation)
        return passed / len(row) if partial else float(passed == len(row))

    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1) as pool:
        return list(pool.map(grade, prompts, completions, tests))


def last_code(prompt: Any, completion: Any) -> str | None:
    """The last closed block marked ``python`` after the thoughts, None where there is none."""
    parts = _FENCE.split(after_thoughts(prompt, completion) or "")  # prose, language, text, language, text, ...
    languages, texts = parts[1::2], parts[2::2]
    codes = [
        code
        for language, code, following in zip(languages, texts, languages[1:], strict=False)
        if language.lower() in _PYTHON and not following  # a fence that closes names no language
    ]
    return codes[-1] if codes else None


def _read_tests(texts: str | Sequence[str]) -> list[str]:
    tests = [texts] if isinstance(texts, str) else list(texts)
    if not any(test.strip() for test in tests):
        raise ValueError("the column 'tests' is empty; give text of assert statements, or a list of such texts")
    for test in tests:
        try:
            compile(test, "<test>", "exec")
        except SyntaxError as error:
            raise ValueError(f"the column 'tests' holds what is not Python ({error}): {test[:80]!r}") from error
    return tests


def count_passed(code: str, tests: list[str], *, seconds: float, memory_mb: int, isolation: str) -> int:
    """Run the code in a sandbox of its own, and then the tests; how many of them passed.

    Raises:
        RuntimeError: the sandbox cannot be set up here.
    """
    if sys.platform != "linux":
        raise RuntimeError(f"runs a model's code on Linux only, this is {sys.platform}; nothing was run")
    nonce = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, tempfile.NamedTemporaryFile() as verdict:
        job = {"solution": code, "tests": tests, "nonce": nonce, "folder": folder, "isolation": isolation}
        limits = {"seconds": seconds, "memory_mb": memory_mb}
        told = os.open(verdict.name, os.O_WRONLY | os.O_APPEND)  # to be added to, not to be read
        try:
            jail = subprocess.run(
                [sys.executable, "-IB", _JAIL],
                input=json.dumps(job | limits).encode(),
                stdout=told,
                stderr=subprocess.PIPE,
                env=_ENVIRONMENT,
                timeout=seconds + _START,
            )
        finally:
            os.close(told)
        started_and_passed = verdict.read(len(nonce) * (len(tests) + 1)).count(nonce.encode())
    if not started_and_passed and jail.stderr:
        reason = (jail.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"])[-1]
        raise RuntimeError(
            f"cannot set up its sandbox here ({reason}); nothing was run. Cutting off network and files takes Linux "
            "5.12 and root or unprivileged user namespaces; in a container that is itself the sandbox, choose "
            "unit_tests?isolation=limits"
        )
    return max(0, started_and_passed - 1)
