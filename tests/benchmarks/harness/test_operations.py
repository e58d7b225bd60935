"""Operations: every implementation and peer agrees with float64, and inputs are as described."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.harness import peers
from benchmarks.harness.checking import allowed_of, check, truth_and_tolerance
from benchmarks.harness.operations import OPERATIONS
from benchmarks.harness.problem import ProblemSize
from sppo_kernels import linear_logprobs

CPU = torch.device("cpu")
SIZE = ProblemSize(8, 16, 97, ignored=0.25, clipped=0.25)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_provider_is_right(name, dtype):
    """Those of this library and whatever else runs here; the others are not installed or need a GPU."""
    operation = OPERATIONS[name]
    torch.manual_seed(0)
    problem = operation.inputs(SIZE, CPU, dtype)
    truth, allowed = truth_and_tolerance(operation, problem)
    providers = {**operation.implementations(None)}
    for provider, make in peers.PEERS[name].items():
        try:
            providers |= {} if provider == "torch.compile" else {provider: make(CPU)}
        except (peers.Unavailable, ModuleNotFoundError):
            continue
    assert len(providers) >= 2
    for provider, function in providers.items():
        bounds = allowed_of(provider, dtype, allowed)
        outcome = check(problem, function, truth, bounds)
        assert outcome["passed"], (provider, outcome, bounds)


def test_the_truth_is_the_definition():
    """Blocks of tokens give the same as all tokens at once."""
    torch.manual_seed(0)
    problem = OPERATIONS["linear_logprobs"].inputs(SIZE._replace(tokens=1100), CPU, torch.float32)
    whole = problem.cast(torch.float64).results(OPERATIONS["linear_logprobs"].implementations("reference")["recompute"])
    for name, x in OPERATIONS["linear_logprobs"].reference(problem, torch.float64).items():
        torch.testing.assert_close(x, whole[name], rtol=1e-10, atol=1e-12)


def test_sharp_logits_have_their_mass_on_a_few_tokens():
    # Of 64 tokens the mean moves by a factor of two from one draw to the next.
    problem = OPERATIONS["linear_logprobs"].inputs(ProblemSize(512, 64, 50_000, logits="sharp"), CPU, torch.float32)
    tensors = problem.tensors
    certificate = linear_logprobs(**tensors, backward="sparse", return_certificate=True).certificate
    assert certificate.sparse_share > 0.9
    assert 30 < certificate.mean_entries < 130


def test_peaked_logits_are_peaked_and_uniform_ones_are_not():
    median = {}
    for logits in ("peaked", "uniform"):
        problem = OPERATIONS["linear_logprobs"].inputs(ProblemSize(256, 64, 5000, logits=logits), CPU, torch.float32)
        outputs = OPERATIONS["linear_logprobs"].reference(problem, torch.float64)
        median[logits] = outputs["logprobs"].median().exp()
    assert median["peaked"] > 0.5
    assert median["uniform"] < 0.001


def test_shares_are_of_tokens():
    problem = OPERATIONS["linear_logprobs"].inputs(
        ProblemSize(4000, 4, 9, ignored=0.5, clipped=0.25), CPU, torch.float32
    )
    assert (problem.tensors["labels"] == -100).float().mean() == pytest.approx(0.5, abs=0.05)
    assert (problem.upstream["logprobs"] == 0).float().mean() == pytest.approx(0.25, abs=0.05)
