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
from benchmarks.harness import peers
from benchmarks.harness.cases import GEMM_ONLY, OURS
from benchmarks.harness.operations import OPERATIONS
from benchmarks.harness.problem import MinimalCost, ProblemSize

CPU = torch.device("cpu")


SIZE = ProblemSize(8, 16, 97, ignored=0.25, clipped=0.25)


POLICY = "policy_loss, token"


@pytest.fixture
def suite(tmp_path):
    def run(*names, without=("torch.compile",)):
        code = main(["kernels", "--plan", "dry", "--out", str(tmp_path), "--only", *names, "--without", *without])
        return code, json.loads((tmp_path / "kernels-dry.json").read_text())

    return run


def spoil(monkeypatch, name, spoilt):
    """Replace this library's implementation of an operation by ``spoilt(right outputs)``."""
    operation = OPERATIONS[name]
    right = operation.implementations

    def implementations(backend):
        return {mode: lambda f=f, **tensors: spoilt(f(**tensors)) for mode, f in right(backend).items()}

    monkeypatch.setattr(operation, "implementations", implementations)


@pytest.mark.slow
def test_rows_have_times_rates_and_errors(suite, tmp_path, capsys):
    code, report = suite("linear_logprobs")
    assert (code, report["failures"]) == (0, [])
    rows = {row["provider"]: row for row in report["rows"] if row["operation"] == "linear_logprobs"}
    assert list(rows)[:4] == [GEMM_ONLY, "sppo_kernels, cache", "sppo_kernels, recompute", "sppo_kernels, sparse"]
    ours = rows["sppo_kernels, cache"]
    assert all(ours[f"{part}_ms"] > 0 for part in ("forward", "backward", "both"))
    assert ours["errors"].keys() == {"logprobs", "entropy", "d hidden", "d weight"}
    flops = 2 * SIZE.tokens * 0.75 * SIZE.hidden * SIZE.vocab * (1 + 2 * 0.75)
    assert ours["rate"] == pytest.approx(flops / ours["both_ms"] / 1e9)
    assert ours["of_ceiling"] == pytest.approx(ours["rate"] / report["ceilings"]["matmul_tflops"])
    assert "both_ms" in rows["eager PyTorch"]
    assert rows["cut-cross-entropy"]["note"] == "needs a GPU" or torch.cuda.is_available()
    with (tmp_path / "kernels-dry.csv").open() as file:
        assert [row["provider"] for row in csv.DictReader(file)] == [row["provider"] for row in report["rows"]]
    assert (tmp_path / "kernels-dry.svg").read_bytes().startswith(b"<?xml")
    assert "of ceiling" in capsys.readouterr().out


@pytest.mark.slow
def test_supports_are_measured_next_to_masked_logits(suite):
    code, report = suite("linear_logprobs, support")
    assert (code, report["failures"]) == (0, [])
    rows = {row["provider"]: row for row in report["rows"]}
    assert list(rows) == ["sppo_kernels, support", "sppo_kernels, from logits", "eager PyTorch"]
    for row in rows.values():
        assert row["both_ms"] > 0
        assert row["errors"].keys() == {"logprobs", "d hidden", "d weight"}


