"""Comparison of variants of a recipe: each variant is trained with each of some seeds, and only its settings differ.

Rows of an earlier run of the same comparison in the same folder are kept, so an interrupted command resumes. The tokens
to the threshold are those of all completions, greedy ones included, until an evaluation on held-out prompts first
reached it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import results
from benchmarks.harness.recipe_trainer import build_quiet_trainer
from benchmarks.harness.results import Row

EVAL_EVERY = 10
LOST = 0.02  # held-out accuracy below which a run with a threshold stops: a policy does not recover from 0
Reward = Callable[..., list[float]]


@dataclass(frozen=True)
class Comparison:
    """Variants of a recipe, and how their rows are judged and shown.

    Attributes:
        suite: name of the suite and of its results file.
        variants: settings by variant, named as on the command line of ``sppo train``.
        columns: of the table of variants.
        stop_at_threshold: whether a run ends at the threshold, or when its accuracy is lost.
        failures_of: lists what fails among the lines of :func:`by_variant`.
        reward_of: replaces the recipe's reward for a variant and seed, if it returns one.
    """

    suite: str
    variants: Mapping[str, dict[str, Any]]
    columns: results.Columns
    stop_at_threshold: bool
    failures_of: Callable[[Iterable[Row]], list[str]] = lambda lines: []
    reward_of: Callable[[str, int], Reward | None] = lambda variant, seed: None

    def run(self, args: argparse.Namespace) -> int:
        """Train what is missing in the results file, and write it after each run."""
        if args.seeds < 1:
            raise SystemExit(f"--seeds must be at least 1, got {args.seeds}")
        path = args.out / f"{self.suite}.json"
        variants = dict(list(self.variants.items())[: 2 if args.quick else None])
        steps = 2 if args.quick else args.steps
        about = {
            "device": results.device_name(results.this_device()),
            "threads": torch.get_num_threads(),
            "recipe": args.recipe,
            "threshold": args.threshold,
            "steps": steps,
            "quick": args.quick,
        }
        rows = _earlier_rows(path, about)
        done = {(row["variant"], row["seed"]) for row in rows}
        for seed in range(1 if args.quick else args.seeds):
            for variant, settings in variants.items():
                if (variant, seed) in done:
                    continue
                row = train(
                    args.recipe,
                    settings | ({"max_steps": steps} if steps else {}),
                    seed,
                    args.out / "runs" / self.suite,
                    threshold=args.threshold if self.stop_at_threshold else None,
                    reward=self.reward_of(variant, seed),
                )
                rows.append({"variant": variant, **row})
                self._report_progress(rows[-1], args.threshold)
                failures = self.failures_of(by_variant(rows, args.threshold))
                results.write(path, self.suite, chart(rows), **about, failures=failures, rows=rows)
        lines = by_variant(rows, args.threshold)
        failures = [] if args.quick else self.failures_of(lines)
        return results.conclude(results.table(lines, self.columns), failures, path)

    def _report_progress(self, row: Row, threshold: float) -> None:
        reached = tokens_to(threshold, row)
        print(
            f"{row['variant']}, seed {row['seed']}: {row['accuracy_before']:.3f} -> {row['accuracy_after']:.3f}, "
            f"{threshold} at {reached or '-'} tokens, {row['seconds']:.0f} s",
            file=sys.stderr,
            flush=True,
        )

    def published_table(self, folder: Path) -> str:
        """Return one line per variant."""
        report = results.load(folder, self.suite)
        return results.markdown(by_variant(report["rows"], report["threshold"]), self.columns)


def train(
    recipe_name: str,
    settings: dict[str, Any],
    seed: int,
    folder: Path,
    *,
    threshold: float | None = None,
    reward: Reward | None = None,
) -> Row:
    """Train once and return the run's summary and its held-out accuracy along the way.

    Args:
        threshold: accuracy at which the run stops; it also stops when the accuracy falls to ``LOST``.
        reward: used in place of the recipe's.
    """
    from transformers import TrainerCallback

    from sppo.reporting.summary import summarize
    from sppo.rewards import resolve

    class StopAtThreshold(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
            if threshold is not None:
                control.should_training_stop |= not LOST < metrics["eval_success_rate"] < threshold

    of_run = {"seed": seed, "model_kwargs.seed": seed, "output_dir": folder, "logging_steps": 1}
    evaluated = {"eval_strategy": "steps", "eval_steps": EVAL_EVERY}
    trainer = build_quiet_trainer(recipe_name, {**of_run, **evaluated, **settings})
    trainer.add_callback(StopAtThreshold())
    if reward is not None:
        trainer.rollouts.sampler.reward_funcs = [resolve(reward)]
    before = trainer.evaluate()
    trainer.state.log_history.clear()
    trainer.train()
    return {
        "seed": seed,
        "problems": len(trainer.eval_dataset),
        **summarize(trainer, before, trainer.evaluate()),
        "evaluations": _evaluations(trainer.state.log_history),
    }


def _evaluations(log: Iterable[dict[str, float]]) -> list[list[float]]:
    """List generated tokens and held-out accuracy of each evaluation."""
    found, tokens = [], 0.0
    for entry in log:
        tokens = entry.get("total_generated_tokens", tokens)
        if "eval_success_rate" in entry:
            found.append([tokens, round(entry["eval_success_rate"], 4)])
    return found


def tokens_to(threshold: float, row: Row) -> float | None:
    """Return the generated tokens until the first evaluation at the threshold; None if it was never reached."""
    return next((tokens for tokens, accuracy in row["evaluations"] if accuracy >= threshold), None)


def by_variant(rows: Iterable[Row], threshold: float) -> list[Row]:
    """Average over the seeds: tokens to the threshold, accuracies and their change, with standard errors."""
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


def chart(rows: list[Row]) -> results.Chart:
    """Chart the final accuracy of each run."""
    return results.Chart(
        "held-out accuracy", [(f"{row['variant']}, seed {row['seed']}", row["accuracy_after"]) for row in rows]
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="two updates of one seed and two variants")
    parser.add_argument("--recipe", default="quickstart", help="a recipe of sppo train (%(default)s)")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="number of seeds (%(default)s)")
    parser.add_argument("--steps", type=int, metavar="N", help="updates per run (the recipe's)")
    parser.add_argument("--threshold", type=float, default=0.75, help="accuracy to reach (%(default)s)")
    results.add_out(parser)


def _earlier_rows(path: Path, about: Row) -> list[Row]:
    """Read the rows of an earlier report with the same settings."""
    report = json.loads(path.read_text()) if path.exists() else {}
    return report.get("rows", []) if {name: report.get(name) for name in about} == about else []
