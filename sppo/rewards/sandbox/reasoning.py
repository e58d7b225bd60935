"""The reward ``reasoning_gym``: the verifiers of its tasks, some of which evaluate the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sppo.rewards.builtin import final_answer
from sppo.rewards.sandbox.run import Limits, judge_samples


def reasoning_gym(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    *,
    entry: Sequence[str],
    seconds: float = 2.0,
    memory_mb: int = 1024,
    isolation: str = "namespaces",
    same_user: bool = False,
) -> list[float | Exception]:
    """Score the final answer with the verifier of its reasoning-gym task, from 0 to 1; some tasks give partial credit.

    Verifiers of some tasks evaluate the answer as Python, so all of them run in the sandbox, a process per answer. One
    that exceeds a limit scores 0.

    Args:
        prompts: text or chat messages.
        completions: text or chat messages.
        entry: JSON, as written by :func:`sppo.data.load_prompts`: the task, its options and reasoning-gym's entry.
        seconds: time limit per answer.
        memory_mb: limit on the address space of each process, in MiB.
        isolation: as for :func:`unit_tests`.
        same_user: as for :func:`unit_tests`.

    Returns:
        A score, or the error that the verifier raised, per completion.

    Raises:
        ValueError: another ``isolation``.
        RuntimeError: the sandbox cannot be set up on this machine, or has no reasoning-gym; nothing was run.
    """
    limits = Limits(seconds=seconds, memory_mb=memory_mb, isolation=isolation, same_user=same_user)
    answers = [final_answer(p, c, multiline=True) for p, c in zip(prompts, completions, strict=True)]
    scores: list[float | Exception] = [0.0] * len(answers)
    given = [i for i, answer in enumerate(answers) if answer]
    values = judge_samples("reasoning_verifier.py", [(entry[i], answers[i]) for i in given], limits)
    for i, value in zip(given, values, strict=True):
        scores[i] = value
    return scores
