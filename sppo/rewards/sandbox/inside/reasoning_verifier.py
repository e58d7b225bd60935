"""The verifiers of reasoning-gym's tasks, as a program for the sandbox.

Verifiers of some tasks evaluate the answer as Python. ``jail.py`` executes this file in the sandbox, where it can
import nothing of the package.
"""

from __future__ import annotations

import functools
import json
from typing import Any


def prepare() -> None:
    """Import what the verifiers need, before any answer is looked at."""
    import reasoning_gym  # noqa: F401


def judge(entry: str, answer: str) -> float:
    """Score an answer with the verifier of its task, from 0 to 1.

    Args:
        entry: JSON, as written by :func:`sppo.data.load_prompts`: the task, its options and reasoning-gym's entry.
        answer: the final answer of a completion.
    """
    record = json.loads(entry, object_hook=_unpack)
    task = reasoning_gym_task(record["task"], json.dumps(record["options"], sort_keys=True))
    return min(1.0, max(0.0, float(task.score_answer(answer, record["entry"]))))


@functools.lru_cache(maxsize=64)
def reasoning_gym_task(task: str, options: str) -> Any:
    """Return reasoning-gym's dataset of a task, cached; ``options`` are JSON so that they can be compared."""
    from reasoning_gym import create_dataset

    return create_dataset(task, **json.loads(options))


def pack(value: Any) -> Any:
    """Encode a reasoning-gym entry for JSON, preserving tuples and non-text keys, which verifiers may depend on."""
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {key: pack(item) for key, item in value.items()}
        return {"__pairs__": [[pack(key), pack(item)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"__tuple__": [pack(item) for item in value]}
    return [pack(item) for item in value] if isinstance(value, list) else value


def _unpack(value: dict[str, Any]) -> Any:
    if "__tuple__" in value:
        return tuple(value["__tuple__"])
    return dict(value["__pairs__"]) if "__pairs__" in value else value
