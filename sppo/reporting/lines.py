"""The console of a run as plain lines: one per log entry, and the progress of a rollout."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

from sppo.reporting.history import (
    DISPENSABLE,
    WIDTHS,
    Entry,
    RunHistory,
    columns,
    evaluation_prefix,
)
from sppo.reporting.text import duration, encodable, number, terminal_width

_HEADER_EVERY = 20  # lines
_SECONDS_BETWEEN_LINES = 30.0  # of progress, without a terminal
_ACTIVITIES = {
    "rollout": "sampling",
    "reward": "scoring",
    "evaluate": "evaluating",
    "checkpoint": "saving a checkpoint",
    "update": "updating",
}


class SilentConsole(TrainerCallback):
    """A console that shows nothing, and the interface of those that do."""

    def phase(self, name: str) -> None:
        """Take note of the phase of :class:`sppo.reporting.meter.Meter` that begins."""

    def progress(self, done: int, total: int) -> None:
        """Take note of how many completions of a rollout or an evaluation are finished."""

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show progress within a context, in whose end or exception the terminal is as before; contexts may nest."""
        yield


class LineConsole(SilentConsole):
    """Prints one line per log entry.

    Without a terminal it prints no control characters, and about a rollout at most one line every 30 seconds.

    Args:
        in_place: whether progress is shown in one line that is overwritten, on a terminal.
    """

    def __init__(self, *, in_place: bool) -> None:
        self.history = RunHistory()
        self.activity = "updating"
        self.counts: tuple[int, int] | None = None  # completions of the activity: finished, all
        self._in_place = in_place
        self._began = self._reported = time.monotonic()
        self._header: list[str] = []
        self._lines_since_header = 0
        self._status_width = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the log of a resumed run up to its checkpoint."""
        self.history.restart(total=state.max_steps)
        for entry in state.log_history:
            self.history.add(entry)
        self.history.resume(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Print the newest log entry."""
        entry = state.log_history[-1]
        self.history.add(entry)
        if "loss" in entry:
            self._print_update()
        elif (prefix := evaluation_prefix(entry)) is not None:
            self.print(describe_evaluation(entry, prefix))
            self._lines_since_header += 1
        elif "train_runtime" in entry:
            self.print(f"{entry['step']} updates finished; training took {duration(entry['train_runtime'])}")

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Remove at the end of a context what is shown in place."""
        try:
            yield
        finally:
            self._clear_status()

    def phase(self, name: str) -> None:
        """Show the activity that begins."""
        self.activity = _ACTIVITIES.get(name, "preparing the update")
        self.counts = None
        self._began = self._reported = time.monotonic()
        self.show_status()

    def progress(self, done: int, total: int) -> None:
        """Show how many completions are finished."""
        self.counts = done, total
        self.show_status()

    def show_status(self) -> None:
        """Show the activity: in place on a terminal, otherwise by a line if the last one is long ago."""
        if self._in_place:
            text = self.status()[: terminal_width() - 1]
            sys.stdout.write(f"{text:<{self._status_width}}\r")  # the cursor stays where the next line begins
            sys.stdout.flush()
            self._status_width = len(text)
        elif self.counts and time.monotonic() - self._reported >= _SECONDS_BETWEEN_LINES:
            self._reported = time.monotonic()
            self.print(self.status())

    def status(self) -> str:
        """Describe the activity, such as ``sampling 96/256, 41 s``."""
        counts = self.counts  # a panel reads it in another thread
        progress = "" if counts is None else f" {counts[0]}/{counts[1]}"
        return f"{self.activity}{progress}, {duration(time.monotonic() - self._began)}"

    def print(self, text: str) -> None:
        """Print complete lines."""
        self._clear_status()
        print(encodable(text), flush=True)

    def _clear_status(self) -> None:
        if self._status_width:
            sys.stdout.write(" " * self._status_width + "\r")
            sys.stdout.flush()
            self._status_width = 0

    def _print_update(self) -> None:
        values = columns(self.history)
        names = [name for name in WIDTHS if name in values or name in self._header]
        if names != self._header or self._lines_since_header >= _HEADER_EVERY:
            self._header, self._lines_since_header = names, 0
            self.print(self._aligned({name: name for name in names}))
        self.print(self._aligned({name: values.get(name, "-") for name in names}))
        self._lines_since_header += 1

    def _aligned(self, values: dict[str, str]) -> str:
        """Align a line, with narrower gaps or fewer columns if it is wider than the terminal."""
        widths = WIDTHS | {"update": max(WIDTHS["update"], 2 * len(str(self.history.total)) + 1)}
        shown = list(values)
        limit = terminal_width() if sys.stdout.isatty() else 0
        gap = 2 if sum(widths[name] + 2 for name in shown) <= limit + 2 else 1
        for name in DISPENSABLE:
            if limit and sum(widths[each] + gap for each in shown) - gap > limit and name in shown:
                shown.remove(name)
        return (" " * gap).join(f"{values[name]:>{widths[name]}}" for name in shown)


def describe_evaluation(entry: Entry, prefix: str) -> str:
    """Describe an evaluation in a line."""
    dataset = prefix.removeprefix("eval").strip("_")
    when = f"after update {entry['step']}" if entry["step"] else "before training"
    return (
        f"evaluation{f' of {dataset}' if dataset else ''} {when}: reward {number(entry[f'{prefix}_reward'])}, "
        f"{entry[f'{prefix}_success_rate']:.1%} solved, {entry[f'{prefix}_response_length']:.0f} tokens, "
        f"{entry[f'{prefix}_truncated']:.0%} cut off"
    )
