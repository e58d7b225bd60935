"""Calling a reward function and checking what it returns; ``serve()`` does so in a process of its own.

A line of JSON in, a line of JSON out, in turn, on standard input and output:

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

_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>

Verdict = float | None | str
"""A sample's reward, None for none, or what was wrong with it."""


class RewardError(Exception):
    """A call of a reward function that gave no usable list; the text reads on from the function's name."""


class Expired(BaseException):
    """The time limit, raised inside a reward function; not an Exception, so that ``except Exception`` lets it pass."""


def call(
    function: Callable[..., Any],
    options: dict[str, Any],
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: dict[str, Sequence[Any]],
) -> list[Verdict]:
    """Call a reward function, wait for it if it is async, and check each value.

    One that takes ``completion`` rather than ``completions`` is called once a sample, with single values.

    Raises:
        RewardError: it raised, or did not return one value a completion.
    """
    arguments: dict[str, Any] = {**columns, "prompts": prompts, "completions": completions}
    try:
        parameters = inspect.signature(function).parameters
        one_by_one = "completion" in parameters and "completions" not in parameters
        if one_by_one:
            arguments = {**columns, "prompt": prompts, "completion": completions}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            arguments = {name: values for name, values in arguments.items() if name in parameters}
        arguments = {name: values for name, values in arguments.items() if name not in options}  # an option wins
        if one_by_one:
            samples = [{name: values[i] for name, values in arguments.items()} for i in range(len(completions))]
            return _each(function, options, samples)
        result = function(**arguments, **options)
        if inspect.isawaitable(result):
            result = asyncio.run(_wait_for(result))
        values = _list(result)
    except (KeyboardInterrupt, Expired, RewardError):
        raise
    except BaseException as error:  # also sys.exit() and math-verify's TimeoutException
        raise RewardError(_describe(error)) from error
    if len(values) != len(completions):
        raise RewardError(f"returned {len(values)} values for {len(completions)} completions")
    return [_verdict(value) for value in values]


def _each(function: Callable[..., Any], options: dict[str, Any], samples: list[dict[str, Any]]) -> list[Verdict]:
    """A call a sample, of which one that raises costs that sample alone; async ones wait side by side."""
    results = [_outcome(partial(function, **sample, **options)) for sample in samples]
    if any(inspect.isawaitable(result) for result in results):
        results = asyncio.run(_wait_for_all(results))
    return [_describe(result) if isinstance(result, BaseException) else _verdict(result) for result in results]


def _outcome(work: Callable[[], Any]) -> Any:
    """What it returns, or the error that it raises."""
    try:
        return work()
    except (KeyboardInterrupt, Expired):
        raise
    except BaseException as error:
        return error


async def _wait_for(result: Awaitable[Any]) -> Any:
    return await result


async def _wait_for_all(results: list[Any]) -> list[Any]:
    async def outcome(result: Any) -> Any:
        try:
            return await result if inspect.isawaitable(result) else result
        except (KeyboardInterrupt, Expired):
            raise
        except BaseException as error:
            return error

    return await asyncio.gather(*map(outcome, results))


def _list(result: Any) -> list[Any]:
    try:
        values = iter(result)
    except TypeError:
        raise RewardError(f"returned {_shorten(result)}, not a list with one value a completion") from None
    return list(values)  # runs a generator's code


def _verdict(value: Any) -> Verdict:
    try:
        return _read(value)
    except (KeyboardInterrupt, Expired):
        raise
    except BaseException as error:  # whatever the value's own methods do
        return _describe(error)


def _read(value: Any) -> Verdict:
    if value is None:
        return None
    try:
        number = value.item() if hasattr(value, "item") else value  # of NumPy, of PyTorch
    except (ValueError, RuntimeError):  # it holds several
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
    except Exception as error:  # its own __str__ or __repr__ is broken
        return f"a {type(value).__name__} whose text raises {type(error).__name__}"
    return line if len(line) <= width else line[:width] + "..."


def serve(*, die_with_parent: bool) -> None:
    """Answer requests until standard input ends, which it does when the trainer is gone, however it went.

    Args:
        die_with_parent: on Linux, have the kernel kill this process when the thread that started it ends.
    """
    if die_with_parent and sys.platform == "linux":  # a call that keeps the GIL would not let us see the input's end
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    replies, lines = os.fdopen(os.dup(1), "wb"), os.fdopen(os.dup(0), "rb")
    os.dup2(2, 1)  # what a reward prints must not land among the replies
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the trainer decides what it means
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(lines, requests), daemon=True).start()
    functions: dict[str, Callable[..., Any]] = {}
    while True:
        reply = _answer(json.loads(requests.get()), functions)
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()


def _receive(lines: Any, requests: queue.SimpleQueue[bytes]) -> None:
    for line in lines:
        requests.put(line)
    os._exit(0)  # also in the middle of an endless call


def _answer(request: dict[str, Any], functions: dict[str, Callable[..., Any]]) -> dict[str, Any]:
    try:
        if "load" in request:
            os.chdir(request["cwd"])
            functions[request["load"]] = import_object(request["load"])
            return {"values": []}
        function = functions[request.pop("call")]
        return {"values": call(function, **request)}
    except (RewardError, ValueError) as error:
        return {"error": str(error)}
    except BaseException as error:  # whatever a module does while it is imported
        return {"error": _describe(error)}
