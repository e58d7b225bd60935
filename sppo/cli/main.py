"""The ``sppo`` command line: subcommands, their options, and the handling of errors."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

try:
    from sppo.cli.evaluate import evaluate as run_evaluate
    from sppo.cli.recipes import KEYS, RECIPES, shipped_recipes
    from sppo.cli.settings_help import settings_help
    from sppo.cli.train import train as run_train
except ModuleNotFoundError as error:
    sys.exit(f"sppo: {error.name} is missing; install the trainer's packages: pip install 'sppo-kernels[train]'")

# torch, transformers and datasets are imported where they are needed, so that --help and errors in the input are quick.

DEFAULT_RUN = "runs/quickstart"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the ``sppo`` command.

    Args:
        argv: the arguments; None for those of the process.

    Returns:
        The exit code: 0, 2 for wrong input (described in one line on stderr), or 130 after Ctrl-C. ``sppo doctor``
        returns 1 if training cannot run.
    """
    arguments, rest = _parser().parse_known_args(argv)
    _configure_logging()
    if "target" in arguments and rest and not rest[0].startswith("--"):
        arguments.target = rest.pop(0)
    try:
        return arguments.run(arguments, _overrides(rest))
    except KeyboardInterrupt:
        print(
            "sppo: interrupted; continue train from its last checkpoint (save_steps) with --resume, eval with the same "
            "command",
            file=sys.stderr,
        )
        return 130
    except (ValueError, TypeError, OSError, ImportError) as error:
        if arguments.traceback or os.environ.get("SPPO_DEBUG"):
            raise
        print(f"sppo: {' '.join(str(error).split())} (--traceback shows where)", file=sys.stderr)
        return 2


def subcommands() -> dict[str, argparse.ArgumentParser]:
    """Return the parser of each subcommand by its name."""
    (commands,) = [action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(commands.choices)


def _parser() -> argparse.ArgumentParser:
    keep_line_breaks = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="sppo",
        description="Sequence-Level PPO (arXiv 2604.08865): train language models on verifiable rewards.",
        epilog="sppo train --help lists recipes and settings. Quick start: sppo train quickstart",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        usage="sppo train [RECIPE] [--resume] [settings]",
        allow_abbrev=False,  # otherwise --model would abbreviate --model_kwargs
        help="train from a recipe",
        formatter_class=keep_line_breaks,
        description="Train from a recipe: evaluate, train, evaluate again, report.",
        epilog="A recipe is a YAML file or the name of a shipped recipe: "
        f"{', '.join(shipped_recipes())}\n\n"
        "Options override any value of the recipe; without a recipe they give all of them:\n"
        "  sppo train quickstart --learning_rate 1e-5 --train_dataset.size 500 --output_dir runs/mine\n"
        "  sppo train --model Qwen/Qwen2.5-1.5B-Instruct --train_dataset mine.jsonl --reward my_reward.py:score\n\n"
        f"A recipe's keys: {', '.join(KEYS)}; see the recipes in {RECIPES}.\n\n"
        f"{settings_help()}",
    )
    train.add_argument("--resume", action="store_true", help="resume from the last checkpoint in output_dir, if any")
    train.add_argument(
        "--allow-changes",
        metavar="NAMES",
        help="settings, separated by commas, that may differ when resuming: those that affect memory only, such as "
        "rollout_batch_size, max_tokens_per_micro_batch or logits_budget_bytes",
    )
    train.set_defaults(run=run_train, target=None)

    evaluate = commands.add_parser(
        "eval",
        usage="sppo eval [RECIPE_OR_CHECKPOINT] [options] [settings]",
        allow_abbrev=False,
        help="measure a model's accuracy",
        formatter_class=keep_line_breaks,
        description="Answer problems, grade the answers, print avg@k, pass@k and maj@k, and write the result of each\n"
        "problem to a JSONL file. The same command resumes an interrupted evaluation.",
        epilog="Examples:\n"
        "  sppo eval quickstart                        the recipe's trained model, or its initial one before training\n"
        "  sppo eval runs/mine/checkpoint-100 --dataset test.parquet --reward math --limit 100\n"
        "  sppo eval runs/mine --dataset aime.parquet --dataset amc.parquet --reward math --k 8 --temperature 0.6\n\n"
        "Settings are given as for sppo train, for example --max_completion_length 2048, --seed 1, or\n"
        "--per_device_eval_batch_size 64 (completions per batch).",
    )
    evaluate.add_argument("--model", help="folder, hub name or module:function")
    evaluate.add_argument(
        "--dataset",
        action="append",
        help="problems: a file, reasoning_gym:TASK, module:function or a hub name; repeat for several datasets",
    )
    evaluate.add_argument("--reward", help="name of a reward, or module:function")
    evaluate.add_argument("--limit", type=int, help="number of problems per dataset to use, from the first")
    evaluate.add_argument("--k", type=int, default=1, help="answers per problem (%(default)s)")
    evaluate.add_argument(
        "--temperature",
        type=float,
        help="sampling temperature, 0 for greedy; default: the recipe's eval_temperature, else 0",
    )
    evaluate.add_argument("--output", type=Path, help="JSONL file; default: eval/<dataset>.jsonl in output_dir")
    evaluate.add_argument("--overwrite", action="store_true", help="start over if the file already holds results")
    # Not a declared positional: argparse would fill it with the value of a setting it does not know (--max_steps 3).
    evaluate.set_defaults(run=run_evaluate, target=None)

    value = commands.add_parser(
        "value",
        help="print a critic's predicted success probability of prompts",
        formatter_class=keep_line_breaks,
        description="Print the probability of success that a trained prompt critic predicts for each prompt.\n"
        "A probe or a token critic has no such model.",
        epilog="Example, after sppo train quickstart:\n  sppo value '7-3*2+1-2*2=' '1+1+1+1+1+1='",
    )
    value.add_argument("prompts", nargs="+", metavar="PROMPT", help="a prompt, formatted as in training")
    value.add_argument(
        "--critic", default=DEFAULT_RUN, metavar="FOLDER", help="a run's folder, a checkpoint or a critic (%(default)s)"
    )
    value.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="send prompts as user messages; default: if the tokenizer has a chat template",
    )
    value.set_defaults(run=_value)

    plot = commands.add_parser(
        "plot",
        help="plot the metrics of runs",
        formatter_class=keep_line_breaks,
        description="Plot reward, response length, entropy, critic calibration and time per phase of finished or\n"
        "running runs in one figure.",
        epilog="Example:\n  sppo plot runs/sppo runs/grpo --output comparison.png",
    )
    plot.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="a run's output_dir, or a checkpoint")
    plot.add_argument(
        "--output", type=Path, default=Path("plot.png"), metavar="FILE", help="image file to write (%(default)s)"
    )
    plot.add_argument("--x", choices=("tokens", "updates", "seconds"), default="tokens", help="x axis (%(default)s)")
    plot.set_defaults(run=_plot)

    compare = commands.add_parser(
        "compare",
        help="compare runs at equal tokens, updates and seconds",
        formatter_class=keep_line_breaks,
        description="Print the mean reward of finished or running runs, in training and on held-out prompts, at the\n"
        "largest number of tokens, updates and seconds that all of them reached, and plot it over the three.",
        epilog="Example:\n  sppo compare runs/sppo runs/grpo --json comparison.json",
    )
    compare.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="a run's output_dir, or a checkpoint")
    compare.add_argument(
        "--output", type=Path, default=Path("compare.png"), metavar="FILE", help="image file to write (%(default)s)"
    )
    compare.add_argument("--json", type=Path, metavar="FILE", help="file to write the numbers to")
    compare.set_defaults(run=_compare)

    doctor = commands.add_parser(
        "doctor",
        help="check the installation: versions, hardware, kernels",
        description="Report installed packages, what a run would use and what is missing, and test the fused kernels. "
        "The exit code is 1 if training cannot run.",
    )
    doctor.set_defaults(run=_doctor)

    for command in (train, evaluate):
        command.add_argument(
            "--trust-recipe-code",
            action="store_true",
            help="import any function that the recipe names, with your rights; without it, only those of the package "
            "and of .py files beside the recipe",
        )
    for command in (train, evaluate, value, plot, compare, doctor):
        command.add_argument(
            "--traceback", action="store_true", help="show the traceback of an error (also with SPPO_DEBUG=1)"
        )
    return parser


