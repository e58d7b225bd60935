"""Scoring of completions: resolving names of rewards, calling them, and isolating the samples that they fail on."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from sppo._utils import suggest
from sppo.rewards.batches import Batch, score_each
from sppo.rewards.limits import Worker, run_within
from sppo.rewards.processes import hide_environment
from sppo.rewards.worker import RewardError, SampleResult, call

BUILTIN = {name: f"sppo.rewards.builtin:{name}" for name in ("exact", "numeric", "math")} | {
    name: f"sppo.rewards.sandbox:{name}" for name in ("reasoning_gym", "stdin_stdout", "unit_tests")
}
BUILTIN_OPTIONS = {"tolerance", "seconds", "memory_mb", "partial", "isolation", "same_user"}
"""Options of built-in rewards, set only in the reward's name; columns of the same names are not passed to them."""


@dataclass(frozen=True)
class Scores:
    """The scores of a batch.

    Attributes:
        rewards: weighted sum of rewards per sample; None if a reward of non-zero weight failed on the sample.
        means: mean of each reward by name, over the samples that it scored; NaN if it scored none.
        stds: unbiased standard deviation of each reward by name, over the same samples; 0 for a single sample.
        failures: one line per reward and sample without a score: the reward, the reason and the prompt.
    """

    rewards: list[float | None]
    means: dict[str, float]
    stds: dict[str, float]
    failures: list[str]

    def metrics(self) -> dict[str, float]:
        """Return ``rewards/NAME`` and ``rewards/NAME/std`` for the log, of each reward that scored a sample."""
        means = {name: mean for name, mean in self.means.items() if not math.isnan(mean)}
        stds = {f"rewards/{name}/std": self.stds[name] for name in means}
        return {f"rewards/{name}": mean for name, mean in means.items()} | stds


@dataclass(frozen=True)
class Reward:
    """A resolved reward: a function to call in this process, or the name of one to call in the worker process."""

    name: str
    target: Callable[..., Any] | str
    options: dict[str, Any] = field(default_factory=dict)

    def load(self, worker: int = 0) -> None:
        """Start the worker process if needed and import a named function in it.

        Args:
            worker: number of the process.

        Raises:
            RewardError: the function cannot be imported.
        """
        if isinstance(self.target, str):
            if self.target in BUILTIN.values() and self.options.get("same_user"):
                hide_environment()
            Worker.current(worker).load(self.target)

    def identity(self) -> dict[str, Any]:
        """Return what a resumed run compares: function, options, and the content of a file that it is in."""
        target = self.target
        if not isinstance(target, str):
            return {"name": self.name, "options": self.options}
        file = Path(target.rpartition(":")[0])
        digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.suffix == ".py" else None
        return {"name": target if digest is None else self.name, "options": self.options, "file": digest}

    @property
    def may_have_workers(self) -> bool:
        """Whether several processes may call it; a built-in one has processes of its own."""
        return isinstance(self.target, str) and self.target not in BUILTIN.values()

    def run(self, batch: Batch, timeout: float, worker: int = 0) -> list[SampleResult]:
        """Call the reward once on a batch.

        Args:
            batch: the samples.
            timeout: time limit in seconds.
            worker: number of the process that calls a named function.

        Raises:
            RewardError: it did not return one value per completion within ``timeout`` seconds.
        """
        function = self.target
        if callable(function):
            return run_within(
                timeout, lambda: call(function, self.options, batch.prompts, batch.completions, dict(batch.columns))
            )
        message = {"options": self.options, "prompts": batch.prompts, "completions": batch.completions}
        hidden = BUILTIN_OPTIONS if function in BUILTIN.values() else set()
        columns = {name: column for name, column in batch.columns.items() if name not in hidden and _is_json(column)}
        return Worker.current(worker).request({"call": function, **message, "columns": columns}, timeout)


def resolve(spec: Reward | Callable[..., Any] | str) -> Reward:
    """Resolve a reward from its name or function.

    Args:
        spec: the name of a built-in reward, ``package.module:function`` or ``path/to/file.py:function``, each
            optionally with options as in ``numeric?tolerance=0.01``; or a function.

    Raises:
        ValueError: there is no such reward, or its module cannot be imported.
        TypeError: ``spec`` has another type.
    """
    if isinstance(spec, Reward):
        return spec
    if callable(spec):
        return Reward(getattr(spec, "__name__", type(spec).__name__), spec)
    if not isinstance(spec, str):
        raise TypeError(f"a reward must be a name, 'module:function' or a function, got {spec!r}")
    base, options = split_options(spec)
    if base not in BUILTIN and ":" not in base:
        own = f"{base}:FUNCTION" if base.endswith(".py") else "module:function"
        raise ValueError(
            f"no reward named {base!r}{suggest(base, BUILTIN)}; known: {', '.join(BUILTIN)}, or give {own}"
        )
    target = BUILTIN.get(base, base)
    reward = Reward(target.rpartition(":")[2], target, options)
    try:
        reward.load()
    except RewardError as error:
        raise ValueError(f"reward {spec!r}: {error}") from error
    return reward


