"""Runs of a program with several inputs, a process each: a program for the sandbox."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable

_FILE = "solution.py"


def run(
    report: Callable[[str], None],
    *,
    program: str,
    driver: str | None,
    arguments: list[str],
    inputs: list[str],
    seconds: float,
    output_bytes: int,
) -> None:
    """Run the program once per input, and report the index of the input and the output, compressed, in base64.

    An output is None if the exit code was not 0. Inputs after one that exceeded the time limit are left out.

    Args:
        report: takes a line of text.
        program: Python source.
        driver: a script to run in its place, which finds the program in ``solution.py``.
        arguments: of the command line.
        inputs: texts for standard input.
        seconds: time limit of each run.
        output_bytes: what is kept of an output; a program that writes more is ended.
    """
    for index, text in enumerate(inputs):
        with open(_FILE, "w", encoding="utf-8", errors="surrogatepass") as file:
            file.write(program)
        command = [sys.executable, "-IB", *([_FILE] if driver is None else ["-c", driver]), *arguments]
        with tempfile.TemporaryFile() as stdin:
            stdin.write(text.encode(errors="surrogatepass"))
            stdin.seek(0)
            code, output = _run_once(command, stdin.fileno(), seconds, output_bytes)
        packed = base64.b64encode(zlib.compress(output, 1)).decode()  # a file has a limit too
        report(json.dumps([index, packed if code == 0 else None]))
        if code is None:
            return


def _run_once(command: list[str], stdin: int, seconds: float, output_bytes: int) -> tuple[int | None, bytes]:
    """Run a command, end all that it started, and return its exit code, or None at the time limit, and its output."""
    end = time.monotonic() + seconds
    process = subprocess.Popen(
        command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    )
    assert process.stdout is not None
    pipe, has_ended = process.stdout.fileno(), os.pidfd_open(process.pid)
    os.set_blocking(pipe, False)
    output = b""
    while len(output) < output_bytes and (left := end - time.monotonic()) > 0:
        ready = select.select([pipe, has_ended], [], [], left)[0]
        part = _read(pipe)
        output += part
        if has_ended in ready and not part:
            break
        if pipe in ready and not part:  # it closed its output
            select.select([has_ended], [], [], max(0.0, end - time.monotonic()))
            break
    in_time = bool(select.select([has_ended], [], [], 0)[0])
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    code = process.wait()
    if os.getpid() == 1:  # of a process namespace, where no other process has anything to do now
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    os.close(has_ended)
    process.stdout.close()
    is_late = not in_time and len(output) < output_bytes
    return None if is_late else code, output


def _read(pipe: int) -> bytes:
    try:
        return os.read(pipe, 1 << 16)
    except BlockingIOError:
        return b""
