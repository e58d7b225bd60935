"""The command ``sppo``: train and evaluate from a recipe, whose values the command line may override; ask a critic."""

from __future__ import annotations

import argparse
import ast
import json
import logging
import math
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    from sppo.recipe import KEYS, RECIPES, Recipe, build_trainer, override, read_recipe, shipped_recipes
except ModuleNotFoundError as error:
    sys.exit(f"sppo: {error.name} is missing; the trainer's packages come with: pip install 'sppo-kernels[train]'")

# torch, transformers and datasets are imported where they are needed, so that --help and wrong input answer at once.
if TYPE_CHECKING:
    from sppo import SPPOTrainer
    from sppo.rollout import RolloutEngine, Sample

BEFORE = "eval_before.json"
SUMMARY = "summary.json"
DEFAULT_RUN = "runs/quickstart"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code: 0, 2 for a wrong input (one line says what), 130 after Ctrl-C."""
    arguments, rest = _parser().parse_known_args(argv)
    _show_log()
    try:
        return arguments.run(arguments, _overrides(rest))
    except KeyboardInterrupt:
        print("sppo: interrupted; with --resume it goes on from the last checkpoint, if there is one", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError) as error:
        if arguments.traceback or os.environ.get("SPPO_DEBUG"):
            raise
        print(f"sppo: {' '.join(str(error).split())} (--traceback shows where)", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="sppo",
        description="Sequence-Level PPO (arXiv 2604.08865): train language models on verifiable rewards.",
        epilog="sppo train --help lists recipes and settings. Quick start: sppo train quickstart",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        allow_abbrev=False,  # --model is no short form of --model_kwargs
        help="train from a recipe",
        formatter_class=raw,
        description="Train from a recipe: evaluate, train, evaluate again, report.",
        epilog=f"Recipes shipped: {', '.join(shipped_recipes())}\n\n"
        "Any value of a recipe can be given, after the recipe's name:\n"
        "  sppo train quickstart --learning_rate 1e-5 --train_dataset.size 500 --output_dir runs/mine\n\n"
        f"A recipe's keys: {', '.join(KEYS)}; see the recipes in {RECIPES}.\n"
        f"Settings (and those of transformers.TrainingArguments):\n{_settings_help()}",
    )
    train.add_argument("recipe", metavar="RECIPE", help="a YAML file or the name of a shipped recipe")
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint in output_dir, if any")
    train.set_defaults(run=_train)

    evaluate = commands.add_parser(
        "eval",
        allow_abbrev=False,
        help="measure a model's accuracy",
        formatter_class=raw,
        description="Answer problems, grade the answers, print the accuracy and write each problem's result as JSONL.",
        epilog="Examples:\n"
        "  sppo eval quickstart                        the recipe's trained model, or its first one before training\n"
        "  sppo eval runs/mine/checkpoint-100 --dataset test.parquet --reward math --limit 100\n\n"
        "Settings can be given as for sppo train, for example --max_completion_length 2048.",
    )
    evaluate.add_argument("target", nargs="?", metavar="RECIPE_OR_CHECKPOINT", help="what to evaluate")
    evaluate.add_argument("--model", help="folder, hub name or module:function")
    evaluate.add_argument("--dataset", help="problems: a file, reasoning_gym:TASK, module:function or a hub name")
    evaluate.add_argument("--reward", help="name of a reward, or module:function")
    evaluate.add_argument("--limit", type=int, help="use the first so many problems")
    evaluate.add_argument(
        "--temperature", type=float, help="of sampling, 0 for greedy; default the recipe's eval_temperature, else 0"
    )
    evaluate.add_argument("--output", type=Path, help="JSONL file to write; default eval.jsonl in output_dir")
    evaluate.set_defaults(run=_eval)

    value = commands.add_parser(
        "value",
        help="print how likely a critic thinks prompts are to be solved",
        formatter_class=raw,
        description="Print the probability of success that a trained critic predicts for each prompt.",
        epilog="Example, after sppo train quickstart:\n  sppo value '7-3*2+1-2*2=' '1+1+1+1+1+1='",
    )
    value.add_argument("prompts", nargs="+", metavar="PROMPT", help="a prompt, as the policy was asked")
    value.add_argument(
        "--critic", default=DEFAULT_RUN, metavar="FOLDER", help="a run's folder, a checkpoint or a critic (%(default)s)"
    )
    value.add_argument(
        "--chat", action=argparse.BooleanOptionalAction, help="ask as a user's message; default: if there is a template"
    )
    value.set_defaults(run=_value)

    for command in (train, evaluate, value):
        command.add_argument(
            "--traceback", action="store_true", help="show where an error comes from (SPPO_DEBUG=1 too)"
        )
    return parser


def _settings_help() -> str:
    """SPPOConfig's fields, from its source: importing it would import torch."""
    body = next(
        node.body
        for node in ast.parse(Path(__file__).with_name("config.py").read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == "SPPOConfig"
    )
    lines = []
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call):
            given = {keyword.arg: keyword.value for keyword in node.value.keywords}
            text = ast.unparse(given["metadata"]).partition(": ")[2].strip("}").strip("f\"'")
            lines.append(f"  --{ast.unparse(node.target):<27} {text} [{ast.unparse(given['default'])}]")
    return "\n".join(lines)


