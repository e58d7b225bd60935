"""Files that are whole or absent, logs of one JSON object a line, a lock, objects by name."""

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
"""What a run has logged, in its ``output_dir``."""

SUMMARY_FILE = "summary.json"
"""What a finished run came to, in its ``output_dir``."""

ADAPTER_CONFIG = "adapter_config.json"
"""The file by which PEFT tells that a folder holds an adapter."""


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a file beside ``path`` to write, which takes its place where the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}")
    try:
        yield staged
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def write_lines(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Write entries as JSON, one a line, in place of what the file had."""
    with atomic_write(path) as staged:
        staged.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries), encoding="utf-8")


def append_line(path: Path, entry: Mapping[str, Any]) -> None:
    """Add an entry at the end of the file."""
    with path.open("a", encoding="utf-8") as lines:
        lines.write(f"{json.dumps(entry)}\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The entries of a file, without a last one that a crash cut short; none where there is no file.

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
    """The object that ``package.module:name`` or ``path/to/file.py:name`` names.

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
            sys.path.insert(0, str(path.parent))  # so that it may import its neighbours, as a script may
            module_spec.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
        return reduce(getattr, name.split("."), module)
    except (ImportError, FileNotFoundError, AttributeError, SyntaxError) as error:
        raise ValueError(
            f"cannot import {spec!r} ({error}); give module:function or path/to/file.py:function"
        ) from error


def nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def lock_file(file: IO[Any], message: str) -> None:
    """Lock an open file for this process. The lock is the system's: it goes with the process, however that ends.

    Raises:
        ValueError: another process has it locked; with this message.
    """
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(message) from None


@contextmanager
def run_lock(output_dir: Path) -> Iterator[None]:
    """Hold a folder for one run at a time.

    Raises:
        ValueError: another process trains into the folder.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    with (output_dir / ".lock").open("w") as lock:
        lock_file(lock, f"output_dir={str(output_dir)!r} is being trained into by another process; choose another one")
        yield
