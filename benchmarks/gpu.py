"""Run all GPU benchmarks in one command of at most 6 minutes, most important first.

    correctness      the compiled kernels against float64: times of wrong kernels mean nothing
    headline         every operation compared with its peers at the sizes of the claims, without torch.compile
    roofline         each kernel and matrix product of a call: time, bandwidth and rate over what the device reaches
    projection       the vendor's product with row passes, and the fused projection, at the heads of four models
    torch-compile    the same cases as in headline with torch.compile
    tune             launch configurations for a vocabulary of 151,936, and the projection of four heads
    headline-tuned   this library with the chosen configurations
    other-tests      all other tests of the kernels but the sharded vocabulary's, as far as time allows

``--minutes 3`` runs only the first three; parts that do not fit are listed as "no time left". Each part is a process
with its own time limit, so that a part that crashes, hangs or breaks the driver affects only itself: it is reported and
skipped. Results are written below ``--out`` as they come, so that a killed command loses nothing: first into a folder
of the part, and after the part into gpu.json (driver, clocks, and every part's own report), kernels.json and .csv (all
measured rows with their part, and the claims), roofline.json and .csv, tuning.json (for ``sppo_kernels.tuning.load``)
and log.txt; at the end also kernels.svg. They replace the results of an earlier run.

Requires a GPU, torch, triton, numpy, pytest and hypothesis. matplotlib is needed for the chart, and pytest-xdist to run
the tests in a third of the time. Other libraries are measured if they are installed: docs/results/benchmarks.md.
``--dry-run`` runs every part on a CPU in Triton's interpreter with tiny sizes. At most 100 lines are printed, the
tables last. The exit code is 1 when a part fails, or when one of the first three is stopped at its limit. A claim that
does not hold is a result, not a failure.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import kernels, roofline
from benchmarks.harness import claims, results
from benchmarks.harness.cases import OURS, POLICY_LOSSES
from benchmarks.harness.results import Row
from benchmarks.harness.suite import Suite

ROOT = Path(__file__).parents[1]
STARTING, SAVING = 10, 5  # seconds that this process takes in all, and at the end
LINES = 100
STOPPED, NO_TIME, UNTUNED = "stopped at its limit", "no time left", "nothing was tuned"
# The files at the end, besides log.txt.
MERGED = (
    "gpu.json", "kernels.json", "kernels.csv", "kernels.svg", "roofline.json", "roofline.csv", "tuning.json",
)  # fmt: skip
PART_COLUMNS = ("part", "seconds", "outcome", "last_line")
PACKAGES = (
    "torch", "triton", "transformers", "trl", "liger-kernel", "verl", "quack-kernels", "nvidia-cutlass-dsl",
    "cut-cross-entropy", "flash-attn", "numpy",
)  # fmt: skip
# The tests that decide whether the kernels are right: comparisons with float64, bits, bounds, and all that need a GPU.
ESSENTIAL = "gpu or agrees_with_float64 or as_without_and_every_run or bound_holds or many_chunks"
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class Part(NamedTuple):
    """A command and its time limit.

    Attributes:
        name: also the name of its folder.
        command: arguments of the Python interpreter.
        seconds: its limit.
        may_stop: whether what it has by its limit is of use.
        open_ended: whether it takes all the time that is left.
    """

    name: str
    command: list[str]
    seconds: int
    may_stop: bool = False
    open_ended: bool = False


class SuiteCommands:
    """Commands of suites that write into a folder of results, each into a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def suite(self, part: str, name: str, *options: str) -> list[str]:
        """Return the command of a suite."""
        return ["-m", "benchmarks", name, "--out", str(self.folder / part), *options]

    def kernels(self, part: str, plan: str, *options: str, providers: Collection[str] | None = None) -> list[str]:
        """Return the command of the suite kernels for some providers (all but torch.compile)."""
        others = [name for name in kernels.all_providers() if providers is not None and name not in providers]
        without = ["torch.compile"] if providers is None else others
        return self.suite(part, "kernels", "--plan", plan, *options, "--without", *without)