def _show_log() -> None:
    logger = logging.getLogger("sppo")
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler(sys.stdout))
        logger.setLevel(logging.INFO)


def _overrides(arguments: Sequence[str]) -> dict[str, str]:
    """``["--a", "1", "--b.c=2"]`` -> ``{"a": "1", "b.c": "2"}``; a name without a value is a switch, true."""
    found: dict[str, str] = {}
    waiting = None
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            found[name] = value if equals else "true"
            waiting = None if equals else name
        elif waiting is None:
            raise ValueError(f"unexpected argument {argument!r}; overrides are --name value, after the recipe's name")
        else:
            found[waiting] = argument
            waiting = None
    return found


def _train(arguments: argparse.Namespace, overrides: dict[str, str]) -> int:
    recipe = read_recipe(arguments.recipe)
    for name, text in overrides.items():
        override(recipe, name, text)
    folder = Path(str(recipe["args"]["output_dir"]))
    if (folder / SUMMARY).exists():
        print(
            f"{folder} holds a finished run (see {folder / SUMMARY}); to start over, delete it or name another folder:"
        )
        print(f"  sppo train {arguments.recipe} --output_dir {folder}-2")
        return 0
    checkpoints = list(folder.glob("checkpoint-*"))
    if checkpoints and not arguments.resume:
        raise ValueError(
            f"output_dir {str(folder)!r} holds a checkpoint of an earlier run ({checkpoints[0].name}); "
            "go on with --resume, or start over: delete the folder or choose another --output_dir"
        )
    if not recipe.get("train_dataset"):
        raise ValueError("the recipe has no 'train_dataset'; give --train_dataset")
    trainer = build_trainer(recipe)
    _print_plan(recipe, trainer, resumes=bool(checkpoints))

    from sppo.report import write_report

    before = _evaluate_before(trainer, folder, resumes=bool(checkpoints))
    trainer.train(resume_from_checkpoint=True if checkpoints else None)
    trainer.save_model()
    after = trainer.evaluate() if trainer.eval_dataset is not None else {}
    if trainer.is_world_process_zero():
        others = {name: text for name, text in overrides.items() if name not in ("output_dir", "seed")}
        started = " ".join([arguments.recipe, *(f"--{name} {shlex.quote(text)}" for name, text in others.items())])
        write_report(trainer, before, after, recipe=started)
    return 0


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


