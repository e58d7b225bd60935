"""The suite host_time: calls reach the driver of a GPU that is not there, and each implementation has a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks import host_time
from benchmarks.__main__ import main

ROOT = Path(__file__).parents[2]

COUNT_LAUNCHES = """
import collections
import json
from benchmarks import host_time
launched = collections.Counter()

class Counting(host_time.NoKernel):
    def __init__(self, names):
        super().__init__(names)
        self.names = names
    def run(self, *arguments):
        super().run(*arguments)
        assert len(arguments) == 9 + len(self.names), "the kernel's arguments come after nine others"
        launched[self.names[0]] += 1

host_time.NoKernel = Counting
for name in ("linear_logprobs", "whiten"):
    rows = host_time.measure(name, repeats=1)
    assert all(row["both_us"] > 0 for row in rows)
print(json.dumps(launched))
"""


def compiled(*command: str) -> subprocess.CompletedProcess[str]:
    """Run Python where Triton compiles, which it does not in a process with its interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = (sys.executable, *command)
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=500)


def test_each_implementation_has_a_time(tmp_path):
    names = ["policy_loss, token", "group_advantages"]
    done = compiled("-m", "benchmarks", "host_time", "--quick", "--only", *names, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "host_time.json").read_text())["rows"]
    assert [(row["operation"], row["provider"]) for row in rows] == [
        (name, provider) for name in names for provider in ("sppo_kernels", "eager PyTorch")
    ]
    for row in rows:
        assert 0 < row["forward_us"] <= row["both_us"]
        assert ("backward_us" in row) == (row["operation"] == names[0])
    assert "| group_advantages | eager PyTorch |" in done.stdout


def test_kernels_are_launched_as_far_as_the_driver():
    done = compiled("-c", COUNT_LAUNCHES)
    assert done.returncode == 0, done.stderr
    launched = json.loads(done.stdout)
    assert set(launched) >= {"x_ptr"}
    # 11 turns of the three modes: the row pass of each, and that of recompute's backward.
    assert launched["x_ptr"] >= 11 * 4


@pytest.mark.skipif(not host_time.library_seams.is_interpreted(), reason="the refusal needs Triton's interpreter")
def test_the_interpreter_is_refused(tmp_path, capsys):
    assert main(["host_time", "--quick", "--out", str(tmp_path)]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err
