"""Whether training comes out the same with a few entries of the gradient a token as with all of it.

A recipe is trained with each of some seeds, once with ``logprobs_backward`` "cache" and once with "sparse". The exit
code is 1 when the mean accuracies on held-out prompts, or the mean rewards on the way, differ by more than twice the
standard error that the spread over seeds gives.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.recipes import trainer_of
from benchmarks.results import Row

MODES = ("cache", "sparse")


def train(recipe_name: str, seed: int, backward: str, folder: Path, steps: int | None) -> Row:
    """A run: its summary, and the mean reward of its rollouts along the way."""
    from sppo.report import summarize

    settings: dict[str, Any] = {"seed": seed, "logprobs_backward": backward, "output_dir": folder}
    if steps is not None:
        settings["max_steps"] = steps
    trainer = trainer_of(recipe_name, settings)
    before = trainer.evaluate()
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "reward" in entry]
    return {
        "backward": backward,
        "seed": seed,
        **summarize(trainer, before, trainer.evaluate()),
        "curve": [[entry["total_generated_tokens"], round(entry["reward"], 4)] for entry in log],
    }


def by_mode(rows: Iterable[Row]) -> list[Row]:
    """Over the seeds: mean and standard deviation of the held-out accuracy, and the mean reward of all rollouts."""
    lines = []
    for mode in MODES:
        runs = [row for row in rows if row["backward"] == mode]
        after = [row["accuracy_after"] for row in runs]
        rewards = [statistics.mean(reward for _, reward in row["curve"]) for row in runs]
        lines.append(
            {
                "backward": mode,
                "seeds": len(runs),
                "before": statistics.mean(row["accuracy_before"] for row in runs),
                "after": statistics.mean(after),
                "after_std": statistics.stdev(after),
                "reward": statistics.mean(rewards),
                "reward_std": statistics.stdev(rewards),
            }
        )
    return lines


COLUMNS: results.Columns = {
    "backward": lambda row: f"`{row['backward']}`",
    "seeds": lambda row: row["seeds"],
    "accuracy before": lambda row: f"{row['before']:.3f}",
    "after": lambda row: f"{row['after']:.3f} ± {row['after_std']:.3f}",
    "mean reward on the way": lambda row: f"{row['reward']:.3f} ± {row['reward_std']:.3f}",
}


def failures_of(rows: list[Row]) -> list[str]:
    """Differences that the seeds do not explain."""
    cache, sparse = by_mode(rows)
    found = []
    for name in ("after", "reward"):
        error = ((cache[f"{name}_std"] ** 2 + sparse[f"{name}_std"] ** 2) / cache["seeds"]) ** 0.5
        if not abs(cache[name] - sparse[name]) <= 2 * error:
            found.append(f"{name}: {cache[name]:.3f} and {sparse[name]:.3f}, standard error {error:.3f}")
    return found


def chart(rows: list[Row]) -> results.Chart:
    """Where each run ended."""
    return results.Chart(
        "held-out accuracy", [(f"{row['backward']}, seed {row['seed']}", row["accuracy_after"]) for row in rows]
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="two updates of two seeds")
    parser.add_argument("--recipe", default="quickstart", help="as of sppo train (%(default)s)")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="how many (%(default)s)")
    results.add_out(parser)


def run(args: argparse.Namespace) -> int:
    """Entry of the suite."""
    if args.seeds < 2:
        raise SystemExit(f"--seeds must be at least 2, which is the least that has a spread, got {args.seeds}")
    path = args.out / f"learning-{Path(args.recipe).stem}.json"
    rows: list[Row] = []
    failures: list[str] = []
    for seed in range(2 if args.quick else args.seeds):
        for mode in MODES:
            row = train(args.recipe, seed, mode, args.out / "runs" / f"{mode}-{seed}", 2 if args.quick else None)
            accuracy = row["accuracy_before"], row["accuracy_after"]
            print(f"{mode}, seed {seed}: {accuracy[0]:.3f} -> {accuracy[1]:.3f}", file=sys.stderr, flush=True)
            rows.append(row)
        if seed:
            failures = failures_of(rows)
            results.write(
                path,
                "learning",
                chart(rows),
                device=results.device_name(results.this_device()),
                threads=torch.get_num_threads(),
                recipe=args.recipe,
                quick=args.quick,
                failures=failures,
                rows=rows,
            )
    return results.conclude(results.table(by_mode(rows), COLUMNS), failures, path)
