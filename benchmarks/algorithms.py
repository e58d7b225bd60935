"""Levels of the ratio compared on a recipe, and whether an algorithm does harm when its rewards are stuck.

Each variant of a comparison is trained with each of some seeds on a recipe, and nothing but its settings differs:

    levels  sppo with each level of the ratio, the recipe as it is (one update a rollout) and with four
    stuck   every algorithm, reinforce with each baseline, under a reward that is random, stuck at 0, or stuck at 1,
            graded by the true one

Rows of an earlier run of the same comparison in the same folder are kept: one that was interrupted goes on.

The tokens to the threshold are those of all completions, greedy ones too, until an evaluation on held-out prompts first
reached it. The exit code of ``stuck`` is 1 when the accuracy of a variant fell by more than twice its standard error
over seeds and held-out prompts. How fast algorithms learn is the matter of the suite ``learn``.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.recipes import trainer_of
from benchmarks.results import Row

EVAL_EVERY = 10
LOST = 0.02  # held-out accuracy
CONTROL = "sppo with min_agreement=0, reward random"  # what the others are kept from

_FOUR_UPDATES = {"per_device_train_batch_size": 256, "steps_per_generation": 4, "gradient_accumulation_steps": 1}
_LEVELS = {
    "token": {"ratio_level": "token"},
    "sequence_mean": {"ratio_level": "sequence_mean"},
    "sequence_mean, GSPO's clip": {"ratio_level": "sequence_mean", "epsilon": 3e-4, "epsilon_high": 4e-4},
    "sequence_sum": {"ratio_level": "sequence_sum"},
}
_ALGORITHMS: dict[str, dict[str, Any]] = {
    **{name: {"algorithm": name} for name in ("sppo", "ppo", "grpo", "dr_grpo", "rloo", "gspo", "remax")},
    **{f"reinforce, {b}": {"algorithm": "reinforce", "baseline": b} for b in (0.5, "running_mean", "prompt_mean")},
}
COMPARISONS: dict[str, dict[str, dict[str, Any]]] = {
    "levels": {
        **{f"{name}, 1 update a rollout": settings for name, settings in _LEVELS.items() if "," not in name},
        **{f"{name}, 4 updates a rollout": settings | _FOUR_UPDATES for name, settings in _LEVELS.items()},
    },
    "stuck": {CONTROL: {"algorithm": "sppo", "min_agreement": 0, "reward": "random"}}
    | {
        f"{name}, reward {reward}": settings | {"reward": reward}
        for reward in ("random", "0", "1")
        for name, settings in _ALGORITHMS.items()
    },
}
Reward = Callable[..., list[float]]


def stuck_reward(kind: str, seed: int) -> Reward:
    """A reward that does not look at its completions: always 0, always 1, or one of the two at random."""
    rng = random.Random(seed)
    draw = {"0": lambda: 0.0, "1": lambda: 1.0, "random": lambda: float(rng.random() < 0.5)}[kind]
    return lambda completions, **_: [draw() for _ in completions]


def train(
    recipe_name: str, variant: str, settings: dict[str, Any], seed: int, threshold: float | None, folder: Path
) -> Row:
    """A run: its summary and its held-out accuracy along the way.

    Where there is a threshold it stops there, and where it has lost what it knew: from 0 there is no way back.
    """
    from transformers import TrainerCallback

    from sppo.report import summarize
    from sppo.rewards import resolve

    class StopAtThreshold(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
            if threshold is not None:
                control.should_training_stop |= not LOST < metrics["eval_success_rate"] < threshold

    of_run = {"seed": seed, "model_kwargs.seed": seed, "output_dir": folder, "logging_steps": 1}
    evaluated = {"eval_strategy": "steps", "eval_steps": EVAL_EVERY}
    given = {name: value for name, value in settings.items() if name != "reward"}
    trainer = trainer_of(recipe_name, {**of_run, **evaluated, **given})
    trainer.add_callback(StopAtThreshold())
    if "reward" in settings:
        trainer.experience.reward_funcs = [resolve(stuck_reward(settings["reward"], seed))]
    before = trainer.evaluate()
    trainer.state.log_history.clear()
    trainer.train()
    log = trainer.state.log_history
    return {
        "variant": variant,
        "seed": seed,
        "problems": len(trainer.eval_dataset),
        **summarize(trainer, before, trainer.evaluate()),
        "updates_until_trusted": sum("gradient_agreement" in entry for entry in log),
        "evaluations": _evaluations(log),
    }


def _evaluations(log: Iterable[dict[str, float]]) -> list[list[float]]:
    """Generated tokens and held-out accuracy at each evaluation."""
    found, tokens = [], 0.0
    for entry in log:
        tokens = entry.get("total_generated_tokens", tokens)
        if "eval_success_rate" in entry:
            found.append([tokens, round(entry["eval_success_rate"], 4)])
    return found


def tokens_to(threshold: float, row: Row) -> float | None:
    """Generated tokens until the first evaluation that reached the threshold; None where none did."""
    return next((tokens for tokens, accuracy in row["evaluations"] if accuracy >= threshold), None)


def by_variant(rows: Iterable[Row], threshold: float) -> list[Row]:
    """Over the seeds: tokens to the threshold, accuracy before and after, and the change with its standard error."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["variant"], []).append(row)
    lines = []
    for variant, runs in found.items():
        reached = [tokens for run in runs if (tokens := tokens_to(threshold, run)) is not None]
        change = [run["accuracy_after"] - run["accuracy_before"] for run in runs]
        lines.append(
            {
                "variant": variant,
                "seeds": len(runs),
                "problems": sum(run["problems"] for run in runs),
                "reached": len(reached),
                "tokens": statistics.mean(reached) if reached else None,
                "tokens_error": _standard_error(reached),
                "before": statistics.mean(run["accuracy_before"] for run in runs),
                "after": statistics.mean(run["accuracy_after"] for run in runs),
                "change": statistics.mean(change),
                "change_error": _standard_error(change),
            }
        )
    return lines


