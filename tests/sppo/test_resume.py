"""SIGKILL at any moment, then resume: the same bits as a run that was never stopped. Real processes, real signals."""

import json
import multiprocessing
import os
import signal
import sys
from multiprocessing import forkserver
from pathlib import Path

import pytest
from resume_run import make_trainer, run
from safetensors.torch import load_file

from sppo.checkpoint import sole_run

PROCESSES = multiprocessing.get_context("forkserver")

MIDWAY = {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "num_iterations": 2}
WHOLE = {"gradient_accumulation_steps": 2}

MOMENTS = {
    "in a rollout": ("_generate_batch", 5),
    "in an update": ("training_step", 12),
    "while weights are written": ("_save", 2),
    "while the optimizer is written": ("_save_optimizer_and_scheduler", 2),
    "before a checkpoint gets its name": ("publish", 2),
    "before old checkpoints go": ("rotate_checkpoints", 2),
}


@pytest.fixture(scope="module", autouse=True)
def _preloaded():
    """Start the server that forks each run with its imports done, so that they are paid once."""
    PROCESSES.set_forkserver_preload(["resume_run"])
    with pytest.MonkeyPatch.context() as patch:  # the server does not take over sys.path before Python 3.12
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()


def in_process(*args, **kwargs):
    process = PROCESSES.Process(target=run, args=args, kwargs=kwargs)
    process.start()
    process.join(timeout=120)
    return process.exitcode


def weights(out):
    parts = ("model.safetensors", "critic/model.safetensors")
    return {part: load_file(out / "final" / part) for part in parts}


def progress(out):
    return json.loads((out / "checkpoint-8" / "experience_0.json").read_text())["progress"]


@pytest.fixture(scope="module", params=["one update a rollout", "four updates a rollout"])
def uninterrupted(request, tmp_path_factory):
    settings = WHOLE if request.param.startswith("one") else MIDWAY
    out = tmp_path_factory.mktemp("uninterrupted")
    assert in_process(out, settings) == 0
    return settings, weights(out), progress(out)


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_same_bits_after_sigkill(uninterrupted, moment, tmp_path):
    settings, expected, expected_progress = uninterrupted
    assert in_process(tmp_path, settings, kill=MOMENTS[moment]) == -signal.SIGKILL
    resume = any(tmp_path.glob("checkpoint-*"))  # killed before the first one, it starts again
    assert in_process(tmp_path, settings, resume=resume) == 0
    for part, tensors in expected.items():
        ours = weights(tmp_path)[part]
        assert tensors.keys() == ours.keys()
        for name, tensor in tensors.items():
            assert tensor.equal(ours[name]), (part, name)
    assert progress(tmp_path) == expected_progress
    assert not (tmp_path / ".staging").exists()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]
    state = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    assert (state["global_step"], state["epoch"]) == (8, pytest.approx(8 / epoch_updates(settings)))


def epoch_updates(settings):
    rollouts = -(-35 // (3 * settings.get("steps_per_generation", 2)))
    return rollouts * (4 if settings is MIDWAY else 1)


def test_a_second_run_needs_leave(tmp_path):
    trainer = make_trainer(tmp_path, **WHOLE)
    trainer.args.max_steps = 3
    trainer.train()
    again = make_trainer(tmp_path, **WHOLE)
    with pytest.raises(ValueError, match="holds a checkpoint of an earlier run"):
        again.train()
    other = make_trainer(tmp_path, **WHOLE, temperature=0.5)
    with pytest.raises(ValueError, match=r"another run \(temperature: 1.0 there, 0.5 here"):
        other.train(resume_from_checkpoint=True)


def test_nothing_to_resume_from(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint in"):
        make_trainer(tmp_path, **WHOLE).train(resume_from_checkpoint=True)


def test_saved_models_are_ordinary_models(tmp_path):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    trainer = make_trainer(tmp_path, **WHOLE)
    trainer.args.max_steps = 1
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    for name, tensor in trainer.model.policy.state_dict().items():
        assert tensor.equal(policy.state_dict()[name]), name
    critic = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final" / "critic")
    assert critic.score.weight.equal(trainer.model.critic.score.weight)
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "final")("3+4=")["input_ids"]
        == trainer.processing_class("3+4=")["input_ids"]
    )
    assert "sppo_packed" not in (tmp_path / "final" / "config.json").read_text()
    assert not list(Path(tmp_path, "final").rglob("*.bin"))


def test_best_checkpoint_is_known_under_its_final_name(tmp_path):
    trainer = make_trainer(tmp_path, **WHOLE, save_strategy="best", load_best_model_at_end=True)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path
    assert json.loads((best / "trainer_state.json").read_text())["best_model_checkpoint"] == str(best)
    saved = load_file(best / "model.safetensors")
    for name, tensor in saved.items():
        assert tensor.equal(trainer.model.policy.state_dict()[name])


def test_a_finished_run_is_only_loaded(tmp_path):
    trainer = make_trainer(tmp_path, **WHOLE)
    trainer.train()
    again = make_trainer(tmp_path, **WHOLE)
    assert again.train(resume_from_checkpoint=True).global_step == 8
    assert again.experience.progress == trainer.experience.progress
    for name, tensor in trainer.model.state_dict().items():
        assert tensor.equal(again.model.state_dict()[name]), name


def test_another_programs_folder_is_passed_over(tmp_path):
    trainer = make_trainer(tmp_path, **WHOLE)
    trainer.args.max_steps = 3
    trainer.train()
    (tmp_path / "checkpoint-17").mkdir()
    again = make_trainer(tmp_path, **WHOLE)
    again.args.max_steps = 4
    assert again.train(resume_from_checkpoint=True).global_step == 4


def test_a_checkpoint_that_lost_a_file_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, **WHOLE)
    trainer.args.max_steps = 3
    trainer.train()
    (tmp_path / "checkpoint-3" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"no whole checkpoint .*optimizer\.pt is missing"):
        make_trainer(tmp_path, **WHOLE).train(resume_from_checkpoint=True)


def test_two_runs_do_not_share_a_folder(tmp_path):
    trainer = make_trainer(tmp_path, **WHOLE)
    with sole_run(tmp_path), pytest.raises(ValueError, match="is being trained into by another process"):
        trainer.train()
    trainer.args.max_steps = 1
    assert trainer.train().global_step == 1
