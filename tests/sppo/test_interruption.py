"""SIGTERM and a full disk: what a run leaves, and that it resumes to the same bits."""

import errno
import json
import os
import signal
import subprocess
import sys

import pytest
from interrupted_runs import MOMENTS, SETTINGS, WHOLE, check_same, in_process
from resume_run import make_trainer
from safetensors import SafetensorError

from sppo.reporting import trackers


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["in a rollout", "in an update", "while the optimizer is written"])
def test_sigterm_saves_a_checkpoint_that_resumes_to_the_same_bits(uninterrupted, moment, tmp_path):
    name = "four updates a rollout"
    expected, settings = uninterrupted(name), SETTINGS[name]
    assert in_process(tmp_path, settings, kill=MOMENTS[moment], number=signal.SIGTERM) == 143
    assert not (tmp_path / "final").exists()
    state = json.loads((max(tmp_path.glob("checkpoint-*")) / "trainer_state.json").read_text())
    assert 3 <= state["global_step"] < 8
    assert in_process(tmp_path, settings, resume=True) == 0
    check_same(tmp_path, expected)


def end_after_update(trainer, update):
    """Let a run receive SIGTERM in an update."""

    def step(*args, original=trainer.training_step):
        if trainer.state.global_step == update - 1 and not trainer.termination.requested:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    trainer.training_step = step


@pytest.mark.parametrize("settings", [{}, {"save_strategy": "no", "enable_jit_checkpoint": True}])
def test_sigterm_ends_a_run_after_the_update_at_hand(tmp_path, settings):
    trainer = make_trainer(tmp_path, **WHOLE | settings)
    end_after_update(trainer, 2)
    with pytest.raises(SystemExit) as end:
        trainer.train()
    assert end.value.code == 143
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("settings", [{}, {"save_strategy": "no"}])
def test_a_callers_handler_of_sigterm_stays(tmp_path, monkeypatch, settings):
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        trainer = make_trainer(tmp_path, **WHOLE | settings, max_steps=2, eval_strategy="no")
        end_after_update(trainer, 1)
        assert trainer.train().global_step == 2
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received


def test_a_second_sigterm_ends_a_run_at_once(tmp_path):
    script = (
        "import os, signal, sys; from resume_run import make_trainer\n"
        "trainer = make_trainer(__import__('pathlib').Path(sys.argv[1]), gradient_accumulation_steps=2)\n"
        "trainer.training_step = lambda *_: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)]\n"
        "trainer.train()"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert "a second SIGTERM ends it at once" in done.stderr


# A full disk

FULL = {
    "a file": OSError(errno.ENOSPC, "No space left on device"),
    "a quota": OSError(errno.EDQUOT, "Disk quota exceeded"),
    "torch.save": RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 220160 vs 220048"),
    "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
}


def fill_disk(trainer, monkeypatch, name, call, error):
    """Let a part of a checkpoint fail after it was written."""
    original, calls = getattr(trainer, name), []

    def fails(*args, **kwargs):
        original(*args, **kwargs)
        calls.append(1)
        if len(calls) == call:
            raise error

    monkeypatch.setattr(trainer, name, fails)


@pytest.mark.parametrize("part", ["_save", "_save_optimizer_and_scheduler", "_save_rng_state"])
@pytest.mark.parametrize("error", FULL.values(), ids=FULL)
def test_a_full_disk_ends_a_run_with_what_to_do(tmp_path, monkeypatch, error, part):
    trainer = make_trainer(tmp_path, **WHOLE)
    fill_disk(trainer, monkeypatch, part, 2, error)
    with pytest.raises(
        OSError, match=r"checkpoint-6 was not written .* the disk of .* is full .*; full_disk='continue'"
    ):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    assert not (tmp_path / ".staging").exists()


def test_a_run_can_continue_without_a_checkpoint_that_does_not_fit(tmp_path, monkeypatch, caplog):
    trainer = make_trainer(tmp_path, **WHOLE, full_disk="continue")
    fill_disk(trainer, monkeypatch, "_save", 2, FULL["a file"])
    assert trainer.train().global_step == 8
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-8"]
    assert "checkpoint-6 was not written" in caplog.text
    whole = make_trainer(tmp_path / "whole", **WHOLE)
    whole.train()
    for name, tensor in whole.model.state_dict().items():
        assert tensor.equal(trainer.model.state_dict()[name]), name


def test_other_errors_are_not_a_full_disk(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, **WHOLE)
    fill_disk(trainer, monkeypatch, "_save", 1, OSError(errno.EACCES, "Permission denied"))
    with pytest.raises(PermissionError):
        trainer.train()


def test_a_log_entry_that_does_not_fit_is_left_out(tmp_path, monkeypatch):
    original, calls = trackers.append_line, []

    def append_line(path, entry):
        calls.append(1)
        if len(calls) == 2:
            path.open("a").write('{"half')
            raise FULL["a file"]
        original(path, entry)

    monkeypatch.setattr(trackers, "append_line", append_line)
    trainer = make_trainer(tmp_path, **WHOLE, max_steps=4, logging_steps=1, save_strategy="no", eval_strategy="no")
    trainer.train()
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps[:3] == [1, 3, 4]