def split_options(spec: str) -> tuple[str, dict[str, Any]]:
    """Split ``"name?size=3&kind=a"`` into ``("name", {"size": 3, "kind": "a"})``, parsing values that are JSON."""
    base, _, query = spec.partition("?")
    return base, {key: _json_or_text(value) for key, value in parse_qsl(query, keep_blank_values=True)}


def score(
    reward_funcs: Sequence[Reward | Callable[..., Any] | str],
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
    *,
    weights: Sequence[float] | None = None,
    timeout: float = 60.0,
    names: Sequence[str] | None = None,
    workers: int = 1,
) -> Scores:
    """Score each completion with each reward.

    If a call fails on the batch, it is repeated per sample to find the samples that cause it; those that take longer
    than their share have a second call with what is left. A reward therefore takes at most three times ``timeout`` per
    batch, plus the time to restart its worker.

    Args:
        reward_funcs: rewards, as taken or returned by :func:`resolve`.
        prompts: text or chat messages, one per completion.
        completions: text or chat messages.
        columns: the dataset's other columns, each as long as ``completions``.
        weights: one per reward; default 1.
        timeout: time limit for one call of one reward, in seconds.
        names: the rewards' names in the result; default: their own, numbered if two are equal.
        workers: number of processes that call a reward given by name, side by side, each with its part of the batch.
            Each imports the reward's module. Built-in rewards have one, which uses all cores.

    Raises:
        ValueError: no rewards, or lists of different lengths.
    """
    if not reward_funcs:
        raise ValueError("reward_funcs is empty; give at least one reward")
    if timeout <= 0:
        raise ValueError(f"timeout must be greater than 0 seconds, got {timeout}")
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    columns = {name: column for name, column in columns.items() if name not in ("prompts", "completions")}
    rewards = [resolve(reward) for reward in reward_funcs]
    weights = [1.0] * len(rewards) if weights is None else weights
    names = _numbered([reward.name for reward in rewards]) if names is None else names
    _check_length(len(completions), "completions", prompts=prompts, **columns)
    _check_length(len(rewards), "rewards", weights=weights, names=names)

    batch = Batch(prompts, completions, columns)
    totals: list[float | None] = [0.0] * len(completions)
    means: dict[str, float] = {}
    stds: dict[str, float] = {}
    failures: list[str] = []
    for reward, weight, name in zip(rewards, weights, names, strict=True):
        values = []
        for i, result in enumerate(score_each(reward, batch, timeout, workers if reward.may_have_workers else 1)):
            if isinstance(result, float):
                values.append(result)
            else:
                failures.append(f"reward {name!r} {result or 'returned None'}; prompt: {_excerpt(prompts[i])}")
            if weight:
                total = totals[i]
                totals[i] = total + weight * result if isinstance(result, float) and total is not None else None
        means[name] = statistics.fmean(values) if values else math.nan
        stds[name] = statistics.stdev(values) if len(values) > 1 else 0.0 if values else math.nan
    # In floating point, weights such as 0.7, 0.2, 0.1 do not add up to 1; rounding makes a full reward exactly 1.
    return Scores([None if total is None else round(total, 12) for total in totals], means, stds, failures)


def _check_length(n: int, of: str, /, **lists: Sequence[Any]) -> None:
    for name, values in lists.items():
        if len(values) != n:
            raise ValueError(f"{name!r} has {len(values)} values for {n} {of}; give one for each")


def _excerpt(prompt: Any, width: int = 80) -> str:
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"] if prompt else ""
    line = " ".join(str(text).split())
    return repr(line if len(line) <= width else line[:width] + "...")


def _numbered(names: list[str]) -> list[str]:
    return [name if names.count(name) == 1 else f"{name}_{names[:i].count(name) + 1}" for i, name in enumerate(names)]


def _is_json(column: Sequence[Any]) -> bool:
    try:
        json.dumps(column)
    except (TypeError, ValueError):
        return False
    return True


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value
