"""The variants and the table of the suite recipe_algorithms; its harness is tested with other suites."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from benchmarks.harness import results
from benchmarks.harness.recipe_comparison import by_variant
from benchmarks.recipe_algorithms import COLUMNS, VARIANTS
from sppo import SPPOConfig


def test_variants_are_valid_settings():
    for settings in VARIANTS.values():
        of_args = {name: value for name, value in settings.items() if name != "critic"}  # an argument of the trainer
        SPPOConfig("unused", use_cpu=True, per_device_train_batch_size=256, **of_args)


def test_table():
    run = {"seed": 0, "problems": 5, "accuracy_before": 0.3, "accuracy_after": 0.8}
    reached = {"variant": "a", **run, "evaluations": [[1000.0, 0.5], [2000.0, 0.8]]}
    lost = {"variant": "b", **run, "evaluations": [[1000.0, 0.5]]}
    lines = results.markdown(by_variant([reached, lost], 0.75), COLUMNS).splitlines()
    assert lines[-2:] == ["| a | 1 | 0.300 | 1 | 2k |", "| b | 1 | 0.300 | 0 | not reached |"]