def parts(folder: Path, dry: bool) -> list[Part]:
    """Return what is run, in order; each suite writes into ``folder``."""
    run = SuiteCommands(folder)
    tuned = "--tuning", str(folder / "tuning.json")
    baseline = (OURS, "eager PyTorch")
    if dry:
        one = "--only", "selective_logprobs"
        kinds = "--only", "linear_logprobs", "selective_logprobs", *POLICY_LOSSES  # each launches other kernels
        compiled = run.kernels("torch-compile", "dry", *one, providers=["torch.compile"])
        retimed = run.kernels("headline-tuned", "dry", *one, *tuned, providers=baseline)
        projection = run.kernels("projection", "dry", "--only", "linear_logprobs, projection", providers=[OURS])
        others = _pytest("tests/sppo_kernels/test_triton_utils.py")
        return [
            Part("correctness", _pytest("tests/sppo_kernels/ops/test_whiten.py", "-k", "float64"), 120),
            Part("headline", run.kernels("headline", "dry", *kinds), 420),
            Part("roofline", run.suite("roofline", "roofline", "--quick"), 240),
            Part("projection", projection, 120, may_stop=True),
            Part("torch-compile", compiled, 120, may_stop=True),
            Part("tune", run.suite("tune", "tune", "--quick"), 240, may_stop=True),
            Part("headline-tuned", retimed, 120, may_stop=True),
            Part("other-tests", others, 60, may_stop=True, open_ended=True),
        ]
    brief = "--seconds", "0.3"
    compiled = run.kernels("torch-compile", "compiled", *brief, providers=["torch.compile"])
    tune = run.suite("tune", "tune", "--vocab", "151936")
    retimed = run.kernels("headline-tuned", "headline", *brief, *tuned, providers=baseline)
    # The tests of a sharded vocabulary run on CPUs.
    others = _pytest("tests/sppo_kernels", "-k", f"not ({ESSENTIAL} or test_vocab_parallel)")
    return [
        Part("correctness", _pytest("-q", "--maxfail=10", "tests/sppo_kernels", "-k", ESSENTIAL), 45),
        Part("headline", run.kernels("headline", "headline", *brief), 100),
        Part("roofline", run.suite("roofline", "roofline"), 25),
        Part("projection", run.kernels("projection", "projection", *brief, providers=[OURS]), 30, may_stop=True),
        Part("torch-compile", compiled, 45, may_stop=True),
        Part("tune", tune, 60, may_stop=True),
        Part("headline-tuned", retimed, 35, may_stop=True),
        Part("other-tests", others, 10, may_stop=True, open_ended=True),
    ]


def planned(wanted: Sequence[Part], seconds: float) -> list[Part]:
    """Return the longest prefix of the parts whose limits fit into some seconds."""
    fitting = []
    for part in wanted:
        seconds -= part.seconds
        if not seconds >= 0:  # NaN neither
            break
        fitting.append(part)
    return fitting


def _pytest(*selected: str) -> list[str]:
    """Return a pytest command, with several processes because compiling kernels takes most of the time."""
    several = ["-n", "12"] if importlib.util.find_spec("xdist") and torch.cuda.is_available() else []
    return ["-m", "pytest", "--tb=short", "-p", "no:cacheprovider", *several, *selected]


