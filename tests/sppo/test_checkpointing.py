"""A run that is killed by SIGKILL and resumed ends with the same bits as an uninterrupted one, in real processes."""

import dataclasses
import errno
import json
import shutil
import signal
from pathlib import Path

import pytest
from interrupted_runs import MIDWAY, MOMENTS, SETTINGS, WHOLE, check_same, in_process
from resume_run import make_trainer
from safetensors.torch import load_file

from sppo import _utils
from sppo._utils import run_lock
from sppo.checkpointing import load_stream, save_stream
from sppo.rewards import resolve
from sppo.rollout.batching import pack_policy_batch


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one update a rollout", "four updates a rollout"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_same_bits_after_sigkill(uninterrupted, name, moment, tmp_path):
    expected, settings = uninterrupted(name), SETTINGS[name]
    assert in_process(tmp_path, settings, kill=MOMENTS[moment]) == -signal.SIGKILL
    resume = any(tmp_path.glob("checkpoint-*"))  # killed before the first one, it starts again
    assert in_process(tmp_path, settings, resume=resume) == 0
    check_same(tmp_path, expected)
    assert not (tmp_path / ".staging").exists()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]
    state = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    assert (state["global_step"], state["epoch"]) == (8, pytest.approx(8 / epoch_updates(settings)))


def test_a_resumed_update_has_the_same_micro_batches(tmp_path):
    """Names, types and values, also of a micro-batch without samples."""
    trainer = make_trainer(tmp_path, **SETTINGS["truncated sampling"], mask_truncated_completions=True)
    trainer.rollouts.updates = trainer.rollouts._collect(0)
    trainer.rollouts.progress.updates = 1
    trainer.rollouts.updates[0].micro_batches.append(pack_policy_batch([]))
    save_stream(trainer.rollouts, tmp_path)
    saved = trainer.rollouts.updates
    load_stream(trainer.rollouts, tmp_path)
    assert [len(update.micro_batches) for update in saved] == [len(u.micro_batches) for u in trainer.rollouts.updates]
    for update, again in zip(saved, trainer.rollouts.updates, strict=True):
        for batch, loaded in zip(update.micro_batches, again.micro_batches, strict=True):
            assert {n: (t.dtype, t.tolist()) for n, t in batch.items()} == {
                n: (t.dtype, t.tolist()) for n, t in loaded.items()
            }
    names = [set(batch) >= {"support_ids", "support_offsets"} for u in saved for batch in u.micro_batches]
    assert set(names) == {False, True}


def epoch_updates(settings):
    rollouts = -(-35 // (3 * settings.get("steps_per_generation", 2)))
    return rollouts * (4 if settings is MIDWAY else 1)


def test_a_folder_with_checkpoints_requires_resume(tmp_path):
    trainer = make_trainer(tmp_path, **WHOLE)
    trainer.args.max_steps = 3
    trainer.train()
    again = make_trainer(tmp_path, **WHOLE)
    with pytest.raises(ValueError, match="holds a checkpoint of an earlier run"):
        again.train()
    other = make_trainer(tmp_path, **WHOLE, temperature=0.5)
    with pytest.raises(ValueError, match=r"another run \(temperature: 1.0 there, 0.5 here"):
        other.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"learning_rate": 1e-3}, "learning_rate: 0.002 there, 0.001 here"),
        ({"epsilon": 0.1, "epsilon_high": 0.2}, "epsilon: 0.2 there, 0.1 here"),
        ({"dual_clip": float("inf")}, "dual_clip: 3.0 there, inf here"),
        ({"reward_weights": [0.5]}, r"reward_weights: None there, \[0.5\] here"),
        ({"algorithm": "reinforce"}, "algorithm: 'sppo' there, 'reinforce' here"),
        ({"rollout_batch_size": 1}, "rollout_batch_size: None there, 1 here"),
    ],
)
def test_resuming_with_another_config_names_the_field_that_differs(half_done, changed, says):
    with pytest.raises(ValueError, match=says):
        make_trainer(half_done, **(WHOLE | changed)).train(resume_from_checkpoint=True)


def test_settings_of_memory_may_differ_if_named(half_done, tmp_path, caplog):
    """What they change is rounding."""
    shutil.copytree(half_done, tmp_path, dirs_exist_ok=True)
    changed = {"rollout_batch_size": 1, "max_tokens_per_micro_batch": 30, "gradient_checkpointing": True}
    trainer = make_trainer(tmp_path, **WHOLE | changed | {"max_steps": 4})
    with pytest.raises(ValueError, match=r"resume with --allow-changes .*rollout_batch_size"):
        trainer.train(resume_from_checkpoint=True)
    output = trainer.train(resume_from_checkpoint=True, allow_changes=list(changed))
    assert output.global_step == 4
    assert "resuming with other settings (" in caplog.text
    with pytest.raises(ValueError, match=r"allow_changes names 'learning_rate'.*can resume with other rollout_batch"):
        trainer.train(resume_from_checkpoint=True, allow_changes=["learning_rate"])


