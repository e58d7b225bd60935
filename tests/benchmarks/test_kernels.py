"""The kernels suite: what is wrong gets no time, what cannot run says why, and the claims are judged by the rows."""

from __future__ import annotations

import csv
import json
import time

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import kernels
from benchmarks.__main__ import main
from benchmarks.harness import checking, claims, peers, results
from benchmarks.harness.cases import BARE, BASE, HEADS, MILLION, PLANS, SHARP, Item
from benchmarks.harness.checking import allowed_of, check, truth_and_tolerance
from benchmarks.harness.claims import CLAIMS, judge
from benchmarks.harness.operations import OPERATIONS, Point, Problem
from sppo_kernels import linear_logprobs

CPU = torch.device("cpu")
POINT = Point(8, 16, 97, ignored=0.25, clipped=0.25)
POLICY = "policy_loss, token"


@pytest.fixture
def suite(tmp_path):
    def run(*names, without=("torch.compile",)):
        code = main(["kernels", "--plan", "dry", "--out", str(tmp_path), "--only", *names, "--without", *without])
        return code, json.loads((tmp_path / "kernels-dry.json").read_text())

    return run


def spoil(monkeypatch, name, spoilt):
    """An operation whose own way is ``spoilt(right outputs)``."""
    operation = OPERATIONS[name]

    def ours(backend):
        return {mode: lambda f=f, **tensors: spoilt(f(**tensors)) for mode, f in operation.ours(backend).items()}

    monkeypatch.setitem(OPERATIONS, name, operation._replace(ours=ours))


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_way_is_right(name, dtype):
    """Ours and whatever else runs here; where that is not installed or needs a GPU there is nothing to hold."""
    operation = OPERATIONS[name]
    torch.manual_seed(0)
    problem = operation.make(POINT, CPU, dtype)
    truth, allowed = truth_and_tolerance(operation, problem)
    ways = {**operation.ours(None)}
    for way, make in peers.PEERS[name].items():
        try:
            ways |= {} if way == "torch.compile" else {way: make(CPU)}
        except (peers.Unavailable, ModuleNotFoundError):
            continue
    assert len(ways) >= 2
    for way, function in ways.items():
        bounds = allowed_of(way, dtype, allowed)
        outcome = check(problem, function, truth, bounds)
        assert outcome["passed"], (way, outcome, bounds)


def test_the_truth_is_the_definition():
    """A block of tokens at a time gives what the whole gives."""
    torch.manual_seed(0)
    problem = OPERATIONS["linear_logprobs"].make(POINT._replace(tokens=1100), CPU, torch.float32)
    whole = problem.cast(torch.float64).results(OPERATIONS["linear_logprobs"].ours("reference")["recompute"])
    for name, x in OPERATIONS["linear_logprobs"].evaluate(problem, torch.float64).items():
        torch.testing.assert_close(x, whole[name], rtol=1e-10, atol=1e-12)


def test_sharp_logits_have_their_mass_on_a_few_tokens():
    # Of 64 tokens the mean moves by a factor of two from one draw to the next.
    problem = OPERATIONS["linear_logprobs"].make(Point(512, 64, 50_000, logits="sharp"), CPU, torch.float32)
    tensors = problem.tensors
    certificate = linear_logprobs(**tensors, backward="sparse").certificate
    assert certificate.sparse_share > 0.9
    assert 30 < certificate.mean_entries < 130


def test_peaked_logits_are_peaked_and_uniform_ones_are_not():
    median = {}
    for logits in ("peaked", "uniform"):
        problem = OPERATIONS["linear_logprobs"].make(Point(256, 64, 5000, logits=logits), CPU, torch.float32)
        outputs = OPERATIONS["linear_logprobs"].evaluate(problem, torch.float64)
        median[logits] = outputs["logprobs"].median().exp()
    assert median["peaked"] > 0.5
    assert median["uniform"] < 0.001


def test_shares_are_of_tokens():
    problem = OPERATIONS["linear_logprobs"].make(Point(4000, 4, 9, ignored=0.5, clipped=0.25), CPU, torch.float32)
    assert (problem.tensors["labels"] == -100).float().mean() == pytest.approx(0.5, abs=0.05)
    assert (problem.upstream["logprobs"] == 0).float().mean() == pytest.approx(0.25, abs=0.05)


