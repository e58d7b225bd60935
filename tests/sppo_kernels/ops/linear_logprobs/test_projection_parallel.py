"""Tests of the fused projection with the vocabulary sharded over processes, against a single process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]
SCRIPT = Path(__file__).parents[3] / "helpers/projection_parallel_run.py"


@pytest.mark.slow
def test_equal_to_one_process():
    """Values and gradients agree in each mode and backend, for shards of different sizes and caches."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", SCRIPT]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    settings = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    env = {**os.environ, **settings}
    completed = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert completed.returncode == 0, completed.stderr
    assert "20 cases passed" in completed.stdout
