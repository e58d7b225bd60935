"""Reward of SPPO, PPO, GRPO and related algorithms against tokens, updates and seconds.

The tasks are chains of thought of 16, 64 and 256 steps with verified outcomes, and one with prompts of very different
difficulty. benchmarks/learn/digit_walk.py has the task, variants.py the compared variants. All runs on a task begin
with the same policy. For each algorithm and task the learning rates, the critic's included, are the best of a few in
runs with a seed of their own. The counted runs and those of SPPO's variants follow, task after task.

Runs are processes of one thread, as many at a time as there are workers. Each is saved when it is done, and the same
command resumes where it was stopped. On 2 cores all of it takes about three hours; ``--quick`` is a short run of every
step. The exit code is 1 when a run raises, not when a run does not learn.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path

import torch

from benchmarks.harness import results
from benchmarks.harness.learning import command
from benchmarks.harness.learning.command import complete, results_file, run_locked
from benchmarks.harness.learning.comparison import COLUMNS, compared
from benchmarks.harness.results import Row
from benchmarks.harness.suite import Suite
from benchmarks.learn import figures
from benchmarks.learn.policy import greedy_accuracy, lessons, make_policy
from benchmarks.learn.run_plan import SEEDS, Plan, plans
from benchmarks.learn.runs import train
from benchmarks.learn.table import OF_PAPER, SPEEDUP
from benchmarks.learn.variants import ALGORITHMS, QUICK, TASKS, Task


def add_arguments(parser: argparse.ArgumentParser) -> None:
    quick = "four steps, three algorithms, ten rollouts, one seed"
    command.add_arguments(parser, quick=quick, seeds=SEEDS, workers=os.cpu_count())


def run(args: argparse.Namespace) -> int:
    """Entry of the suite."""
    return run_locked(args, _run)


def _run(args: argparse.Namespace) -> int:
    path, rows = results_file(args, "learn")
    tasks = [QUICK] if args.quick else TASKS
    files = {task.name: _policy(args.out / "policies", task, args.quick) for task in tasks}
    hashes = {name: sha256(file.read_bytes()).hexdigest()[:16] for name, file in files.items()}
    planned = plans(rows, tasks, hashes, seeds=1 if args.quick else args.seeds, quick=args.quick)
    about = {
        "device": results.device_name(torch.device("cpu")),
        "threads": 1,
        "policies": hashes,
        "greedy": {task.name: greedy_accuracy(files[task.name], task.horizon) for task in tasks},
    }
    save = lambda failures: results.write(path, "learn", **about, failures=failures, rows=rows)
    policy_of = lambda plan: [files[plan.task.name]]
    failures = complete(planned, rows, train, policy_of, workers=args.workers, save=save)
    figures.draw_all(path, planned)
    return results.conclude(results.table(compared(planned), COLUMNS), failures, path)


def _policy(folder: Path, task: Task, quick: bool) -> Path:
    course = lessons(task.difficulty, task.horizon)
    return make_policy(folder, [lesson._replace(steps=3) for lesson in course] if quick else course)


def _of_report(figure: Callable[[Path, Sequence[Plan]], None]) -> Callable[[Path, Row], None]:
    """Return a function that draws a figure of a report."""
    return lambda path, report: figure(path, reported(report))


def reported(report: Row) -> list[Plan]:
    """Return the plans that the rows of a report belong to."""
    return plans(report["rows"], TASKS, report["policies"])


def _published(folder: Path) -> list[Row]:
    return compared(reported(results.load(folder, "learn")))


def algorithms_table(folder: Path) -> str:
    """Return one line per task and algorithm."""
    return results.markdown([line for line in _published(folder) if line["variant"] in ALGORITHMS], COLUMNS)


def variants_table(folder: Path) -> str:
    """Return one line per variant of an algorithm, after SPPO on the same task."""
    lines = _published(folder)
    tasks = {line["task"] for line in lines if line["variant"] not in ALGORITHMS}
    shown = [line for line in lines if line["task"] in tasks and line["variant"] not in set(ALGORITHMS) - {"sppo"}]
    return results.markdown(shown, COLUMNS)


def speedup_table(folder: Path) -> str:
    """Return one line per task for the algorithms of SPPO's paper, and SPPO with centred advantages."""
    return results.markdown([line for line in _published(folder) if line["variant"] in OF_PAPER], SPEEDUP)


SUITE = Suite(
    add_arguments,
    run,
    tables={"learn": algorithms_table, "learn-variants": variants_table, "learn-speedup": speedup_table},
    figures={name: _of_report(figure) for name, figure in figures.FIGURES.items()},
    needs="the trainer",
)
