"""Calls of reward functions, checks of their results, and the worker process that makes such calls.

The worker process reads one request per line of JSON from standard input and writes one reply per line of JSON to
standard output:

    {"load": spec, "cwd": folder}                                  -> {"values": []} or {"error": text}
    {"call": spec, "options", "prompts", "completions", "columns"} -> {"values": [...]} or {"error": text}
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
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sppo._utils import import_object

_PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>

SampleResult = float | None | str
"""The result of a reward on one sample: its value, None if it returned None, or a description of the failure."""


class RewardError(Exception):
    """A reward call without a usable result. The message continues a sentence that starts with the reward's name."""


class TimeLimitError(RewardError):
    """A reward call that took too long."""


class Expired(BaseException):
    """Raised inside a reward function at its time limit; ``except Exception`` in the function does not catch it."""


def call(
    function: Callable[..., Any],
    options: dict[str, Any],
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: dict[str, Sequence[Any]],
) -> list[SampleResult]:
    """Call a reward function, await it if it is async, and check each value.

    A function that takes ``completion`` rather than ``completions`` is called once per sample, with single values.

    Args:
        function: the reward function.
        options: keyword arguments of each call; an option overrides a column of the same name.
        prompts: text or chat messages, one per completion.
        completions: text or chat messages.
        columns: the dataset's other columns.

    Raises:
        RewardError: the function raised, or did not return one value per completion.
    """
    arguments: dict[str, Any] = {**columns, "prompts": prompts, "completions": completions}
    try:
        parameters = inspect.signature(function).parameters
        per_sample = "completion" in parameters and "completions" not in parameters
        if per_sample:
            arguments = {**columns, "prompt": prompts, "completion": completions}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            arguments = {name: values for name, values in arguments.items() if name in parameters}
        arguments = {name: values for name, values in arguments.items() if name not in options}
        if per_sample:
            samples = [{name: values[i] for name, values in arguments.items()} for i in range(len(completions))]
            return _call_per_sample(function, options, samples)
        result = function(**arguments, **options)
        if inspect.isawaitable(result):
            result = asyncio.run(_await(result))
        values = _to_list(result)
    except (KeyboardInterrupt, Expired, RewardError):
        raise
    except BaseException as error:  # also sys.exit() and math-verify's TimeoutException
        raise RewardError(_describe(error)) from error
    if len(values) != len(completions):
        raise RewardError(f"returned {len(values)} values for {len(completions)} completions")
    return [_check_value(value) for value in values]


def _call_per_sample(
    function: Callable[..., Any], options: dict[str, Any], samples: list[dict[str, Any]]
) -> list[SampleResult]:
    """Call the function once per sample; an error affects only its sample, and async calls run concurrently."""
    results = [_result_or_error(partial(function, **sample, **options)) for sample in samples]
    if any(inspect.isawaitable(result) for result in results):
        results = asyncio.run(_await_all(results))
    return [_describe(result) if isinstance(result, BaseException) else _check_value(result) for result in results]


def _result_or_error(work: Callable[[], Any]) -> Any:
    """Call ``work`` and return its result, or the error that it raises."""
    try:
        return work()
    except (KeyboardInterrupt, Expired):
        raise
    except BaseException as error:
        return error


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
            functions[request["load"]] = import_object(request["load"])
            return {"values": []}
        function = functions[request.pop("call")]
        return {"values": call(function, **request)}
    except (RewardError, ValueError) as error:
        return {"error": str(error)}
    except BaseException as error:  # raised by a module while it is imported
        return {"error": _describe(error)}
