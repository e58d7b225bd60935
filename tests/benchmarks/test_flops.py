"""The flops suite: passes are as designed, and it would say so if they were not."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton")

from benchmarks import flops
from benchmarks.__main__ import main
from benchmarks.flops import QUICK, Case, count


@pytest.mark.slow
def test_passes_are_as_designed(tmp_path, capsys):
    assert main(["flops", "--quick", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "flops.json").read_text())
    assert report["failures"] == []
    rows = {row["case"]: row for row in report["rows"]}
    assert {rows[name]["products"] for name in ("recompute", "cache", "forward alone")} == {4, 3, 1}
    fused = {name.removeprefix("fused, "): row["products"] for name, row in rows.items() if name.startswith("fused")}
    again = fused.pop("forward alone, every label the unlikeliest token")
    assert again == 2
    assert fused.items() <= {name: row["products"] for name, row in rows.items()}.items()
    assert "seen by the profiler" in capsys.readouterr().out
    assert (tmp_path / "flops.svg").exists()


@pytest.mark.parametrize("case", [Case("cache", 2, "cache"), Case("eager", 4, backward=None)])
def test_a_pass_more_or_less_is_a_failure(tmp_path, monkeypatch, capsys, case):
    monkeypatch.setattr(flops, "CASES", [case, Case("right", 4)])
    assert main(["flops", "--quick", "--out", str(tmp_path)]) == 1
    (failure,) = json.loads((tmp_path / "flops.json").read_text())["failures"]
    assert failure.startswith(case.name)
    assert failure in capsys.readouterr().err


def test_entries_of_supports_are_counted_and_are_no_matrix_products():
    row = count(Case("support", 0, support=4), QUICK)
    assert row["products"] == row["designed_products"] == 0
    assert row["counted"] == pytest.approx(row["designed"]) == pytest.approx(3 * 4 / QUICK[2])


def test_a_formula_that_forgets_a_product_is_a_failure(tmp_path, monkeypatch):
    """What the operation says of itself and what the profiler sees are held against the design apart."""
    right = count(Case("cache", 3, "cache"), QUICK)
    for key in ("counted", "products"):
        monkeypatch.setattr(flops, "count", lambda case, size, key=key: {**right, key: 2.0})
        monkeypatch.setattr(flops, "CASES", [Case("cache", 3, "cache")])
        assert main(["flops", "--quick", "--out", str(tmp_path)]) == 1
