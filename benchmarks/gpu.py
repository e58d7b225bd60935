"""Everything that wants a GPU, in one call of under 8 minutes, the most valuable first.

Each part is a process of its own with a limit of its own, so that one that crashes, hangs or takes the driver down with
it costs only itself: it is reported and passed over. What a part had saved until then counts. After each part all
results so far are written again: gpu.json (every part's own report), kernels.json, .csv and .png (all measured rows,
with the part that they are of), tuning.json (for ``sppo_kernels.tuning.load``) and log.txt.

Needs a GPU, torch, triton, numpy, pytest and hypothesis; matplotlib for the chart, pytest-xdist to run the tests in a
third of the time, and of the other libraries compared with those that are installed: pip install trl==1.16
liger-kernel cut-cross-entropy. ``--dry-run`` walks through all of it on a CPU, in Triton's interpreter, with tiny
sizes. The exit code is 1 when a part fails or is stopped at its limit; only the last one, which takes what time is
left, may be.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import claims, kernels, results
from benchmarks.results import Row

ROOT = Path(__file__).parents[1]
SECONDS = 450  # for all parts; starting Python and saving take the rest of 8 minutes
STOPPED, NO_TIME = "stopped at its limit", "no time left"
PART_COLUMNS = ("part", "seconds", "outcome", "last_line")
PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy", "flash-attn", "numpy")


class Part(NamedTuple):
    """A command, and the most seconds that it may take."""

    name: str
    command: list[str]
    seconds: int
    open_ended: bool = False  # as far as the time goes: being stopped is how it ends


def parts(folder: Path, dry: bool) -> list[Part]:
    """What is run, in order; each suite writes into ``folder``."""
    suite = lambda label, name, *options: ["-m", "benchmarks", name, "--out", str(folder / label), *options]
    measured = lambda label, plan, *options: suite(label, "kernels", "--plan", plan, *options)
    tuned = "--tuning", str(folder / "tune" / "tuning.json")
    ours = "--without", *_others()
    trl = bool(importlib.util.find_spec("trl"))
    if dry:
        few = "--only", "linear_logprobs", "policy_loss, token"
        return [
            Part("headline", measured("headline", "dry", "--without", "torch.compile"), 420),
            Part("tests", _pytest("tests/sppo_kernels/test_whiten.py", "-k", "float64"), 120),
            Part("tune", suite("tune", "tune", "--quick"), 240),
            Part("headline, tuned", measured("headline, tuned", "dry", *few, *tuned, *ours), 120),
            *[Part("TRL", suite("TRL", "trl", "--quick"), 120)] * trl,
        ]
    brief, uncompiled = ("--seconds", "0.5"), ("--without", "torch.compile")
    return [
        Part("headline", measured("headline", "headline", *brief), 130),
        Part("tests", _pytest("tests/sppo_kernels", "-m", "gpu or not slow"), 110),
        Part("tune", suite("tune", "tune"), 60),
        Part("headline, tuned", measured("headline, tuned", "headline", *brief, *tuned, *ours), 40),
        *[Part("TRL", suite("TRL", "trl", "--rounds", "2"), 60)] * trl,
        Part("shapes", measured("shapes", "shapes", *brief, *uncompiled), 130),
        Part("others", measured("others", "others", *brief, *uncompiled), 90),
        Part("sweep", measured("sweep", "sweep", *brief, *ours), SECONDS, open_ended=True),
    ]


def _pytest(*selected: str) -> list[str]:
    """Each test has its line as it ends, for the log of a run that is stopped. Compiling kernels is most of their time,
    hence the processes."""
    several = ["-n", "8"] if importlib.util.find_spec("xdist") and torch.cuda.is_available() else []
    return ["-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", *several, *selected]


def _others() -> list[str]:
    """Everything but ours and eager PyTorch."""
    return sorted({way for peers in kernels.PEERS.values() for way in peers} - {"eager PyTorch"})


class Session:
    """Runs one part after another and keeps all results written."""

    def __init__(self, out: Path, dry: bool) -> None:
        self.out, self.dry = out, dry
        self.deadline = time.monotonic() + SECONDS * (2 if dry else 1)
        self.done: list[Row] = []
        self.rows: list[Row] = []
        self.claims: list[Row] = []
        self.failures: list[str] = []
        self.log = out / "log.txt"

    def run(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        self.log.write_text("")
        with tempfile.TemporaryDirectory() as folder:
            for part in parts(Path(folder), self.dry):
                self._run(part, Path(folder) / part.name)

    def _run(self, part: Part, folder: Path) -> None:
        limit = min(part.seconds, self.deadline - time.monotonic())
        print(f"{part.name}: at most {max(0, limit):.0f} s", file=sys.stderr, flush=True)
        start = time.monotonic()
        outcome = "interrupted"  # by whoever runs this: what there is by then is saved all the same
        try:
            outcome = self._process(part, limit) if limit > 5 else NO_TIME
        finally:
            seconds = round(time.monotonic() - start, 1)
            print(f"{part.name}: {outcome}, {seconds} s", file=sys.stderr, flush=True)
            row = {
                "part": part.name,
                "seconds": seconds,
                "outcome": outcome,
                "last_line": next((line for line in reversed(self._logged()) if line), ""),
            }
            if outcome != "passed" and not (part.open_ended and outcome in (STOPPED, NO_TIME)):
                self.failures.append(f"{part.name}: {outcome}")
            self._collect(row, folder)
            self._save()

    def _collect(self, row: Row, folder: Path) -> None:
        self.done.append(row)
        row["reports"] = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
        for report in row["reports"]:
            if report.get("suite") == "kernels":
                self.rows += [{"part": row["part"], **measured} for measured in report["rows"]]
                self.claims += [{"part": row["part"], **claim} for claim in report["claims"]]
        tuning = folder / "tuning.json"
        if tuning.exists():
            (self.out / tuning.name).write_bytes(tuning.read_bytes())

    def _process(self, part: Part, limit: float) -> str:
        """Its outcome in a word or two; what it prints goes to the log, the end of it to the terminal if it fails."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        if self.dry:
            environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        with self.log.open("a") as log:
            log.write(f"\n=== {part.name}: {' '.join(part.command)}\n")
            log.flush()
            begin = log.tell()
            # Its own session, so that the processes that it started end with it.
            process = subprocess.Popen(
                [sys.executable, *part.command],
                cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end(process)
        if code != 0:
            print(*self._logged(begin)[-15:], sep="\n", file=sys.stderr, flush=True)
        return {0: "passed", None: STOPPED}.get(code, f"failed, exit code {code}")

    def _logged(self, begin: int = 0) -> list[str]:
        """Lines of the log, whatever bytes a crashing process left in it."""
        return self.log.read_bytes()[begin:].decode(errors="replace").splitlines()

    def _save(self) -> None:
        about = {"device": results.device_name(results.this_device()), "dry_run": self.dry, "packages": packages()}
        results.write(self.out / "gpu.json", "gpu", **about, failures=self.failures, parts=self.done)
        chart = kernels.chart(self.rows)
        results.write(self.out / "kernels.json", "kernels", chart, **about, claims=self.claims, rows=self.rows)

    def table(self) -> str:
        """The parts; where ours stands against the best of the others; the claims."""
        ran = results.table(self.done, {key: lambda row, key=key: row[key] for key in PART_COLUMNS})
        held = results.table(self.claims, claims.COLUMNS) if self.claims else ""
        return "\n\n".join(filter(None, [kernels.summary(self.rows), held, ran]))


def _end(process: subprocess.Popen[Any]) -> None:
    """With all that it started; on a system without process groups, it alone."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (AttributeError, ProcessLookupError, PermissionError):
        process.kill()
    process.wait()


def packages() -> dict[str, str]:
    """Versions of what is installed of those that matter to the results."""
    installed = {distribution.metadata["Name"].lower().replace("_", "-"): distribution.version
                 for distribution in importlib.metadata.distributions() if distribution.metadata["Name"]}  # fmt: skip
    return {name: installed.get(name, "not installed") for name in PACKAGES}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", "--quick", action="store_true", help="on a CPU, interpreted, with tiny sizes")
    results.add_out(parser)


def run(args: argparse.Namespace) -> int:
    """Entry of the suite."""
    if not args.dry_run and not torch.cuda.is_available():
        print("there is no GPU here; --dry-run walks through all parts on a CPU", file=sys.stderr)
        return 2
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or the running part would outlive this
    session = Session(args.out.resolve(), args.dry_run)
    try:
        session.run()
    finally:
        signal.signal(signal.SIGTERM, before)
    name = results.device_name(results.this_device())
    print(f"{session.table()}\n\n{name}; {len(session.failures)} failures; written to {session.out}")
    return 1 if session.failures else 0
