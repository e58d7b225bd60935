"""The suite recipe_algorithms: a short run, and its variants."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton")

from benchmarks.__main__ import main
from benchmarks.harness import results
from benchmarks.harness.recipe_comparison import by_variant
from benchmarks.recipe_algorithms import COLUMNS, VARIANTS
from sppo import SPPOConfig


@pytest.mark.slow
def test_trains_each_variant(tmp_path):
    assert main(["recipe_algorithms", "--quick", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "recipe_algorithms.json").read_text())
    assert [row["variant"] for row in report["rows"]] == list(VARIANTS)[:2]
    assert all(row["updates"] == 2 for row in report["rows"])


def test_variants_are_valid_settings():
    for settings in VARIANTS.values():
        SPPOConfig("unused", use_cpu=True, per_device_train_batch_size=256, **settings)


def test_table():
    run = {"seed": 0, "problems": 5, "accuracy_before": 0.3, "accuracy_after": 0.8}
    reached = {"variant": "a", **run, "evaluations": [[1000.0, 0.5], [2000.0, 0.8]]}
    lost = {"variant": "b", **run, "evaluations": [[1000.0, 0.5]]}
    lines = results.markdown(by_variant([reached, lost], 0.75), COLUMNS).splitlines()
    assert lines[-2:] == ["| a | 1 | 0.300 | 1 | 2k |", "| b | 1 | 0.300 | 0 | not reached |"]
