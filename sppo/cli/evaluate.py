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

# torch, transformers and datasets are imported where they are needed, so that wrong input answers at once.


def evaluate(arguments: argparse.Namespace, overrides: dict[str, str]) -> int:
    if (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise ValueError(f"sppo eval runs in one process, not {processes} (WORLD_SIZE); start it without a launcher")
    recipe, sources = _what_to_evaluate(arguments, overrides)
    args = config_from(recipe["args"])

    from sppo.data import check_dataset, load_prompts
    from sppo.evaluation import check_sampling, evaluate, model_identity, table

    check_sampling(arguments.k, args.eval_temperature)
    limit = {} if arguments.limit is None else {"limit": arguments.limit}
    problems = {name: load_prompts(source, **limit) for name, source in sources.items()}
    # A recipe may evaluate in the course of training, and then its settings want a dataset.
    trainer = build_trainer({**recipe, "train_dataset": None, "eval_dataset": next(iter(problems.values()))})
    for name, dataset in problems.items():
        check_dataset(f"dataset {name!r}", dataset, trainer.tokenizer)
    identity = {
        "model": recipe["model"],
        **model_identity(trainer.accelerator.unwrap_model(trainer.model), trainer.tokenizer),
        **{name: getattr(args, name) for name in ("max_completion_length", "top_p", "top_k", "bf16", "fp16")},
    }
    folder = Path(str(args.output_dir), "eval")
    metrics = {}
    for name, dataset in problems.items():
        output = arguments.output or folder / f"{name}.jsonl"
        what = f"{recipe['adapter']} on {recipe['model']}" if recipe.get("adapter") else recipe["model"]
        print(
            f"evaluating {what} on {name} ({len(dataset)} problems, k={arguments.k}, at most "
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
            )
        metrics[name] = evaluation.metrics
        _add_to_summary(folder / SUMMARY_FILE, {name: {"file": str(output), **evaluation.header, **evaluation.metrics}})
    print(table(metrics, arguments.k))
    return 0


def _what_to_evaluate(arguments: argparse.Namespace, overrides: dict[str, str]) -> tuple[Recipe, dict[str, Any]]:
    """The recipe, with the model that it trained if there is one, and the sources of problems by name."""
    recipe: Recipe = {"args": {"output_dir": "runs"}}
    is_checkpoint = arguments.target and any(
        Path(arguments.target, n).is_file() for n in ("config.json", ADAPTER_CONFIG)
    )
    if is_checkpoint:
        recipe = {"model": arguments.target, "args": {"output_dir": arguments.target, **_length_of(arguments.target)}}
    elif arguments.target:
        recipe = read_recipe(arguments.target)
    for name, text in overrides.items():
        override(recipe, name, text)
    if not is_checkpoint or arguments.model:
        recipe = _with_adapter(recipe, arguments.target if is_checkpoint else str(recipe["args"]["output_dir"]))
    if other := arguments.model or (None if is_checkpoint else _trained(recipe)):
        recipe = {**recipe, "model": other, "model_kwargs": {}}
    recipe["reward"] = arguments.reward or recipe.get("reward")
    if arguments.temperature is not None:
        recipe["args"]["eval_temperature"] = arguments.temperature
    sources = arguments.dataset or [recipe.get("eval_dataset")]
    for what, value, option in (
        ("model", recipe.get("model"), "--model"),
        ("eval_dataset", sources[0], "--dataset"),
        ("reward", recipe["reward"], "--reward"),
    ):
        if not value:
            raise ValueError(f"nothing says which {what} to use; give {option}, or a recipe that has it")
    if arguments.output and len(sources) > 1:
        raise ValueError(f"--output names one file for {len(sources)} datasets; leave it out, or give --output_dir")
    return recipe, dict(zip(_dataset_names(sources), sources, strict=True))


def _length_of(folder: str) -> dict[str, int]:
    """How long the completions were that a model was trained on, where its folder says so."""
    trained = Path(folder, "training_args.json")
    known = json.loads(trained.read_text()) if trained.is_file() else {}
    return {name: known[name] for name in ("max_completion_length",) if name in known}


def _dataset_names(sources: Sequence[Any]) -> list[str]:
    """A short name for each dataset, good for a file: ``data/math_500.parquet?limit=9`` is ``math_500``."""
    names: list[str] = []
    for source in sources:
        text = str(source.get("name")) if isinstance(source, dict) else str(source)
        base = re.split(r"[/\\:]", text.partition("?")[0].rstrip("/"))[-1]
        name = re.sub(r"\.(parquet|jsonl?|csv)$", "", base)
        numbered = (f"{name}-{i}" for i in itertools.count(2))
        names.append(name if name not in names else next(other for other in numbered if other not in names))
    return names


def _add_to_summary(path: Path, metrics: dict[str, Any]) -> None:
    """Put the metrics of datasets beside those that the file has of others."""
    known = json.loads(path.read_text()) if path.exists() else {}
    with atomic_write(path) as staged:
        staged.write_text(json.dumps({**known, **metrics}, indent=1) + "\n")


def _trained(recipe: Recipe) -> str | None:
    """The model that a run of the recipe saved."""
    folder = Path(str(recipe["args"]["output_dir"]))
    return str(folder) if (folder / "config.json").is_file() else None


def _with_adapter(recipe: Recipe, folder: str) -> Recipe:
    """The recipe with the adapter that a run left in a folder, if it did, in place of one to learn."""
    trained = Path(folder, ADAPTER_CONFIG).is_file()
    return {**recipe, "adapter": folder, "peft_config": None} if trained else {**recipe, "peft_config": None}
