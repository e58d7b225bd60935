"""The suite trl: a short run, and gradients that differ from TRL's."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton")
pytest.importorskip("trl")

from benchmarks.__main__ import main
from benchmarks.trl import VARIANTS, failures_of


@pytest.mark.slow
def test_measures_each_variant_with_equal_and_mixed_responses(tmp_path):
    assert main(["trl", "--quick", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "trl.json").read_text())
    assert [(row["responses"], row["variant"]) for row in report["rows"]] == [
        (kind, variant) for kind in ("equal", "mixed") for variant in VARIANTS
    ]
    for row in report["rows"]:
        assert len(row["updates_s"]) == 2
        assert row["peak_bytes"] > 0
        all_bear_loss = row["responses"] == "equal" and row["variant"].startswith("TRL, only")
        if not all_bear_loss:  # where that may be TRL to the bit
            assert (row["gradient_error"] == 0) == (
                row["variant"] == "TRL"
            )  # the same bits would mean the same function
    assert (tmp_path / "trl.svg").stat().st_size > 1000


def test_a_gradient_that_is_not_trls_is_a_failure():
    row = {"variant": "patched", "responses": "equal", "gradient_error": 1e-5}
    assert failures_of([row], 1e-4) == []
    assert failures_of([row | {"gradient_error": float("nan")}], 1e-4) == ["patched, equal: gradients differ by nan"]