def test_rows_have_times_rates_and_errors(suite, tmp_path, capsys):
    code, report = suite("linear_logprobs", "selective_logprobs")
    assert (code, report["failures"]) == (0, [])
    rows = {row["way"]: row for row in report["rows"] if row["operation"] == "linear_logprobs"}
    assert list(rows)[:4] == [BARE, "ours, cache", "ours, recompute", "ours, sparse"]
    ours = rows["ours, cache"]
    assert all(ours[f"{part}_ms"] > 0 for part in ("forward", "backward", "both"))
    assert ours["errors"].keys() == {"logprobs", "entropy", "d hidden", "d weight"}
    flops = 2 * POINT.tokens * 0.75 * POINT.hidden * POINT.vocab * (1 + 2 * 0.75)
    assert ours["rate"] == pytest.approx(flops / ours["both_ms"] / 1e9)
    assert ours["of_ceiling"] == pytest.approx(ours["rate"] / report["ceilings"]["matmul_tflops"])
    assert "both_ms" in rows["eager PyTorch"]
    assert rows["cut-cross-entropy"]["note"] == "needs a GPU" or torch.cuda.is_available()
    (selective,) = (r for r in report["rows"] if r["operation"] == "selective_logprobs" and r["way"] == "ours")
    assert selective["unit"] == "GB/s"
    with (tmp_path / "kernels-dry.csv").open() as file:
        assert [row["way"] for row in csv.DictReader(file)] == [row["way"] for row in report["rows"]]
    assert (tmp_path / "kernels-dry.png").read_bytes().startswith(b"\x89PNG")
    assert "of ceiling" in capsys.readouterr().out


WRONG = {
    "value": lambda out: {**out, "loss": out["loss"] + 0.01},
    "gradient": lambda out: {**out, "loss": out["loss"] * 1.01 - 0.01 * out["loss"].detach()},
    "not a number": lambda out: {**out, "loss": out["loss"] * float("nan")},
}


@pytest.mark.parametrize("spoilt", WRONG.values(), ids=WRONG)
def test_a_wrong_kernel_gets_no_time(suite, monkeypatch, capsys, spoilt):
    spoil(monkeypatch, POLICY, spoilt)
    code, report = suite(POLICY)
    assert code == 1
    ours, eager = report["rows"]
    assert (ours["way"], ours["passed"], ours["note"]) == ("ours", False, "wrong, so no time")
    assert not any(key.endswith("_ms") or key in ("rate", "of_ceiling", "peak_bytes") for key in ours)
    assert eager["passed"]
    assert eager["both_ms"] > 0
    (failure,) = report["failures"]
    assert "ours is wrong" in failure
    assert failure in capsys.readouterr().err


def test_an_output_left_out_is_wrong():
    operation = OPERATIONS["linear_logprobs"]
    problem = operation.make(POINT, CPU, torch.float32)
    truth, allowed = truth_and_tolerance(operation, problem)
    scored = Problem(problem.tensors)  # no gradients
    assert not check(scored, lambda **_: {}, truth, allowed)["passed"]
    assert check(scored, operation.ours(None)["cache"], truth, allowed)["passed"]
    gradients = {name: x for name, x in truth.items() if name.startswith("d ")}
    assert not check(problem, operation.ours(None)["cache"], gradients, allowed)["passed"]


@pytest.mark.parametrize(
    ("spoil_it", "error"),
    [
        (lambda x: x[-1].fill_(float("nan")), float("nan")),
        (lambda x: x[-1].fill_(float("inf")), float("inf")),
        (lambda x: x[-1].add_(0.5), 0.5),
    ],
)
def test_an_error_anywhere_is_found(spoil_it, error):
    """In the last of several parts too, where Python's max would pass over NaN."""
    want = torch.ones(9000, 2)
    got = want.clone()
    spoil_it(got)
    assert checking.errors_of({"x": got}, {"x": want})["x"] == pytest.approx(error, nan_ok=True)
    assert checking.errors_of({"x": got[:1]}, {"x": want})["x"] == float("inf")


def test_goes_on_after_a_point_that_raises(suite, monkeypatch):
    operation = OPERATIONS["gae"]

    def make(*_):
        raise torch.OutOfMemoryError("no such luck")

    monkeypatch.setitem(OPERATIONS, "gae", operation._replace(make=make))
    code, report = suite("gae", "whiten")
    assert (code, report["failures"]) == (1, ["gae: 64 tokens: out of memory"])
    assert {row["operation"] for row in report["rows"]} == {"whiten"}


def test_what_is_wrong_only_when_scoring_is_wrong():
    operation = OPERATIONS["linear_logprobs"]
    problem = operation.make(POINT, CPU, torch.float32)
    truth, allowed = truth_and_tolerance(operation, problem)
    right = operation.ours(None)["cache"]
    lazy = lambda **tensors: {k: x if torch.is_grad_enabled() else x * 2 for k, x in right(**tensors).items()}
    assert check(problem, right, truth, allowed)["passed"]
    assert not check(problem, lazy, truth, allowed)["passed"]


