"""``sppo train``: evaluate, train, evaluate again, report."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from sppo._utils import ADAPTER_CONFIG, SUMMARY_FILE
from sppo.cli.recipes import Recipe, build_trainer, override, read_recipe

# torch, transformers and datasets are imported where they are needed, so that --help and errors in the input are quick.
if TYPE_CHECKING:
    from sppo import SPPOTrainer

EVAL_BEFORE_FILE = "eval_before.json"


def train(arguments: argparse.Namespace, overrides: dict[str, str]) -> int:
    """Run ``sppo train``: evaluate, train, evaluate again, and write the report and the model card.

    Args:
        arguments: the parsed command line.
        overrides: settings given as ``--name value``.

    Returns:
        The exit code; 0 also if ``output_dir`` already holds a finished run.

    Raises:
        ValueError: wrong input, or a checkpoint in ``output_dir`` without ``--resume``.
    """
    name = arguments.target or ""
    recipe: Recipe = {"args": {"output_dir": "runs/train"}}
    if name:
        recipe = read_recipe(name, trust_code=arguments.trust_recipe_code)
        name += " --trust-recipe-code" * arguments.trust_recipe_code  # in the commands that are printed
    for key, text in overrides.items():
        override(recipe, key, text)
    folder = Path(str(recipe["args"]["output_dir"]))
    if (folder / SUMMARY_FILE).exists():
        print(
            f"{folder} holds a finished run (see {folder / SUMMARY_FILE}); to start over, delete it or name another "
            "folder:"
        )
        command = _command_line(name, overrides, without=("output_dir",))
        print(f"  {program()} train {command} --output_dir {shlex.quote(f'{folder}-2')}")
        return 0
    checkpoints = list(folder.glob("checkpoint-*"))
    if arguments.resume and not checkpoints:
        print(f"{folder} holds no checkpoint to resume from; starting from the beginning")
    if checkpoints and not arguments.resume:
        raise ValueError(
            f"output_dir {str(folder)!r} holds a checkpoint of an earlier run ({checkpoints[0].name}); "
            "continue it with --resume, or delete the folder or choose another --output_dir to start over"
        )
    if not recipe.get("train_dataset"):
        raise ValueError("the recipe has no 'train_dataset'; give --train_dataset")
    trainer = build_trainer(recipe)
    _print_plan(recipe, trainer, resumes=bool(checkpoints))

    from sppo.reporting.summary import write_report

    before = _evaluate_before(trainer, folder, resumes=bool(checkpoints))
    changes = [name for name in (arguments.allow_changes or "").split(",") if name]
    trainer.train(resume_from_checkpoint=True if checkpoints else None, allow_changes=changes)
    trainer.save_model()
    after = _evaluate_after(trainer)
    if trainer.is_world_process_zero():
        command = _command_line(name, overrides, without=("output_dir", "seed"))
        evaluation = _eval_command(recipe, name, overrides)
        write_report(trainer, before, after, program=program(), recipe=command, evaluation=evaluation)
        trainer.create_model_card()
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    return 0


def program() -> str:
    """Return the command by which this process was started, or ``sppo`` if the shell finds it."""
    script = Path(sys.argv[0])
    if script.name == "__main__.py":
        python = "python" if shutil.which("python") == sys.executable else shlex.quote(sys.executable)
        return f"{python} -m sppo.cli"
    return "sppo" if shutil.which("sppo") else shlex.quote(str(script))  # the environment may not be activated


def _command_line(name: str, overrides: dict[str, str], without: Sequence[str]) -> str:
    """Return a recipe's name and the overrides, except those of the keys in ``without``, quoted for a shell."""
    kept = {key: text for key, text in overrides.items() if key.partition(".")[0] not in without}
    return " ".join([name, *(f"--{key} {shlex.quote(text)}" for key, text in kept.items())]).strip()


