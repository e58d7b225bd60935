"""Running a program of ``inside/`` in the sandbox."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sppo.rewards.processes import hide_environment, num_cores

_Value = TypeVar("_Value")

_INSIDE = Path(__file__).with_name("inside")
_JAIL = _INSIDE / "jail.py"
# The complete environment. Without it, libraries would start one thread per core, and each counts against the limits.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
_STARTUP_SECONDS = 30.0
_KILL_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of a sandbox.

    Attributes:
        seconds: time limit; of what, depends on the function that takes it.
        memory_mb: limit on the address space of each process, in MiB.
        isolation: ``"namespaces"``: no network and no files except the interpreter's; or ``"limits"``: only limits on
            time, memory, files, processes and system calls, for use inside a container that isolates the rest and does
            not permit namespaces.
        same_user: permit ``"limits"`` to run code as the user of this process, where there is no other.

    Raises:
        ValueError: another ``isolation``.
    """

    seconds: float
    memory_mb: int
    isolation: str = "namespaces"
    same_user: bool = False

    def __post_init__(self) -> None:
        if self.isolation not in ("namespaces", "limits"):
            raise ValueError(f"isolation must be 'namespaces' or 'limits', got {self.isolation!r}")


def run_program(*files: str, arguments: dict[str, Any], limits: Limits) -> list[str]:
    """Run a program of ``inside/`` in a new sandbox, with ``limits.seconds`` for all of it.

    Args:
        *files: the names of its files, executed in this order; the last has a function ``run``.
        arguments: of ``run``; must be JSON.
        limits: of the sandbox.

    Returns:
        The texts that it reported.

    Raises:
        RuntimeError: the sandbox cannot be set up on this machine; nothing was run.
        subprocess.TimeoutExpired: the sandbox did not end by itself.
    """
    return _run_jail({"program": [read_inside(file) for file in files], "arguments": arguments}, limits)


def read_inside(name: str) -> str:
    """Return the text of a file of ``inside/``."""
    return _INSIDE.joinpath(name).read_text()


def judge_samples(name: str, samples: Sequence[Sequence[Any]], limits: Limits) -> list[float | Exception]:
    """Call ``judge(*sample)`` of a file of ``inside/`` for each sample, in one sandbox and a process per sample.

    Args:
        name: of the file; it has functions ``prepare`` and ``judge``.
        samples: arguments that are JSON.
        limits: of the sandbox, with ``limits.seconds`` per sample.

    Returns:
        A number, or what went wrong, per sample.

    Raises:
        RuntimeError: the sandbox cannot be set up on this machine; nothing was run.
    """
    if not samples:
        return []
    each = {"seconds_per_sample": limits.seconds, "at_once": num_cores()}
    job = {"program": [read_inside(name)], "samples": samples, **each}
    total = _STARTUP_SECONDS + 2 * limits.seconds * len(samples)  # some may be repeated
    found = dict(json.loads(line) for line in _run_jail(job, limits, total))
    values = [found.get(i, "not judged: another answer may have ended the sandbox") for i in range(len(samples))]
    return [value if isinstance(value, float) else ValueError(value) for value in values]


def _run_jail(job: dict[str, Any], limits: Limits, seconds: float | None = None) -> list[str]:
    """Run ``jail.py`` with limits for all of the job, and return what it reported."""
    seconds = limits.seconds if seconds is None else seconds
    if sys.platform != "linux":
        raise RuntimeError(f"runs what a model wrote only on Linux, this is {sys.platform}; nothing was run")
    word = secrets.token_hex(16)  # only the jail knows it, so only the jail can report
    settings = {"isolation": limits.isolation, "same_user": limits.same_user, "memory_mb": limits.memory_mb}
    if limits.same_user:
        hide_environment()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, tempfile.NamedTemporaryFile() as reports:
        job = {**job, **settings, "folder": folder, "seconds": seconds, "word": word}
        fd = os.open(reports.name, os.O_WRONLY | os.O_APPEND)  # the jail can append to the file, not read it
        try:
            errors = _communicate(json.dumps(job).encode(), fd, seconds + _STARTUP_SECONDS)
        finally:
            os.close(fd)
        lines = reports.read().decode(errors="replace").splitlines()
    if not lines and errors:
        reason = (errors.decode(errors="replace").strip().splitlines() or ["no reason given"])[-1]
        remedy = (
            "in a container that is itself the sandbox, use unit_tests?isolation=limits (and so for other rewards). "
            "Isolating network and files requires Linux 5.12 on x86-64 or ARM64, and root or user namespaces"
        )
        raise RuntimeError(f"cannot set up its sandbox on this machine ({reason}); nothing was run; {remedy}")
    return [line.removeprefix(word) for line in lines[1:] if line.startswith(word)]


def _communicate(job: bytes, reports: int, seconds: float) -> bytes:
    """Run ``jail.py`` with standard output ``reports``, and return what it wrote to standard error.

    Unlike ``subprocess.run``, which waits for a killed process for ever: the kernel may not be able to end one.

    Raises:
        subprocess.TimeoutExpired: it took longer than ``seconds`` and was killed.
    """
    command = [sys.executable, "-IB", str(_JAIL)]
    jail = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=reports, stderr=subprocess.PIPE, env=_ENVIRONMENT)
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


def map_concurrently(function: Callable[..., _Value], *columns: Sequence[Any]) -> list[_Value | Exception]:
    """Call a function for each sample, as many at once as this process has cores, and return values or ValueErrors."""

    def value_or_error(*sample: Any) -> _Value | Exception:
        try:
            return function(*sample)
        except ValueError as error:
            return error

    with ThreadPoolExecutor(num_cores()) as pool:
        return list(pool.map(value_or_error, *columns))