def test_options_and_files_of_rewards_are_part_of_a_run(tmp_path):
    """Also the content of a file, but not of one that is only imported."""
    file = tmp_path / "mine.py"
    file.write_text("def f(completions, scale=1.0, **_): return [scale for _ in completions]")
    before = resolve(f"{file}:f?scale=0.5").identity()
    assert before == resolve(f"{file}:f?scale=0.5").identity()
    assert before != resolve(f"{file}:f?scale=0.6").identity()
    file.write_text(file.read_text() + "\n")
    assert before != resolve(f"{file}:f?scale=0.5").identity()
    assert resolve("numeric?tolerance=0.01").identity() != resolve("numeric?tolerance=0.5").identity()
    assert resolve("numeric").identity() == resolve("numeric").identity()


def test_every_row_of_the_data_is_part_of_a_run(half_done):
    other = make_trainer(half_done, **WHOLE)
    answers = list(other.train_dataset["answer"])
    answers[17] = "z"
    other.train_dataset = other.train_dataset.remove_columns("answer").add_column("answer", answers)
    with pytest.raises(ValueError, match="dataset: "):
        other.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("changed", [{"max_steps": 4}, {"save_steps": 1, "save_total_limit": 5}, {"logging_steps": 1}])
def test_schedule_and_output_settings_may_differ(half_done, changed, tmp_path):
    shutil.copytree(half_done, tmp_path, dirs_exist_ok=True)
    trainer = make_trainer(tmp_path, **(WHOLE | {"max_steps": 4} | changed))
    assert trainer.train(resume_from_checkpoint=True).global_step == 4


@pytest.fixture(scope="module")
def half_done(tmp_path_factory):
    out = tmp_path_factory.mktemp("half_done")
    make_trainer(out, **WHOLE, max_steps=3).train()
    return out


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
    assert critic.score.weight.equal(trainer.model.critic.model.score.weight)
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "final")("3+4=")["input_ids"]
        == trainer.processing_class("3+4=")["input_ids"]
    )
    assert "sppo_packed" not in (tmp_path / "final" / "config.json").read_text()
    assert not list(Path(tmp_path, "final").rglob("*.bin"))


@pytest.mark.slow
def test_best_checkpoint_is_known_under_its_final_name(tmp_path):
    trainer = make_trainer(tmp_path, **WHOLE, save_strategy="best", load_best_model_at_end=True)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path
    assert json.loads((best / "trainer_state.json").read_text())["best_model_checkpoint"] == str(best)
    saved = load_file(best / "model.safetensors")
    for name, tensor in saved.items():
        assert tensor.equal(trainer.model.policy.state_dict()[name])


@pytest.mark.slow
def test_a_finished_run_is_only_loaded(tmp_path):
    trainer = make_trainer(tmp_path, **WHOLE)
    trainer.train()
    again = make_trainer(tmp_path, **WHOLE)
    assert again.train(resume_from_checkpoint=True).global_step == 8
    assert again.rollouts.progress == trainer.rollouts.progress
    for name, tensor in trainer.model.state_dict().items():
        assert tensor.equal(again.model.state_dict()[name]), name


@pytest.mark.slow
def test_folders_of_other_programs_are_skipped(tmp_path):
    trainer = make_trainer(tmp_path, **WHOLE)
    trainer.args.max_steps = 3
    trainer.train()
    (tmp_path / "checkpoint-17").mkdir()
    again = make_trainer(tmp_path, **WHOLE)
    again.args.max_steps = 4
    assert again.train(resume_from_checkpoint=True).global_step == 4


def test_an_incomplete_checkpoint_is_rejected(tmp_path):
    trainer = make_trainer(tmp_path, **WHOLE)
    trainer.args.max_steps = 3
    trainer.train()
    for name in ("optimizer.pt", "experience_0.safetensors", "critic/config.json"):
        lost = tmp_path / "checkpoint-3" / name
        kept = lost.read_bytes()
        lost.unlink()
        with pytest.raises(ValueError, match=rf"not a complete SPPOTrainer checkpoint .*{name} is missing"):
            make_trainer(tmp_path, **WHOLE).train(resume_from_checkpoint=True)
        lost.write_bytes(kept)


def test_another_reward_or_dataset_is_rejected(half_done):
    other = make_trainer(half_done, **WHOLE)
    other.reward_funcs = [dataclasses.replace(other.reward_funcs[0], name="another")]
    with pytest.raises(ValueError, match=r"rewards: .*'name': 'another'"):
        other.train(resume_from_checkpoint=True)
    other = make_trainer(half_done, **WHOLE)
    other.train_dataset = other.train_dataset.map(lambda row: {"answer": "z"})
    with pytest.raises(ValueError, match="dataset: "):
        other.train(resume_from_checkpoint=True)


def test_two_runs_cannot_share_a_folder(tmp_path):
    trainer = make_trainer(tmp_path, **WHOLE)
    with run_lock(tmp_path), pytest.raises(ValueError, match="is being trained into by another process"):
        trainer.train()
    trainer.args.max_steps = 1
    assert trainer.train().global_step == 1


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    """As Lustre and some network file systems are."""

    def flock(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(_utils.fcntl, "flock", flock)
    with run_lock(tmp_path):
        assert "cannot be locked ([Errno 38] Function not implemented)" in caplog.text


def test_a_file_is_no_output_dir(tmp_path):
    (tmp_path / "file").touch()
    trainer = make_trainer(tmp_path / "run", **WHOLE)
    trainer.args.output_dir = str(tmp_path / "file")
    with pytest.raises(ValueError, match=r"output_dir='.*file' is a file; name a folder"):
        trainer.train()
