"""The suites algorithms, trl and endurance: short runs of each, and what they would say of worse ones."""

import json

import pytest

from benchmarks import algorithms, endurance, trl_patch
from benchmarks.__main__ import main


def a_run(variant, seed, after, evaluations=((100, 0.5), (200, 0.8)), before=0.4):
    return {
        "variant": variant,
        "seed": seed,
        "problems": 500,
        "accuracy_before": before,
        "accuracy_after": after,
        "evaluations": [list(each) for each in evaluations],
    }


@pytest.mark.slow
def test_algorithms(tmp_path):
    assert main(["algorithms", "--quick", "--compare", "stuck", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "algorithms-stuck.json").read_text())
    assert [row["variant"] for row in report["rows"]] == [algorithms.CONTROL, "sppo, reward random"]
    assert all(0 < row["accuracy_before"] < 1 and row["updates"] == 2 for row in report["rows"])


def test_an_interrupted_comparison_goes_on(tmp_path, monkeypatch):
    made = []

    def train(recipe, variant, settings, seed, threshold, folder):
        made.append((variant, seed))
        if len(made) == 4:
            raise KeyboardInterrupt
        return a_run(variant, seed, 0.8) | {"seconds": 1.0}

    monkeypatch.setattr(algorithms, "train", train)
    monkeypatch.setattr(algorithms, "COMPARISONS", {"levels": {"a": {}, "b": {}}})
    command = ["algorithms", "--compare", "levels", "--seeds", "3", "--out", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        main(command)
    assert main(command) == 0
    assert made == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert len(json.loads((tmp_path / "algorithms-levels.json").read_text())["rows"]) == 6


def test_tokens_to_the_threshold():
    rows = [a_run("a", 0, 0.8), a_run("a", 1, 0.9, [(100, 0.9)]), a_run("b", 0, 0.6, [(100, 0.6)])]
    lines = algorithms.by_variant(rows, 0.75)
    assert [(line["variant"], line["reached"], line["tokens"]) for line in lines] == [("a", 2, 150), ("b", 0, None)]
    assert lines[0]["tokens_error"] == pytest.approx(50)


def test_harm_is_a_fall_beyond_noise():
    lines = algorithms.by_variant([a_run("a", 0, 0.37), a_run("a", 1, 0.41), a_run("b", 0, 0.2), a_run("b", 1, 0.3)], 1)
    (failure,) = algorithms.failures_of("stuck", lines)
    assert failure.startswith("b: -0.150")
    assert algorithms.failures_of("stuck", algorithms.by_variant([a_run(algorithms.CONTROL, 0, 0.0)], 1)) == []


@pytest.mark.parametrize(("kind", "expected"), [("0", {0.0}), ("1", {1.0}), ("random", {0.0, 1.0})])
def test_stuck_rewards(kind, expected):
    rewards = algorithms.stuck_reward(kind, 0)(["x"] * 50)
    assert set(rewards) == expected
    assert rewards == algorithms.stuck_reward(kind, 0)(["y"] * 50)


@pytest.mark.slow
def test_endurance(tmp_path):
    assert main(["endurance", "--quick", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "endurance.json").read_text())
    assert [row["update"] for row in report["rows"]] == list(range(1, 6))
    assert all(row["resident_mb"] > 100 and row["seconds"] > 0 for row in report["rows"])
    assert (tmp_path / "endurance.png").stat().st_size > 1000


def test_growth_is_a_failure():
    steady = [{"resident_mb": 500 + i % 3, "seconds": 1.0} for i in range(100)]
    assert endurance.failures_of(steady) == []
    leaking = [row | {"resident_mb": 500 + i} for i, row in enumerate(steady)]
    assert endurance.failures_of(leaking) == ["resident_mb grew 1.11 times"]


@pytest.mark.slow
def test_trl_with_and_without_the_patch(tmp_path):
    assert main(["trl", "--quick", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "trl.json").read_text())
    assert [(row["responses"], row["way"]) for row in report["rows"]] == [
        (kind, way) for kind in ("equal", "mixed") for way in trl_patch.WAYS
    ]
    for row in report["rows"]:
        assert len(row["updates_s"]) == 2
        assert row["peak_bytes"] > 0
        all_bear_loss = row["responses"] == "equal" and row["way"].startswith("TRL, only")
        if not all_bear_loss:  # where that may be TRL to the bit
            assert (row["gradient_error"] == 0) == (row["way"] == "TRL")  # the same bits would mean the same function
    assert (tmp_path / "trl.png").stat().st_size > 1000


def test_a_gradient_that_is_not_trls_is_a_failure():
    row = {"way": "patched", "responses": "equal", "gradient_error": 1e-5}
    assert trl_patch.failures_of([row], 1e-4) == []
    assert trl_patch.failures_of([row | {"gradient_error": float("nan")}], 1e-4) == [
        "patched, equal: gradients differ by nan"
    ]
