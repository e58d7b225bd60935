"""Outcomes from per-token rewards: sums in [0, 1], up to rounding."""

import pytest
import torch

from sppo_kernels.integrations._outcomes import outcomes


def test_only_unmasked_rewards_are_summed():
    rewards = torch.tensor([[0.25, 0.5, 9.0], [float("nan"), 1.0, 0.0], [3.0, 3.0, 3.0]])
    mask = torch.tensor([[1, 1, 0], [0, 1, 1], [0, 0, 0]])
    assert outcomes(rewards, mask, "").tolist() == [0.75, 1.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("parts", [3, 6, 9, 10, 100])
def test_rounding_beyond_the_bounds_is_accepted(dtype, parts):
    rewards = torch.full((1, parts), 1 / parts, dtype=dtype)
    (outcome,) = outcomes(rewards, torch.ones(1, parts), "")
    assert outcome.dtype == torch.float32
    assert 1 - 2 * torch.finfo(dtype).eps <= outcome <= 1


@pytest.mark.parametrize("reward", [1.01, -0.01, float("nan"), float("inf")])
def test_sums_outside_the_bounds_are_rejected(reward):
    with pytest.raises(ValueError, match=r"rewards must be in \[0, 1\] when summed over a response: scale them, got"):
        outcomes(torch.tensor([[0.5], [reward]]), torch.ones(2, 1), "scale them")
