"""Tests of the metrics file, sample completions and trackers, also for resumed runs."""

import json
import os
import shutil
import sqlite3
import time

import pytest
from resume_run import make_trainer
from tiny_run import DATASET, make

from sppo._utils import read_lines

PROMPT = "2+3=|\n<b>"


def dataset_and_completions(**settings):
    return {"eval_dataset": DATASET.select(range(3)), "log_completions": True, "max_steps": 2, **settings}


# metrics.jsonl


def test_the_metrics_file_holds_the_log_and_evaluations(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"loss": 99, "step": 1}\n{"eval_reward": 9, "step": 0}\n')
    trainer = make(tmp_path, eval_dataset=DATASET.select(range(3)), max_steps=2)
    trainer.evaluate()
    before = trainer.state.log_history[-1]
    trainer.train()
    trainer.evaluate()
    entries = read_lines(tmp_path / "metrics.jsonl")
    assert entries == [before, *trainer.state.log_history]
    assert [entry["step"] for entry in entries] == [0, 1, 2, 2, 2]


def test_evaluation_only_does_not_change_the_metrics_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    make(tmp_path, dataset=None, eval_dataset=DATASET.select(range(3))).evaluate()
    assert (tmp_path / "metrics.jsonl").read_text() == "{}\n"


@pytest.mark.slow
def test_a_resumed_run_logs_each_line_once(tmp_path):
    """Stop within a line after update 8, resume from update 6; entries before training are kept."""
    make_trainer(tmp_path, logging_steps=1).train()
    path = tmp_path / "metrics.jsonl"
    shutil.rmtree(tmp_path / "checkpoint-8")
    path.write_text('{"eval_reward": 0.5, "step": 0}\n' + path.read_text() + '{"loss": 0.')
    resumed = make_trainer(tmp_path, logging_steps=1)
    resumed.train(resume_from_checkpoint=True)
    entries = read_lines(path)
    assert entries == [{"eval_reward": 0.5, "step": 0}, *resumed.state.log_history]
    assert [entry["step"] for entry in entries if "loss" in entry] == list(range(1, 9))


# Sample completions


def test_completions_are_written_with_reward_and_advantage(tmp_path, capsys):
    trainer = make(tmp_path, **dataset_and_completions(num_completions_to_print=2))
    trainer.train()
    rows = read_lines(tmp_path / "completions.jsonl")
    assert [row["step"] for row in rows] == [1, 1, 2, 2]
    last = trainer.rollouts.samples[1]
    assert rows[-1] == {
        "step": 2,
        "prompt": last.prompt,
        "completion": last.completion,
        "reward": last.reward,
        "advantage": pytest.approx(last.advantage.item()),
    }
    assert capsys.readouterr().out.count("update 2") >= 1


# Trackers


def test_only_tracked_runs_have_a_name(tmp_path):
    pytest.importorskip("tensorboard")
    assert make(tmp_path / "mine", report_to=["tensorboard"]).args.run_name.startswith("mine-")
    assert make(tmp_path / "mine", report_to=["tensorboard"], run_name="first").args.run_name == "first"
    assert make(tmp_path / "mine", report_to=[]).args.run_name is None


def test_tensorboard_writes_the_complete_run_to_its_folder(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    trainer = make(tmp_path / "run", report_to=["tensorboard"], **dataset_and_completions())
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    assert os.listdir(tmp_path) == ["run"]
    (folder,) = (tmp_path / "run" / "runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("eval/reward")] == [0, 2]
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert [event.value for event in events.Scalars("train/reward")] == pytest.approx(rewards)
    table = events.Tensors("completions/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert table.startswith("| step | prompt | completion | reward | advantage |\n| --- |")


def test_table_cells_are_escaped():
    from sppo.reporting.trackers import _markdown

    assert _markdown([{"step": 1, "prompt": PROMPT, "reward": 0.123456}]).splitlines() == [
        "| step | prompt | reward |",
        "| --- | --- | --- |",
        "| 1 | 2+3=\\|<br>&lt;b> | 0.123 |",
    ]


@pytest.fixture
def trackio(tmp_path, monkeypatch):
    """Import trackio so that it writes to a temporary folder, unless it was imported before."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    return pytest.importorskip("trackio")


def test_trackio_shows_one_run(tmp_path, trackio):
    """The settings include a number that JSON lacks: grpo's dual_clip is infinite."""
    project = f"sppo-test-{time.time_ns()}"
    settings = dataset_and_completions(algorithm="grpo", num_generations=4, project=project)
    trainer = make(tmp_path / "run", report_to=["trackio"], **settings)
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    trackio.finish()
    file = trackio.utils.TRACKIO_DIR / f"{project}.db"
    rows = sqlite3.connect(file).execute("select run_name, metrics from metrics").fetchall()
    file.unlink()
    assert {name for name, _ in rows} == {trainer.args.run_name}
    metrics = [json.loads(row) for _, row in rows]
    assert len([entry for entry in metrics if "eval/reward" in entry]) == 2
    assert len([entry for entry in metrics if "train/reward" in entry]) == 2
    tables = [entry["completions"] for entry in metrics if "completions" in entry]
    assert len(tables) == 2
    assert {"prompt", "completion", "reward", "advantage"} <= set(json.dumps(tables[0]).split('"'))


@pytest.mark.slow
def test_wandb_receives_metrics_and_a_table(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    trainer = make(tmp_path / "run", report_to=["wandb"], **dataset_and_completions())
    trainer.train()
    try:
        assert wandb.run.name == trainer.args.run_name
        assert wandb.run.summary["train/reward"] == trainer.state.log_history[-2]["reward"]
        assert wandb.run.summary["completions"]["_type"] == "table-file"
        assert wandb.run.config["algorithm"] == "sppo"
    finally:
        wandb.finish()


def test_uploading_the_model_to_wandb_raises(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_LOG_MODEL", "end")
    with pytest.raises(ValueError, match="WANDB_LOG_MODEL='end' is not available"):
        make(tmp_path, report_to=["wandb"])