def test_another_library_that_is_wrong_gets_no_time_and_fails_nothing(suite, monkeypatch):
    wrong = lambda device: lambda **tensors: {"loss": tensors["logprobs"].sum()}
    raises = lambda device: 1 / 0

    def fits_not(device):
        raise torch.OutOfMemoryError

    monkeypatch.setitem(peers.PEERS, POLICY, {"wrong": wrong, "raises": raises, "too large": fits_not})
    code, report = suite(POLICY)
    assert (code, report["failures"]) == (0, [])
    assert [(row["way"], row.get("note")) for row in report["rows"]] == [
        ("ours", None),
        ("wrong", "wrong, so no time"),
        ("raises", "ZeroDivisionError: division by zero"),
        ("too large", "out of memory"),
    ]


@pytest.mark.parametrize(
    ("error", "shown"),
    [(RuntimeError("no such luck"), "RuntimeError: no such luck"), (torch.OutOfMemoryError("full"), "out of memory")],
)
def test_ours_raising_is_a_failure(suite, monkeypatch, error, shown):
    def raises(out):
        raise error

    spoil(monkeypatch, POLICY, raises)
    code, report = suite(POLICY)
    assert code == 1
    assert report["failures"] == [f"{POLICY}: 64 tokens: ours: {shown}"]


def test_the_table_shows_the_worst_error_and_nan_above_all():
    nan = float("nan")
    shown = kernels.COLUMNS["error"]
    assert shown({"errors": {"a": 0.1, "b": 0.3}, "scored_errors": {"a": 0.2}}) == pytest.approx(0.3)
    assert shown({"errors": {"a": 0.1}, "scored_errors": {"a": 0.4}}) == pytest.approx(0.4)
    assert shown({"errors": {"a": 0.1, "b": nan}, "scored_errors": {"a": 0.2}}) == pytest.approx(nan, nan_ok=True)
    assert shown({"note": "needs a GPU"}) is None


def test_forward_and_backward_are_told_apart():
    """A forward that takes 100 ms, 20 without gradients, and a backward that takes next to none."""
    problem = OPERATIONS[POLICY].make(POINT, CPU, torch.float32)

    def slow(logprobs, **_):
        time.sleep(0.1 if torch.is_grad_enabled() else 0.02)
        return {"loss": logprobs.sum()}

    row = kernels.clock(problem, slow, CPU, seconds=0.1)
    assert row["backward_ms"] < 20 <= row["forward_ms"] < 100 <= row["both_ms"]
    assert row["repeats"] >= 3
    assert row["peak_bytes"] is None


def timed(operation, point, way, both, **other):
    return {"operation": operation, **point._asdict(), "way": way, "both_ms": both, **other}


def judged(*rows):
    return [(claim["target"], claim["measured"], claim["held"]) for claim in judge(rows)]


def test_claims_are_judged_by_the_rows():
    million, sequence = Point(MILLION, 1536, 0), "policy_loss, sequence_mean"
    rows = [
        timed("linear_logprobs", BASE, BARE, 30.0, forward_ms=10.0),
        timed("linear_logprobs", BASE, "ours, cache", 35.0),
        timed("linear_logprobs", BASE, "ours, recompute", 51.0),
        timed(POLICY, million, "ours", 1.0),
        timed(POLICY, million, "eager PyTorch", 4.0),
        timed(sequence, million, "ours", 1.0),
        timed(sequence, million, "eager PyTorch", 4.0),
        timed("selective_logprobs", BASE, "ours", 1.0, forward_of_copy=0.6, of_ceiling=0.55),
    ]
    assert judged(*rows) == [
        (1.25, pytest.approx(35 / 30), True),
        (1.25, pytest.approx(51 / 40), False),
        (5.0, 4.0, False),
        (3.0, 4.0, True),
        (0.5, 0.6, True),
        (0.6, 0.55, False),
    ]
    assert judge(rows[:1]) == []


def test_a_part_that_was_stopped_decides_fewer_claims():
    """Its last rows have no share of the copy bandwidth yet, and nothing to compare with."""
    assert judged(timed("selective_logprobs", BASE, "ours", 1.0)) == []
    assert judged(timed("linear_logprobs", BASE, "ours, cache", 34.0)) == []


