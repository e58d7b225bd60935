"""The console of a run on a terminal: lines that scroll above a live panel, drawn with rich."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from transformers.utils import logging as transformers_logging

from sppo._utils import printable
from sppo.reporting.history import RunHistory
from sppo.reporting.lines import LineConsole
from sppo.reporting.text import cut, duration, encodable, number, sparkline
from sppo.rollout.engine import Sample

_SECONDS_BETWEEN_REFRESHES = 0.5
_MOST_COLUMNS = 120  # of the panel
_ROOM = 3  # cells to the right of the panel: the ^C that a terminal echoes must not begin a line
_LABEL = 10  # cells
_VALUE = 15  # cells


class LockedConsole(Console):
    """A console that one thread at a time writes to.

    rich computes where a panel begins and writes it under separate locks, so that a line of one thread could be erased
    by the redraw of another.

    Args:
        lock: held from when output is computed until it is written.
    """

    def __init__(self, lock: AbstractContextManager[Any]) -> None:
        # Without markup, because rich would also interpret what others print.
        super().__init__(file=sys.stdout, markup=False, highlight=False, emoji=False)
        self._writing = lock

    def __enter__(self) -> LockedConsole:
        """Begin output."""
        self._writing.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Write the output."""
        try:
            super().__exit__(*error)
        finally:
            self._writing.__exit__(*error)


class PanelConsole(LineConsole):
    """Shows sparklines, progress and the last sample below the lines, while :meth:`shown` is entered.

    Everything else that this process prints, warns or logs appears above the panel. A thread redraws the panel; it does
    not run while the process forks.

    Args:
        title: of the panel.
        samples: returns the samples of the last rollout.
    """

    def __init__(self, title: str, samples: Callable[[], Sequence[Sample]]) -> None:
        super().__init__(in_place=False)
        self.title = title
        self.samples = samples
        self._live: Live | None = None
        self._writing = threading.RLock()
        self._moved: list[tuple[logging.StreamHandler[Any], Any]] = []
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(
                before=self._writing.acquire,
                after_in_parent=self._writing.release,
                after_in_child=self._leave_to_parent,
            )

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the panel within a context; the terminal and the streams are restored at its end."""
        if self._live is not None:
            yield
            return
        console = LockedConsole(self._writing)
        live = Live(console=console, auto_refresh=False, get_renderable=self.render, transient=True)
        updates = len(self.history.entries)
        stop = threading.Event()
        thread = threading.Thread(target=self._redraw, args=(live, stop), daemon=True)
        has_bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        out, err = sys.stdout, sys.stderr
        try:
            with self._writing:
                live.start(refresh=True)
            self._move_log(out, err)
            self._live = live
            thread.start()
            yield
        finally:
            self._live = None
            stop.set()
            if thread.is_alive():
                thread.join(timeout=2.0)  # an interrupted output may not have released the lock
            live.transient = len(self.history.entries) == updates  # what remains shows how the run ended
            with self._writing:
                live.stop()
            self._restore_log()
            if has_bars:
                transformers_logging.enable_progress_bar()

    def show_status(self) -> None:
        """Leave the status to the panel."""

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Print the newest log entry, and redraw the panel."""
        super().on_log(args, state, control, **kwargs)
        if self._live is not None:
            with self._writing:
                self._live.refresh()

    def render(self) -> RenderableType:
        """Draw the panel."""
        return RunPanel(self)

    def _redraw(self, live: Live, stop: threading.Event) -> None:
        while not stop.wait(_SECONDS_BETWEEN_REFRESHES):
            with self._writing:
                live.refresh()

    def _move_log(self, out: Any, err: Any) -> None:
        """Let log handlers that write to the terminal write above the panel."""
        replacements = {id(out): sys.stdout, id(err): sys.stderr}
        loggers = [logging.root, *logging.root.manager.loggerDict.values()]
        for handler in [h for logger in loggers for h in getattr(logger, "handlers", ())]:
            if isinstance(handler, logging.StreamHandler) and id(handler.stream) in replacements:
                self._moved.append((handler, handler.stream))
                handler.setStream(replacements[id(handler.stream)])

    def _restore_log(self) -> None:
        while self._moved:
            handler, stream = self._moved.pop()
            handler.setStream(stream)

    def _leave_to_parent(self) -> None:
        """In a forked child, write to the streams themselves: the panel belongs to the parent."""
        self._writing.release()
        if self._live is not None:
            self._live = None
            sys.stdout = getattr(sys.stdout, "rich_proxied_file", sys.stdout)
            sys.stderr = getattr(sys.stderr, "rich_proxied_file", sys.stderr)
            self._restore_log()


