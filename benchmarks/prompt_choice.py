"""Generated tokens that SPPO needs if half of the prompts cannot be solved, and its critic may skip prompts or not.

The reward of prompts that begin with 5 to 9 is 0 in training, whatever the response. With prompt_value_range the
critic, once it knows that, skips such prompts before they are sampled. Evaluation is that of the recipe.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.harness import recipe_comparison, results
from benchmarks.harness.recipe_comparison import Comparison, Reward
from benchmarks.harness.suite import Suite
from benchmarks.ratio_levels import thousands
from sppo.tasks import chain

VARIANTS: dict[str, dict[str, Any]] = {
    "all prompts": {},
    "prompts chosen by the critic": {"prompt_value_range": [0.1, 0.9]},
}


def solvable_half(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str]) -> list[float]:
    """Grade like the recipe, but for 0 where the prompt begins with 5 to 9."""
    rewards = chain.reward(prompts, completions, answer)
    return [reward * (prompt[0] < "5") for prompt, reward in zip(prompts, rewards, strict=True)]


def _reward_of(variant: str, seed: int) -> Reward:
    return solvable_half


COLUMNS: results.Columns = {
    "prompts": lambda row: row["variant"],
    "seeds": lambda row: row["seeds"],
    "reached": lambda row: row["reached"],
    "tokens to the threshold": thousands,
}
COMPARISON = Comparison("prompt_choice", VARIANTS, COLUMNS, stop_at_threshold=True, reward_of=_reward_of)
SUITE = Suite(
    recipe_comparison.add_arguments,
    COMPARISON.run,
    tables={"prompt_choice": COMPARISON.published_table},
    draw=results.draw_bars(recipe_comparison.chart),
    needs="the trainer",
)
