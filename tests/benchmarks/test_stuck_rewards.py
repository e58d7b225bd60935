"""The suite stuck_rewards: a short run, and what counts as harm."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton")

from benchmarks.__main__ import main
from benchmarks.harness.recipe_comparison import by_variant
from benchmarks.stuck_rewards import failures_of, stuck_reward


def make_runs(variant, accuracies):
    return [
        {"variant": variant, "seed": i, "problems": 500, "accuracy_before": 0.4, "accuracy_after": x, "evaluations": []}
        for i, x in enumerate(accuracies)
    ]


@pytest.mark.slow
def test_trains_and_evaluates_each_variant(tmp_path):
    assert main(["stuck_rewards", "--quick", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "stuck_rewards.json").read_text())
    assert [row["variant"] for row in report["rows"]] == ["sppo, reward random", "ppo, reward random"]
    assert all(0 < row["accuracy_before"] < 1 and row["updates"] == 2 for row in report["rows"])


def test_harm_is_a_fall_beyond_noise():
    (failure,) = failures_of(by_variant([*make_runs("a", [0.37, 0.41]), *make_runs("b", [0.2, 0.3])], 1))
    assert failure.startswith("b: -0.150")
    assert failures_of(by_variant(make_runs("a, reward random", [0.0]), 1)) == []


@pytest.mark.parametrize(("kind", "expected"), [("0", {0.0}), ("1", {1.0}), ("random", {0.0, 1.0})])
def test_stuck_rewards(kind, expected):
    rewards = stuck_reward(kind, 0)(["x"] * 50)
    assert set(rewards) == expected
    assert rewards == stuck_reward(kind, 0)(["y"] * 50)
