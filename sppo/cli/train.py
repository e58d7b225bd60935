"""``sppo train``: evaluate, train, evaluate again, report."""

from __future__ import annotations

import argparse
import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sppo._utils import ADAPTER_CONFIG, SUMMARY_FILE
from sppo.cli.recipes import Recipe, build_trainer, override, read_recipe

# torch, transformers and datasets are imported where they are needed, so that --help and wrong input answer at once.
if TYPE_CHECKING:
    from sppo import SPPOTrainer

BEFORE = "eval_before.json"


def train(arguments: argparse.Namespace, overrides: dict[str, str]) -> int:
    named = arguments.target or ""
    recipe: Recipe = read_recipe(named) if named else {"args": {"output_dir": "runs/train"}}
    for name, text in overrides.items():
        override(recipe, name, text)
    folder = Path(str(recipe["args"]["output_dir"]))
    if (folder / SUMMARY_FILE).exists():
        print(
            f"{folder} holds a finished run (see {folder / SUMMARY_FILE}); to start over, delete it or name another "
            "folder:"
        )
        print(f"  {' '.join(['sppo train', named, '--output_dir'])} {folder}-2")
        return 0
    checkpoints = list(folder.glob("checkpoint-*"))
    if arguments.resume and not checkpoints:
        print(f"{folder} holds no checkpoint to resume from: the run starts at its beginning")
    if checkpoints and not arguments.resume:
        raise ValueError(
            f"output_dir {str(folder)!r} holds a checkpoint of an earlier run ({checkpoints[0].name}); "
            "go on with --resume, or start over: delete the folder or choose another --output_dir"
        )
    if not recipe.get("train_dataset"):
        raise ValueError("the recipe has no 'train_dataset'; give --train_dataset")
    trainer = build_trainer(recipe)
    _print_plan(recipe, trainer, resumes=bool(checkpoints))

    from sppo.reporting.summary import write_report

    before = _evaluate_before(trainer, folder, resumes=bool(checkpoints))
    trainer.train(resume_from_checkpoint=True if checkpoints else None)
    trainer.save_model()
    after = trainer.evaluate() if trainer.eval_dataset is not None else {}
    if trainer.is_world_process_zero():
        started = _command(named, overrides, without=("output_dir", "seed"))
        write_report(trainer, before, after, recipe=started, evaluation=_evaluation_of(recipe, named, overrides))
        trainer.create_model_card()
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    return 0


def _command(named: str, overrides: dict[str, str], without: Sequence[str]) -> str:
    """A recipe's name and the overrides, but for some, as they are typed."""
    kept = {name: text for name, text in overrides.items() if name.partition(".")[0] not in without}
    return " ".join([named, *(f"--{name} {shlex.quote(text)}" for name, text in kept.items())]).strip()


def _evaluation_of(recipe: Recipe, named: str, overrides: dict[str, str]) -> str:
    """What ``sppo eval`` is to be told for the model that a run has left, which an adapter's base model belongs to."""
    folder = str(recipe["args"]["output_dir"])
    if not recipe.get("eval_dataset"):
        return f"{folder} --dataset FILE --reward {shlex.quote(str(recipe['reward']))}"
    base = () if Path(folder, ADAPTER_CONFIG).is_file() else ("model", "model_kwargs")
    told = _command(named, overrides, without=(*base, "critic", "train_dataset", "max_steps", "output_dir"))
    return f"{told} --output_dir {folder}"


def _evaluate_before(trainer: SPPOTrainer, folder: Path, *, resumes: bool) -> dict[str, float]:
    """The first model's scores; a resumed run has them in its folder."""
    if trainer.eval_dataset is None:
        return {}
    if resumes and (folder / BEFORE).exists():
        return json.loads((folder / BEFORE).read_text())
    before = trainer.evaluate()
    if trainer.is_world_process_zero():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / BEFORE).write_text(json.dumps(before))
    return before


def _print_plan(recipe: Recipe, trainer: Any, *, resumes: bool) -> None:
    if not trainer.is_world_process_zero():
        return
    args = trainer.args
    updates = args.max_steps
    if updates <= 0:
        updates = math.ceil(args.num_train_epochs * trainer.rollouts.updates_per_epoch)
    per_update = args.rollout_size * args.world_size / args.updates_per_rollout
    size = sum(parameter.numel() for parameter in trainer.model.parameters())
    plan = {
        "algorithm": f"{args.algorithm}, {args.num_generations} a prompt, {args.ratio_level} ratio",
        "model": f"{recipe['model']} (with its critic {size / 1e6:.3g}M parameters, on {args.device})",
        "prompts": f"{len(trainer.train_dataset)} from {_describe(recipe['train_dataset'])}",
        "evaluation": f"{len(trainer.eval_dataset)} from {_describe(recipe['eval_dataset'])}, before and after"
        if trainer.eval_dataset is not None
        else "none (no eval_dataset)",
        "reward": ", ".join(reward.name for reward in trainer.reward_funcs),
        "updates": f"{updates}, of {per_update:g} completions of at most {args.max_completion_length} tokens, on "
        f"{args.world_size} process{'es' if args.world_size > 1 else ''}",
        "learning": f"policy at {args.learning_rate:g}, {args.lr_scheduler_type.value} schedule, "
        f"{args.get_warmup_steps(updates)} warm-up steps",
        "output": f"{args.output_dir}{', resuming' if resumes else ''}",
    }
    for name, what in plan.items():
        print(f"{name:<11} {what}")


def _describe(source: Any) -> str:
    if not isinstance(source, dict):
        return str(source)
    options = ", ".join(f"{key}={value}" for key, value in source.items() if key != "name" and len(str(value)) < 40)
    return f"{source.get('name')} ({options})" if options else str(source.get("name"))
