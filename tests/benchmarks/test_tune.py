"""The tuning suite: candidates are checked and timed, the fastest is chosen, and a killed run leaves what it has.

The dry run of the suite gpu measures every candidate of every kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import tune
from benchmarks.__main__ import main
from benchmarks.harness import library_seams, timing
from benchmarks.tune import Tuner, shapes
from sppo_kernels import tuning
from sppo_kernels.ops.linear_logprobs.projection import choose_projection
from sppo_kernels.tuning import TUNABLES, Config

CPU = torch.device("cpu")
POLICY = [shape for shape in shapes(tiny=True) if shape.kernel == "policy_loss"]
HEAD = [shape for shape in shapes(tiny=True) if shape.kernel == "linear_logprobs.projection"]
needs_interpreter = pytest.mark.skipif(
    not library_seams.is_interpreted(), reason="tries the suite in Triton's interpreter"
)


@pytest.fixture(autouse=True)
def _defaults_again():
    yield
    tuning.reset()


@pytest.fixture
def timed(monkeypatch):
    """Candidates take as long as is said, in their order."""

    def set_times(*ms):
        times = iter(ms)
        monkeypatch.setattr(timing, "measure", lambda *_: {"ms": next(times), "iqr_ms": 0.1})
        monkeypatch.setattr(timing, "measure_parts", lambda *_, **__: {"all": {"ms": next(times), "iqr_ms": 0.1}})

    return set_times


def test_real_shapes_are_the_usual_vocabularies():
    planned = shapes(tiny=False)
    assert {shape.kernel for shape in planned} == set(TUNABLES)
    rows = [shape for shape in planned if shape.kernel.startswith("selective")]
    assert {shape.size.vocab for shape in rows} == {151_936, 128_256, 49_152}
    heads = [shape for shape in planned if shape.kernel == "linear_logprobs.projection"]
    assert [shape.where for shape in heads] == [
        "151936 x 896, 2 bytes", "151936 x 1536, 2 bytes", "152064 x 3584, 2 bytes", "151936 x 4096, 2 bytes"
    ]  # fmt: skip
    assert [shape.where for shape in shapes(tiny=False, heads=["7B"]) if shape in heads] == ["152064 x 3584, 2 bytes"]


@needs_interpreter
@pytest.mark.parametrize(("ms", "chosen"), [((2.0, 1.9), 1), ((2.0, 1.97), 0)])
def test_the_fastest_is_chosen_where_it_gains(tmp_path, timed, ms, chosen):
    timed(*ms)
    tuner = Tuner(CPU, tmp_path)
    tuner.timed = True
    tuner.run(POLICY)
    tuning.reset()
    tuning.load(tmp_path / "tuning.json")
    assert TUNABLES["policy_loss"].config(POLICY[0].length, 4) == TUNABLES["policy_loss"].candidates[chosen]
    assert [row.get("chosen", False) for row in tuner.rows] == [i == chosen for i in range(2)]


class Results(NamedTuple):
    """What ``choose_projection`` says of the head that was tuned, and of another."""

    tuned: str
    other: str


def projections_chosen() -> Results:
    weight = torch.empty(HEAD[0].size.vocab, HEAD[0].size.hidden, dtype=torch.bfloat16)
    return Results(
        choose_projection("auto", weight, backend="triton", group=""),
        choose_projection("auto", weight[:-1], backend="triton", group=""),
    )


@needs_interpreter
@pytest.mark.parametrize(("ms", "chosen"), [((2.0, 1.9), "fused"), ((2.0, 1.97), "vendor"), ((2.0, 2.1), "vendor")])
def test_auto_is_fused_where_a_tile_beats_the_vendor(tmp_path, timed, ms, chosen):
    """Times of the vendor's product, then of the only tile that the interpreter has."""
    timed(*ms)
    tuner = Tuner(CPU, tmp_path)
    tuner.timed = True
    tuner.run(HEAD)
    assert [row["configuration"] for row in tuner.rows if row.get("chosen")] == [
        "vendor" if chosen == "vendor" else "128/128/64/8/3"
    ]
    tuning.reset()
    assert projections_chosen() == ("vendor", "vendor")
    tuning.load(tmp_path / "tuning.json")
    assert projections_chosen() == (chosen, "vendor")


@needs_interpreter
def test_a_wrong_tile_is_not_chosen(tmp_path, timed, monkeypatch):
    timed(2.0)  # only the vendor's product is timed
    right = tune.checking.check
    is_fused = lambda function: function.args[0] == "fused"
    monkeypatch.setattr(
        tune.checking,
        "check",
        lambda problem, function, *rest: {**right(problem, function, *rest), "passed": not is_fused(function)},
    )
    tuner = Tuner(CPU, tmp_path)
    tuner.timed = True
    tuner.run(HEAD)
    assert "128/128/64/8/3" in tuner.failures[0]
    assert [row["configuration"] for row in tuner.rows if row.get("chosen")] == ["vendor"]
    assert projections_chosen() == ("vendor", "vendor")


@needs_interpreter
def test_a_wrong_candidate_is_withheld(tmp_path, timed, monkeypatch, capsys):
    timed(2.0)
    right = tune.checking.check
    wrong = Config(4096, 16)

    def check(problem, function, truth, allowed):
        outcome = right(problem, function, truth, allowed)
        return {**outcome, "passed": TUNABLES["policy_loss"].config(1, 4) != wrong}

    monkeypatch.setattr(tune.checking, "check", check)
    tuner = Tuner(CPU, tmp_path)
    tuner.timed = True
    tuner.run(POLICY)
    (withheld,) = (row for row in tuner.rows if not row["passed"])
    assert (withheld["block"], withheld["num_warps"]) == wrong
    assert "ms" not in withheld
    assert "4096/16" in tuner.failures[0]
    assert tuner.failures[0] in capsys.readouterr().err
    assert TUNABLES["policy_loss"].config(POLICY[0].length, 4) == Config(1024, 4)


@needs_interpreter
def test_a_killed_run_leaves_what_it_had(tmp_path, timed):
    timed(2.0, 1.0)  # and no more: the second shape raises
    tuner = Tuner(CPU, tmp_path)
    tuner.timed = True
    with pytest.raises(StopIteration):
        tuner.run(POLICY * 2)
    tuning.load(tmp_path / "tuning.json")
    assert TUNABLES["policy_loss"].config(POLICY[0].length, 4) == Config(4096, 16)


def test_without_a_gpu_it_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(library_seams, "is_interpreted", lambda: False)
    assert main(["tune", "--out", str(tmp_path)]) == 2
    assert "--quick" in capsys.readouterr().err
