"""Generated tokens that each algorithm needs to learn a recipe, at the settings that the recipe has for SPPO.

It shows that every algorithm learns, not which one is best: learning rates are not tuned for each. SPPO is also trained
with advantages centered and standardized, on prompts that its critic chooses before they are sampled, and with a probe
as its critic. The suite learn compares algorithms with tuned settings.
"""

from __future__ import annotations

from typing import Any

from benchmarks.harness import recipe_comparison, results
from benchmarks.harness.recipe_comparison import Comparison
from benchmarks.harness.suite import Suite
from benchmarks.ratio_levels import thousands

VARIANTS: dict[str, dict[str, Any]] = {
    "sppo": {},
    "sppo, prompts chosen": {"prompt_value_range": [0.1, 0.9]},
    "sppo, centered": {"center_advantages": True},
    "sppo, standardized": {"standardize_advantages": True},
    "sppo, probe": {"critic": "probe"},
    "poise": {"algorithm": "poise"},
    "spo": {"algorithm": "spo"},
    "reinforce_plus_plus": {"algorithm": "reinforce_plus_plus"},
    "grpo": {"algorithm": "grpo"},
    "dapo": {"algorithm": "dapo", "overlong_buffer": 0},
    "cispo": {"algorithm": "cispo"},
    "opo": {"algorithm": "opo"},
}


COLUMNS: results.Columns = {
    "algorithm": lambda row: row["variant"],
    "seeds": lambda row: row["seeds"],
    "accuracy before": lambda row: f"{row['before']:.3f}",
    "reached": lambda row: row["reached"],
    "tokens to the threshold": thousands,
}
COMPARISON = Comparison("recipe_algorithms", VARIANTS, COLUMNS, stop_at_threshold=True)
SUITE = Suite(
    recipe_comparison.add_arguments,
    COMPARISON.run,
    tables={"recipe_algorithms": COMPARISON.published_table},
    draw=results.draw_bars(recipe_comparison.chart),
    needs="the trainer",
)