def _eval_command(recipe: Recipe, name: str, overrides: dict[str, str]) -> str:
    """Return the arguments of ``sppo eval`` for the model that a run saved.

    They name a base model only if the run saved an adapter.
    """
    folder = str(recipe["args"]["output_dir"])
    if not recipe.get("eval_dataset"):
        reward = f" --reward {shlex.quote(str(recipe['reward']))}" if recipe.get("reward") else ""
        options = _format(recipe)
        file = shlex.quote(f"FILE?{urlencode(options)}") if options else "FILE"
        return f"{shlex.quote(folder)} --dataset {file}{reward}"
    base = () if Path(folder, ADAPTER_CONFIG).is_file() else ("model", "model_kwargs")
    command = _command_line(name, overrides, without=(*base, "critic", "train_dataset", "max_steps", "output_dir"))
    return f"{command} --output_dir {shlex.quote(folder)}"


def _format(recipe: Recipe) -> dict[str, str]:
    """Return the options of the training set that say how prompts are sent, as text."""
    from sppo.data import format_options

    options = format_options(recipe["train_dataset"])
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in options.items()}


def _evaluate_before(trainer: SPPOTrainer, folder: Path, *, resumes: bool) -> dict[str, float]:
    """Evaluate the initial model; a resumed run reads the metrics from its folder."""
    if trainer.eval_dataset is None:
        return {}
    file = folder / EVAL_BEFORE_FILE
    if resumes and file.exists():
        return json.loads(file.read_text())
    before = trainer.evaluate()
    if trainer.is_world_process_zero():
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(before))
    return before


def _evaluate_after(trainer: SPPOTrainer) -> dict[str, Any]:
    """Return the metrics of the trained model: those of training, if it was evaluated after the last update."""
    if trainer.eval_dataset is None:
        return {}
    state = trainer.state
    last = next((entry for entry in reversed(state.log_history) if "eval_reward" in entry), {"step": -1})
    evaluated = last["step"] == state.global_step and not trainer.args.load_best_model_at_end
    return last if evaluated else trainer.evaluate()


def _print_plan(recipe: Recipe, trainer: Any, *, resumes: bool) -> None:
    if not trainer.is_world_process_zero():
        return
    args = trainer.args
    updates = args.max_steps
    if updates <= 0:
        updates = math.ceil(args.num_train_epochs * trainer.rollouts.updates_per_epoch)
    per_update = args.rollout_size * args.world_size / args.updates_per_rollout
    size = sum(parameter.numel() for parameter in trainer.model.parameters())
    critic = "with its critic " if trainer.algorithm.critic else ""
    plan = {
        "algorithm": f"{args.algorithm}, {args.num_generations} per prompt, {args.ratio_level} ratio",
        "model": f"{recipe['model']} ({critic}{size / 1e6:.3g}M parameters, on {args.device})",
        "prompts": f"{len(trainer.train_dataset)} from {_describe_source(recipe['train_dataset'])}"
        f"{', without the chat template of the model' if _omits_chat_template(trainer) else ''}",
        "evaluation": f"{len(trainer.eval_dataset)} from {_describe_source(recipe['eval_dataset'])}, before and after"
        if trainer.eval_dataset is not None
        else "none (no eval_dataset)",
        "reward": ", ".join(reward.name for reward in trainer.reward_funcs),
        "updates": f"{updates}, of {per_update:g} completions of at most {args.max_completion_length} tokens, on "
        f"{args.world_size} process{'es' if args.world_size > 1 else ''}",
        "learning": f"policy at {args.learning_rate:g}, {args.lr_scheduler_type.value} schedule, "
        f"{args.get_warmup_steps(updates)} warm-up steps",
        "output": f"{args.output_dir}{', resuming' if resumes else ''}",
    }
    for name, text in plan.items():
        print(_hanging(f"{name:<11} {text}"))


def _omits_chat_template(trainer: Any) -> bool:
    """Return whether the model has a chat template and the prompts are plain text."""
    return bool(getattr(trainer.tokenizer, "chat_template", None)) and isinstance(
        trainer.train_dataset[0]["prompt"], str
    )


def _hanging(line: str) -> str:
    """Break a line of the plan at the width of a terminal, with its text below each other."""
    if not sys.stdout.isatty():
        return line
    width = shutil.get_terminal_size().columns
    return textwrap.fill(line, width, subsequent_indent=" " * 12, break_on_hyphens=False)


def _describe_source(source: Any) -> str:
    if not isinstance(source, dict):
        return str(source)
    options = ", ".join(f"{key}={value}" for key, value in source.items() if key != "name" and len(str(value)) < 40)
    return f"{source.get('name')} ({options})" if options else str(source.get("name"))
