"""The command of a comparison of learning curves: its options, and its results file, written after each run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import results
from benchmarks.harness.learning.jobs import AnyPlan, remaining_rows
from benchmarks.harness.results import Row
from sppo._utils import run_lock


def add_arguments(parser: argparse.ArgumentParser, *, quick: str, seeds: int, workers: int | None) -> None:
    """Add the options of every comparison.

    Args:
        parser: parser of the suite.
        quick: help of ``--quick``.
        seeds: default number of seeds.
        workers: default number of runs at a time.
    """
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--seeds", type=int, default=seeds, metavar="N", help="seeds of the counted runs (%(default)s)")
    parser.add_argument("--workers", type=int, default=workers, metavar="N", help="runs at a time (%(default)s)")
    results.add_out(parser)


def run_locked(args: argparse.Namespace, body: Callable[[argparse.Namespace], int]) -> int:
    """Check the options and run ``body`` with one thread, as the only command that writes into ``--out``."""
    for name in ("seeds", "workers"):
        if getattr(args, name) < 1:
            raise SystemExit(f"--{name} must be at least 1, got {getattr(args, name)}")
    torch.set_num_threads(1)
    with run_lock(args.out):  # two runs would overwrite each other's rows
        return body(args)


def results_file(args: argparse.Namespace, suite: str) -> tuple[Path, list[Row]]:
    """Return the results file of a suite, another one with ``--quick``, and the rows that it has."""
    path: Path = args.out / f"{suite}{'-quick' if args.quick else ''}.json"
    return path, json.loads(path.read_text())["rows"] if path.exists() else []


def complete(
    plans: Sequence[AnyPlan],
    rows: list[Row],
    train: Callable[..., Row],
    args: Callable[[AnyPlan], Sequence[Any]],
    *,
    workers: int,
    save: Callable[[list[str]], None],
) -> list[str]:
    """Do the runs that are not done, as :func:`benchmarks.harness.learning.jobs.remaining_rows` does.

    Args:
        plans, train, args, workers: see there.
        rows: list to which rows are added.
        save: writes the results; called with the failures so far after each run that is done.

    Returns:
        What failed; an interruption is one.
    """
    failures: list[str] = []
    try:
        for plan, row in remaining_rows(plans, train, args, workers=workers, failures=failures):
            plan.done[row["run"]] = row
            rows.append(row)
            save(failures)
    except KeyboardInterrupt:
        failures.append("interrupted; the same command resumes from here")
    return failures
