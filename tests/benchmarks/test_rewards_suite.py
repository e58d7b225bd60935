"""The suite rewards: the answers that it grades, and what it says of a method that costs others their score."""

import json

import pytest

from benchmarks import rewards
from benchmarks.__main__ import main
from sppo.rewards import score


def test_answers_are_right_but_for_the_hard_ones():
    completions, truths, hard = rewards.problems(60, 0.0)
    assert not any(hard)
    assert score(["math"], ["p"] * 60, completions, {"answer": truths}).rewards == [1.0] * 60
    completions, truths, hard = rewards.problems(60, 0.1)
    assert sum(hard) == 6
    assert all((truth not in given) == is_hard for given, truth, is_hard in zip(completions, truths, hard, strict=True))


@pytest.mark.slow
def test_each_method_is_measured(tmp_path):
    assert main(["rewards", "--quick", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "rewards.json").read_text())
    ours, before = report["rows"]
    assert (ours["method"], ours["answers"], ours["hard"]) == ("`math`", 40, 2)
    assert (ours["rejected"], ours["innocent"], ours["wrong"]) == (0, 0, 0)
    assert before["seconds"] > ours["seconds"]
    assert rewards.failures_of([ours | {"innocent": 3}, before | {"innocent": 3}]) == ["`math`: 3 innocent"]
