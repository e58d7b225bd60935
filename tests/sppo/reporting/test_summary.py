"""The report's numbers are those of the run, whole or resumed, and its picture can be drawn of any run."""

import json
import shutil
from types import SimpleNamespace

import pytest
from resume_run import make_trainer

from sppo.reporting.summary import summarize, write_report

BEFORE = {"eval_success_rate": 0.25, "eval_reward": 0.3}
AFTER = {"eval_success_rate": 0.75, "eval_reward": 0.8}


def step(number, **changes):
    return {
        "loss": 0.5,
        "reward": 0.1 * number,
        "brier": 0.2,
        "brier_baseline": 0.25,
        "generated_tokens": 100,
        "total_generated_tokens": 100 * number,
        "seconds/rollout": 1.0,
        "seconds/update": 2.0,
        "step": number,
    } | changes


LOG = [
    step(1),
    {"eval_reward": 0.4, "eval_success_rate": 0.35, "step": 1},
    step(2, **{"seconds/evaluate": 0.5}),
    {"train_runtime": 99.0, "step": 2},
    AFTER | {"step": 2},
]


def finished(folder, log=LOG):
    return SimpleNamespace(
        args=SimpleNamespace(output_dir=str(folder), seed=3, algorithm="sppo"),
        state=SimpleNamespace(log_history=log, global_step=2),
        rollouts=SimpleNamespace(progress=SimpleNamespace(generated_tokens=200)),
    )


def test_report(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    path = write_report(finished(tmp_path / "runs" / "quickstart"), BEFORE, AFTER, recipe="quickstart")
    summary = json.loads(path.read_text())
    assert summary == {
        "accuracy_before": 0.25,
        "accuracy_after": 0.75,
        "reward_before": 0.3,
        "reward_after": 0.8,
        "updates": 2,
        "algorithm": "sppo",
        "generated_tokens": 200,
        "seconds": 6.5,
        "seconds_by_phase": {"rollout": 2.0, "update": 4.0, "evaluate": 0.5},
    }
    assert sorted(file.name for file in path.parent.iterdir()) == ["learning_curve.png", "summary.json"]
    assert (path.parent / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    for words in ("0.250 -> 0.750", "seconds of training  6.5", "sppo train quickstart --seed 4 --output_dir"):
        assert words in said


def test_a_folder_that_names_no_recipe_is_not_taken_for_one(tmp_path, capsys):
    write_report(finished(tmp_path / "mine"), {}, {})
    assert " train RECIPE --seed 4" in capsys.readouterr().out


def test_without_held_out_prompts_or_logs(tmp_path, capsys):
    summary = json.loads(write_report(finished(tmp_path, log=[]), {}, {}).read_text())
    assert summary["accuracy_before"] is None
    assert summary["seconds"] == 0
    assert "accuracy" not in capsys.readouterr().out


def test_totals_of_a_resumed_run_cover_all_of_it(tmp_path):
    """Stopped after update 6 and resumed, a run reports what one that was never stopped reports."""
    whole, parts = (make_trainer(tmp_path / name) for name in ("whole", "parts"))
    whole.args.logging_steps = parts.args.logging_steps = 1
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-6", tmp_path / "parts" / "checkpoint-6")
    parts.train(resume_from_checkpoint=True)
    expected, found = (summarize(trainer, BEFORE, AFTER) for trainer in (whole, parts))
    logged = [entry["generated_tokens"] for entry in whole.state.log_history if "generated_tokens" in entry]
    assert found["updates"] == expected["updates"] == len(logged) == 8
    assert found["generated_tokens"] == expected["generated_tokens"] == sum(logged)
    first = [entry for entry in whole.state.log_history if entry["step"] <= 6]
    before_the_stop = sum(value for entry in first for name, value in entry.items() if name.startswith("seconds/"))
    after_it = [entry for entry in parts.state.log_history if entry["step"] > 6]
    later = sum(value for entry in after_it for name, value in entry.items() if name.startswith("seconds/"))
    assert found["seconds"] == pytest.approx(before_the_stop + later, abs=0.01)
    assert before_the_stop > 0 < later