def test_a_plan_without_the_operation_says_what_it_has(tmp_path, capsys):
    assert main(["kernels", "--plan", "others", "--only", "linear_logprobs", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "the plan others has no case of 'linear_logprobs'; it has 'gae', " in said
    assert not list(tmp_path.iterdir())


def test_operations_without_matrix_products_have_a_bandwidth():
    cost = MinimalCost(forward_bytes=6e6, backward_bytes=2e6)
    row = kernels.rate(cost, {"forward_ms": 2.0, "both_ms": 4.0})
    assert row == {"rate": 2.0, "unit": "GB/s", "forward_gb_s": 3.0}


WRONG = {
    "value": lambda out: {**out, "loss": out["loss"] + 0.01},
    "gradient": lambda out: {**out, "loss": out["loss"] * 1.01 - 0.01 * out["loss"].detach()},
    "not a number": lambda out: {**out, "loss": out["loss"] * float("nan")},
}


@pytest.mark.slow
@pytest.mark.parametrize("spoilt", WRONG.values(), ids=WRONG)
def test_a_wrong_kernel_gets_no_time(suite, monkeypatch, capsys, spoilt):
    spoil(monkeypatch, POLICY, spoilt)
    code, report = suite(POLICY)
    assert code == 1
    ours, eager = report["rows"]
    assert (ours["provider"], ours["passed"], ours["note"]) == (OURS, False, "wrong, so no time")
    assert not any(key.endswith("_ms") or key in ("rate", "of_ceiling", "peak_bytes") for key in ours)
    assert eager["passed"]
    assert eager["both_ms"] > 0
    (failure,) = report["failures"]
    assert "sppo_kernels is wrong" in failure
    assert failure in capsys.readouterr().err


@pytest.mark.slow
def test_continues_after_a_case_that_raises(suite, monkeypatch):
    def inputs(*_):
        raise torch.OutOfMemoryError("no such luck")

    monkeypatch.setattr(OPERATIONS["gae"], "inputs", inputs)
    code, report = suite("gae", "whiten")
    assert (code, report["failures"]) == (1, ["gae: 64 tokens: out of memory"])
    assert {row["operation"] for row in report["rows"]} == {"whiten"}


def test_errors_of_a_provider_that_raises_when_timed_are_kept(suite, monkeypatch):
    def raises(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(kernels, "clock", raises)
    code, report = suite("gae")
    assert (code, report["failures"]) == (1, ["gae: 64 tokens: sppo_kernels: out of memory"])
    for row in report["rows"]:
        assert (row["passed"], row["note"]) == (True, "out of memory")
        assert row["allowed"].keys() == row["errors"].keys()
        assert "both_ms" not in row


@pytest.mark.slow
def test_another_library_that_is_wrong_gets_no_time_and_fails_nothing(suite, monkeypatch):
    wrong = lambda device: lambda **tensors: {"loss": tensors["logprobs"].sum()}
    raises = lambda device: 1 / 0

    def fits_not(device):
        raise torch.OutOfMemoryError

    monkeypatch.setitem(peers.PEERS, POLICY, {"wrong": wrong, "raises": raises, "too large": fits_not})
    code, report = suite(POLICY)
    assert (code, report["failures"]) == (0, [])
    assert [(row["provider"], row.get("note")) for row in report["rows"]] == [
        (OURS, None),
        ("wrong", "wrong, so no time"),
        ("raises", "ZeroDivisionError: division by zero"),
        ("too large", "out of memory"),
    ]


@pytest.mark.slow
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
    assert report["failures"] == [f"{POLICY}: 64 tokens: sppo_kernels: {shown}"]


def test_the_table_shows_the_worst_error_and_nan_above_all():
    nan = float("nan")
    shown = kernels.COLUMNS["error"]
    assert shown({"errors": {"a": 0.1, "b": 0.3}, "scored_errors": {"a": 0.2}}) == pytest.approx(0.3)
    assert shown({"errors": {"a": 0.1}, "scored_errors": {"a": 0.4}}) == pytest.approx(0.4)
    assert shown({"errors": {"a": 0.1, "b": nan}, "scored_errors": {"a": 0.2}}) == pytest.approx(nan, nan_ok=True)
    assert shown({"note": "needs a GPU"}) is None


def test_forward_and_backward_are_told_apart():
    """A forward that takes 100 ms, 20 without gradients, and a backward that takes next to none."""
    problem = OPERATIONS[POLICY].inputs(SIZE, CPU, torch.float32)

    def slow(logprobs, **_):
        time.sleep(0.1 if torch.is_grad_enabled() else 0.02)
        return {"loss": logprobs.sum()}

    row = kernels.clock(problem, slow, CPU, seconds=0.1)
    assert row["backward_ms"] < 20 <= row["forward_ms"] < 100 <= row["both_ms"]
    assert row["repeats"] >= 3
    assert row["peak_bytes"] is None


def test_a_claim_that_is_not_held_is_listed_and_is_no_failure(tmp_path):
    missed = {"claim": "fast", "target": 5.0, "measured": 1.5, "held": False}
    suite = kernels.KernelComparison([], CPU, 0.05, (), tmp_path / "kernels-x.json")
    suite.claims = [missed]
    suite.run()
    assert suite.failures == []
    assert "NOT HELD" in suite.table()


@pytest.mark.slow
def test_rows_are_saved_as_they_come(suite, monkeypatch, tmp_path):
    """A run that is killed while it measures the second provider leaves the row of the first."""
    measure = kernels.KernelComparison._time

    def killed_at_the_second(self, *arguments):
        if self.rows:
            raise KeyboardInterrupt
        return measure(self, *arguments)

    monkeypatch.setattr(kernels.KernelComparison, "_time", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        suite(POLICY)
    (row,) = json.loads((tmp_path / "kernels-dry.json").read_text())["rows"]
    assert row["provider"] == OURS
    assert row["both_ms"] > 0


@pytest.mark.slow
def test_others_are_measured_without_ours(suite):
    _, report = suite("selective_logprobs", without=(OURS, "torch.compile"))
    assert not any(row["provider"].startswith((OURS, GEMM_ONLY)) for row in report["rows"])
    assert any(row["provider"] == "eager PyTorch" for row in report["rows"])


def test_the_summary_names_the_fastest():
    rows = [
        {"operation": POLICY, **SIZE._asdict(), "provider": provider, **({} if ms is None else {"both_ms": ms})}
        for provider, ms in ((OURS, 2.0), ("eager PyTorch", 3.0), ("another", 1.0), ("a third", None))
    ]
    (line,) = kernels.summaries(rows)
    assert (line["ours"], line["our_ms"], line["peer"], line["eager_ms"]) == (OURS, 2.0, "another", 3.0)


def test_the_summary_compares_across_parts_but_not_with_tuned_rows():
    """torch.compile is measured in a part of its own."""
    measured = ("headline", OURS, 2.0), ("torch-compile", "torch.compile", 3.0), (kernels.TUNED, OURS, 1.0)
    rows = [
        {"operation": POLICY, **SIZE._asdict(), "provider": provider, "both_ms": ms, "part": part}
        for part, provider, ms in measured
    ]
    plain, tuned = kernels.summaries(rows)
    assert (plain["our_ms"], plain["peer"], plain["peer_ms"]) == (2.0, "torch.compile", 3.0)
    assert (tuned["our_ms"], tuned["peer"]) == (1.0, None)
    assert tuned["case"].endswith(f"({kernels.TUNED})")
