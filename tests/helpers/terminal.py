"""A process in a pseudo-terminal, and the screen that it leaves."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from typing import NamedTuple

_CONTROL = re.compile(r"\x1b\[(\??[\d;]*)([A-Za-z])|\r|\n")


class Ended(NamedTuple):
    """How a process ended: its exit code, all that it wrote, and the lines on an endless screen."""

    code: int
    output: str
    screen: list[str]


def run_in_terminal(command, *, columns=100, rows=40, **environment):
    """Run a command with a terminal as its three streams, until it ends -> Ended."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    env |= {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "TERM": "xterm-256color"} | environment
    process = subprocess.Popen(command, stdin=child, stdout=child, stderr=child, env=env)
    os.close(child)
    written = b""
    try:
        while block := _read(parent):
            written += block
        code = process.wait(timeout=60)
    finally:
        process.kill()
        os.close(parent)
    output = written.decode()
    return Ended(code, output, draw(output))


def _read(descriptor):
    try:
        return os.read(descriptor, 65536)
    except OSError:  # how Linux reports that the last writer has closed the terminal
        return b""


def draw(output):
    """Return the lines of a screen without a bottom; it knows the sequences that rich writes, and no others."""
    lines, row, column, end = [""], 0, 0, 0
    for match in [*_CONTROL.finditer(output), None]:
        text = output[end : match.start() if match else None]
        assert "\x1b" not in text
        line = lines[row].ljust(column)
        lines[row] = line[:column] + text + line[column + len(text) :]
        column += len(text)
        if match is None:
            break
        end = match.end()
        if match[0] == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif match[0] == "\r":
            column = 0
        elif match[2] == "A":
            row -= int(match[1] or 1)
        elif match[2] == "K":
            assert match[1] == "2"
            lines[row] = ""
        else:
            assert match[2] in "mhl", match[0]
    return [line.rstrip() for line in lines]
