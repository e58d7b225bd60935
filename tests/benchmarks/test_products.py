"""The products report: it runs on a CPU, gives no time to wrong numbers, and goes on after a part that raises."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton")

import sppo_kernels
from benchmarks import products
from benchmarks.__main__ import main

PARTS = ["cache", "recompute", "auto", "forward alone", "eager"]


@pytest.fixture
def report(tmp_path):
    def run():
        code = main(["products", "--quick", "--out", str(tmp_path)])
        (file,) = tmp_path.glob("products-*-quick.json")
        return code, json.loads(file.read_text())

    return run


def spoil(monkeypatch, mode, spoilt):
    """linear_logprobs with ``spoilt`` in its place for one mode."""
    right = sppo_kernels.linear_logprobs
    call = lambda *args, backward="auto", **kwargs: (spoilt if backward == mode else right)(
        *args, backward=backward, **kwargs
    )
    monkeypatch.setattr(sppo_kernels, "linear_logprobs", call)


def test_every_part_is_measured(report, capsys):
    code, content = report()
    assert (code, content["failures"], content["suite"]) == (0, [], "products")
    assert [row["part"] for row in content["rows"]] == PARTS
    assert [row["passes"] for row in content["rows"]] == [3, 4, 3, 1, 3]
    assert content["bare_ms"].keys() == {"logits", "d hidden", "d weight"}
    assert all(content["checks"][mode]["passed"] for mode in ("cache", "recompute", "auto"))
    size = content["tokens"] * content["hidden"] * content["vocab"]
    logits, *gradients = content["bare_ms"].values()
    for row in content["rows"]:
        bare = logits if row["passes"] == 1 else logits * (row["passes"] - 2) + sum(gradients)
        assert row["ratio"] == pytest.approx(row["ms"] / bare)
        assert row["tflops"] == pytest.approx(2 * row["passes"] * size / row["ms"] / 1e9)
        assert row["passed"] is None  # nothing is judged at a tiny size
    assert "ratio" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["value", "gradient"])
def test_wrong_numbers_get_no_time(report, monkeypatch, capsys, wrong):
    right = sppo_kernels.linear_logprobs

    def spoilt(hidden, weight, labels, **settings):
        logprobs, entropy = right(hidden, weight, labels, **settings)
        if wrong == "value":
            return logprobs, entropy * 1.01
        return logprobs + 0.01 * (logprobs - logprobs.detach()), entropy

    spoil(monkeypatch, "recompute", spoilt)
    code, content = report()
    assert code == 1
    assert [row["part"] for row in content["rows"]] == ["cache", "auto", "eager"]
    (failure,) = content["failures"]
    assert failure.startswith("check recompute")
    assert failure in capsys.readouterr().err


def test_goes_on_after_a_part_that_raises(report, monkeypatch):
    right = sppo_kernels.linear_logprobs

    def spoilt(hidden, *args, **settings):
        if len(hidden) == products.TINY[0]:
            raise RuntimeError("no such luck")
        return right(hidden, *args, **settings)

    spoil(monkeypatch, "cache", spoilt)
    code, content = report()
    assert (code, content["failures"]) == (1, ["cache: RuntimeError: no such luck"])
    assert [row["part"] for row in content["rows"]] == PARTS[1:]


def test_times_without_bare_products_have_no_ratio(report, monkeypatch):
    monkeypatch.delattr(products, "bare_products")
    code, content = report()
    assert code == 1
    assert [row["ratio"] for row in content["rows"]] == [None] * 5


def test_the_claim_is_judged_at_the_full_size(tmp_path, monkeypatch):
    quick = products.Report(tmp_path, quick=True)
    quick.judged = True
    monkeypatch.setattr(products, "measure", lambda call, device, repeats: {"ms": 10.0, "iqr_ms": 0.1, "peak_bytes": 1})
    quick.run()
    assert quick.failures == []
    monkeypatch.setattr(products, "LIMIT", 0.3)  # all take as long, so cache takes 1/3 of three products, recompute 1/4
    quick.rows.clear()
    quick.run()
    assert [failure.partition(":")[0] for failure in quick.failures] == ["cache", "auto"]
    assert [row["passed"] for row in quick.rows] == [False, True, False, None, None]
    assert "failed" in quick.table()
