"""The GPU suite: every part is walked through on a CPU, and one that fails or hangs costs only itself."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

from benchmarks import gpu
from benchmarks.__main__ import main
from benchmarks.gpu import Part, Session, parts, planned
from benchmarks.harness.cases import BASE, POLICY_LOSSES
from sppo_kernels import tuning
from sppo_kernels.tuning import TUNABLES


@pytest.fixture
def run_parts(tmp_path, monkeypatch):
    """Parts made of Python code, which find the folder of results as FOLDER."""

    def run(*given):
        made = lambda folder, dry: [
            Part(name, ["-c", code.replace("FOLDER", repr(str(folder)))], seconds) for name, code, seconds in given
        ]
        monkeypatch.setattr(gpu, "parts", made)
        code = main(["gpu", "--dry-run", "--out", str(tmp_path / "out")])
        return code, json.loads((tmp_path / "out" / "gpu.json").read_text())

    return run


def is_running(pid):
    """Still, after a while: a killed process takes a moment, and is a zombie until its new parent has waited for it."""
    for _ in range(50):
        try:
            if "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text():
                return False
        except FileNotFoundError:
            return False
        time.sleep(0.1)
    return True


ROW = {"operation": "gae", "tokens": 8, "hidden": 1, "vocab": 0, "ignored": 0, "clipped": 0, "logits": "peaked"}
SAVE = f"""
import json, pathlib
folder = pathlib.Path(FOLDER) / "saving"
folder.mkdir()
row = {{**{ROW}, "provider": "sppo_kernels", "both_ms": 2.0, "of_ceiling": 0.5}}
report = {{"suite": "kernels", "rows": [row]}}
(folder / "kernels-x.json").write_text(json.dumps(report))
(folder / "tuning.json").write_text("{{}}")
"""


def test_a_part_that_fails_is_reported_and_passed_over(run_parts, tmp_path, capsys):
    code, report = run_parts(
        ("failing", "import sys; sys.stdout.buffer.write(b'\\xff what went wrong'); raise SystemExit(3)", 60),
        ("killed", "import os; os.kill(os.getpid(), 9)", 60),
        ("saving", SAVE, 60),
    )
    assert code == 1
    assert report["failures"] == ["failing: failed, exit code 3", "killed: failed, exit code -9"]
    assert [part["outcome"] for part in report["parts"]][-1] == "passed"
    assert report["parts"][0]["last_line"] == "\ufffd what went wrong"
    printed = capsys.readouterr()
    assert "what went wrong" in printed.err
    assert b"what went wrong" in (tmp_path / "out" / "log.txt").read_bytes()


@pytest.mark.slow
def test_what_a_part_saved_before_its_limit_counts(run_parts, tmp_path):
    start = time.monotonic()
    pid = tmp_path / "pid"
    hang = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"])
pathlib.Path({str(pid)!r}).write_text(str(child.pid))
time.sleep(99)
"""
    code, report = run_parts(("saving", SAVE + hang, 6))
    assert time.monotonic() - start < 60
    assert not is_running(int(pid.read_text()))  # what a part started ends with it
    assert (code, report["failures"]) == (1, ["saving: stopped at its limit"])
    assert report["parts"][0]["outcome"] == "stopped at its limit"
    out = tmp_path / "out"
    merged = json.loads((out / "kernels.json").read_text())
    assert [(row["part"], row["both_ms"]) for row in merged["rows"]] == [("saving", 2.0)]
    assert (out / "tuning.json").read_text() == "{}"
    names = {"gpu.json", "kernels.json", "kernels.csv", "kernels.svg", "tuning.json", "log.txt"}
    assert {path.name for path in out.iterdir()} == names


@pytest.fixture
def hanging(tmp_path):
    """The command in a process whose only part saves something and hangs, and the process number of that part."""
    hang = SAVE + "\nimport os, time\n(folder / 'pid').write_text(str(os.getpid()))\ntime.sleep(99)"
    program = f"""
from benchmarks import gpu
from benchmarks.__main__ import main
code = {hang!r}
gpu.parts = lambda folder, dry: [gpu.Part("saving", ["-c", code.replace("FOLDER", repr(str(folder)))], 90)]
main(["gpu", "--dry-run", "--out", {str(tmp_path / "out")!r}])
"""
    process = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(gpu.ROOT)})
    pid = tmp_path / "out" / "saving" / "pid"
    while not pid.exists() or not pid.read_text():
        assert process.poll() is None
        time.sleep(0.1)
    child = int(pid.read_text())
    yield process, child
    if is_running(child):
        os.kill(child, signal.SIGKILL)


