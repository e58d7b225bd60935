"""The suite prompt_choice: a short run, and its reward."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton")

from benchmarks.__main__ import main
from benchmarks.prompt_choice import VARIANTS, solvable_half


@pytest.mark.slow
def test_trains_both_variants(tmp_path):
    assert main(["prompt_choice", "--quick", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "prompt_choice.json").read_text())
    assert [row["variant"] for row in report["rows"]] == list(VARIANTS)


def test_prompts_of_the_upper_half_have_no_reward():
    assert solvable_half(["4+1=", "5+1=", "4+1="], ["#5", "#6", "#6"], ["5", "6", "5"]) == [1.0, 0.0, 0.0]
