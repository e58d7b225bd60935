"""Text for the console: numbers, durations, sparklines, and text cut to a width in terminal cells."""

from __future__ import annotations

import math
import shutil
import sys
import unicodedata
from collections.abc import Sequence
from itertools import pairwise

from sppo._utils import printable

_WIDTH_WITHOUT_TERMINAL = 100
_SMOOTHING = 0.8
_BARS = "▁▂▃▄▅▆▇█"
_ASCII_BARS = "_.-=+*%#"


def smooth(values: Sequence[float]) -> list[float]:
    """Compute the exponential moving average, corrected for its start-up bias."""
    total = weight = 0.0
    means = []
    for value in values:
        total, weight = _SMOOTHING * total + value, _SMOOTHING * weight + 1
        means.append(total / weight)
    return means


def number(value: float, *, signed: bool = False) -> str:
    """Format a number in about six characters."""
    sign = "+" if signed else ""
    size = abs(value)
    if size < 10:
        return f"{value:{sign}.3f}"
    return f"{value:{sign}.2f}" if size < 100 else f"{value:{sign}.1f}" if size < 1000 else f"{value:{sign}.3g}"


def duration(seconds: float) -> str:
    """Format a duration in five characters, such as ``41 s``, ``9m20s``, ``1h14m`` or ``2d03h``."""
    total = max(0, round(seconds))
    if total < 60:
        return f"{total} s"
    if total < 600:
        return f"{total // 60}m{total % 60:02}s"
    minutes = total // 60
    if minutes < 60:
        return f"{minutes}m"
    hours = minutes // 60
    return f"{hours}h{minutes % 60:02}m" if hours < 24 else f"{hours // 24}d{hours % 24:02}h"


def sparkline(values: Sequence[float], width: int, *, ascii_only: bool = False) -> str:
    """Draw values as a line of bars from their minimum to their maximum.

    Args:
        values: in their order; those that are not finite are left out. Of more than ``width``, neighbours are averaged.
        width: maximum number of characters.
        ascii_only: draw with ASCII characters.
    """
    finite = [value for value in values if math.isfinite(value)]
    count = min(width, len(finite))
    edges = [i * len(finite) // count for i in range(count + 1)] if count else []
    means = [sum(finite[a:b]) / (b - a) for a, b in pairwise(edges)]
    if not means:
        return ""
    bars = _ASCII_BARS if ascii_only else _BARS
    low, span = min(means), max(means) - min(means)
    if span == 0:
        return bars[0] * len(means)
    return "".join(bars[round((mean - low) / span * (len(bars) - 1))] for mean in means)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Align the cells of a table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        for row in rows
    )
    return "\n".join("  ".join(cells).rstrip() for cells in lines)


def terminal_width() -> int:
    """Return the width of the terminal, or 100 without one."""
    return shutil.get_terminal_size((_WIDTH_WITHOUT_TERMINAL, 24)).columns


def encodable(text: str, encoding: str | None = None) -> str:
    """Return text with the characters that an encoding lacks as escapes; None for the one of standard output."""
    if encoding is None:
        encoding = getattr(getattr(sys.stdout, "rich_proxied_file", sys.stdout), "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def cells(text: str) -> int:
    """Count the terminal cells that a line takes: two for wide characters, none for combining ones."""
    return sum(map(_cells, text))


def _cells(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Cf", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def fitting(text: str, width: int) -> int:
    """Count the characters at the start of a line that fit into a width, at least one."""
    used = 0
    for i, character in enumerate(text):
        used += _cells(character)
        if used > width:
            return max(1, i)
    return len(text)


def cut(text: str, width: int) -> str:
    """Cut a line to a width, with ``...`` at its end if something is left out."""
    return text if cells(text) <= width else text[: fitting(text, max(1, width - 3))] + "..."


def excerpt(text: str, width: int, max_lines: int) -> list[str]:
    """Break text into at most ``max_lines`` lines of a width, and say how many characters are left out.

    Args:
        text: of a model; control characters are shown as escapes.
        width: in terminal cells.
        max_lines: at least 1, without the line that says what is left out.
    """
    lines: list[str] = []
    shown = 0
    for line in text.split("\n"):
        rest = line
        while True:
            if len(lines) == max_lines:
                return [*lines, f"[{len(text) - shown:,} more characters]"]
            visible = printable(rest).expandtabs(4)
            if cells(visible) <= width:
                lines.append(visible)
                shown += len(rest) + 1
                break
            length = _fitting_source(rest, width)
            lines.append(printable(rest[:length]).expandtabs(4))
            shown += length
            rest = rest[length:]
    return lines


def _fitting_source(line: str, width: int) -> int:
    """Count the characters at the start of a line that fit into a width once they are printable, at least one."""
    low, high = 1, min(len(line), width)
    while low < high:
        middle = (low + high + 1) // 2
        if cells(printable(line[:middle]).expandtabs(4)) <= width:
            low = middle
        else:
            high = middle - 1
    return low