@pytest.mark.slow
def test_an_interrupted_run_leaves_what_it_had_and_no_process(hanging, tmp_path):
    """SIGTERM, as of a scheduler."""
    process, child = hanging
    process.terminate()
    assert process.wait(60) == 143
    assert not is_running(child)
    report = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert [part["outcome"] for part in report["parts"]] == ["interrupted"]
    assert json.loads((tmp_path / "out" / "kernels.json").read_text())["rows"][0]["both_ms"] == 2.0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the part outlives a killed command")
def test_a_killed_run_leaves_the_rows_of_the_part_that_ran_and_no_process(hanging, tmp_path):
    """SIGKILL, which no program can answer."""
    process, child = hanging
    process.kill()
    process.wait(60)
    assert not is_running(child)
    report = json.loads((tmp_path / "out" / "saving" / "kernels-x.json").read_text())
    assert report["rows"][0]["both_ms"] == 2.0


@pytest.mark.slow
def test_a_part_finds_what_lies_on_pythonpath(run_parts, tmp_path, monkeypatch):
    """Packages that were brought along lie in a folder of their own, which PYTHONPATH alone names."""
    (tmp_path / "brought_along.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    code, report = run_parts(("one", "import brought_along, benchmarks.gpu", 60))
    assert (code, report["failures"]) == (0, [])


def test_results_of_an_earlier_run_are_replaced_and_nothing_else_is_removed(run_parts, tmp_path):
    """``--out`` may be a folder with a folder "tests" in it, such as a checkout."""
    out = tmp_path / "out"
    (out / "saving").mkdir(parents=True)
    for name in (
        "saving/kernels-old.json",
        "saving/.kernels-old.json.tmp",
        "saving/test.py",
        "mine.json",
        "tuning.json",
    ):
        (out / name).write_text("{}")
    code, report = run_parts(("saving", "", 60))
    assert code == 0
    assert report["parts"][0]["reports"] == []
    left = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert left == {"saving/test.py", "mine.json", "gpu.json", "kernels.json", "log.txt"}


@pytest.mark.slow
def test_rows_of_a_part_that_was_stopped_can_be_judged(tmp_path, monkeypatch):
    """They are saved before they are related to the copy bandwidth; the parts after it run all the same."""
    row = {"operation": "selective_logprobs", **BASE._asdict(), "provider": "sppo_kernels", "both_ms": 1.0}
    save = f"""
import json, pathlib, time
folder = pathlib.Path({str(tmp_path)!r}) / "saving"
folder.mkdir()
(folder / "kernels-x.json").write_text(json.dumps({{"suite": "kernels", "rows": [{row}]}}))
time.sleep(99)
"""
    made = [Part("saving", ["-c", save], 6), Part("next", ["-c", ""], 60)]
    monkeypatch.setattr(gpu, "parts", lambda folder, dry: made)
    session = Session(tmp_path, dry=False, seconds=300)
    session.run()
    assert [part["outcome"] for part in session.done] == ["stopped at its limit", "passed"]
    assert (len(session.rows), session.claims()) == (1, [])


def test_claims_are_judged_across_parts_but_not_by_tuned_rows(tmp_path):
    """torch.compile is measured in a part of its own, and may be the fastest other."""
    session = Session(tmp_path, dry=False, seconds=300)
    sharp = {"operation": "linear_logprobs", **BASE._replace(logits="sharp")._asdict()}
    for part, provider, ms in (
        ("headline", "sppo_kernels, sparse", 30.0),
        ("headline", "eager PyTorch", 90.0),
        ("torch-compile", "torch.compile", 40.0),
        ("headline-tuned", "eager PyTorch", 10.0),
    ):
        session.rows.append({**sharp, "part": part, "provider": provider, "both_ms": ms})
    assert [(claim["measured"], claim["held"]) for claim in session.claims()] == [(0.75, True)]


def test_results_are_saved_after_each_part(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "parts", lambda folder, dry: [Part("one", ["-c", ""], 60), Part("two", ["-c", ""], 60)])
    session = Session(tmp_path, dry=True, seconds=300)
    saved = []
    monkeypatch.setattr(session, "_save", lambda: saved.append([row["part"] for row in session.done]))
    session.run()
    assert saved == [["one"], ["one", "two"], ["one", "two"]]


def test_no_part_begins_after_the_deadline(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "parts", lambda folder, dry: [Part("late", ["-c", "raise SystemExit(1)"], 60)])
    session = Session(tmp_path, dry=True, seconds=300)
    session.deadline = time.monotonic() + 1
    session.run()
    assert [row["outcome"] for row in session.done] == ["no time left"]
    assert session.failures == ["late: no time left"]


@pytest.mark.slow
def test_an_open_ended_part_takes_what_time_is_left(tmp_path, monkeypatch):
    command = ["-c", "import time; time.sleep(99)"]
    made = lambda folder, dry: [Part("first", command, 1, True, open_ended=True), Part("second", command, 1, True)]
    monkeypatch.setattr(gpu, "parts", made)
    session = Session(tmp_path, dry=True, seconds=7)
    session.run()
    assert [row["outcome"] for row in session.done] == ["stopped at its limit", "no time left"]
    assert session.failures == []


def test_parts_that_do_not_fit_are_listed_and_are_no_failures(tmp_path, monkeypatch):
    made = [Part("first", ["-c", ""], 30), Part("second", ["-c", ""], 90), Part("third", ["-c", ""], 1)]
    monkeypatch.setattr(gpu, "parts", lambda folder, dry: made)
    session = Session(tmp_path, dry=True, seconds=60)
    session.run()
    listed = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert [row["outcome"] for row in listed] == ["passed", "no time left", "no time left"]
    assert session.failures == []
    assert "third" in session.table()


def test_nothing_tuned_is_launched_where_nothing_was_tuned(tmp_path, monkeypatch):
    """Tuning may be stopped before its first choice."""
    command = ["-c", "raise SystemExit(1)", "--tuning", "tuning.json"]
    monkeypatch.setattr(gpu, "parts", lambda folder, dry: [Part("tuned", command, 30, may_stop=True)])
    session = Session(tmp_path, dry=True, seconds=60)
    session.run()
    assert [(row["outcome"], row["last_line"]) for row in session.done] == [("nothing was tuned", "")]
    assert session.failures == []
    assert any("--tuning" in part.command for part in parts(tmp_path, dry=False))


def test_a_slow_start_counts(tmp_path, monkeypatch):
    """The deadline is that of the command, whose imports may have taken half a minute."""
    late = []
    monkeypatch.setattr(gpu, "parts", lambda folder, dry: [Part("one", ["-c", ""], 5)])
    monkeypatch.setattr(Session, "run", lambda session: late.append(session.deadline - time.monotonic()))
    args = SimpleNamespace(out=tmp_path, dry_run=True, minutes=0.2, started=time.monotonic() - 30)
    gpu.run(args)
    assert late == [pytest.approx(5 * 12 - 30 - gpu.SAVING, abs=3)]


@pytest.mark.parametrize(("minutes", "count"), [(6, 8), (3, 3), (1, 1)])
def test_parts_that_fit_into_the_minutes(tmp_path, minutes, count):
    """Each ends in time even if those before it run into their limits, in the dry run as on a GPU."""
    seconds = 60 * minutes - gpu.STARTING
    wanted = parts(tmp_path, dry=False)
    assert [part.name for part in planned(wanted, seconds)] == [part.name for part in wanted[:count]]
    if minutes >= 3:
        assert len(planned(parts(tmp_path, dry=True), 5 * seconds)) == count


def test_a_folder_that_cannot_be_written_is_named_at_once(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["gpu", "--dry-run", "--out", str(tmp_path / "file")]) == 2
    assert f"cannot write to --out {tmp_path / 'file'}" in capsys.readouterr().err


@pytest.mark.parametrize("minutes", ["0.1", "0", "nan"])
def test_too_few_minutes_are_refused(minutes, tmp_path, capsys):
    assert main(["gpu", "--dry-run", "--minutes", minutes, "--out", str(tmp_path / "out")]) == 2
    assert f"--minutes must be at least 1, the time of the first part, got {minutes}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_most_valuable_comes_first(tmp_path):
    wanted = parts(tmp_path, dry=False)
    assert [part.name for part in wanted[:3]] == ["correctness", "headline", "roofline"]
    assert not any(part.may_stop for part in wanted[:3])
    assert [part.name for part in wanted if part.open_ended] == [wanted[-1].name]
    assert [part.name for part in parts(tmp_path, dry=True)] == [part.name for part in wanted]
    assert all(re.fullmatch(r"[\w.-]+", part.name) for part in wanted)  # names of folders


@pytest.mark.slow
def test_essential_tests_are_those_against_float64_and_those_that_need_a_gpu():
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "tests/sppo_kernels", "-k", gpu.ESSENTIAL]
    found = subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True, timeout=300).stdout
    for name in ("test_agrees_with_float64", "test_the_bound_holds", "test_tokens_may_exceed_a_grid_axis"):
        assert name in found
    others = parts(gpu.ROOT, dry=False)[-1].command
    assert f"not ({gpu.ESSENTIAL} or test_vocab_parallel)" in others  # the other tests repeat none of them