def _configure_logging() -> None:
    logger = logging.getLogger("sppo")
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler(sys.stdout))
        logger.setLevel(logging.INFO)


def _overrides(arguments: Sequence[str]) -> dict[str, str]:
    """Parse ``["--a", "1", "--b.c=2"]`` as ``{"a": "1", "b.c": "2"}``; a name without a value is a switch, true."""
    overrides: dict[str, str] = {}
    expects_value = None
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            overrides[name] = value if equals else "true"
            expects_value = None if equals else name
        elif expects_value is None:
            raise ValueError(
                f"unexpected argument {argument!r}; give overrides as --name value after the recipe's name"
            )
        else:
            overrides[expects_value] = argument
            expects_value = None
    return overrides


def _value(arguments: argparse.Namespace, overrides: dict[str, str]) -> int:
    _reject(overrides, "value")
    if not Path(arguments.critic).is_dir():
        raise ValueError(
            f"there is no critic in {arguments.critic!r}; train one with sppo train, or give a folder with --critic"
        )
    from sppo.cli.recipes import load_tokenizer
    from sppo.models.critic_io import critic_folder, load_critic
    from sppo.models.critics import prompt_values
    from sppo.rollout import encode

    folder = critic_folder(arguments.critic)
    critic, tokenizer = load_critic(folder), load_tokenizer(str(folder), {})
    kind = getattr(critic.config, "critic_kind", "prompt")
    if kind != "prompt":
        raise ValueError(
            f"{str(folder)!r} is a {kind} critic; only a prompt critic predicts the probability of success of a prompt "
            "by itself"
        )
    is_chat = bool(tokenizer.chat_template) if arguments.chat is None else arguments.chat
    prompts = [[{"role": "user", "content": text}] if is_chat else text for text in arguments.prompts]
    values = prompt_values(critic.eval(), [encode(prompt, tokenizer) for prompt in prompts])
    for text, value in zip(arguments.prompts, values, strict=True):
        print(f"{value:.3f}  {text}")
    return 0


def _plot(arguments: argparse.Namespace, overrides: dict[str, str]) -> int:
    _reject(overrides, "plot")
    from sppo.reporting.plots import plot

    plot(arguments.runs, arguments.output, arguments.x)
    print(arguments.output)
    return 0


def _compare(arguments: argparse.Namespace, overrides: dict[str, str]) -> int:
    _reject(overrides, "compare")
    from sppo.reporting.compare import compare

    print(compare(arguments.runs, arguments.output, arguments.json))
    return 0


def _doctor(arguments: argparse.Namespace, overrides: dict[str, str]) -> int:
    _reject(overrides, "doctor")
    from sppo.cli.doctor import diagnose

    return diagnose()


def _reject(overrides: dict[str, str], command: str) -> None:
    if overrides:
        raise ValueError(f"unknown option --{next(iter(overrides))}; sppo {command} --help lists them")
