"""Generated tokens that SPPO needs to learn a recipe with each level of the ratio.

Trains sppo with a ratio per token, the mean over the sequence and the sum over it, with one update per rollout as the
recipe has it, and with four. The suite learn compares algorithms.
"""

from __future__ import annotations

from typing import Any

from benchmarks.harness import recipe_comparison, results
from benchmarks.harness.recipe_comparison import Comparison
from benchmarks.harness.results import Row
from benchmarks.harness.suite import Suite

_FOUR_UPDATES = {"per_device_train_batch_size": 256, "steps_per_generation": 4, "gradient_accumulation_steps": 1}
_LEVELS: dict[str, dict[str, Any]] = {
    "token": {"ratio_level": "token"},
    "sequence_mean": {"ratio_level": "sequence_mean"},
    "sequence_mean, GSPO's clip": {"ratio_level": "sequence_mean", "epsilon": 3e-4, "epsilon_high": 4e-4},
    "sequence_sum": {"ratio_level": "sequence_sum"},
}
VARIANTS = {
    **{f"{name}, 1 update per rollout": settings for name, settings in _LEVELS.items() if "," not in name},
    **{f"{name}, 4 updates per rollout": settings | _FOUR_UPDATES for name, settings in _LEVELS.items()},
}


def thousands(row: Row) -> str:
    """Format the mean number of tokens to the threshold, with its standard error over several seeds."""
    if not row["tokens"]:
        return "not reached"
    spread = f" ± {row['tokens_error'] / 1e3:.0f}k" if row["reached"] > 1 else ""
    return f"{row['tokens'] / 1e3:.0f}k{spread}"


COLUMNS: results.Columns = {
    "ratio": lambda row: row["variant"],
    "seeds": lambda row: row["seeds"],
    "reached": lambda row: row["reached"],
    "tokens to the threshold": thousands,
}
COMPARISON = Comparison("ratio_levels", VARIANTS, COLUMNS, stop_at_threshold=True)
SUITE = Suite(
    recipe_comparison.add_arguments,
    COMPARISON.run,
    tables={"ratio_levels": COMPARISON.published_table},
    draw=results.draw_bars(recipe_comparison.chart),
    needs="the trainer",
)
