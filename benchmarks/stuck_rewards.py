"""Accuracy that each algorithm keeps when its rewards carry no information.

Trains every algorithm, and reinforce with each baseline, under a reward that is random, stuck at 0, or stuck at 1, and
measures the accuracy by the true reward before and after. The exit code is 1 when the accuracy under a reward stuck at
0 or 1 fell by more than twice its standard error over seeds and held-out prompts. Under a random reward the accuracy is
only reported: noise moves any policy.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

from benchmarks.harness import recipe_comparison, results
from benchmarks.harness.recipe_comparison import Comparison, Reward
from benchmarks.harness.results import Row
from benchmarks.harness.suite import Suite

RANDOM = "reward random"
_ALGORITHMS: dict[str, dict[str, Any]] = {
    **{name: {"algorithm": name} for name in ("sppo", "ppo", "grpo", "dr_grpo", "rloo", "gspo", "remax")},
    **{f"reinforce, {b}": {"algorithm": "reinforce", "baseline": b} for b in (0.5, "running_mean", "prompt_mean")},
}
VARIANTS = {
    f"{name}, reward {reward}": settings for reward in ("random", "0", "1") for name, settings in _ALGORITHMS.items()
}


def stuck_reward(kind: str, seed: int) -> Reward:
    """Return a reward that ignores its completions: always 0, always 1, or one of the two at random."""
    rng = random.Random(seed)

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(rng.random() < 0.5) if kind == "random" else float(kind) for _ in completions]

    return reward


def failures_of(lines: Iterable[Row]) -> list[str]:
    """List the variants with a constant reward that lost accuracy."""
    found = []
    for line in lines:
        # Two evaluations on the same prompts, each with samples of its own, and what the seeds differ by beyond that.
        sampling = (2 * line["before"] * (1 - line["before"]) / line["problems"]) ** 0.5
        if RANDOM not in line["variant"] and line["change"] < -2 * max(sampling, line["change_error"]):
            found.append(f"{line['variant']}: {line['change']:+.3f}, standard error {sampling:.3f}")
    return found


COLUMNS: results.Columns = {
    "algorithm and reward": lambda row: row["variant"],
    "seeds": lambda row: row["seeds"],
    "accuracy before": lambda row: f"{row['before']:.3f}",
    "after": lambda row: f"{row['after']:.3f}",
    "change": lambda row: f"{row['change']:+.3f}",
}
COMPARISON = Comparison(
    "stuck_rewards",
    VARIANTS,
    COLUMNS,
    stop_at_threshold=False,
    failures_of=failures_of,
    reward_of=lambda variant, seed: stuck_reward(variant.rpartition(" ")[2], seed),
)
SUITE = Suite(
    recipe_comparison.add_arguments,
    COMPARISON.run,
    tables={"stuck_rewards": COMPARISON.published_table},
    draw=results.draw_bars(recipe_comparison.chart),
    needs="the trainer",
)
