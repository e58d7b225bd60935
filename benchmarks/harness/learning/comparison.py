"""Comparison of variants: costs until a task's threshold, and rewards, each relative to SPPO's."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.harness.learning.intervals import (
    COSTS,
    Cost,
    at_least,
    geometric_mean,
    mean,
    mean_reward,
    own_best,
    reached,
)
from benchmarks.harness.learning.plan import Plan
from benchmarks.harness.results import Columns, Row


def compared(plans: Iterable[Plan[Any, Any]]) -> list[Row]:
    """Return one line per task and variant."""
    lines = []
    for plan in plans:
        variants = plan.counted()
        for name, runs in variants.items():
            of_sppo = {run["seed"]: run for run in variants.get("sppo", []) if name != "sppo"}
            pairs = [(run, of_sppo[run["seed"]]) for run in runs if run["seed"] in of_sppo]
            threshold = plan.task.threshold
            lines.append(
                {
                    "task": plan.task.name,
                    "variant": name,
                    "threshold": threshold,
                    "learning_rate": runs[0]["learning_rate"],
                    "critic_learning_rate": runs[0]["critic_learning_rate"],
                    "runs": len(runs),
                    "reached": sum(reached(run, threshold, "tokens") is not None for run in runs),
                    **{cost: _cost(runs, threshold, cost) for cost in COSTS},
                    **{f"{cost}_to_sppo": _ratio(pairs, threshold, cost) for cost in COSTS},
                    "own_best_to_sppo": _paired(pairs, lambda run: own_best(run, "seconds")),
                    "update_to_sppo": _paired(pairs, lambda run: run["seconds"][-1] / run["updates"][-1]),
                    "before": statistics.fmean(run["reward"][0] for run in runs),
                    "mean": mean([mean_reward(run) for run in runs]),
                    "mean_less_sppos": _difference(pairs),
                    "after": mean([run["reward"][-1] for run in runs]),
                }
            )
    return lines


def _cost(runs: list[Row], threshold: float, cost: str) -> Cost | None:
    """Return the mean cost until the threshold; a lower bound if a run does not reach it."""
    spent = [reached(run, threshold, cost) for run in runs]
    if None in spent:
        return at_least([run[cost][-1] if x is None else x for run, x in zip(runs, spent, strict=True)])
    return geometric_mean([x for x in spent if x is not None])


def _ratio(pairs: list[tuple[Row, Row]], threshold: float, cost: str) -> Cost | None:
    """Return the cost relative to SPPO's, seed by seed; None if SPPO does not reach the threshold."""
    spent = [(reached(run, threshold, cost), run[cost][-1], reached(other, threshold, cost)) for run, other in pairs]
    if not spent or any(other is None for *_, other in spent):
        return None
    ratios = [(most if mine is None else mine) / other for mine, most, other in spent if other is not None]
    return at_least(ratios) if any(mine is None for mine, *_ in spent) else geometric_mean(ratios)


def _difference(pairs: list[tuple[Row, Row]]) -> Cost | None:
    """Return the difference of mean rewards, seed by seed."""
    return mean([mean_reward(run) - mean_reward(other) for run, other in pairs]) if pairs else None


def _paired(pairs: list[tuple[Row, Row]], measure: Callable[[Row], float]) -> Cost | None:
    """Return a measure of runs over that of SPPO's runs, seed by seed."""
    ratios = [measure(run) / measure(other) for run, other in pairs]
    return geometric_mean(ratios) if ratios else None


COLUMNS: Columns = {
    "task": lambda line: line["task"],
    "algorithm": lambda line: line["variant"],
    "rate": lambda line: _rates(line),
    "reached": lambda line: f"{line['reached']} of {line['runs']}",
    "thousands of tokens to it": lambda line: line["tokens"] and line["tokens"].times(1e-3),
    "times SPPO's tokens": lambda line: line["tokens_to_sppo"],
    "times SPPO's seconds": lambda line: line["seconds_to_sppo"],
    "mean reward": lambda line: line["mean"],
    "less SPPO's": lambda line: line["mean_less_sppos"],
    "reward at the end": lambda line: line["after"],
}


def _rates(line: Row) -> str:
    of_critic = line["critic_learning_rate"]
    return f"{line['learning_rate']:.0e}" + (f", critic {of_critic:.0e}" if of_critic else "")
