"""The suite endurance: a short run, and what counts as growth."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton")

from benchmarks.__main__ import main
from benchmarks.endurance import failures_of


@pytest.mark.slow
def test_records_memory_and_seconds_of_each_update(tmp_path):
    assert main(["endurance", "--quick", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "endurance.json").read_text())
    assert [row["update"] for row in report["rows"]] == list(range(1, 6))
    assert all(row["resident_mb"] > 100 and row["seconds"] > 0 for row in report["rows"])
    assert (tmp_path / "endurance.svg").stat().st_size > 1000


def test_growth_is_a_failure():
    steady = [{"resident_mb": 500 + i % 3, "seconds": 1.0} for i in range(100)]
    assert failures_of(steady) == []
    leaking = [row | {"resident_mb": 500 + i} for i, row in enumerate(steady)]
    assert failures_of(leaking) == ["resident_mb grew 1.11 times"]
