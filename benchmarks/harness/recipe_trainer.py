"""Trainers of recipes for the suites that train: without progress bars, checkpoints and evaluations by default."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sppo import SPPOTrainer

QUIET = {"disable_tqdm": True, "log_completions": False, "eval_strategy": "no", "save_strategy": "no"}


def build_quiet_trainer(recipe_name: str, settings: dict[str, Any]) -> SPPOTrainer:
    """Build the trainer of a recipe with settings named as on the command line of ``sppo train``."""
    from sppo.cli.recipes import build_trainer, override, read_recipe

    recipe = read_recipe(recipe_name)
    for name, value in {"console": "none", **QUIET, **settings}.items():
        override(recipe, name, str(value))
    return build_trainer(recipe)
