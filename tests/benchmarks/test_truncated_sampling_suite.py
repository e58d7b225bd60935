"""The suite truncated_sampling: a short run, its table and its figure."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton")

from benchmarks.__main__ import main
from benchmarks.harness import results
from benchmarks.harness.recipe_comparison import by_variant
from benchmarks.truncated_sampling import COLUMNS, VARIANTS, draw


def make_run(variant, seed, accuracies):
    evaluations = [[1000.0 * (i + 1), accuracy] for i, accuracy in enumerate(accuracies)]
    ends = {"accuracy_before": 0.3, "accuracy_after": accuracies[-1], "updates": 10 * len(accuracies)}
    return {"variant": variant, "seed": seed, "problems": 500, "evaluations": evaluations, **ends}


@pytest.mark.slow
def test_trains_on_truncated_samples(tmp_path):
    """The variants differ in their log-probabilities, so not in the first rollout but in what is learned from it."""
    assert main(["truncated_sampling", "--quick", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "truncated_sampling.json").read_text())
    assert [row["variant"] for row in report["rows"]] == list(VARIANTS)[:2]
    assert all(row["updates"] == 2 for row in report["rows"])


def test_only_sampling_and_log_probabilities_differ():
    complete, replayed, not_replayed = VARIANTS.values()
    assert replayed == complete | {"top_p": 0.9}
    assert not_replayed == replayed | {"replay_sampling_support": False}


def test_table():
    runs = [make_run("a", 0, [0.5, 0.8, 0.9]), make_run("a", 1, [0.8, 0.9, 1.0])]
    (line,) = by_variant(runs, threshold=0.75)
    assert [column(line) for column in COLUMNS.values()] == ["a", 2, "0.300", "0.950 ± 0.050", 2, "2k ± 0k"]


def test_figure(tmp_path):
    rows = [make_run(name, seed, [0.4, 0.6]) for name in list(VARIANTS)[:2] for seed in (0, 1)]
    draw(tmp_path / "figure.svg", {"rows": rows, "threshold": 0.75})
    assert (tmp_path / "figure.svg").stat().st_size > 1000
    assert results.markdown(by_variant(rows, 0.75), COLUMNS).count("\n") >= 3
