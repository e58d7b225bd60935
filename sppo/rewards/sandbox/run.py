"""The built-in rewards ``unit_tests`` and ``reasoning_gym``, which run in a sandbox.

``unit_tests`` runs the completion's Python code against the tests of its row. Verifiers of ``reasoning_gym`` may
evaluate the answer. No other built-in reward runs what a model wrote. ``docs/rewards.md`` describes what the sandbox
prevents and what it does not; ``jail.py`` implements it.
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

from sppo.rewards.builtin import final_answer, text_after_thinking
from sppo.rewards.processes import num_cores

_JAIL = Path(__file__).with_name("jail.py")
_REASONING_VERIFIER = Path(__file__).with_name("reasoning_verifier.py")
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
    _check_isolation(isolation)

    def grade(prompt: Any, completion: Any, cell: str | Sequence[str]) -> float:
        row_tests = _check_tests(cell)
        code = last_code(prompt, completion)
        if code is None:
            return 0.0
        passed = count_passed(code, row_tests, seconds=seconds, memory_mb=memory_mb, isolation=isolation)
        return passed / len(row_tests) if partial else float(passed == len(row_tests))

    with ThreadPoolExecutor(num_cores()) as pool:
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
    nonce = secrets.token_hex(16)
    job = {"solution": code, "tests": tests, "nonce": nonce}
    verdict = _run_jail(job, seconds=seconds, memory_mb=memory_mb, isolation=isolation)
    return max(0, verdict[: len(nonce) * (len(tests) + 1)].count(nonce.encode()) - 1)


def reasoning_gym(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    *,
    entry: Sequence[str],
    seconds: float = 2.0,
    memory_mb: int = 1024,
    isolation: str = "namespaces",
) -> list[float | Exception]:
    """Score the final answer with the verifier of its reasoning-gym task, from 0 to 1; some tasks give partial credit.

    Verifiers of some tasks evaluate the answer as Python, so all of them run in the sandbox, a process per answer. One
    that exceeds a limit scores 0.

    Args:
        prompts: text or chat messages.
        completions: text or chat messages.
        entry: JSON, as written by :func:`sppo.data.load_prompts`: the task, its options and reasoning-gym's entry.
        seconds: time limit per answer.
        memory_mb: limit on the address space of each process, in MiB.
        isolation: as for :func:`unit_tests`.

    Returns:
        A score, or the error that the verifier raised, per completion.

    Raises:
        RuntimeError: the sandbox cannot be set up on this machine, or has no reasoning-gym; nothing was run.
    """
    _check_isolation(isolation)
    answers = [final_answer(p, c, multiline=True) for p, c in zip(prompts, completions, strict=True)]
    scores: list[float | Exception] = [0.0] * len(answers)
    given = [i for i, answer in enumerate(answers) if answer]
    samples = [(entry[i], answers[i]) for i in given]
    values = _judge(_REASONING_VERIFIER, samples, seconds=seconds, memory_mb=memory_mb, isolation=isolation)
    for i, value in zip(given, values, strict=True):
        scores[i] = value
    return scores


def _judge(
    program: Path, samples: Sequence[Sequence[Any]], *, seconds: float, memory_mb: int, isolation: str
) -> list[float | Exception]:
    """Call ``judge(*sample)`` of a program of this package for each sample in one sandbox.

    Args:
        program: a file with functions ``prepare`` and ``judge``.
        samples: arguments that are JSON.
        seconds: time limit per sample.
        memory_mb: limit on the address space of each process, in MiB.
        isolation: ``"namespaces"`` or ``"limits"``.

    Returns:
        A number, or what went wrong, per sample.

    Raises:
        RuntimeError: the sandbox cannot be set up on this machine.
    """
    if not samples:
        return []
    job = {"program": program.read_text(), "samples": samples, "seconds_per_sample": seconds, "at_once": num_cores()}
    total = _STARTUP_SECONDS + 2 * seconds * len(samples)  # some may be repeated
    verdict = _run_jail(job, seconds=total, memory_mb=memory_mb, isolation=isolation)
    found = dict(json.loads(line) for line in verdict.splitlines() if line)
    values = [found.get(i, "not judged: another answer may have ended the sandbox") for i in range(len(samples))]
    return [value if isinstance(value, float) else ValueError(value) for value in values]


def _run_jail(job: dict[str, Any], *, seconds: float, memory_mb: int, isolation: str) -> bytes:
    """Run ``jail.py`` with limits for all of the job, and return what it wrote to its standard output.

    Raises:
        RuntimeError: it wrote nothing, because the sandbox cannot be set up on this machine.
        subprocess.TimeoutExpired: the sandbox did not end by itself.
    """
    if sys.platform != "linux":
        raise RuntimeError(f"runs what a model wrote only on Linux, this is {sys.platform}; nothing was run")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, tempfile.NamedTemporaryFile() as verdict:
        job = {**job, "folder": folder, "isolation": isolation, "seconds": seconds, "memory_mb": memory_mb}
        verdict_fd = os.open(verdict.name, os.O_WRONLY | os.O_APPEND)  # the jail can append to the file, not read it
        try:
            errors = _communicate(json.dumps(job).encode(), verdict_fd, seconds + _STARTUP_SECONDS)
        finally:
            os.close(verdict_fd)
        output = verdict.read()
    if not output and errors:
        reason = (errors.decode(errors="replace").strip().splitlines() or ["no reason given"])[-1]
        raise RuntimeError(
            f"cannot set up its sandbox on this machine ({reason}); nothing was run. Isolating network and files "
            "requires Linux 5.12 and root or unprivileged user namespaces; in a container that is itself the sandbox, "
            "use the option isolation=limits, as in unit_tests?isolation=limits"
        )
    return output


def _check_isolation(isolation: str) -> None:
    if isolation not in ("namespaces", "limits"):
        raise ValueError(f"isolation must be 'namespaces' or 'limits', got {isolation!r}")


def _communicate(job: bytes, verdict_fd: int, seconds: float) -> bytes:
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