class Session:
    """Runs one part after another and saves all results after each."""

    def __init__(self, out: Path, dry: bool, seconds: float) -> None:
        self.out, self.dry, self.seconds = out, dry, seconds
        self.deadline = time.monotonic() + seconds
        self.facts = results.gpu_facts()
        self.done: list[Row] = []
        self.rows: list[Row] = []
        self.rooflines: list[Row] = []
        self.failures: list[str] = []
        self.log = out / "log.txt"
        self.lines = 0

    def run(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        for name in MERGED:
            (self.out / name).unlink(missing_ok=True)
        self.log.write_text("")
        self.say(results.describe_gpu(self.facts))
        wanted = parts(self.out, self.dry)
        fitting = planned(wanted, self.seconds)
        try:
            for part in fitting:
                self._run(part, self.out / part.name)
        finally:
            self.done += [
                {"part": part.name, "seconds": 0.0, "outcome": NO_TIME, "last_line": "", "reports": []}
                for part in wanted[len(fitting) :]
            ]
            self._save()
            chart = kernels.chart(self.rows)
            if chart.bars:
                results.draw(self.out / "kernels.svg", chart)

    def say(self, text: str) -> None:
        """Print progress, up to a third of the lines; the log has everything."""
        for line in text.splitlines():
            self.lines += 1
            if self.lines <= LINES // 3:
                print(line[:160], file=sys.stderr, flush=True)

    def _run(self, part: Part, folder: Path) -> None:
        left = self.deadline - time.monotonic()
        limit = left if part.open_ended else min(part.seconds, left)
        _remove_results(folder)  # of an earlier run
        start = time.monotonic()
        outcome = "interrupted"  # what there is by then is saved all the same
        try:
            outcome = self._outcome(part, limit)
        finally:
            seconds = round(time.monotonic() - start, 1)
            self.say(f"{part.name}: {outcome}, {seconds} of at most {max(0.0, limit):.0f} s")
            row = {
                "part": part.name,
                "seconds": seconds,
                "outcome": outcome,
                "last_line": "",
                "gpu_after": results.gpu_facts(),
            }
            if outcome not in (NO_TIME, UNTUNED):
                row["last_line"] = next((line for line in reversed(self._logged()) if line), "")
            if outcome != "passed" and not (part.may_stop and outcome in (STOPPED, NO_TIME, UNTUNED)):
                self.failures.append(f"{part.name}: {outcome}")
            self._collect(row, folder)
            self._save()
            _remove_results(folder)  # all of it is in the files above

    def _outcome(self, part: Part, limit: float) -> str:
        if limit <= 5:
            return NO_TIME
        # Tuning was stopped before its first choice, or failed and was reported.
        if "--tuning" in part.command and not (self.out / "tuning.json").exists():
            return UNTUNED
        return self._process(part, limit)

    def _collect(self, row: Row, folder: Path) -> None:
        self.done.append(row)
        row["reports"] = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
        for report in row["reports"]:
            if report.get("suite") == "kernels":
                self.rows += [{"part": row["part"], **measured} for measured in report["rows"]]
            if report.get("suite") == "roofline":
                self.rooflines = report["rows"]
        for path in [folder / "tuning.json", *folder.glob("roofline.*")]:
            if path.exists():
                path.replace(self.out / path.name)

    def claims(self) -> list[Row]:
        """Judge the claims by the rows of all parts but the tuned one."""
        return [] if self.dry else claims.judge(row for row in self.rows if row["part"] != kernels.TUNED)

    def _process(self, part: Part, limit: float) -> str:
        """Run a part and return its outcome; it prints to the log, and its last lines to the terminal if it fails."""
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        if self.dry:
            environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        with self.log.open("a") as log:
            log.write(f"\n=== {part.name}: {' '.join(part.command)}\n")
            log.flush()
            begin = log.tell()
            # A session of its own, so that the processes that it starts end with it.
            process = subprocess.Popen(
                [sys.executable, *part.command],
                cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                preexec_fn=_end_with_parent,
            )  # fmt: skip
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end(process)
        if code not in (0, None):
            self.say("\n".join(self._logged(begin)[-6:]))
        return {0: "passed", None: STOPPED}.get(code, f"failed, exit code {code}")

    def _logged(self, begin: int = 0) -> list[str]:
        """Read the lines of the log, in which a crashing process may have left any bytes."""
        return self.log.read_bytes()[begin:].decode(errors="replace").splitlines()

    def _save(self) -> None:
        device = results.device_name(results.this_device())
        about = {"device": device, "dry_run": self.dry, "gpu": self.facts, "packages": packages()}
        results.write(self.out / "gpu.json", "gpu", **about, failures=self.failures, parts=self.done)
        results.write(self.out / "kernels.json", "kernels", **about, claims=self.claims(), rows=self.rows)

    def table(self) -> str:
        """Return the tables: roofline, fastest providers, claims, parts."""
        shown = [dict(row, last_line=row["last_line"][:70]) for row in self.done]
        ran = results.table(shown, {key: lambda row, key=key: row[key] for key in PART_COLUMNS})
        held = results.table(self.claims(), claims.COLUMNS) if self.claims() else ""
        rest = "\n\n".join(filter(None, [kernels.summary(self.rows), held, ran]))
        left = LINES - min(self.lines, LINES // 3) - len(rest.splitlines()) - 4
        where = roofline.table(self.rooflines, lines=left) if self.rooflines and left > 5 else ""
        return "\n\n".join(filter(None, [where, rest]))


def _remove_results(folder: Path) -> None:
    """Remove the files that suites write, and the folder if it is then empty."""
    for pattern in ("*.json", "*.csv", "*.svg", ".*.tmp"):
        for path in folder.glob(pattern):
            path.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _end_with_parent() -> None:
    """Let this process die with its parent on Linux, or it would keep using the GPU."""
    if _LIBC:
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _end(process: subprocess.Popen[Any]) -> None:
    """Kill a process and all that it started; on a system without process groups, only itself."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (AttributeError, ProcessLookupError, PermissionError):
        process.kill()
    process.wait()


def packages() -> dict[str, str]:
    """Return the versions of the installed packages that matter to the results."""
    installed = {distribution.metadata["Name"].lower().replace("_", "-"): distribution.version
                 for distribution in importlib.metadata.distributions() if distribution.metadata["Name"]}  # fmt: skip
    return {name: installed.get(name, "not installed") for name in PACKAGES}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--minutes", type=float, default=6.0, help="limit in total (%(default)s); 3: the first three parts"
    )
    parser.add_argument("--dry-run", "--quick", action="store_true", help="run on a CPU, interpreted, with tiny sizes")
    results.add_out(parser)


def run(args: argparse.Namespace) -> int:
    """Entry of the suite."""
    if not args.dry_run and not torch.cuda.is_available():
        why = "" if torch.version.cuda or torch.version.hip else ", which is built without CUDA"
        remedy = "--dry-run runs all parts on a CPU"
        print(f"there is no GPU for torch {torch.__version__}{why}; {remedy}", file=sys.stderr)
        return 2
    minutes = 5 * args.minutes if args.dry_run else args.minutes
    if not planned(parts(args.out, args.dry_run), 60 * minutes - STARTING):
        print(f"--minutes must be at least 1, the time of the first part, got {args.minutes:g}", file=sys.stderr)
        return 2
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "log.txt").touch()
    except OSError as error:
        print(f"cannot write to --out {args.out} ({error}); name another folder", file=sys.stderr)
        return 2
    session = Session(args.out.resolve(), args.dry_run, 60 * minutes - STARTING)
    # From a cold disk torch may take longer to import than planned.
    session.deadline = min(session.deadline, args.started + 60 * minutes - SAVING)
    before = signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # otherwise the running part would outlive this process
    try:
        session.run()
    finally:
        signal.signal(signal.SIGTERM, before)
    name = results.device_name(results.this_device())
    print(f"{session.table()}\n\n{name}; {len(session.failures)} failures; written to {session.out}")
    return 1 if session.failures else 0


SUITE = Suite(add_arguments, run, needs="a GPU, pytest, hypothesis; `--dry-run` needs no GPU")
