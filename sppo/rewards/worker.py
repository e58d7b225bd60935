"""Calls of reward functions, checks of their results, and the worker process that makes such calls.

The worker process reads one request per line of JSON from standard input and writes one reply per line of JSON to
standard output:

    {"load": spec, "cwd": folder}
                               -> {"names": [...], "takes_all": bool, "required": [...]} or {"error": text}
    {"call": spec, "options", "prompts", "completions", "columns", "state"}
                                                   -> {"values": [...], "log": {...}} or {"error": text}
"""

from __future__ import annotations

import asyncio
import ctypes
import inspect
import json
import math
import numbers
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sppo._utils import import_object
from sppo.rewards.log import RewardLog

_PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>

SampleResult = float | None | str
"""The result of a reward on one sample: its value, None if it returned None, or a description of the failure."""


class RewardError(Exception):
    """A reward call without a usable result. The message continues a sentence that starts with the reward's name."""


class TimeLimitError(RewardError):
    """A reward call that took too long."""


class Expired(BaseException):
    """Raised inside a reward function at its time limit; ``except Exception`` in the function does not catch it."""


@dataclass(frozen=True)
class Parameters:
    """What a reward function takes.

    Attributes:
        names: its parameters.
        takes_all: whether it takes arguments of other names too.
        required: parameters without a default.
    """

    names: Sequence[str]
    takes_all: bool
    required: Sequence[str]

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Parameters:
        """Read a function's signature."""
        parameters = inspect.signature(function).parameters.values()
        named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        return cls(
            names=tuple(p.name for p in named),
            takes_all=any(p.kind is p.VAR_KEYWORD for p in parameters),
            required=tuple(p.name for p in named if p.default is p.empty),
        )

    @property
    def per_sample(self) -> bool:
        """Whether the function takes one completion rather than a batch."""
        return "completion" in self.names and "completions" not in self.names

    def accepted(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments that the function takes."""
        return arguments if self.takes_all else {name: arguments[name] for name in arguments if name in self.names}


def call(
    function: Callable[..., Any],
    options: dict[str, Any],
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: dict[str, Sequence[Any]],
    *,
    state: Any = None,
    log: RewardLog | None = None,
) -> list[SampleResult]:
    """Call a reward function, await it if it is async, and check each value.

    A function that takes ``completion`` rather than ``completions`` is called once per sample, with single values.

    Args:
        function: the reward function.
        options: keyword arguments of each call; an option overrides a column of the same name.
        prompts: text or chat messages, one per completion.
        completions: text or chat messages.
        columns: the dataset's other columns.
        state: the argument ``trainer_state``. Without it a function with ``**columns`` receives only columns.
        log: takes what the function logs.

    Raises:
        RewardError: the function raised, or did not return one value per completion.
    """
    log = RewardLog(len(completions)) if log is None else log
    try:
        parameters = Parameters.of(function)
        own = {"trainer_state": state, "log_metric": log.log_metric, "log_extra": log.log_extra}
        own = {name: value for name, value in own.items() if name in parameters.names or state is not None}
        batch = {"prompt": prompts, "completion": completions}
        if not parameters.per_sample:
            batch = {"prompts": prompts, "completions": completions}
        arguments = parameters.accepted({**columns, **batch, **own})
        arguments = {name: value for name, value in arguments.items() if name not in options}
        _check_required(parameters, {**arguments, **options}, columns)
        if parameters.per_sample:
            samples = [_one_sample(arguments, own, log, i) for i in range(len(completions))]
            return _call_per_sample(function, options, samples)
        result = function(**arguments, **options)
        if inspect.isawaitable(result):
            result = run_async(_await(result))
        values = _to_list(result)
    except (KeyboardInterrupt, Expired, RewardError):
        raise
    except BaseException as error:  # also sys.exit() and math-verify's TimeoutException
        raise RewardError(_describe(error)) from error
    if len(values) != len(completions):
        raise RewardError(f"returned {len(values)} values for {len(completions)} completions")
    return [_check_value(value) for value in values]


def _one_sample(arguments: dict[str, Any], own: dict[str, Any], log: RewardLog, index: int) -> dict[str, Any]:
    """Return the arguments of a call for one sample: of each column its value, the trainer's own as they are."""
    single = {**own, "log_extra": log.one_sample(index).log_extra}
    return {name: single[name] if name in own else values[index] for name, values in arguments.items()}


def _check_required(parameters: Parameters, arguments: dict[str, Any], columns: dict[str, Any]) -> None:
    missing = [name for name in parameters.required if name not in arguments]
    if missing:
        raise RewardError(
            f"needs {', '.join(map(repr, missing))}: give it as an option of the reward's name, or as a column; there "
            f"are the columns {', '.join(sorted(columns)) or 'none'}"
        )


def _call_per_sample(
    function: Callable[..., Any], options: dict[str, Any], samples: list[dict[str, Any]]
) -> list[SampleResult]:
    """Call the function once per sample; an error affects only its sample, and async calls run concurrently."""
    results = [_result_or_error(partial(function, **sample, **options)) for sample in samples]
    if any(inspect.isawaitable(result) for result in results):
        results = run_async(_await_all(results))
    return [_describe(result) if isinstance(result, BaseException) else _check_value(result) for result in results]


def _result_or_error(work: Callable[[], Any]) -> Any:
    """Call ``work`` and return its result, or the error that it raises."""
    try:
        return work()
    except (KeyboardInterrupt, Expired):
        raise
    except BaseException as error:
        return error


def run_async(work: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine like ``asyncio.run``, but do not wait for threads of ``asyncio.to_thread``.

    ``asyncio.run`` waits for them in a coroutine. If a time limit interrupts that, the coroutine waits again when it is
    collected as garbage, which may be while ``threading`` holds the lock that the wait needs: a deadlock.
    """
    loop = asyncio.new_event_loop()

    async def cancel() -> None:
        tasks = asyncio.all_tasks(loop) - {asyncio.current_task(loop)}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await loop.shutdown_asyncgens()

    try:
        try:
            return loop.run_until_complete(work)
        finally:
            loop.run_until_complete(cancel())
    finally:
        loop.close()


async def _await(result: Awaitable[Any]) -> Any:
    return await result


async def _await_all(results: list[Any]) -> list[Any]:
    async def result_or_error(result: Any) -> Any:
        try:
            return await result if inspect.isawaitable(result) else result
        except (KeyboardInterrupt, Expired):
            raise
        except BaseException as error:
            return error

    return await asyncio.gather(*map(result_or_error, results))


def _to_list(result: Any) -> list[Any]:
    try:
        values = iter(result)
    except TypeError:
        raise RewardError(f"returned {_shorten(result)}, not a list with one value per completion") from None
    return list(values)  # runs a generator's code


def _check_value(value: Any) -> SampleResult:
    try:
        return _to_float(value)
    except (KeyboardInterrupt, Expired):
        raise
    except BaseException as error:  # raised by methods of the value
        return _describe(error)


def _to_float(value: Any) -> SampleResult:
    if value is None:
        return None
    if isinstance(value, Exception):
        return f"raised {type(value).__name__}: {_shorten(value, str)}"
    try:
        number = value.item() if hasattr(value, "item") else value  # NumPy and PyTorch scalars
    except (ValueError, RuntimeError):  # an array of several values
        number = value
    if not isinstance(number, numbers.Real):
        return f"returned {_shorten(value)}, not a number"
    return float(number) if math.isfinite(number) else f"returned {float(number)}"


def _describe(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"raised {type(error).__name__}: {_shorten(error, str)} ({Path(frame.filename).name}:{frame.lineno})"


def _shorten(value: Any, text: Callable[[Any], str] = repr, width: int = 200) -> str:
    try:
        line = " ".join(text(value).split())
    except Exception as error:  # its __str__ or __repr__ is broken
        return f"a {type(value).__name__} whose text raises {type(error).__name__}"
    return line if len(line) <= width else line[:width] + "..."


def serve(*, die_with_parent: bool) -> None:
    """Serve requests until standard input ends, that is, until the trainer's process has ended.

    Args:
        die_with_parent: on Linux, let the kernel kill this process when the thread that started it ends.
    """
    # A reward that holds the GIL would keep this process from noticing the end of its input.
    if die_with_parent and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    replies, lines = os.fdopen(os.dup(1), "wb"), os.fdopen(os.dup(0), "rb")
    os.dup2(2, 1)  # the output of rewards must not mix with the replies
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # they reach all processes of a job; the trainer handles them
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(lines, requests), daemon=True).start()
    functions: dict[str, Callable[..., Any]] = {}
    while True:
        reply = _handle(json.loads(requests.get()), functions)
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()


def _receive(lines: Any, requests: queue.SimpleQueue[bytes]) -> None:
    for line in lines:
        requests.put(line)
    os._exit(0)  # even in the middle of an endless call


def _handle(request: dict[str, Any], functions: dict[str, Callable[..., Any]]) -> dict[str, Any]:
    try:
        if "load" in request:
            os.chdir(request["cwd"])
            function = functions[request["load"]] = import_object(request["load"])
            parameters = Parameters.of(function)
            return vars(parameters)
        function, state = functions[request.pop("call")], request.pop("state")
        log = RewardLog(len(request["completions"]))
        values = call(function, **request, state=None if state is None else SimpleNamespace(**state), log=log)
        return {"values": values, "log": log.to_json()}
    except (RewardError, ValueError) as error:
        return {"error": str(error)}
    except BaseException as error:  # raised by a module while it is imported
        return {"error": _describe(error)}