def _eval(arguments: argparse.Namespace, overrides: dict[str, str]) -> int:
    recipe: Recipe = {"args": {"output_dir": "runs/eval"}}
    if arguments.target and Path(arguments.target, "config.json").is_file():
        recipe["model"] = arguments.target
    elif arguments.target:
        recipe = read_recipe(arguments.target)
    for name, text in overrides.items():
        override(recipe, name, text)
    if other := arguments.model or _trained(recipe):
        recipe = {**recipe, "model": other, "model_kwargs": {}}
    recipe["eval_dataset"] = arguments.dataset or recipe.get("eval_dataset")
    recipe["reward"] = arguments.reward or recipe.get("reward")
    for key, option in (("model", "--model"), ("eval_dataset", "--dataset"), ("reward", "--reward")):
        if not recipe.get(key):
            raise ValueError(f"nothing says which {key} to use; give {option}, or a recipe that has it")
    if arguments.temperature is not None:
        recipe["args"]["eval_temperature"] = arguments.temperature
    if arguments.limit is not None:
        override(recipe, "eval_dataset.limit", str(arguments.limit))
    trainer = build_trainer({**recipe, "train_dataset": None})
    if trainer.args.world_size > 1:
        raise ValueError(f"sppo eval runs in one process, not {trainer.args.world_size}; start it without a launcher")
    recorder = trainer.rollout_engine = _Recorder(trainer.rollout_engine)
    problems: Any = trainer.eval_dataset
    print(f"evaluating {recipe['model']} on {_describe(recipe['eval_dataset'])} ({len(problems)} problems)")
    metrics = trainer.evaluate()
    output = arguments.output or Path(str(trainer.args.output_dir), "eval.jsonl")
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w") as lines:
        for i, sample in enumerate(recorder.samples):
            lines.write(json.dumps(_result(i, sample, problems[i])) + "\n")
    print(
        f"accuracy {metrics['eval_success_rate']:.3f} on {metrics['eval_problems']:.0f} problems, mean reward "
        f"{metrics['eval_reward']:.3f}, mean length {metrics['eval_response_length']:.0f} tokens, "
        f"cut off {metrics['eval_truncated']:.1%}; each problem in {output}"
    )
    return 0


def _value(arguments: argparse.Namespace, overrides: dict[str, str]) -> int:
    if overrides:
        raise ValueError(f"unknown option --{next(iter(overrides))}; sppo value --help lists them")
    if not Path(arguments.critic).is_dir():
        raise ValueError(
            f"there is no critic in {arguments.critic!r}; train one with sppo train, or name a folder with --critic"
        )
    from sppo.critic import critic_folder, load_critic, prompt_values
    from sppo.recipe import load_tokenizer
    from sppo.rollout import encode

    folder = critic_folder(arguments.critic)
    critic, tokenizer = load_critic(folder), load_tokenizer(str(folder), {})
    kind = getattr(critic.config, "critic_kind", "prompt")
    if kind != "prompt":
        raise ValueError(f"{str(folder)!r} is a {kind} critic, which predicts returns; only a prompt critic predicts P")
    chat = bool(tokenizer.chat_template) if arguments.chat is None else arguments.chat
    asked = [[{"role": "user", "content": text}] if chat else text for text in arguments.prompts]
    for text, value in zip(
        arguments.prompts, prompt_values(critic.eval(), [encode(prompt, tokenizer) for prompt in asked]), strict=True
    ):
        print(f"{value:.3f}  {text}")
    return 0


class _Recorder:
    """A rollout engine that keeps the samples another makes; the trainer writes their rewards into them."""

    def __init__(self, engine: RolloutEngine) -> None:
        self.engine = engine
        self.samples: list[Sample] = []

    def generate(self, prompts: Sequence[Any], **settings: Any) -> list[Sample]:
        self.samples += (made := self.engine.generate(prompts, **settings))
        return made


def _result(index: int, sample: Sample, row: dict[str, Any]) -> dict[str, Any]:
    facts = {"index": index, "prompt": sample.prompt, "completion": sample.completion, "answer": row.get("answer")}
    return {**facts, "reward": sample.reward, "tokens": len(sample.response_ids), "truncated": sample.truncated}


def _trained(recipe: Recipe) -> str | None:
    """The model that a run of the recipe saved."""
    folder = Path(str(recipe["args"]["output_dir"]))
    return str(folder) if (folder / "config.json").is_file() else None


def _print_plan(recipe: Recipe, trainer: Any, *, resumes: bool) -> None:
    if not trainer.is_world_process_zero():
        return
    args = trainer.args
    updates = args.max_steps
    if updates <= 0:
        updates = math.ceil(args.num_train_epochs * trainer.experience.updates_per_epoch)
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
        "updates": f"{updates}, of {per_update:g} completions of at most {args.max_completion_length} tokens",
        "output": f"{args.output_dir}{', resuming' if resumes else ''}",
    }
    for name, what in plan.items():
        print(f"{name:<11} {what}")


def _describe(source: Any) -> str:
    if not isinstance(source, dict):
        return str(source)
    options = ", ".join(f"{key}={value}" for key, value in source.items() if key != "name" and len(str(value)) < 40)
    return f"{source.get('name')} ({options})" if options else str(source.get("name"))


if __name__ == "__main__":
    sys.exit(main())
