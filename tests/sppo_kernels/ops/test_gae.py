"""Tests of gae against float64 and against the sums of the paper, token by token."""

import importlib
from unittest import mock

import pytest
import torch
from against_float64 import (
    BACKENDS,
    DEVICE,
    DTYPES,
    assert_close_to_float64,
    ragged_shapes,
    randint,
    randn,
)
from hypothesis import given
from hypothesis import strategies as st
from registration import check_registration
from torch._subclasses.fake_tensor import FakeTensorMode

from sppo_kernels import gae, reference

module = importlib.import_module("sppo_kernels.ops.gae")  # the package has a function of this name


def check(backend, rewards, values, mask, **arguments):
    tensors = {"rewards": rewards, "values": values, "mask": mask}
    assert_close_to_float64(gae, reference.gae, backend, tensors, **arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@ragged_shapes
@given(
    rows=st.integers(0, 3),
    length=st.integers(0, 40) | st.sampled_from([15, 16, 17, 33]),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.95, 1.0]),
    density=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
)
def test_agrees_with_float64(backend, dtype, rows, length, gamma, lam, density):
    """With blocks of 16 tokens, because the interpreter takes a second for a block of 1024."""
    mask = (torch.rand(rows, length) < density).to(DEVICE)
    with mock.patch.object(module, "MAX_BLOCK", 16):
        check(backend, randn(rows, length, dtype=dtype), randn(rows, length, dtype=dtype), mask, gamma=gamma, lam=lam)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_equals_the_sum_in_the_paper(backend):
    """arXiv 1506.02438, equation 16: A_t = sum_l (gamma lam)^l delta_{t+l}, over the unmasked tokens of each row."""
    gamma, lam = 0.9, 0.8
    rewards, values = randn(4, 12), randn(4, 12)
    mask = torch.ones(4, 12, device=DEVICE)
    mask[0, 5:8] = 0  # tool output inside the response
    mask[1, :3] = mask[1, 9:] = 0  # prompt and padding
    mask[2] = 0
    mask[3, 1::2] = 0
    got_advantages, got_returns = gae(rewards, values, mask, gamma=gamma, lam=lam, backend=backend)
    want = torch.zeros(4, 12, dtype=torch.float64)
    for row in range(4):
        unmasked = mask[row].nonzero().flatten().tolist()
        r, v = rewards[row, unmasked].double().tolist(), [*values[row, unmasked].double().tolist(), 0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(len(unmasked))]
        for t, column in enumerate(unmasked):
            want[row, column] = sum((gamma * lam) ** k * d for k, d in enumerate(delta[t:]))
    want = want.to(DEVICE)
    torch.testing.assert_close(got_advantages.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got_returns.double(), want + values * mask, rtol=1e-5, atol=1e-6)
    for x in (got_advantages, got_returns):
        assert torch.equal(x[mask == 0], torch.zeros_like(x[mask == 0]))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_monte_carlo_and_one_step_limits(backend):
    rewards, values, mask = randn(2, 9), randn(2, 9), torch.ones(2, 9, device=DEVICE)
    _, returns = gae(rewards, values, mask, backend=backend)
    torch.testing.assert_close(returns, rewards.flip(1).cumsum(1).flip(1), rtol=1e-5, atol=1e-5)
    advantages, _ = gae(rewards, values, mask, gamma=0.5, lam=0.0, backend=backend)
    next_value = torch.nn.functional.pad(values[:, 1:], (0, 1))
    torch.testing.assert_close(advantages, rewards + 0.5 * next_value - values)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_token_and_forty_thousand(backend):
    for length in (1, 40_000 if backend == "torch" or DEVICE == "cuda" else 10_000):
        mask = torch.ones(1, length, device=DEVICE)
        mask[:, length // 2 : length // 2 + 3000] = 0  # longer than two blocks of the kernel
        check(backend, randn(1, length), randn(1, length), mask, gamma=1.0, lam=0.99)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_values_of_masked_tokens_are_ignored(backend):
    rewards, values, mask = randn(2, 9), randn(2, 9), randint(0, 2, 2, 9)
    want = gae(rewards, values, mask, gamma=0.9, lam=0.9, backend=backend)
    for bad in (float("nan"), float("inf")):
        dirty = (x.masked_fill(mask == 0, bad) for x in (rewards, values))
        for x, y in zip(gae(*dirty, mask, gamma=0.9, lam=0.9, backend=backend), want, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_layout(backend):
    mask = randint(0, 2, 7, 3).t()
    check(backend, randn(3, 8)[:, :-1], randn(7, 3).t(), mask, gamma=0.9, lam=0.9)
    check(backend, randn(22)[1:].view(3, 7), randn(3, 14)[:, ::2], mask.bool(), gamma=0.9, lam=0.9)
    check(backend, randn(3, 1).expand(3, 7), randn(1, 7).expand(3, 7), mask.float(), gamma=0.9, lam=0.9)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_every_run_float32_and_no_gradient(backend):
    rewards, values, mask = randn(2, 1500, dtype=torch.bfloat16), randn(2, 1500, grad=True), randint(0, 2, 2, 1500)
    first, second = (gae(rewards, values, mask, lam=0.9, backend=backend) for _ in range(2))
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)
        assert (x.dtype, x.requires_grad) == (torch.float32, False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_registration_compile_and_fake_tensors(backend):
    tensors = (randn(2, 5), randn(2, 5), randint(0, 2, 2, 5).bool())
    check_registration(module._gae, gae, tensors, gamma=0.9, lam=0.8, backend=backend)
    with FakeTensorMode():
        for x in gae(*(torch.empty(2, 5, dtype=torch.float16, device=DEVICE) for _ in range(3)), backend=backend):
            assert (x.shape, x.dtype) == ((2, 5), torch.float32)


GOOD = {"rewards": torch.zeros(2, 3), "values": torch.zeros(2, 3), "mask": torch.ones(2, 3)}


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"rewards": [0.0]}, TypeError, "rewards must be a torch.Tensor, got list"),
        ({"rewards": torch.zeros(2, 3).long()}, TypeError, "rewards must be a floating-point tensor, got torch.int64"),
        ({"rewards": torch.zeros(3)}, ValueError, r"rewards must be \[B, T\], got shape \(3,\)"),
        ({"values": torch.zeros(2, 4)}, ValueError, r"values must be of shape \(2, 3\).*got shape \(2, 4\)"),
        ({"values": torch.zeros(2, 3, device="meta")}, ValueError, "values must be on cpu.*got meta"),
        ({"mask": torch.ones(3)}, ValueError, r"mask must be of shape \(2, 3\).*got shape \(3,\)"),
        ({"mask": [[1]]}, TypeError, "mask must be a torch.Tensor, got list"),
        ({"gamma": 1.1}, ValueError, r"gamma must be in \[0, 1\], got 1.1"),
        ({"lam": -0.1}, ValueError, r"lam must be in \[0, 1\], got -0.1"),
        ({"lam": float("nan")}, ValueError, r"lam must be in \[0, 1\], got nan"),
        ({"backend": "cuda"}, ValueError, "backend must be one of reference, torch, triton.*got 'cuda'"),
    ],
)
def test_errors_name_the_invalid_argument(bad, error, message):
    with pytest.raises(error, match=message):
        gae(**{**GOOD, **bad})


@pytest.mark.gpu
def test_rows_may_exceed_a_grid_axis():
    mask = torch.ones(70_000, 3, device=DEVICE)
    check("triton", randn(70_000, 3), randn(70_000, 3), mask, gamma=0.9, lam=0.9)
