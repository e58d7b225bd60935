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
from sppo.rewards.log import RewardLog
from sppo.rewards.processes import hide_environment
from sppo.rewards.worker import Parameters, RewardError, SampleResult, call

_MODULES = {
    "builtin": ("exact", "numeric", "math"),
    "sandbox": ("reasoning_gym", "stdin_stdout", "unit_tests"),
    "lengths": ("length", "overlong"),
}
BUILTIN = {name: f"sppo.rewards.{module}:{name}" for module, names in _MODULES.items() for name in names}
BUILTIN_OPTIONS = {
    *("tolerance", "seconds", "memory_mb", "partial", "isolation", "same_user"),
    *("max_tokens", "buffer", "offset", "target", "alpha", "delta"),
}
"""Options of built-in rewards, set only in the reward's name; columns of the same names are not passed to them."""
TRAINER_COLUMNS = ("completion_ids", "completion_lengths", "truncated")
"""Columns that the trainer adds: token ids, their number, and whether the completion was cut off."""
_MODEL_PREFIX = "model:"


@dataclass(frozen=True)
class Scores:
    """The scores of a batch.

    Attributes:
        rewards: weighted sum of rewards per sample, without those that returned None for it. None if a reward of
            non-zero weight failed on the sample, or all returned None.
        means: mean of each reward by name, over the samples that it scored; NaN if it scored none.
        stds: unbiased standard deviation of each reward by name, over the same samples; 0 for a single sample.
        failures: one line per reward and sample on which it failed, and per sample without any reward: the reward, the
            reason and the prompt.
        log: what the rewards logged.
    """

    rewards: list[float | None]
    means: dict[str, float]
    stds: dict[str, float]
    failures: list[str]
    log: RewardLog

    def metrics(self) -> dict[str, float]:
        """Return metrics for the log.

        ``rewards/NAME`` and ``rewards/NAME/std`` of each reward that scored a sample, and ``custom/NAME`` of what the
        rewards logged themselves.
        """
        means = {name: mean for name, mean in self.means.items() if not math.isnan(mean)}
        stds = {f"rewards/{name}/std": self.stds[name] for name in means}
        custom = {f"custom/{name}": mean for name, mean in self.log.means().items()}
        return {f"rewards/{name}": mean for name, mean in means.items()} | stds | custom


@dataclass(frozen=True)
class Reward:
    """A resolved reward: a function to call in this process, or the name of one to call in the worker process."""

    name: str
    target: Callable[..., Any] | str
    options: dict[str, Any] = field(default_factory=dict)

    def load(self, worker: int = 0) -> Parameters | None:
        """Start the worker process if needed and import a named function in it.

        Args:
            worker: number of the process.

        Returns:
            The parameters of a named function.

        Raises:
            RewardError: the function cannot be imported.
        """
        if not isinstance(self.target, str):
            return None
        if self.is_builtin and self.options.get("same_user"):
            hide_environment()
        return Worker.current(worker).load(self.target)

    def identity(self) -> dict[str, Any]:
        """Return what a resumed run compares: function, options, and the content of a file that it is in."""
        target = self.target
        if not isinstance(target, str):
            digest = getattr(target, "digest", None)  # of a reward model
            return {"name": self.name, "options": self.options} | ({} if digest is None else {"model": digest})
        file = Path(target.rpartition(":")[0])
        digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.suffix == ".py" else None
        return {"name": target if digest is None else self.name, "options": self.options, "file": digest}

    @property
    def may_have_workers(self) -> bool:
        """Whether several processes may call it; a built-in one has processes of its own."""
        return isinstance(self.target, str) and not self.is_builtin

    @property
    def is_builtin(self) -> bool:
        """Whether it is a reward of this package."""
        return self.target in BUILTIN.values()

    def run(self, batch: Batch, timeout: float, worker: int = 0) -> list[SampleResult]:
        """Call the reward once on a batch.

        Args:
            batch: the samples.
            timeout: time limit in seconds.
            worker: number of the process that calls a named function.

        Raises:
            RewardError: it did not return one value per completion within ``timeout`` seconds.
        """
        function, log = self.target, RewardLog(len(batch))
        message: dict[str, Any] = {"options": self.options, "prompts": batch.prompts, "completions": batch.completions}
        if callable(function):
            columns, state = dict(batch.columns), batch.state
            values = run_within(timeout, lambda: call(function, **message, columns=columns, state=state, log=log))
        else:
            process = Worker.current(worker)
            columns = self._columns(process.load(function), batch)
            request = {"call": function, **message, "columns": columns, "state": _json_state(batch.state)}
            reply = process.request(request, timeout)
            values, log = reply["values"], RewardLog.from_json(len(batch), reply["log"])
        batch.log.add(log, batch.first)
        return values

    def _columns(self, parameters: Parameters, batch: Batch) -> dict[str, Sequence[Any]]:
        """Return the columns to send to the process: those that the function takes, and JSON can represent."""
        columns = parameters.accepted(dict(batch.columns))
        if self.is_builtin:
            own = {name for name in TRAINER_COLUMNS if name not in parameters.names}
            columns = {name: column for name, column in columns.items() if name not in BUILTIN_OPTIONS | own}
        return {name: column for name, column in columns.items() if _is_json(column)}