class RunPanel:
    """Draws the panel at the width of a console."""

    def __init__(self, console: PanelConsole) -> None:
        self.console = console
        self.history: RunHistory = console.history

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        width = min(_MOST_COLUMNS, max(1, options.max_width - _ROOM))
        inner = width - 4
        parts = [self._progress(inner), *self._curves(inner, options), *self._sample(inner, options)]
        title = Text(encodable(cut(self.console.title, inner - 4), options.encoding), style="bold")
        yield Panel(Group(*parts), title=title, title_align="left", width=width, border_style="bright_black")

    def _progress(self, width: int) -> RenderableType:
        history = self.history
        status = self.console.status()
        if not history.total:
            return Text(cut(status, width))
        counts = f"update {history.step}/{history.total}"
        if history.step == history.total:
            status = "finished"
        elif (left := history.seconds_left) is not None:
            counts += f", {duration(left)} left"
        grid = Table.grid(expand=True, padding=(0, 1))
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True, justify="right")
        bar = ProgressBar(total=history.total, completed=history.step, complete_style="cyan", finished_style="cyan")
        rest = max(3, width - len(counts) - 6)  # with at least four cells for the bar
        grid.add_row(Text(counts), bar, Text(cut(status, rest), style="bright_black"))
        return grid

    def _curves(self, width: int, options: ConsoleOptions) -> Iterator[RenderableType]:
        history = self.history
        entries = history.entries  # the thread of the run may replace it
        if not entries:
            return
        last = entries[-1]
        change = f" {number(history.reward_change, signed=True)}"
        cut_off = f", {last['truncated']:.0%} cut" if "truncated" in last else ""
        base = f" / {number(last['brier_baseline'])}" if "brier_baseline" in last else ""
        rows = [
            ("reward", history.series["reward"], number, change, "green"),
            ("held-out", history.held_out, number, "", "green"),
            ("tokens", history.series["response_length"], "{:.0f}".format, cut_off, "blue"),
            ("entropy", history.series["entropy"], number, "", "magenta"),
            ("brier/base", history.series["brier"], number, base, "yellow"),
        ]
        columns = 2 if width >= 2 * (_LABEL + _VALUE + 11) else 1
        length = max(4, (width + 1) // columns - _LABEL - _VALUE - 3)
        table = Table.grid(padding=(0, 1))
        for _ in range(columns):
            table.add_column(width=_LABEL, no_wrap=True)
            table.add_column(width=length, no_wrap=True)
            table.add_column(width=_VALUE, no_wrap=True)
        cells = [
            (
                Text(label, style="bright_black"),
                Text(sparkline(values, length, ascii_only=options.ascii_only), style=color),
                Text(f"{form(values[-1])}{more}"),
            )
            for label, values, form, more, color in rows
            if values
        ]
        for i in range(0, len(cells), columns):
            table.add_row(*(cell for row in cells[i : i + columns] for cell in row))
        yield table

    def _sample(self, width: int, options: ConsoleOptions) -> Iterator[RenderableType]:
        if not (samples := self.console.samples()):
            return
        sample = samples[-1]
        reward = "-" if sample.reward is None else f"{sample.reward:.2f}"
        text = f"sample     reward {reward}: {as_line(sample.prompt)}  {as_line(sample.completion)}"
        yield Text(cut(encodable(text, options.encoding), width), style="bright_black", no_wrap=True)


def as_line(message: Any) -> str:
    """Return a prompt or a completion as one printable line; of chat messages, the last."""
    text = message if isinstance(message, str) else str(message[-1]["content"])
    return printable(" ".join(text.split()))
