"""Runs in processes of their own that a signal ends, and runs that nothing ended, to compare with."""

import json
import multiprocessing
import os
import signal
import sys
import time
from multiprocessing import forkserver

import pytest
from resume_run import run
from safetensors.torch import load_file

PROCESSES = multiprocessing.get_context("forkserver")

MIDWAY = {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "num_iterations": 2}
WHOLE = {"gradient_accumulation_steps": 2}

SETTINGS = {
    "one update a rollout": WHOLE,
    "four updates a rollout": MIDWAY,
    "token critic": MIDWAY | {"algorithm": "ppo", "max_tokens_per_micro_batch": 20},
    "truncated sampling": MIDWAY | {"top_k": 5, "min_p": 0.1},
    "a mean for each prompt": MIDWAY | {"algorithm": "reinforce", "baseline": "prompt_mean", "num_iterations": 1},
}

MOMENTS = {
    "in a rollout": ("_generate_batch", 5),
    "in an update": ("training_step", 12),
    "while weights are written": ("_save", 2),
    "while the optimizer is written": ("_save_optimizer_and_scheduler", 2),
    "before a checkpoint gets its name": ("publish", 2),
    "before old checkpoints go": ("rotate_checkpoints", 2),
}


def preload():
    """Start the server that forks each run after the imports, so that they are made once."""
    PROCESSES.set_forkserver_preload(["resume_run"])
    with pytest.MonkeyPatch.context() as patch:  # the server does not take over sys.path before Python 3.12
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()
        warm = PROCESSES.Process(target=int)  # its imports are done once a process has been forked
        warm.start()
        warm.join(timeout=240)
        assert warm.exitcode == 0


def in_process(*args, after=None, do=signal.SIGKILL, **kwargs):
    """Run in a process, and return its exit code; ``do`` is a signal to send, or a function to call, after seconds."""
    process = PROCESSES.Process(target=run, args=args, kwargs=kwargs)
    process.start()
    process.join(timeout=120 if after is None else after)
    ended = process.exitcode is not None
    if not ended and callable(do):
        do(process.pid)
    elif not ended:
        os.kill(process.pid, do)
    process.join(timeout=60)
    assert ended or after is not None, "the run took longer than 120 s"
    assert process.exitcode is not None, "the run did not end"
    return process.exitcode


def weights(out):
    parts = ("model.safetensors", "adapter_model.safetensors", "critic/model.safetensors")
    return {part: load_file(out / "final" / part) for part in parts if (out / "final" / part).exists()}


def progress(out):
    return json.loads((out / "checkpoint-8" / "experience_0.json").read_text())["progress"]


class Uninterrupted:
    """Uninterrupted runs, each made on first use."""

    def __init__(self, folder, settings=SETTINGS):
        self.folder, self.settings, self.seconds = folder, settings, {}

    def __call__(self, name):
        out = self.folder / name
        if name not in self.seconds:
            start = time.perf_counter()
            assert in_process(out, self.settings[name]) == 0
            self.seconds[name] = time.perf_counter() - start
        return weights(out), progress(out)


def check_same(out, expected):
    """Compare weights bit for bit, and the place in the data."""
    expected_weights, expected_progress = expected
    assert weights(out).keys() == expected_weights.keys()
    for part, tensors in expected_weights.items():
        ours = weights(out)[part]
        assert tensors.keys() == ours.keys()
        for name, tensor in tensors.items():
            assert tensor.equal(ours[name]), (part, name)
    assert progress(out) == expected_progress
