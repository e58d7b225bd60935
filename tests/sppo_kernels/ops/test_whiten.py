"""Tests of whiten against float64 and torch.var_mean."""

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

from sppo_kernels import reference, whiten
from sppo_kernels.ops.whiten import _whiten


def check(backend, x, mask):
    """Compare with float64; the error of an element minus the mean scales with magnitude over spread."""
    unmasked = x[mask != 0].double()
    term = (unmasked.abs().max() / unmasked.std()).item() if len(unmasked) > 1 else 0.0
    assert_close_to_float64(whiten, reference.whiten, backend, {"x": x, "mask": mask}, term=term)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@ragged_shapes
@given(
    shape=st.lists(st.integers(0, 30), max_size=3) | st.sampled_from([[2047], [2048], [2049], [3, 2049]]),
    density=st.sampled_from([0.0, 0.1, 1.0]),
    scale=st.sampled_from([1e-3, 1.0, 100.0]),
    offset=st.sampled_from([0.0, 30.0]),
)
def test_agrees_with_float64(backend, dtype, shape, density, scale, offset):
    mask = (torch.rand(shape) < density).to(DEVICE)
    check(backend, (scale * torch.randn(shape) + offset).to(DEVICE, dtype), mask)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_zero_mean_and_unit_variance(backend):
    x, mask = 5 * randn(3, 1700) + 100, randint(0, 2, 3, 1700)
    y = whiten(x, mask, backend=backend)
    variance, mean = torch.var_mean(y[mask != 0].double())
    assert mean.abs() < 1e-5
    assert variance == pytest.approx(1.0, rel=1e-5)
    unmasked = x[mask != 0].double()
    want = (unmasked - unmasked.mean()) / unmasked.std()
    torch.testing.assert_close(y[mask != 0].double(), want, rtol=1e-4, atol=1e-5)
    assert torch.equal(y[mask == 0], torch.zeros_like(y[mask == 0]))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_fewer_than_two_unmasked_elements_give_zero(backend):
    x = torch.full((2, 3), 7.3, device=DEVICE)
    for unmasked in ([], [4]):
        mask = torch.zeros(6, device=DEVICE)
        mask[unmasked] = 1
        assert torch.equal(whiten(x, mask.view(2, 3), backend=backend), torch.zeros(2, 3, device=DEVICE))
    assert torch.equal(whiten(x, torch.ones(2, 3, device=DEVICE), backend=backend).round(decimals=1), 0 * x)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_values_of_masked_elements_are_ignored(backend):
    x, mask = randn(40), randint(0, 2, 40)
    want = whiten(x, mask, backend=backend)
    for bad in (float("nan"), float("inf")):
        assert torch.equal(whiten(x.masked_fill(mask == 0, bad), mask, backend=backend), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_offsets_do_not_cancel(backend):
    """Block means of 1e4 and -1e4 with a standard deviation of 1."""
    x = randn(5000)
    x[:2048] += 1e4
    x[2048:4096] -= 1e4
    check(backend, x, torch.ones(5000, device=DEVICE))
    check(backend, randn(5000) + 1e4, torch.ones(5000, device=DEVICE))


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_layout(backend):
    mask = randint(0, 2, 7, 3).t()
    for x in (randn(3, 8)[:, :-1], randn(7, 3).t(), randn(22)[1:].view(3, 7), randn(3, 1).expand(3, 7)):
        check(backend, x, mask)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_tokens(backend):
    check(backend, randn(1, 40_000), randint(0, 2, 1, 40_000))


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_every_run_float32_and_no_gradient(backend):
    x, mask = randn(5000, dtype=torch.bfloat16, grad=True), randint(0, 2, 5000)
    first, second = (whiten(x, mask, backend=backend) for _ in range(2))
    assert torch.equal(first, second)
    assert (first.dtype, first.requires_grad) == (torch.float32, False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_registration_compile_and_fake_tensors(backend):
    tensors = (randn(5, 2).t(), randint(0, 2, 2, 5).bool())
    check_registration(_whiten, whiten, tensors, backend=backend)
    with FakeTensorMode():
        y = whiten(*(torch.empty(2, 5, dtype=torch.float16, device=DEVICE) for _ in range(2)), backend=backend)
        assert (y.shape, y.dtype) == ((2, 5), torch.float32)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"x": 1.0}, TypeError, "x must be a torch.Tensor, got float"),
        ({"x": torch.zeros(3).int()}, TypeError, "x must be a floating-point tensor, got torch.int32"),
        ({"mask": [1, 1, 1]}, TypeError, "mask must be a torch.Tensor, got list"),
        ({"mask": torch.ones(4)}, ValueError, r"mask must be of shape \(3,\).*got shape \(4,\)"),
        ({"mask": torch.ones(3, device="meta")}, ValueError, "mask must be on cpu.*got meta"),
        ({"backend": "cuda"}, ValueError, "backend must be one of reference, torch, triton.*got 'cuda'"),
    ],
)
def test_errors_name_the_invalid_argument(bad, error, message):
    with pytest.raises(error, match=message):
        whiten(**{"x": torch.zeros(3), "mask": torch.ones(3), **bad})