def test_sparse_has_to_be_as_fast_as_the_fastest_other():
    ours = timed("linear_logprobs", SHARP, "ours, sparse", 36.0)
    bare = timed("linear_logprobs", SHARP, BARE, 20.0, forward_ms=7.0)
    others = [timed("linear_logprobs", SHARP, f"other {ms}", ms) for ms in (90.0, 48.0)]
    assert judged(ours, bare) == []
    assert judged(ours, bare, *others) == [(1.0, 0.75, True)]
    assert judged(ours, *others, timed("linear_logprobs", SHARP, "a third", 30.0)) == [(1.0, 1.2, False)]


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
def test_a_claim_is_expected_to_hold_and_says_its_target(claim):
    assert all(claim.row(ratio)["held"] for ratio in claim.expected)
    row = claim.row(claim.target)
    assert row["held"]
    assert f" {claim.target:g} " in row["claim"]
    assert "{" not in row["claim"]
    assert [column(row) for column in claims.COLUMNS.values()] == [row["claim"], claim.target, claim.target, "held"]
    assert results.table([{"claim": "old", "measured": 1.0, "held": False}], claims.COLUMNS).endswith("NOT HELD")


def test_a_claim_that_is_not_held_is_listed_and_is_no_failure(tmp_path):
    missed = {"claim": "fast", "target": 5.0, "measured": 1.5, "held": False}
    suite = kernels.KernelComparison([], CPU, 0.05, (), tmp_path / "kernels-x.json")
    suite.claims = [missed]
    suite.run()
    assert suite.failures == []
    assert "NOT HELD" in suite.table()


def test_rows_are_saved_as_they_come(suite, monkeypatch, tmp_path):
    """A run that is killed while it measures the second way leaves the row of the first."""
    measure = kernels.KernelComparison._time

    def killed_at_the_second(self, problem, function, work, row):
        if row["way"] != "ours":
            raise KeyboardInterrupt
        return measure(self, problem, function, work, row)

    monkeypatch.setattr(kernels.KernelComparison, "_time", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        suite(POLICY)
    (row,) = json.loads((tmp_path / "kernels-dry.json").read_text())["rows"]
    assert row["way"] == "ours"
    assert row["both_ms"] > 0


def test_others_are_measured_without_ours(suite):
    _, report = suite("selective_logprobs", without=("ours", "torch.compile"))
    assert not any(row["way"].startswith(("ours", BARE)) for row in report["rows"])
    assert any(row["way"] == "eager PyTorch" for row in report["rows"])


def test_the_points_that_the_claims_need_are_planned():
    planned = PLANS["headline"]
    assert {Item("linear_logprobs", BASE), Item("linear_logprobs", SHARP), Item("selective_logprobs", BASE)} <= set(
        planned
    )
    assert {name for name, point in planned if point.tokens == MILLION} == {POLICY, "policy_loss, sequence_mean"}
    heads = {(point.hidden, point.vocab) for name, point in planned if name == "linear_logprobs"}
    assert heads == {HEADS["8B"], HEADS["1.5B"], HEADS["0.5B"]}
    assert set(PLANS["compiled"]) < set(planned)
    assert {name for name, _ in PLANS["full"]} == set(OPERATIONS)
    tokens = {point.tokens for name, point in PLANS["full"] if name == "linear_logprobs"}
    assert tokens == {1024, 2048, 4096, 8192, 16_384, 32_768, 65_536}


def test_the_summary_names_the_fastest():
    rows = [
        {"operation": POLICY, **POINT._asdict(), "way": way, **({} if ms is None else {"both_ms": ms})}
        for way, ms in (("ours", 2.0), ("eager PyTorch", 3.0), ("another", 1.0), ("a third", None))
    ]
    (line,) = kernels.summaries(rows)
    assert (line["ours"], line["our_ms"], line["other"], line["eager_ms"]) == ("ours", 2.0, "another", 3.0)


def test_the_summary_compares_across_parts_but_not_with_tuned_rows():
    """torch.compile is measured in a part of its own."""
    measured = ("headline", "ours", 2.0), ("torch-compile", "torch.compile", 3.0), (kernels.TUNED, "ours", 1.0)
    rows = [
        {"operation": POLICY, **POINT._asdict(), "way": way, "both_ms": ms, "part": part} for part, way, ms in measured
    ]
    plain, tuned = kernels.summaries(rows)
    assert (plain["our_ms"], plain["other"], plain["other_ms"]) == (2.0, "torch.compile", 3.0)
    assert (tuned["our_ms"], tuned["other"]) == (1.0, None)
    assert tuned["at"].endswith(f"({kernels.TUNED})")
