"""The trainer of a recipe, for the suites that train: nothing shown, nothing saved, nothing evaluated unless asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sppo import SPPOTrainer

QUIET = {"disable_tqdm": True, "log_completions": False, "eval_strategy": "no", "save_strategy": "no"}


def trainer_of(recipe_name: str, settings: dict[str, Any]) -> SPPOTrainer:
    """Settings are named as on the command line of ``sppo train``."""
    from sppo.recipe import build_trainer, override, read_recipe

    recipe = read_recipe(recipe_name)
    for name, value in {**QUIET, **settings}.items():
        override(recipe, name, str(value))
    return build_trainer(recipe)
