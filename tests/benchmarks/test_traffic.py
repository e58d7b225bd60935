"""The traffic suite: bytes are counted right, kernels move what they are designed to, and more is reported."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton")

import traffic_kernels as kernels

from benchmarks import traffic
from benchmarks.__main__ import main
from benchmarks.harness import library_seams
from benchmarks.traffic import Case, Kernel, counted, measure

pytestmark = pytest.mark.skipif(not library_seams.is_interpreted(), reason="counts in Triton's interpreter")
NAME = "copy_kernel"
TWICE = "copy_twice_read_kernel"


def copy(kernel, n=100, dtype=torch.float32, block=64):
    x = torch.ones(n).to(dtype)
    kernel[(-(-n // block),)](x, torch.empty_like(x), n, BLOCK=block)


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2), (torch.int64, 8), (torch.int8, 1), (torch.bool, 1)]
)
def test_each_element_counts_once_and_masked_lanes_do_not(dtype, size):
    with counted() as seen:
        copy(kernels.copy_kernel, dtype=dtype)
    assert (seen.loaded, seen.stored) == ({NAME: 100 * size}, {NAME: 100 * size})


def test_what_is_read_again_counts_again():
    with counted() as seen:
        copy(kernels.copy_twice_read_kernel)
    assert sum(seen.loaded.values()) == 800
    assert sum(seen.stored.values()) == 400


def test_lanes_that_ask_for_the_same_element_count_once():
    with counted() as seen:
        kernels.broadcast_kernel[(3,)](torch.ones(1), torch.empty(64), BLOCK=64)
    assert sum(seen.loaded.values()) == 3 * (4 + 4)
    assert sum(seen.stored.values()) == 3 * 64 * 4


def test_an_atomic_operation_loads_and_stores():
    with counted() as seen:
        kernels.count_kernel[(5,)](torch.zeros((), dtype=torch.int32))
    assert (sum(seen.loaded.values()), sum(seen.stored.values())) == (20, 20)


def test_nothing_is_counted_afterwards():
    with counted() as seen:
        pass
    copy(kernels.copy_kernel)
    assert not seen.loaded
    assert not seen.stored


def test_more_than_designed_fails_and_so_does_a_count_that_is_too_low():
    twice = Case("copy", "", lambda: copy(kernels.copy_twice_read_kernel), (Kernel(TWICE, 800),))
    (row,) = measure(twice)
    assert (row["ratio"], row["passed"]) == (1.5, False)
    (row,) = measure(twice._replace(kernels=(Kernel(row["kernel"], 800, designed=1200),)))
    assert row["passed"]
    (row,) = measure(twice._replace(kernels=(Kernel(row["kernel"], 1600),)))
    assert not row["passed"]


def test_a_kernel_that_was_not_expected_fails():
    (row,) = measure(Case("copy", "", lambda: copy(kernels.copy_kernel), ()))
    assert (row["kernel"], row["passed"]) == (NAME, False)


@pytest.mark.slow
def test_every_kernel_moves_what_it_is_designed_to(tmp_path, capsys):
    assert main(["traffic", "--quick", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "traffic.json").read_text())
    assert report["failures"] == []
    rows = report["rows"]
    row_passes = [row for row in rows if "logprobs" in row["operation"]]
    assert len(row_passes) == 41
    # A tile of maxima that has a candidate is read again, which is a larger share of the shorter rows here.
    fused = [row for row in row_passes if row["case"].startswith("fused")]
    again = {row["kernel"]: row["designed"] for row in row_passes if row["designed"] != 1.0 and row not in fused}
    # Logits of supports are read twice, the second time from the cache.
    twice = {"linear_logprobs_candidates_kernel": 1.27, "support_fwd_kernel": 1.86}
    assert again == {name: pytest.approx(factor, abs=0.01) for name, factor in twice.items()}
    assert all(row["ratio"] <= 1.05 * row["designed"] for row in row_passes)
    # No logit is stored: sums of 128 columns are, or rows of results in half precision, or bits.
    stored = {row["case"]: row["stored"] / (128 * 30_011) for row in fused if "projection" in row["kernel"]}
    assert list(stored.values()) == pytest.approx([8 / 128, 2 + 8 / 128, 2 + 8 / 128, (1 + 12 / 16) / 8], rel=0.01)
    assert "over the minimum" in capsys.readouterr().out


def test_failures_are_reported(tmp_path, monkeypatch, capsys):
    case = Case("copy", "", lambda: copy(kernels.copy_kernel), (Kernel(NAME, 400),))
    monkeypatch.setattr(traffic, "cases", lambda quick: [case])
    assert main(["traffic", "--out", str(tmp_path)]) == 1
    failures = json.loads((tmp_path / "traffic.json").read_text())["failures"]
    assert failures[0] == f"copy, {NAME}: 2.000 times the minimum, not 1.000"
    assert "gae_fwd_kernel: no case launches it" in failures
    assert all(failure in capsys.readouterr().err for failure in failures[:1])
