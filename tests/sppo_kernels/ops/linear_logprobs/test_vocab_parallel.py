"""Tests of linear_logprobs with the vocabulary sharded over processes, against a single process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sppo_kernels import linear_logprobs

ROOT = Path(__file__).parents[4]
SCRIPT = Path(__file__).parents[3] / "helpers/vocab_parallel_run.py"


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_equal_to_one_process(ranks):
    """Values and gradients agree in each mode and backend, for uneven shards, and under DTensor and FSDP2."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", SCRIPT]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    settings = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    env = {**os.environ, **settings}
    completed = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert completed.returncode == 0, completed.stderr
    assert f"{44 if ranks == 2 else 29} cases passed" in completed.stdout


def test_group_of_one_equals_no_group():
    """A group with only this process gives the gradients of a call without a group."""
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        hidden, weight, labels = torch.randn(5, 4), torch.randn(9, 4, requires_grad=True), torch.arange(5)
        grads = []
        for group in (None, dist.group.WORLD):
            out = linear_logprobs(hidden, weight, labels, group=group)
            grads += torch.autograd.grad(out.logprobs.sum() + out.entropy.sum(), weight)
        torch.testing.assert_close(*grads)
        with pytest.raises(ValueError, match="group must be None with backend='reference'"):
            linear_logprobs(hidden, weight, labels, group=dist.group.WORLD, backend="reference")
    finally:
        dist.destroy_process_group()
