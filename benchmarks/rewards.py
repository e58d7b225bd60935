"""Seconds to grade math answers of which some are too hard to evaluate, and answers that lose their score to them.

Answers are those of competitions in form: numbers, fractions, roots, intervals, sets. Hard ones, such as 9^{9^{9}},
take the place of some. The reward `math` is compared with grading one answer after the other in one call that has a
time limit for the batch, as it did before each answer had a limit of its own. A batch is a rollout. "rejected" are
answers without a score, "innocent" those of them that are not hard. The exit code is 1 if `math` rejects an answer that
is not hard, or gives one the wrong score.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.harness import results
from benchmarks.harness.results import Row
from benchmarks.harness.suite import Suite
from sppo.rewards import builtin, score

HARD = (r"9^{9^{9}}", r"9^{9^{9^{9^{9}}}} + \frac{1}{9^{9^{9^{9}}}}", "99999999!", r"\binom{99999999}{49999999}")
FORMS = (
    "{a}", r"\frac{{{a}}}{{{b}}}", r"{a}\sqrt{{{b}}}", "({a}, {b})", r"\left[{a}, {b}\right)", r"\{{{a}, {b}\}}",
    r"{a}\pi", "{a}.{b}", "x^{{{a}}} + {b}", r"{a}^\circ",
)  # fmt: skip
METHODS = {"`math`": "math", "one limit for the batch": "benchmarks.rewards:in_one_call"}


def in_one_call(prompts: Sequence[Any], completions: Sequence[Any], *, answer: Sequence[str]) -> list[float]:
    """Grade as ``math`` did: in turn, with math-verify's own limits of five seconds."""
    return [
        builtin._math(prompt, completion, truth, None, 5)
        for prompt, completion, truth in zip(prompts, completions, answer, strict=True)
    ]


def problems(count: int, share: float) -> tuple[list[str], list[str], list[bool]]:
    """Return completions, ground truths, and which completions are hard."""
    draw = random.Random(0)
    truths = [draw.choice(FORMS).format(a=draw.randint(2, 99), b=draw.randint(2, 99)) for _ in range(count)]
    hard = set(draw.sample(range(count), round(share * count)))
    given = [draw.choice(HARD) if i in hard else truths[i] for i in range(count)]
    return [rf"Therefore \boxed{{{each}}}." for each in given], truths, [i in hard for i in range(count)]


def measure(method: str, args: argparse.Namespace) -> Row:
    """Grade all answers by one method, a batch at a time."""
    completions, truths, hard = problems(args.answers, args.share)
    rewards: list[float | None] = []
    score([METHODS[method]], ["p"], ["1"], {"answer": ["1"]})  # starts the worker
    start = time.perf_counter()
    for first in range(0, args.answers, args.batch):
        batch = slice(first, first + args.batch)
        prompts = ["p"] * len(truths[batch])
        scores = score([METHODS[method]], prompts, completions[batch], {"answer": truths[batch]}, timeout=args.timeout)
        rewards += scores.rewards
        print(f"{method}: {len(rewards)} of {args.answers}", flush=True)
    return {
        "method": method,
        "answers": args.answers,
        "hard": sum(hard),
        "rejected": sum(reward is None for reward in rewards),
        "innocent": sum(reward is None and not is_hard for reward, is_hard in zip(rewards, hard, strict=True)),
        "wrong": sum(reward is not None and reward != (not h) for reward, h in zip(rewards, hard, strict=True)),
        "seconds": time.perf_counter() - start,
    }


COLUMNS: results.Columns = {
    name: (lambda row: f"{row['seconds']:.0f}") if name == "seconds" else lambda row, name=name: row[name]
    for name in ("method", "answers", "hard", "rejected", "innocent", "wrong", "seconds")
}


def failures_of(rows: list[Row]) -> list[str]:
    """Return what `math` got wrong."""
    return [
        f"{row['method']}: {row[name]} {name}"
        for row in rows
        for name in ("innocent", "wrong")
        if row["method"] == "`math`" and row[name]
    ]


def chart(rows: list[Row]) -> results.Chart:
    """Chart the seconds of each method."""
    return results.Chart("seconds", [(row["method"].strip("`"), row["seconds"]) for row in rows])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="40 answers")
    parser.add_argument("--answers", type=int, default=1000, help="number of answers (%(default)s)")
    parser.add_argument("--share", type=float, default=0.05, help="share of hard answers (%(default)s)")
    parser.add_argument("--batch", type=int, default=128, help="answers of a rollout (%(default)s)")
    parser.add_argument("--timeout", type=float, default=60.0, help="reward_timeout, in seconds (%(default)s)")
    results.add_out(parser)


def run(args: argparse.Namespace) -> int:
    """Entry of the suite."""
    if args.quick:
        args.answers, args.timeout = 40, 4.0
    rows = [measure(method, args) for method in METHODS]
    failures = failures_of(rows)
    path = args.out / "rewards.json"
    settings = {"batch": args.batch, "timeout": args.timeout}
    device = results.device_name(results.this_device())
    results.write(
        path, "rewards", chart(rows), quick=args.quick, failures=failures, rows=rows, device=device, **settings
    )
    return results.conclude(results.markdown(rows, COLUMNS), failures, path)


def published_table(folder) -> str:
    """Return one line per method."""
    rows = [row for report in results.load_all(folder, "rewards") for row in report["rows"]]
    return results.markdown(rows, COLUMNS)


SUITE = Suite(
    add_arguments, run, tables={"rewards": published_table}, draw=results.draw_bars(chart), needs="math-verify"
)