def _standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def _thousands(row: Row) -> str:
    return f"{row['tokens'] / 1e3:.0f}k ± {row['tokens_error'] / 1e3:.0f}k" if row["tokens"] else "not reached"


COLUMNS: dict[str, results.Columns] = {
    "levels": {
        "ratio": lambda row: row["variant"],
        "seeds": lambda row: row["seeds"],
        "reached": lambda row: row["reached"],
        "tokens to the threshold": _thousands,
    },
    "stuck": {
        "algorithm and reward": lambda row: row["variant"],
        "seeds": lambda row: row["seeds"],
        "accuracy before": lambda row: f"{row['before']:.3f}",
        "after": lambda row: f"{row['after']:.3f}",
        "change": lambda row: f"{row['change']:+.3f}",
    },
}


def failures_of(comparison: str, lines: Iterable[Row]) -> list[str]:
    """Variants that did harm."""
    if comparison == "levels":
        return []
    found = []
    for line in lines:
        # Two evaluations on the same prompts, each with samples of its own, and what the seeds differ by beyond that.
        sampling = (2 * line["before"] * (1 - line["before"]) / line["problems"]) ** 0.5
        if line["variant"] != CONTROL and line["change"] < -2 * max(sampling, line["change_error"]):
            found.append(f"{line['variant']}: {line['change']:+.3f}, standard error {sampling:.3f}")
    return found


def chart(rows: list[Row]) -> results.Chart:
    """Where each run ended."""
    return results.Chart(
        "held-out accuracy", [(f"{row['variant']}, seed {row['seed']}", row["accuracy_after"]) for row in rows]
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="two updates of one seed and two variants")
    parser.add_argument("--compare", default="levels", choices=COMPARISONS, help="what (%(default)s)")
    parser.add_argument("--recipe", default="quickstart", help="as of sppo train (%(default)s)")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="how many (%(default)s)")
    parser.add_argument("--steps", type=int, metavar="N", help="updates of a run (the recipe's)")
    parser.add_argument("--threshold", type=float, default=0.75, help="accuracy to reach (%(default)s)")
    results.add_out(parser)


def _earlier(path: Path, about: Row) -> list[Row]:
    """The rows of a report on the same, if there is one at the path."""
    report = json.loads(path.read_text()) if path.exists() else {}
    return report.get("rows", []) if {name: report.get(name) for name in about} == about else []


def run(args: argparse.Namespace) -> int:
    """Entry of the suite."""
    path = args.out / f"algorithms-{args.compare}.json"
    variants = dict(list(COMPARISONS[args.compare].items())[: 2 if args.quick else None])
    steps = 2 if args.quick else args.steps
    if args.seeds < 1:
        raise SystemExit(f"--seeds must be at least 1, got {args.seeds}")
    about = {
        "device": results.device_name(results.this_device()),
        "threads": torch.get_num_threads(),
        "comparison": args.compare,
        "recipe": args.recipe,
        "threshold": args.threshold,
        "steps": steps,
        "quick": args.quick,
    }
    rows = _earlier(path, about)
    done = {(row["variant"], row["seed"]) for row in rows}
    for seed in range(1 if args.quick else args.seeds):
        for variant, settings in variants.items():
            if (variant, seed) in done:
                continue
            settings = settings | ({"max_steps": steps} if steps else {})
            threshold = args.threshold if args.compare == "levels" else None
            row = train(args.recipe, variant, settings, seed, threshold, args.out / "runs" / args.compare)
            reached = tokens_to(args.threshold, row)
            print(
                f"{variant}, seed {seed}: {row['accuracy_before']:.3f} -> {row['accuracy_after']:.3f}, "
                f"{args.threshold} at {reached or '-'} tokens, {row['seconds']:.0f} s",
                file=sys.stderr,
                flush=True,
            )
            rows.append(row)
            failures = failures_of(args.compare, by_variant(rows, args.threshold))
            results.write(path, "algorithms", chart(rows), **about, failures=failures, rows=rows)
    lines = by_variant(rows, args.threshold)
    failures = [] if args.quick else failures_of(args.compare, lines)
    return results.conclude(results.table(lines, COLUMNS[args.compare]), failures, path)
