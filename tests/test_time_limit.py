"""The time limit of each test, which is in pyproject.toml."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HANGING = """
import threading

def test_waits_for_ever():
    thread = threading.Thread(target=hang_in_a_thread, daemon=True)
    thread.start()
    thread.join()

def hang_in_a_thread():
    threading.Event().wait()

def test_passes():
    pass
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["one process", "workers"])
def test_a_test_that_hangs_ends_with_the_stacks_of_all_threads(workers, tmp_path):
    (tmp_path / "test_hanging.py").write_text(HANGING)
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "-o", "faulthandler_timeout=1"]
    command += ["-p", "no:cacheprovider", *workers, str(tmp_path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)
    assert done.returncode != 0
    assert "in test_waits_for_ever" in done.stdout
    assert "in hang_in_a_thread" in done.stdout
    if workers:
        assert "1 failed, 1 passed" in done.stdout
        assert "test_hanging.py::test_waits_for_ever" in done.stdout
