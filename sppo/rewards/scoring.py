"""Scoring completions: which reward a name means, and what becomes of the samples that it fails on."""

from __future__ import annotations

import difflib
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

from sppo.rewards.limits import Worker, within
from sppo.rewards.worker import RewardError, Verdict, call

BUILTIN = {name: f"sppo.rewards.builtin:{name}" for name in ("exact", "numeric", "math", "reasoning_gym")} | {
    "unit_tests": "sppo.rewards.sandbox:unit_tests"
}
BUILTIN_OPTIONS = {"tolerance", "seconds", "memory_mb", "partial", "isolation"}
"""Set with the reward's name alone: a column that happens to be called so is not for a built-in."""


@dataclass(frozen=True)
class Scores:
    """What the rewards said about a batch.

    Attributes:
        rewards: a sample's weighted sum of rewards; None where a reward of non-zero weight gave no verdict.
        means: name of each reward -> mean over the samples that it gave a verdict on, NaN where it gave none.
        stds: the same for the standard deviation (unbiased; 0 for a single verdict).
        failures: a line for each missing verdict: which reward, what happened, which prompt.
    """

    rewards: list[float | None]
    means: dict[str, float]
    stds: dict[str, float]
    failures: list[str]

    def metrics(self) -> dict[str, float]:
        """``rewards/NAME`` and ``rewards/NAME/std`` for the log, of the rewards that gave a verdict."""
        found = {name: mean for name, mean in self.means.items() if not math.isnan(mean)}
        stds = {f"rewards/{name}/std": self.stds[name] for name in found}
        return {f"rewards/{name}": mean for name, mean in found.items()} | stds


@dataclass(frozen=True)
class Reward:
    """A reward as :func:`resolve` gives it: a function to call here, or the name of one to call in the worker."""

    name: str
    target: Callable[..., Any] | str
    options: dict[str, Any] = field(default_factory=dict)

    def load(self) -> None:
        """Have the worker running and the function in it; RewardError where it cannot be imported."""
        if isinstance(self.target, str):
            Worker.current().load(self.target)

    def run(
        self, prompts: Sequence[Any], completions: Sequence[Any], columns: dict[str, Any], timeout: float
    ) -> list[Verdict]:
        """Call it once; RewardError where that gives no list of the right length within ``timeout`` seconds."""
        function = self.target
        if callable(function):
            return within(timeout, lambda: call(function, self.options, prompts, completions, columns))
        message = {"options": self.options, "prompts": prompts, "completions": completions}
        hidden = BUILTIN_OPTIONS if function in BUILTIN.values() else set()
        columns = {name: column for name, column in columns.items() if name not in hidden and _is_json(column)}
        self.load()
        return Worker.current().request({"call": function, **message, "columns": columns}, timeout)


