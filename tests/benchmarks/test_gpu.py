"""The GPU suite: every part is walked through on a CPU, and one that fails or hangs costs only itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks import gpu
from benchmarks.__main__ import main
from benchmarks.gpu import Part, Session, parts


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
row = {{**{ROW}, "way": "ours", "both_ms": 2.0, "of_ceiling": 0.5}}
claim = {{"claim": "fast", "measured": 1.5, "held": False}}
report = {{"suite": "kernels", "rows": [row], "claims": [claim]}}
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
    assert "NOT HELD" in printed.out
    assert b"what went wrong" in (tmp_path / "out" / "log.txt").read_bytes()


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
    assert merged["claims"] == [{"part": "saving", "claim": "fast", "measured": 1.5, "held": False}]
    assert (out / "tuning.json").read_text() == "{}"
    names = {"gpu.json", "kernels.json", "kernels.csv", "kernels.png", "tuning.json", "log.txt"}
    assert {path.name for path in out.iterdir()} == names


def test_an_interrupted_run_leaves_what_it_had_and_no_process(tmp_path):
    """SIGTERM, as of a scheduler, while the first part hangs after it saved something."""
    hang = SAVE + "\nimport os, time\n(folder / 'pid').write_text(str(os.getpid()))\ntime.sleep(99)"
    program = f"""
from benchmarks import gpu
from benchmarks.__main__ import main
code = {hang!r}
gpu.parts = lambda folder, dry: [gpu.Part("saving", ["-c", code.replace("FOLDER", repr(str(folder)))], 90)]
main(["gpu", "--dry-run", "--out", {str(tmp_path / "out")!r}])
"""
    environment = {**os.environ, "PYTHONPATH": str(gpu.ROOT), "TMPDIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", program], env=environment)
    while not (found := list(tmp_path.glob("tmp*/saving/pid"))) or not found[0].read_text():
        assert process.poll() is None
        time.sleep(0.1)
    child = int(found[0].read_text())
    process.terminate()
    assert process.wait(60) == 143
    assert not is_running(child)
    report = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert [part["outcome"] for part in report["parts"]] == ["interrupted"]
    assert json.loads((tmp_path / "out" / "kernels.json").read_text())["rows"][0]["both_ms"] == 2.0


def test_results_are_saved_after_each_part(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "parts", lambda folder, dry: [Part("one", ["-c", ""], 60), Part("two", ["-c", ""], 60)])
    session = Session(tmp_path, dry=True)
    saved = []
    monkeypatch.setattr(session, "_save", lambda: saved.append([row["part"] for row in session.done]))
    session.run()
    assert saved == [["one"], ["one", "two"]]


def test_no_part_begins_after_the_deadline(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "parts", lambda folder, dry: [Part("late", ["-c", "raise SystemExit(1)"], 60)])
    session = Session(tmp_path, dry=True)
    session.deadline = time.monotonic() + 1
    session.run()
    assert [row["outcome"] for row in session.done] == ["no time left"]
    assert session.failures == ["late: no time left"]


def test_the_last_part_takes_what_time_is_left(tmp_path, monkeypatch):
    command = ["-c", "import time; time.sleep(99)"]
    made = lambda folder, dry: [Part("first", command, 6, open_ended=True), Part("second", command, 6, open_ended=True)]
    monkeypatch.setattr(gpu, "parts", made)
    session = Session(tmp_path, dry=True)
    session.deadline = time.monotonic() + 7
    session.run()
    assert [row["outcome"] for row in session.done] == ["stopped at its limit", "no time left"]
    assert session.failures == []
    assert [part.name for part in parts(tmp_path, dry=False) if part.open_ended] == ["sweep"]
    assert parts(tmp_path, dry=False)[-1].open_ended


def test_the_most_valuable_fits_into_the_time(tmp_path):
    """What decides the claims ends before the deadline even if each part runs into its limit."""
    planned = parts(tmp_path, dry=False)
    names = [part.name for part in planned]
    assert names[:3] == ["headline", "tests", "tune"]
    assert sum(part.seconds for part in planned[:4]) <= gpu.SECONDS < 8 * 60
    dry = [part.name for part in parts(tmp_path, dry=True)]
    assert set(dry) <= set(names)


def test_without_a_gpu_it_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    assert main(["gpu", "--out", str(tmp_path)]) == 2
    assert "--dry-run" in capsys.readouterr().err


@pytest.mark.slow
def test_dry_run(tmp_path):
    """The command itself, as on a GPU: checks, tuning, times and files."""
    command = [sys.executable, "-m", "benchmarks", "gpu", "--dry-run", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=gpu.ROOT, env={**os.environ})
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "log.txt").read_text()[-3000:]
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert {part["outcome"] for part in report["parts"]} == {"passed"}
    assert " passed" in next(part["last_line"] for part in report["parts"] if part["part"] == "tests")
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    ours = [row for row in rows if row["way"].startswith("ours")]
    assert {row["operation"] for row in ours} == set(gpu.kernels.OPERATIONS)
    assert {row["part"] for row in ours} == {"headline", "headline, tuned"}
    assert all(row["passed"] and row["both_ms"] > 0 for row in ours)
    assert "headline" in done.stdout