def resolve(spec: Reward | Callable[..., Any] | str) -> Reward:
    """Resolve a reward from its name or function.

    Args:
        spec: the name of a built-in reward, ``package.module:function``, ``path/to/file.py:function`` or
            ``model:PATH`` for a reward model, each optionally with options as in ``numeric?tolerance=0.01``; a
            function; or a sequence classifier with one label.

    Raises:
        ValueError: there is no such reward, its module cannot be imported, or its model cannot be loaded.
        TypeError: ``spec`` has another type.
    """
    if isinstance(spec, Reward):
        return spec
    if isinstance(spec, str) and spec.startswith(_MODEL_PREFIX):
        return _resolve_model(spec)
    if hasattr(spec, "get_input_embeddings"):  # a model of transformers
        return _resolve_model(spec)
    if callable(spec):
        return Reward(getattr(spec, "__name__", type(spec).__name__), spec)
    if not isinstance(spec, str):
        raise TypeError(f"a reward must be a name, 'module:function' or a function, got {spec!r}")
    base, options = split_options(spec)
    if base not in BUILTIN and ":" not in base:
        own = f"{base}:FUNCTION" if base.endswith(".py") else "module:function"
        raise ValueError(
            f"no reward named {base!r}{suggest(base, BUILTIN)}; known: {', '.join(BUILTIN)}, or give {own}, or "
            "model:PATH for a reward model"
        )
    target = BUILTIN.get(base, base)
    reward = Reward(target.rpartition(":")[2], target, options)
    try:
        parameters = reward.load()
    except RewardError as error:
        raise ValueError(f"reward {spec!r}: {error}") from error
    assert parameters is not None
    _check_options(spec, reward, parameters)
    return reward


def _check_options(spec: str, reward: Reward, parameters: Parameters) -> None:
    """Raise ValueError for an option that the function does not take, or one that a built-in reward needs."""
    options = sorted(BUILTIN_OPTIONS & {*parameters.names} if reward.is_builtin else {*parameters.names})
    for name in () if parameters.takes_all and not reward.is_builtin else reward.options:
        if name not in options:
            raise ValueError(f"reward {spec!r} has no option {name!r}{suggest(name, options)}; it takes {options}")
    missing = [name for name in parameters.required if name in BUILTIN_OPTIONS and name not in reward.options]
    if reward.is_builtin and missing:
        example = "&".join(f"{name}=..." for name in missing)
        raise ValueError(f"reward {spec!r} needs {', '.join(missing)}: {reward.name}?{example}")


def _resolve_model(spec: Any) -> Reward:
    from sppo.rewards.reward_model import RewardModel  # imports torch, which other rewards do not need

    base, options = split_options(spec.removeprefix(_MODEL_PREFIX)) if isinstance(spec, str) else (spec, {})
    try:
        model = RewardModel(base, **options)
    except TypeError as error:
        raise ValueError(f"reward {spec!r}: {error}; see sppo.rewards.reward_model.RewardModel") from error
    return Reward(model.__name__, model, {})


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
    trainer_state: Any = None,
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
        trainer_state: a ``transformers.TrainerState`` for rewards that take it. The worker process receives its numbers
            and texts, not ``log_history``. If given, rewards with ``**columns`` also receive it, and ``log_metric`` and
            ``log_extra`` of :class:`sppo.rewards.log.RewardLog`.

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

    batch = Batch(prompts, completions, columns, state=trainer_state, log=RewardLog(len(completions)))
    totals = [0.0] * len(completions)
    failed, scored = [False] * len(completions), [False] * len(completions)
    means: dict[str, float] = {}
    stds: dict[str, float] = {}
    failures: list[str] = []
    for reward, weight, name in zip(rewards, weights, names, strict=True):
        values = []
        for i, result in enumerate(score_each(reward, batch, timeout, workers if reward.may_have_workers else 1)):
            if isinstance(result, float):
                values.append(result)
                totals[i] += weight * result
                scored[i] |= bool(weight)
            elif result is not None:
                failures.append(f"reward {name!r} {result}; prompt: {excerpt(prompts[i])}")
                failed[i] |= bool(weight)
        means[name] = statistics.fmean(values) if values else math.nan
        stds[name] = statistics.stdev(values) if len(values) > 1 else 0.0 if values else math.nan
    for i, (has_failed, has_score) in enumerate(zip(failed, scored, strict=True)):
        if not has_failed and not has_score and any(weights):
            named = f"reward {names[0]!r}" if len(names) == 1 else "each reward"
            failures.append(f"{named} returned None; prompt: {excerpt(prompts[i])}")
    # In floating point, weights such as 0.7, 0.2, 0.1 do not add up to 1; rounding makes a full reward exactly 1.
    usable = [(has_score or not any(weights)) and not bad for has_score, bad in zip(scored, failed, strict=True)]
    rewards_or_none = [round(total, 12) if ok else None for total, ok in zip(totals, usable, strict=True)]
    return Scores(rewards_or_none, means, stds, failures, batch.log)


def _check_length(n: int, of: str, /, **lists: Sequence[Any]) -> None:
    for name, values in lists.items():
        if len(values) != n:
            raise ValueError(f"{name!r} has {len(values)} values for {n} {of}; give one for each")


def excerpt(prompt: Any, width: int = 80) -> str:
    """Return the beginning of a prompt's text, quoted, for messages."""
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"] if prompt else ""
    line = " ".join(str(text).split())
    return repr(line if len(line) <= width else line[:width] + "...")


def _numbered(names: list[str]) -> list[str]:
    return [name if names.count(name) == 1 else f"{name}_{names[:i].count(name) + 1}" for i, name in enumerate(names)]


def _json_state(state: Any) -> dict[str, Any] | None:
    """Return the numbers and texts of a trainer's state."""
    if state is None:
        return None
    return {name: value for name, value in vars(state).items() if isinstance(value, str | int | float | None)}


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
