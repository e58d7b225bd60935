"""``sppo eval``: measure a model's accuracy."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sppo._utils import ADAPTER_CONFIG, SUMMARY_FILE, atomic_write
from sppo.cli.recipes import Recipe, build_trainer, config_from, override, read_recipe

_SAMPLING = ("max_completion_length", "stop_strings", "top_p", "top_k", "min_p", "generation_kwargs", "bf16", "fp16")
"""Settings that affect the completions, in the header of an evaluation's file."""

# torch, transformers and datasets are imported where they are needed, so that wrong input fails at once.


def evaluate(arguments: argparse.Namespace, overrides: dict[str, str]) -> int:
    """Run ``sppo eval``: evaluate one model on each dataset, print a table and update ``eval/summary.json``.

    Args:
        arguments: the parsed command line.
        overrides: settings given as ``--name value``.

    Returns:
        The exit code.

    Raises:
        ValueError: wrong input, or more than one process.
    """
    if (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise ValueError(f"sppo eval runs in one process, not {processes} (WORLD_SIZE); start it without a launcher")
    recipe, sources = _resolve_target(arguments, overrides)
    args = config_from(recipe["args"])

    from sppo.data import check_dataset, load_prompts
    from sppo.evaluation import check_sampling, evaluate, model_identity, table

    check_sampling(arguments.k, args.eval_temperature)
    limit = {} if arguments.limit is None else {"limit": arguments.limit}
    problems = {name: load_prompts(source, **limit) for name, source in sources.items()}
    # The trainer requires an evaluation dataset if the recipe's settings evaluate during training.
    trainer = build_trainer({**recipe, "train_dataset": None, "eval_dataset": next(iter(problems.values()))})
    for name, dataset in problems.items():
        check_dataset(f"dataset {name!r}", dataset, trainer.tokenizer)
    identity = {
        "model": recipe["model"],
        **model_identity(trainer.accelerator.unwrap_model(trainer.model), trainer.tokenizer),
        **{name: getattr(args, name) for name in _SAMPLING},
    }
    folder = Path(str(args.output_dir), "eval")
    metrics = {}
    for name, dataset in problems.items():
        output = arguments.output or folder / f"{name}.jsonl"
        model = f"{recipe['adapter']} on {recipe['model']}" if recipe.get("adapter") else recipe["model"]
        print(
            f"evaluating {model} on {name} ({len(dataset)} problems, k={arguments.k}, at most "
            f"{args.max_completion_length} tokens) into {output}"
        )
        with trainer.accelerator.autocast():
            evaluation = evaluate(
                trainer.rollout_engine,
                dataset,
                trainer.reward_funcs,
                k=arguments.k,
                temperature=args.eval_temperature,
                seed=args.seed,
                batch_size=args.per_device_eval_batch_size,
                reward_weights=args.reward_weights,
                timeout=args.reward_timeout,
                output=output,
                overwrite=arguments.overwrite,
                identity={**identity, "dataset": name},
                progress=not args.disable_tqdm,
                episodes=trainer.episodes,
            )
        metrics[name] = evaluation.metrics
        _add_to_summary(folder / SUMMARY_FILE, {name: {"file": str(output), **evaluation.header, **evaluation.metrics}})
    print(table(metrics, arguments.k))
    return 0


def _resolve_target(arguments: argparse.Namespace, overrides: dict[str, str]) -> tuple[Recipe, dict[str, Any]]:
    """Return a recipe with the model to evaluate, and the sources of problems by name.

    The model is the one that a run of the recipe saved, if there is one.
    """
    recipe: Recipe = {"args": {"output_dir": "runs"}}
    is_checkpoint = arguments.target and any(
        Path(arguments.target, n).is_file() for n in ("config.json", ADAPTER_CONFIG)
    )
    if is_checkpoint:
        settings = {"output_dir": arguments.target, **_completion_end(arguments.target)}
        recipe = {"model": arguments.target, "args": settings}
    elif arguments.target:
        recipe = read_recipe(arguments.target, trust_code=arguments.trust_recipe_code)
    for name, text in overrides.items():
        override(recipe, name, text)
    if not is_checkpoint or arguments.model:
        recipe = _with_adapter(recipe, arguments.target if is_checkpoint else str(recipe["args"]["output_dir"]))
    if model := arguments.model or (None if is_checkpoint else _trained_model(recipe)):
        recipe = {**recipe, "model": model, "model_kwargs": {}}
    recipe["reward"] = arguments.reward or recipe.get("reward")
    if arguments.temperature is not None:
        recipe["args"]["eval_temperature"] = arguments.temperature
    sources = arguments.dataset or [recipe.get("eval_dataset")]
    for key, value, option in (
        ("model", recipe.get("model"), "--model"),
        ("eval_dataset", sources[0], "--dataset"),
        ("reward", recipe["reward"], "--reward"),
    ):
        if not value and not (key == "reward" and recipe.get("environment")):
            raise ValueError(f"no {key} to use; give {option}, or a recipe that has it")
    if arguments.output and len(sources) > 1:
        raise ValueError(f"--output names one file for {len(sources)} datasets; omit it, or give --output_dir")
    return recipe, dict(zip(_dataset_names(sources), sources, strict=True))


def _completion_end(folder: str) -> dict[str, Any]:
    """Return where completions ended in the run that saved a model, or nothing if its folder does not record it."""
    file = Path(folder, "training_args.json")
    settings = json.loads(file.read_text()) if file.is_file() else {}
    return {name: settings[name] for name in ("max_completion_length", "stop_strings") if settings.get(name)}


def _dataset_names(sources: Sequence[Any]) -> list[str]:
    """Return a short, distinct file name for each dataset: ``math_500`` for ``data/math_500.parquet?limit=9``."""
    names: list[str] = []
    for source in sources:
        text = str(source.get("name")) if isinstance(source, dict) else str(source)
        base = re.split(r"[/\\:]", text.partition("?")[0].rstrip("/"))[-1]
        name = re.sub(r"\.(parquet|jsonl?|csv)$", "", base)
        numbered = (f"{name}-{i}" for i in itertools.count(2))
        names.append(name if name not in names else next(other for other in numbered if other not in names))
    return names


def _add_to_summary(path: Path, metrics: dict[str, Any]) -> None:
    """Add metrics by dataset to the file, keeping those of other datasets."""
    previous = json.loads(path.read_text()) if path.exists() else {}
    with atomic_write(path) as staged:
        staged.write_text(json.dumps({**previous, **metrics}, indent=1) + "\n")


def _trained_model(recipe: Recipe) -> str | None:
    """Return the folder of the model that a run of the recipe saved, or None."""
    folder = Path(str(recipe["args"]["output_dir"]))
    return str(folder) if (folder / "config.json").is_file() else None


def _with_adapter(recipe: Recipe, folder: str) -> Recipe:
    """Return the recipe with the adapter saved in a folder, if any, and without an adapter to train."""
    recipe = {**recipe, "peft_config": None}
    return {**recipe, "adapter": folder} if Path(folder, ADAPTER_CONFIG).is_file() else recipe
