"""Atomic file writes, JSON Lines files, file locks, and import of objects by name."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import json
import os
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

METRICS_FILE = "metrics.jsonl"
"""Name of the metrics log in a run's ``output_dir``."""

SUMMARY_FILE = "summary.json"
"""Name of the summary in a finished run's ``output_dir``."""

ADAPTER_CONFIG = "adapter_config.json"
"""Name of the file with an adapter's configuration, by PEFT."""


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary file next to ``path``, and rename it to ``path`` if the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}")
    try:
        yield staged
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def write_lines(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Replace the contents of a file by JSON entries, one per line."""
    with atomic_write(path) as staged:
        staged.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries), encoding="utf-8")


def append_line(path: Path, entry: Mapping[str, Any]) -> None:
    """Append a JSON entry to a file."""
    with path.open("a", encoding="utf-8") as lines:
        lines.write(f"{json.dumps(entry)}\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the JSON entries of a file, one per line.

    A last line that a crash cut short is ignored, and a missing file has no entries.

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
                raise ValueError(f"{str(path)!r} has no JSON in line {number} ({error}); delete that line") from error
    return entries


def import_object(spec: str) -> Any:
    """Import an object by ``package.module:name`` or ``path/to/file.py:name``.

    Raises:
        ValueError: there is no such module, file or name.
    """
    where, _, name = spec.rpartition(":")
    try:
        if where.endswith(".py"):
            path = Path(where).resolve()
            module_spec = importlib.util.spec_from_file_location(path.stem, path)
            assert module_spec is not None
            assert module_spec.loader is not None
            module = importlib.util.module_from_spec(module_spec)
            sys.path.insert(0, str(path.parent))  # so that it can import its neighbours, like a script
            module_spec.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
        return reduce(getattr, name.split("."), module)
    except (ImportError, FileNotFoundError, AttributeError, SyntaxError) as error:
        raise ValueError(
            f"cannot import {spec!r} ({error}); give module:function or path/to/file.py:function"
        ) from error


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint with the most similar known name for an error message, or an empty text."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def lock_file(file: IO[Any], message: str) -> None:
    """Lock an open file for this process, until it is closed or the process ends in whatever way.

    Raises:
        ValueError: another process has locked the file; with ``message``.
    """
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(message) from None


@contextmanager
def run_lock(output_dir: Path) -> Iterator[None]:
    """Lock a folder for one run within a context.

    Raises:
        ValueError: another process trains into the folder.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    with (output_dir / ".lock").open("w") as lock:
        lock_file(lock, f"output_dir={str(output_dir)!r} is in use by another training process; choose another one")
        yield
