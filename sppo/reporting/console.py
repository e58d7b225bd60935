"""Console output of sample completions, whose control characters would reach the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from sppo._utils import printable
from sppo.rollout.engine import Sample


def print_completions(samples: Sequence[Sample], step: int) -> None:
    """Print samples of the last rollout, as a table if rich is installed, else as plain lines."""
    rows = [
        (
            printable(as_text(s.prompt)),
            printable(as_text(s.completion)),
            "-" if s.reward is None else f"{s.reward:.2f}",
            "-" if s.advantage is None else f"{s.advantage.mean():+.2f}",
        )
        for s in samples
    ]
    header = ("prompt", "completion", "reward", "advantage")
    if find_spec("rich") is None:
        for row in rows:
            print(f"[update {step}] " + " | ".join(f"{name}: {cell!r}" for name, cell in zip(header, row, strict=True)))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(*header, title=f"update {step}", show_lines=True)
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)


def as_text(prompt: Any) -> str:
    """Return a prompt or completion as text, with one line per chat message."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
