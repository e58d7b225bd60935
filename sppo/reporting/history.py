"""What the console knows of a run: its log entries so far, and the columns of numbers computed from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sppo.reporting.text import duration, number, smooth

Entry = Mapping[str, Any]

SERIES = ("reward", "response_length", "entropy", "brier")

_CHANGE_OVER = 10  # entries
_PACE_OVER = 20  # entries
_SMOOTHED = 200  # entries, the earlier of which have a weight of 0.8**190 or less in the running means compared
_NOT_UPDATES = ("evaluate", "checkpoint")  # phases between updates


class RunHistory:
    """Collects the log entries of a run.

    Attributes:
        total: updates of the complete run.
        step: last logged update.
        entries: log entries of updates.
        series: values of each metric of ``SERIES``, without the entries that lack it.
        scores: last mean reward of each set of held-out prompts.
        held_out: mean over these sets after each evaluation.
    """

    def __init__(self) -> None:
        self.scores: dict[str, float] = {}
        self.held_out: list[float] = []
        self.restart(total=0)

    def restart(self, *, total: int) -> None:
        """Forget the updates, but not the evaluations before the first of them."""
        self.total = total
        self.step = 0
        self.entries: list[Entry] = []
        self.series: dict[str, list[float]] = {name: [] for name in SERIES}
        self._paces: list[tuple[int, float]] = []  # updates and seconds of each entry

    def add(self, entry: Entry) -> None:
        """Add a log entry of an update or an evaluation, with its ``step``; others are ignored."""
        if "loss" in entry:
            self._paces.append((max(1, entry["step"] - self.step), sum(seconds_by_phase(entry).values())))
            self.step = entry["step"]
            self.entries.append(entry)
            for metric in SERIES:
                if metric in entry:
                    self.series[metric].append(entry[metric])
        elif (name := evaluation_prefix(entry)) is not None and name.startswith("eval"):
            self.scores[name] = entry[f"{name}_reward"]
            self.held_out.append(sum(self.scores.values()) / len(self.scores))

    def resume(self, step: int) -> None:
        """Continue after an update, at a pace that the updates from here on determine."""
        self.step = step
        self._paces = []

    @property
    def reward_change(self) -> float:
        """Running mean of the reward minus the one ten entries ago, or that of the first."""
        means = smooth(self.series["reward"][-_SMOOTHED:])
        return means[-1] - means[max(0, len(means) - 1 - _CHANGE_OVER)] if means else 0.0

    @property
    def updates_since(self) -> int:
        """Number of updates that the last entry covers."""
        return self._paces[-1][0]

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the last update, at the pace of the last 20 entries with evaluations and checkpoints."""
        recent = self._paces[-_PACE_OVER:]
        seconds = sum(seconds for _, seconds in recent)
        return seconds / sum(updates for updates, _ in recent) * (self.total - self.step) if seconds else None


def seconds_by_phase(entry: Entry) -> dict[str, float]:
    """Return the seconds of a log entry by phase."""
    return {name.removeprefix("seconds/"): value for name, value in entry.items() if name.startswith("seconds/")}


def evaluation_prefix(entry: Entry) -> str | None:
    """Return the prefix of the metrics of an evaluation's entry, or None for another entry."""
    name = next((name for name in entry if name.endswith("_success_rate")), None)
    return None if name is None else name.removesuffix("_success_rate")


WIDTHS = {
    "update": 6,
    "reward": 6,
    "change": 6,
    "eval": 6,
    "tokens": 6,
    "cut": 4,
    "entr.": 5,
    "kl": 6,
    "clip": 4,
    "brier/base": 10,
    "s/upd": 5,
    "roll%": 5,
    "left": 5,
}
"""Columns of a line, in order, with their minimum width."""

DISPENSABLE = ("roll%", "clip", "entr.", "change", "kl", "cut", "s/upd", "brier/base", "tokens", "eval")
"""Columns that a narrow terminal leaves out, the first first."""


def columns(history: RunHistory) -> dict[str, str]:
    """Format the last entry by column; a column that it lacks is left out."""
    entry = history.entries[-1]
    cells: dict[str, str | None] = {
        "update": f"{history.step}/{history.total}",
        "reward": _format(entry, "reward", number),
        "change": number(history.reward_change, signed=True) if "reward" in entry else None,
        "eval": number(history.held_out[-1]) if history.held_out else None,
        "tokens": _format(entry, "response_length", "{:.0f}".format),
        "cut": _format(entry, "truncated", "{:.0%}".format),
        "entr.": _format(entry, "entropy", number),
        "kl": _format(entry, "kl", _small),
        "clip": _format(entry, "clip_fraction", "{:.0%}".format),
        "brier/base": _brier(entry),
    }
    phases = seconds_by_phase(entry)
    seconds = sum(value for name, value in phases.items() if name not in _NOT_UPDATES)
    if seconds:
        cells["s/upd"] = _seconds(seconds / history.updates_since)
        cells["roll%"] = f"{phases.get('rollout', 0.0) / seconds:.0%}"
    if (left := history.seconds_left) is not None:
        cells["left"] = duration(left)
    return {name: text for name, text in cells.items() if text is not None}


def _format(entry: Entry, name: str, form: Any) -> str | None:
    return form(entry[name]) if name in entry else None


def _small(value: float) -> str:
    return f"{value:.4f}" if abs(value) >= 0.0001 or value == 0 else f"{value:.0e}"


def _seconds(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _brier(entry: Entry) -> str | None:
    if "brier" not in entry:
        return None
    return "/".join(number(entry[name]).removeprefix("0") for name in ("brier", "brier_baseline"))
