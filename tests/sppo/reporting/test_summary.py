"""Tests of the report: its numbers, also of a resumed run, its files and suggested commands."""

import json
import shutil
from pathlib import Path
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


def test_the_report_is_printed_and_written(tmp_path, capsys):
    path = write_report(finished(tmp_path / "runs" / "quickstart"), BEFORE, AFTER, recipe="quickstart")
    summary = json.loads(path.read_text())
    assert summary == {
        "accuracy_before": 0.25,
        "accuracy_after": 0.75,
        "reward_before": 0.3,
        "reward_after": 0.8,
        "training_reward_first": 0.1,
        "training_reward_last": 0.2,
        "updates": 2,
        "algorithm": "sppo",
        "generated_tokens": 200,
        "seconds": 6.5,
        "seconds_by_phase": {"rollout": 2.0, "update": 4.0, "evaluate": 0.5},
    }
    assert sorted(file.name for file in path.parent.iterdir()) == ["learning_curve.png", "summary.json"]
    assert (path.parent / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    for text in (
        "0.250 -> 0.750",
        "seconds of training  6.5",
        "sppo train quickstart --seed 4 --output_dir",
        "eval/greedy.jsonl",
    ):
        assert text in output
    assert "did not rise" not in output


def rewards(*values):
    return [step(i, reward=value) for i, value in enumerate(values, 1)]


@pytest.mark.parametrize(
    ("log", "before", "after", "expected"),
    [
        (rewards(0, 0.2, 0.3, 0.5, 0.3, 0.6, 0.7, 0.9), {}, {}, ["training reward      0.100 -> 0.800", "quarter"]),
        (rewards(0.3, 0.3, 0.3), {}, {}, ["0.300 -> 0.300", "The mean reward of training did not rise: see"]),
        (rewards(0.4, 0.3), {}, {}, ["The mean reward of training did not rise"]),
        (rewards(0.1, 0.3), AFTER, BEFORE, ["0.100 -> 0.300", "reward of held-out prompts did not rise"]),
        (rewards(0.1), {}, {}, ["too few rewards to say whether the mean reward rose"]),
        ([step(1)], BEFORE, AFTER, ["mean reward          0.300 -> 0.800"]),
    ],
)
def test_the_report_says_what_happened_to_the_reward(tmp_path, capsys, log, before, after, expected):
    write_report(finished(tmp_path, log), before, after)
    output = capsys.readouterr().out
    for text in expected:
        assert text in output
    rose = any("rise" in text or "rose" in text for text in expected)
    assert ('"When nothing is learned" in docs/guides/monitoring.md' in output) is rose
    assert "## When nothing is learned" in (Path(__file__).parents[3] / "docs/guides/monitoring.md").read_text()


def test_suggestions_without_a_recipe_have_a_placeholder(tmp_path, capsys):
    write_report(finished(tmp_path / "mine"), {}, {})
    assert " train RECIPE --seed 4" in capsys.readouterr().out


def test_held_out_prompts_and_logs_are_optional(tmp_path, capsys):
    summary = json.loads(write_report(finished(tmp_path, log=[]), {}, {}).read_text())
    assert summary["accuracy_before"] is None
    assert summary["seconds"] == 0
    assert "accuracy" not in capsys.readouterr().out


@pytest.mark.slow
def test_totals_of_a_resumed_run_include_all_updates(tmp_path):
    """A run resumed from update 6 reports the same as an uninterrupted run."""
    uninterrupted, resumed = (make_trainer(tmp_path / name) for name in ("uninterrupted", "resumed"))
    uninterrupted.args.logging_steps = resumed.args.logging_steps = 1
    uninterrupted.train()
    shutil.copytree(tmp_path / "uninterrupted" / "checkpoint-6", tmp_path / "resumed" / "checkpoint-6")
    resumed.train(resume_from_checkpoint=True)
    expected, summary = (summarize(trainer, BEFORE, AFTER) for trainer in (uninterrupted, resumed))
    logged = [entry["generated_tokens"] for entry in uninterrupted.state.log_history if "generated_tokens" in entry]
    assert summary["updates"] == expected["updates"] == len(logged) == 8
    assert summary["generated_tokens"] == expected["generated_tokens"] == sum(logged)
    before = seconds_of(entry for entry in uninterrupted.state.log_history if entry["step"] <= 6)
    after = seconds_of(entry for entry in resumed.state.log_history if entry["step"] > 6)
    assert summary["seconds"] == pytest.approx(before + after, abs=0.01)
    assert before > 0 < after


def seconds_of(entries):
    return sum(value for entry in entries for name, value in entry.items() if name.startswith("seconds/"))