def resolve(spec: Reward | Callable[..., Any] | str) -> Reward:
    """The reward that a name, a ``module:function`` string or a function means.

    Args:
        spec: a built-in's name, ``package.module:function`` or ``path/to/file.py:function``, each with options as in
            ``numeric?tolerance=0.01`` if wanted; or a function.

    Raises:
        ValueError: there is no such reward, or its module cannot be imported.
        TypeError: ``spec`` is something else.
    """
    if isinstance(spec, Reward):
        return spec
    if callable(spec):
        return Reward(getattr(spec, "__name__", type(spec).__name__), spec)
    if not isinstance(spec, str):
        raise TypeError(f"a reward is a name, 'module:function' or a function, got {spec!r}")
    base, options = split_options(spec)
    if base not in BUILTIN and ":" not in base:
        near = difflib.get_close_matches(base, BUILTIN, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        own = f"{base}:FUNCTION" if base.endswith(".py") else "module:function"
        raise ValueError(f"no reward named {base!r}; {hint}known: {', '.join(BUILTIN)}, or give {own}")
    target = BUILTIN.get(base, base)
    reward = Reward(target.rpartition(":")[2], target, options)
    try:
        reward.load()
    except RewardError as error:
        raise ValueError(f"reward {spec!r}: {error}") from error
    return reward


def split_options(spec: str) -> tuple[str, dict[str, Any]]:
    """``"name?size=3&kind=a"`` -> ``("name", {"size": 3, "kind": "a"})``; a value that is JSON is read as JSON."""
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
) -> Scores:
    """Score each completion with each reward.

    A call that fails as a whole is repeated one sample at a time to find the culprits, so a reward takes at most three
    times ``timeout`` a batch, and the time in which its worker starts again.

    Args:
        reward_funcs: what :func:`resolve` takes or returns.
        prompts: text or chat messages, one a completion.
        completions: text or chat messages.
        columns: the dataset's other columns, each as long as ``completions``.
        weights: one a reward; default 1.
        timeout: seconds that one call of one reward may take.
        names: the rewards' names in the result; default their own, numbered where two are the same.

    Raises:
        ValueError: nothing to score with, or lengths that differ.
    """
    if not reward_funcs:
        raise ValueError("reward_funcs is empty; give at least one reward")
    if timeout <= 0:
        raise ValueError(f"timeout must be greater than 0 seconds, got {timeout}")
    columns = {name: column for name, column in columns.items() if name not in ("prompts", "completions")}
    rewards = [resolve(reward) for reward in reward_funcs]
    weights = [1.0] * len(rewards) if weights is None else weights
    names = _distinct([reward.name for reward in rewards]) if names is None else names
    _check_length(len(completions), "completions", prompts=prompts, **columns)
    _check_length(len(rewards), "rewards", weights=weights, names=names)

    totals: list[float | None] = [0.0] * len(completions)
    means: dict[str, float] = {}
    stds: dict[str, float] = {}
    failures: list[str] = []
    for reward, weight, name in zip(rewards, weights, names, strict=True):
        values = []
        for i, verdict in enumerate(_verdicts(reward, prompts, completions, columns, timeout)):
            if isinstance(verdict, float):
                values.append(verdict)
            else:
                failures.append(f"reward {name!r} {verdict or 'gave no verdict'}; prompt: {_excerpt(prompts[i])}")
            if weight:
                total = totals[i]
                totals[i] = total + weight * verdict if isinstance(verdict, float) and total is not None else None
        means[name] = statistics.fmean(values) if values else math.nan
        stds[name] = statistics.stdev(values) if len(values) > 1 else 0.0 if values else math.nan
    # Weights such as 0.7, 0.2, 0.1 add up to 1 only in real numbers; a full reward is to be 1.
    return Scores([None if total is None else round(total, 12) for total in totals], means, stds, failures)


def _verdicts(
    reward: Reward, prompts: Sequence[Any], completions: Sequence[Any], columns: dict[str, Any], timeout: float
) -> list[Verdict]:
    """One call for the batch; where that fails, one a sample, each with at most a quarter of the time that is left."""
    if len(completions) == 0:
        return []
    try:
        return reward.run(prompts, completions, columns, timeout)
    except RewardError as error:
        if len(completions) == 1:
            return [str(error)]
    left = 2 * timeout
    verdicts: list[Verdict] = []
    for i in range(len(completions)):
        if left < timeout / 20:
            verdicts.append("was not asked: other samples of the batch used up its time")
            continue
        sample = {name: [column[i]] for name, column in columns.items()}
        try:
            reward.load()  # again, after the worker was killed: not this sample's time
            start = time.monotonic()
            try:
                verdicts += reward.run([prompts[i]], [completions[i]], sample, left / 4)
            finally:
                left -= time.monotonic() - start
        except RewardError as error:
            verdicts.append(str(error))
    return verdicts


def _check_length(n: int, of: str, /, **lists: Sequence[Any]) -> None:
    for name, values in lists.items():
        if len(values) != n:
            raise ValueError(f"{name!r} has {len(values)} values for {n} {of}; give one each")


def _excerpt(prompt: Any, width: int = 80) -> str:
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"] if prompt else ""
    line = " ".join(str(text).split())
    return repr(line if len(line) <= width else line[:width] + "...")


def _distinct(names: list[str]) -> list[str]:
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
