"""Claims of speed are judged by the rows that decide them."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from benchmarks.harness import claims, results
from benchmarks.harness.cases import BASE, GEMM_ONLY, MILLION, OURS, SHARP
from benchmarks.harness.claims import CLAIMS, judge
from benchmarks.harness.problem import ProblemSize

POLICY = "policy_loss, token"


def timed(operation, size, provider, both, **other):
    return {"operation": operation, **size._asdict(), "provider": provider, "both_ms": both, **other}


def judged(*rows):
    return [(claim["target"], claim["measured"], claim["held"]) for claim in judge(rows)]


def test_claims_are_judged_by_the_rows():
    million, sequence = ProblemSize(MILLION, 1536, 0), "policy_loss, sequence_mean"
    rows = [
        timed("linear_logprobs", BASE, GEMM_ONLY, 30.0, forward_ms=10.0),
        timed("linear_logprobs", BASE, "sppo_kernels, cache", 35.0),
        timed("linear_logprobs", BASE, "sppo_kernels, recompute", 51.0),
        timed(POLICY, million, OURS, 1.0),
        timed(POLICY, million, "eager PyTorch", 4.0),
        timed(sequence, million, OURS, 1.0),
        timed(sequence, million, "eager PyTorch", 4.0),
        timed("selective_logprobs", BASE, OURS, 1.0, forward_of_copy=0.6, of_ceiling=0.55),
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
    assert judged(timed("selective_logprobs", BASE, OURS, 1.0)) == []
    assert judged(timed("linear_logprobs", BASE, "sppo_kernels, cache", 34.0)) == []


def test_sparse_has_to_be_as_fast_as_the_fastest_other():
    ours = timed("linear_logprobs", SHARP, "sppo_kernels, sparse", 36.0)
    bare = timed("linear_logprobs", SHARP, GEMM_ONLY, 20.0, forward_ms=7.0)
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
