"""Helpers shared by the trainer's modules: atomic writes, JSON Lines, file locks, imports by name."""

from __future__ import annotations

import difflib
import errno
import importlib
import importlib.util
import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
"""The log of a run, in its ``output_dir``."""

SUMMARY_FILE = "summary.json"
"""The results of a finished run, in its ``output_dir``."""

LEARNING_CURVE_FILE = "learning_curve.png"
"""The plot of a finished run, in its ``output_dir``."""

ADAPTER_CONFIG = "adapter_config.json"
"""The file that marks a folder as a PEFT adapter."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary file next to ``path``, which replaces it if the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}")
    try:
        yield staged
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def write_lines(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Write entries as JSON, one per line, replacing the file's content."""
    with atomic_write(path) as staged:
        staged.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries), encoding="utf-8")


def append_line(path: Path, entry: Mapping[str, Any]) -> None:
    """Append an entry to the file as one line of JSON."""
    with path.open("a", encoding="utf-8") as lines:
        lines.write(f"{json.dumps(entry)}\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the entries of a file, except for a last line that a crash cut short.

    Returns:
        One dictionary per line; an empty list if there is no such file.

    Raises:
        ValueError: a line before the last is not JSON.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{str(path)!r}: line {number} is not JSON ({error}); delete that line") from error
    return entries


def import_object(spec: str) -> Any:
    """Import the object named by ``package.module:name`` or ``path/to/file.py:name``.

    Raises:
        ValueError: there is no such module, file or name.
    """
    source, _, name = spec.rpartition(":")
    try:
        if source.endswith(".py"):
            path = Path(source).resolve()
            module_spec = importlib.util.spec_from_file_location(path.stem, path)
            assert module_spec is not None
            assert module_spec.loader is not None
            module = importlib.util.module_from_spec(module_spec)
            sys.path.insert(0, str(path.parent))  # the file may import modules from its folder, as a script may
            module_spec.loader.exec_module(module)
        else:
            module = importlib.import_module(source)
        return reduce(getattr, name.split("."), module)
    except (ImportError, FileNotFoundError, AttributeError, SyntaxError) as error:
        raise ValueError(
            f"cannot import {spec!r} ({error}); give module:function or path/to/file.py:function"
        ) from error


def suggest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean ...?"`` with the known name closest to a misspelt one, or ``""`` if none is close."""
    matches = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def printable(text: str) -> str:
    """Return text for a terminal: control characters of a model's output, but line ends and tabs, as ``\\x1b``."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def lock_file(file: IO[Any], message: str) -> None:
    """Lock an open file for this process; the system releases the lock when the process ends.

    Does nothing on Windows. Warns and does nothing on a file system without locks.

    Raises:
        ValueError: another process holds the lock; the error has the text ``message``.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise ValueError(message) from None
        logger.warning("%r cannot be locked (%s): make sure that no other process writes there", file.name, error)


@contextmanager
def run_lock(output_dir: Path) -> Iterator[None]:
    """Reserve ``output_dir`` for one run at a time.

    Raises:
        ValueError: another process is training into the folder, or it is a file.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"output_dir={str(output_dir)!r} is a file; name a folder")
    output_dir.mkdir(parents=True, exist_ok=True)
    with (output_dir / ".lock").open("w") as lock:
        lock_file(lock, f"output_dir={str(output_dir)!r} is being trained into by another process; choose another one")
        yield