def test_the_clocks_of_the_gpu_are_recorded(tmp_path, monkeypatch):
    facts = {"name": "a GPU", "driver_version": "580.1", "clocks.sm": "1980", "power.limit": "700.00", "cuda": "13.0"}
    monkeypatch.setattr(gpu.results, "gpu_facts", lambda: facts)
    monkeypatch.setattr(gpu, "parts", lambda folder, dry: [Part("one", ["-c", ""], 60)])
    session = Session(tmp_path, dry=True, seconds=300)
    session.run()
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["gpu"] == report["parts"][0]["gpu_after"] == facts


@pytest.mark.slow
def test_output_is_short_even_if_everything_fails(run_parts, capsys):
    failing = "for i in range(300): print('line', i)\nraise SystemExit(3)"
    run_parts(*[(f"part{i}", failing, 60) for i in range(12)])
    printed = capsys.readouterr()
    assert len((printed.out + printed.err).splitlines()) <= gpu.LINES


def test_without_a_gpu_it_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    assert main(["gpu", "--out", str(tmp_path)]) == 2
    assert "--dry-run" in capsys.readouterr().err


@pytest.mark.slow
def test_dry_run(tmp_path):
    """The command itself, as on a GPU, without the packages of the trainer and of charts."""
    blocked = "datasets", "trl", "accelerate", "matplotlib"
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\nsys.modules |= dict.fromkeys({blocked})\nimport interpreter\ninterpreter.patch()"
    )
    out = tmp_path / "out"
    command = [sys.executable, "-m", "benchmarks", "gpu", "--dry-run", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(gpu.ROOT / "tests/helpers")])}
    done = subprocess.run(command, capture_output=True, text=True, cwd=gpu.ROOT, env=environment, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr + (out / "log.txt").read_text()[-3000:]
    report = json.loads((out / "gpu.json").read_text())
    assert {part["outcome"] for part in report["parts"]} == {"passed"}
    assert " passed" in next(part["last_line"] for part in report["parts"] if part["part"] == "correctness")
    rows = json.loads((out / "kernels.json").read_text())["rows"]
    ours = [row for row in rows if row["provider"].startswith("sppo_kernels")]
    linear = {"linear_logprobs", "linear_logprobs, projection"}
    assert {row["operation"] for row in ours} == {*linear, "selective_logprobs", *POLICY_LOSSES}
    assert {row["part"] for row in ours} == {"headline", "projection", "headline-tuned"}
    assert any(row["provider"] == "torch.compile" for row in rows)
    notes = {row["note"] for row in rows if row["provider"].startswith("TRL")}
    assert notes == {"trl.kernels is not installed", "needs a GPU"}
    assert len({row["case"] for row in json.loads((out / "roofline.json").read_text())["rows"]}) > 3
    assert {path.name for path in out.iterdir()} == {*gpu.MERGED, "log.txt"} - {"kernels.svg"}
    assert len((done.stdout + done.stderr).splitlines()) <= gpu.LINES
    assert all(row["passed"] and row["both_ms"] > 0 for row in ours)
    (tuned,) = (part["reports"][0] for part in report["parts"] if part["part"] == "tune")
    for name, tunable in TUNABLES.items():
        measured = {row["configuration"] for row in tuned["rows"] if row["kernel"] == name}
        known = {"/".join(map(str, config)) for config in tunable.candidates}
        assert measured == known or (
            name == "linear_logprobs.projection" and "vendor" in measured <= {*known, "vendor"}
        )
    assert all(row["passed"] and row["ms"] > 0 and "chosen" not in row for row in tuned["rows"])
    tuning.load(out / "tuning.json")
    assert all(tunable.chosen == {} for tunable in TUNABLES.values())  # an interpreter's times choose nothing
    assert "headline" in done.stdout
    assert "times mean nothing and nothing is chosen" in (out / "log.txt").read_text()
