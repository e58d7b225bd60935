"""The command ``sppo``: train and evaluate from a recipe, whose values the command line may override; ask a critic."""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import logging
import math
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sppo.files import replacing

try:
    from sppo.recipe import KEYS, RECIPES, Recipe, build_trainer, config_from, override, read_recipe, shipped_recipes
except ModuleNotFoundError as error:
    sys.exit(f"sppo: {error.name} is missing; the trainer's packages come with: pip install 'sppo-kernels[train]'")

# torch, transformers and datasets are imported where they are needed, so that --help and wrong input answer at once.
if TYPE_CHECKING:
    from sppo import SPPOTrainer

ADAPTER = "adapter_config.json"
BEFORE = "eval_before.json"
SUMMARY = "summary.json"
DEFAULT_RUN = "runs/quickstart"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code: 0, 2 for a wrong input (one line says what), 130 after Ctrl-C."""
    arguments, rest = _parser().parse_known_args(argv)
    _show_log()
    if "target" in arguments and rest and not rest[0].startswith("--"):
        arguments.target = rest.pop(0)
    try:
        return arguments.run(arguments, _overrides(rest))
    except KeyboardInterrupt:
        print(
            "sppo: interrupted; train goes on from its last checkpoint (save_steps) with --resume, eval with the same "
            "command",
            file=sys.stderr,
        )
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
        usage="sppo train [RECIPE] [--resume] [settings]",
        allow_abbrev=False,  # --model is no short form of --model_kwargs
        help="train from a recipe",
        formatter_class=raw,
        description="Train from a recipe: evaluate, train, evaluate again, report.",
        epilog="A recipe is a YAML file, or one of those that are shipped: "
        f"{', '.join(shipped_recipes())}\n\n"
        "Any value of a recipe can be given, after the recipe's name if there is one:\n"
        "  sppo train quickstart --learning_rate 1e-5 --train_dataset.size 500 --output_dir runs/mine\n"
        "  sppo train --model Qwen/Qwen2.5-1.5B-Instruct --train_dataset mine.jsonl --reward my_reward.py:score\n\n"
        f"A recipe's keys: {', '.join(KEYS)}; see the recipes in {RECIPES}.\n"
        f"Settings (and those of transformers.TrainingArguments):\n{_settings_help()}",
    )
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint in output_dir, if any")
    train.set_defaults(run=_train, target=None)

    evaluate = commands.add_parser(
        "eval",
        usage="sppo eval [RECIPE_OR_CHECKPOINT] [options] [settings]",
        allow_abbrev=False,
        help="measure a model's accuracy",
        formatter_class=raw,
        description="Answer problems, grade the answers, print avg@k, pass@k and maj@k, and keep each problem's result "
        "in\na JSONL file. The same command goes on with an evaluation that was stopped.",
        epilog="Examples:\n"
        "  sppo eval quickstart                        the recipe's trained model, or its first one before training\n"
        "  sppo eval runs/mine/checkpoint-100 --dataset test.parquet --reward math --limit 100\n"
        "  sppo eval runs/mine --dataset aime.parquet --dataset amc.parquet --reward math --k 8 --temperature 0.6\n\n"
        "Settings can be given as for sppo train, for example --max_completion_length 2048, --seed 1, or\n"
        "--per_device_eval_batch_size 64: completions to work on at once.",
    )
    evaluate.add_argument("--model", help="folder, hub name or module:function")
    evaluate.add_argument(
        "--dataset",
        action="append",
        help="problems: a file, reasoning_gym:TASK, module:function or a hub name; may be given several times",
    )
    evaluate.add_argument("--reward", help="name of a reward, or module:function")
    evaluate.add_argument("--limit", type=int, help="use the first so many problems of each dataset")
    evaluate.add_argument("--k", type=int, default=1, help="answers a problem (%(default)s)")
    evaluate.add_argument(
        "--temperature", type=float, help="of sampling, 0 for greedy; default the recipe's eval_temperature, else 0"
    )
    evaluate.add_argument("--output", type=Path, help="JSONL file; default eval/<dataset>.jsonl in output_dir")
    evaluate.add_argument("--overwrite", action="store_true", help="start over where the file holds results")
    # Were it declared, argparse would take the value of a setting that it does not know (--max_steps 3) for it.
    evaluate.set_defaults(run=_eval, target=None)

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

    plot = commands.add_parser(
        "plot",
        help="draw runs into one picture",
        formatter_class=raw,
        description="Draw reward, response length, entropy, the critic's calibration and where the time went, of runs\n"
        "that are finished or still going, into one picture.",
        epilog="Example:\n  sppo plot runs/sppo runs/grpo --output comparison.png",
    )
    plot.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="a run's output_dir, or a checkpoint")
    plot.add_argument(
        "--output", type=Path, default=Path("plot.png"), metavar="FILE", help="picture to write (%(default)s)"
    )
    plot.add_argument("--x", choices=("tokens", "updates", "seconds"), default="tokens", help="x axis (%(default)s)")
    plot.set_defaults(run=_plot)

    doctor = commands.add_parser(
        "doctor",
        help="say what is installed, what a run would use, and what is missing",
        description="Say what is installed, what a run would use of it and what to install for more, and try the fused "
        "kernels. The exit code is 1 where training cannot run.",
    )
    doctor.set_defaults(run=_doctor)

    for command in (train, evaluate, value, plot, doctor):
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
    named = arguments.target or ""
    recipe: Recipe = read_recipe(named) if named else {"args": {"output_dir": "runs/train"}}
    for name, text in overrides.items():
        override(recipe, name, text)
    folder = Path(str(recipe["args"]["output_dir"]))
    if (folder / SUMMARY).exists():
        print(
            f"{folder} holds a finished run (see {folder / SUMMARY}); to start over, delete it or name another folder:"
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

    from sppo.report import write_report

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
    base = () if Path(folder, ADAPTER).is_file() else ("model", "model_kwargs")
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


def _eval(arguments: argparse.Namespace, overrides: dict[str, str]) -> int:
    if (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise ValueError(f"sppo eval runs in one process, not {processes} (WORLD_SIZE); start it without a launcher")
    recipe, sources = _what_to_evaluate(arguments, overrides)
    args = config_from(recipe["args"])

    from sppo.data import load_prompts
    from sppo.evaluation import check_sampling, evaluate, model_identity, table
    from sppo.inputs import check_dataset

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
        _add_to_summary(folder / SUMMARY, {name: {"file": str(output), **evaluation.header, **evaluation.metrics}})
    print(table(metrics, arguments.k))
    return 0


def _what_to_evaluate(arguments: argparse.Namespace, overrides: dict[str, str]) -> tuple[Recipe, dict[str, Any]]:
    """The recipe, with the model that it trained if there is one, and the sources of problems by name."""
    recipe: Recipe = {"args": {"output_dir": "runs"}}
    is_checkpoint = arguments.target and any(Path(arguments.target, n).is_file() for n in ("config.json", ADAPTER))
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
    with replacing(path) as staged:
        staged.write_text(json.dumps({**known, **metrics}, indent=1) + "\n")


def _value(arguments: argparse.Namespace, overrides: dict[str, str]) -> int:
    _refuse(overrides, "value")
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


def _plot(arguments: argparse.Namespace, overrides: dict[str, str]) -> int:
    _refuse(overrides, "plot")
    from sppo.plot import plot

    plot(arguments.runs, arguments.output, arguments.x)
    print(arguments.output)
    return 0


def _doctor(arguments: argparse.Namespace, overrides: dict[str, str]) -> int:
    _refuse(overrides, "doctor")
    from sppo.doctor import diagnose

    return diagnose()


def _refuse(overrides: dict[str, str], command: str) -> None:
    if overrides:
        raise ValueError(f"unknown option --{next(iter(overrides))}; sppo {command} --help lists them")


def _trained(recipe: Recipe) -> str | None:
    """The model that a run of the recipe saved."""
    folder = Path(str(recipe["args"]["output_dir"]))
    return str(folder) if (folder / "config.json").is_file() else None


def _with_adapter(recipe: Recipe, folder: str) -> Recipe:
    """The recipe with the adapter that a run left in a folder, if it did, in place of one to learn."""
    trained = Path(folder, ADAPTER).is_file()
    return {**recipe, "adapter": folder, "peft_config": None} if trained else {**recipe, "peft_config": None}


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
        "updates": f"{updates}, of {per_update:g} completions of at most {args.max_completion_length} tokens, on "
        f"{args.world_size} process{'es' if args.world_size > 1 else ''}",
        "learning": f"policy at {args.learning_rate:g}"
        + (
            f", a fiftieth of it until its gradients agree (min_agreement={args.min_agreement:g})"
            * (args.min_agreement > 0)
        ),
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
