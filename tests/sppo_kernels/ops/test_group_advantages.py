"""Tests of group_advantages against float64 and against GRPO, Dr. GRPO and RLOO, group by group."""

import statistics

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

from sppo_kernels import group_advantages, reference
from sppo_kernels.ops.group_advantages import _group_advantages

ESTIMATORS = ["grpo", "dr_grpo", "rloo"]


def check(backend, rewards, group_ids, estimator):
    """Compare with float64; the error of a reward minus a mean scales with the rewards."""
    tensors = {"rewards": rewards, "group_ids": group_ids}
    term = rewards.abs().max().item() if len(rewards) else 0.0
    assert_close_to_float64(
        group_advantages, reference.group_advantages, backend, tensors, term=term, estimator=estimator
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("backend", BACKENDS)
@ragged_shapes
@given(
    n=st.integers(0, 40) | st.sampled_from([128, 129, 260]),
    groups=st.integers(1, 20),
    offset=st.sampled_from([0.0, 100.0]),
)
def test_agrees_with_float64(backend, estimator, dtype, n, groups, offset):
    check(backend, (randn(n) + offset).to(dtype), randint(0, groups, n), estimator)


def grpo(rewards):
    """GRPO, arXiv 2402.03300, section 4.1.2."""
    if len(rewards) == 1:
        return [0.0]
    mean, std = statistics.fmean(rewards), statistics.stdev(rewards)
    return [(r - mean) / (std + 1e-6) for r in rewards]


def dr_grpo(rewards):
    """Dr. GRPO, arXiv 2503.20783: no division by the standard deviation."""
    return [r - statistics.fmean(rewards) for r in rewards]


def rloo(rewards):
    """RLOO, arXiv 2402.14740, equation 8: the baseline is the mean of the others."""
    if len(rewards) == 1:
        return [0.0]
    return [r - statistics.fmean(rewards[:i] + rewards[i + 1 :]) for i, r in enumerate(rewards)]


@pytest.mark.parametrize("published", [grpo, dr_grpo, rloo])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_equals_the_published_formula(backend, published):
    """Interleaved groups of different sizes with arbitrary ids, including a singleton and one of equal rewards."""
    groups = {7: [1.0, 0.0, 0.5, 1.0], -3: [0.25], 2**40: [2.0, -1.0], 0: [0.5, 0.5, 0.5]}
    members = [(i, g, r, a) for g, rs in groups.items() for i, (r, a) in enumerate(zip(rs, published(rs), strict=True))]
    members.sort()  # interleaves the groups
    _, ids, rewards, want = (torch.tensor(column, device=DEVICE) for column in zip(*members, strict=True))
    got = group_advantages(rewards, ids, estimator=published.__name__, backend=backend)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert got[ids == -3].item() == 0
    assert got[ids == 0].tolist() == [0.0] * 3


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_of_several_blocks(backend, estimator):
    """Groups of 255, 256, 257 and 600 members, the least and the greatest id among theirs, shuffled."""
    sizes = {-(2**63): 255, -1: 256, 2**40: 257, 2**63 - 1: 600}
    ids = torch.cat([torch.full((size,), i) for i, size in sizes.items()])[torch.randperm(sum(sizes.values()))]
    rewards = randn(len(ids)) + (ids % 7).to(DEVICE)
    check(backend, rewards, ids.to(DEVICE), estimator)
    equal = group_advantages(torch.full_like(rewards, 0.7), ids.to(DEVICE), estimator=estimator, backend=backend)
    assert equal.count_nonzero() == 0


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_common_offset_does_not_matter(backend, estimator):
    """Differences are exact here, so the advantages of rewards around 2^17 are those of rewards around 0."""
    rewards, ids = randint(-64, 64, 600) / 64, randint(0, 2, 600)
    want = group_advantages(rewards, ids, estimator=estimator, backend=backend)
    got = group_advantages(rewards + 2.0**17, ids, estimator=estimator, backend=backend)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_order_and_layout_do_not_matter(backend, estimator):
    rewards, ids = randn(99), randint(0, 9, 99)
    check(backend, randn(198)[::2], randint(0, 9, 99, 2)[:, 1], estimator)
    check(backend, randn(1).expand(5), torch.tensor([3], device=DEVICE).expand(5), estimator)
    order = torch.randperm(99).to(DEVICE)
    got = group_advantages(rewards[order], ids[order].int(), estimator=estimator, backend=backend)
    torch.testing.assert_close(got, group_advantages(rewards, ids, estimator=estimator, backend=backend)[order])


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_every_run_float32_and_no_gradient(backend):
    if backend == "torch" and DEVICE == "cuda":
        pytest.skip("the torch backend adds up groups with index_add, which is atomic on CUDA")
    rewards, ids = randn(300, dtype=torch.float16, grad=True), randint(0, 9, 300)
    first, second = (group_advantages(rewards, ids, backend=backend) for _ in range(2))
    assert torch.equal(first, second)
    assert (first.dtype, first.requires_grad) == (torch.float32, False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_registration_compile_and_fake_tensors(backend):
    tensors = (randn(12)[::2], randint(0, 3, 6))
    check_registration(_group_advantages, group_advantages, tensors, estimator="grpo", backend=backend)
    with FakeTensorMode():
        rewards = torch.empty(6, dtype=torch.float16, device=DEVICE)
        y = group_advantages(rewards, torch.empty(6, dtype=torch.int64, device=DEVICE), backend=backend)
        assert (y.shape, y.dtype) == ((6,), torch.float32)


GOOD = {"rewards": torch.zeros(3), "group_ids": torch.zeros(3).long()}


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"rewards": [0.0]}, TypeError, "rewards must be a torch.Tensor, got list"),
        ({"rewards": torch.zeros(3).long()}, TypeError, "rewards must be a floating-point tensor, got torch.int64"),
        ({"rewards": torch.zeros(1, 3)}, ValueError, r"rewards must be \[B\], got shape \(1, 3\)"),
        ({"group_ids": torch.zeros(3)}, TypeError, "group_ids must be an integer tensor, got torch.float32"),
        ({"group_ids": torch.zeros(2).long()}, ValueError, r"group_ids must be of shape \(3,\).*got shape \(2,\)"),
        ({"group_ids": torch.zeros(3, device="meta").long()}, ValueError, "group_ids must be on cpu.*got meta"),
        ({"estimator": "ppo"}, ValueError, "estimator must be one of 'grpo', 'dr_grpo', 'rloo', got 'ppo'"),
        ({"backend": "cuda"}, ValueError, "backend must be one of reference, torch, triton.*got 'cuda'"),
    ],
)
def test_errors_name_the_invalid_argument(bad, error, message):
    with pytest.raises(error, match=message):
        group_advantages(**{**GOOD, **bad})


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_equal_rewards_give_exactly_zero(backend, estimator):
    """The rounded mean of eight times 0.7 is not 0.7, a difference that GRPO would amplify to 0.06."""
    rewards = torch.tensor([0.7] * 8 + [100.1] * 7 + [0.3], device=DEVICE)
    groups = torch.tensor([3] * 8 + [1] * 7 + [2], device=DEVICE)
    assert group_advantages(rewards, groups, estimator=estimator, backend=backend).tolist() == [0.0] * 16
