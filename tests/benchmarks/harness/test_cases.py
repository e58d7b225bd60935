"""Plans hold the cases that the claims are about."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from benchmarks.harness.cases import BASE, LM_SHAPES, MILLION, PLANS, SHARP, BenchmarkCase
from benchmarks.harness.operations import OPERATIONS

POLICY_LOSSES = {"policy_loss, token", "policy_loss, sequence_mean"}


def test_the_cases_that_the_claims_need_are_planned():
    planned = PLANS["headline"]
    assert {
        BenchmarkCase("linear_logprobs", BASE),
        BenchmarkCase("linear_logprobs", SHARP),
        BenchmarkCase("selective_logprobs", BASE),
    } <= set(planned)
    assert {name for name, size in planned if size.tokens == MILLION} == POLICY_LOSSES
    heads = {(size.hidden, size.vocab) for name, size in planned if name == "linear_logprobs"}
    assert heads == {LM_SHAPES["8B"], LM_SHAPES["1.5B"], LM_SHAPES["0.5B"]}
    assert set(PLANS["compiled"]) < set(planned)
    compared = PLANS["projection"]
    assert {(size.hidden, size.vocab) for _, size in compared} == set(LM_SHAPES.values())
    assert {(name, size.tokens) for name, size in compared} == {("linear_logprobs, projection", 8192)}
    assert {name for name, _ in PLANS["full"]} == set(OPERATIONS)
    tokens = {size.tokens for name, size in PLANS["full"] if name == "linear_logprobs"}
    assert tokens == {1024, 2048, 4096, 8192, 16_384, 32_768, 65_536}
