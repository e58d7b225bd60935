"""Files that are whole or absent, and logs of one JSON object a line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
"""What a run has logged, in its ``output_dir``."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
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
    with replacing(path) as staged:
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
