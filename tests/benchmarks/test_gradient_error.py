"""The suite gradient_error: what it measures of the two ways to cache, and what it would say of a worse one."""

from __future__ import annotations

import json

import pytest

from benchmarks import gradient_error
from benchmarks.__main__ import main


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gradient_error")
    assert main(["gradient_error", "--quick", "--out", str(folder)]) == 0
    return json.loads((folder / "gradient_error.json").read_text())


def test_rounded_logit_gradients_have_the_rounding_error_of_their_dtype(report):
    for row in report["rows"]:
        eps = {"bf16": 2.0**-8, "fp16": 2.0**-11}[row["dtype"]]
        assert 0.1 * eps < row["d weight, logit gradients"] < eps


def test_probabilities_are_ten_times_as_exact_where_the_label_is_likely_or_none_is(report):
    for row in report["rows"]:
        if row["dtype"] == "bf16" and row["distribution"] in ("label likely", "nearly uniform"):
            assert 10 * row["d hidden, probabilities"] < row["d hidden, logit gradients"]


def test_a_worse_way_fails(report):
    (row, *_) = report["rows"]
    worse = {**row, "d hidden, probabilities": 2 * row["d hidden, logit gradients"]}
    assert gradient_error.failures_of([row]) == []
    assert gradient_error.failures_of([worse]) == ["label likely, bf16: d hidden is less exact from probabilities"]
