"""Host code for CUDA without a device: bodies of operations run on fake tensors, and their launches are checked."""

import pytest
import torch

pytest.importorskip("triton")

from cuda_arguments import (
    ARGUMENTS,
    DTYPES,
    IGNORED,
    OPS,
    gae,
    linear,
    new_labels,
    new_temperature,
    policy,
    selective,
    selective_inputs,
)
from fake_cuda import FakeCUDA

from sppo_kernels.ops import policy_loss
from sppo_kernels.ops.linear_logprobs import auto_mode


@pytest.fixture
def cuda(monkeypatch):
    auto_mode.reset_defaults()
    with FakeCUDA(monkeypatch).active() as cuda:
        yield cuda
    auto_mode.reset_defaults()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sorted(OPS))
def test_every_operation_launches(cuda, name, dtype):
    cuda.run(OPS[name], **ARGUMENTS[name](cuda, dtype))
    assert cuda.launches.made


def test_strided_logits_are_not_copied(cuda):
    """The slice [B, T, V] has two leading strides and more than 2^31 logits."""
    logits, labels = selective_inputs(cuda, torch.bfloat16, batch=9, length=5000)
    arguments = {**selective(cuda, torch.bfloat16), "logits": logits, "labels": labels}
    arguments["temperature"] = new_temperature(cuda, 45_000)
    cuda.launches.sizes = {"V": 50257, "T": 5000, "N": 45_000, "softcap": 0.0, "ignore_index": IGNORED}
    cuda.run(OPS["selective_logprobs"], **arguments)
    (launch,) = cuda.launches.made
    assert launch.rows == 45_000
    assert launch.grid == (2 * 45_000,)  # a row of 50,257 is split in two
    assert launch.arguments["x_ptr"] is logits
    assert launch.arguments["stride_b"] == 5001 * 50257


def test_empty_inputs_launch_nothing(cuda):
    empty, no_labels = cuda.new(0), new_labels(cuda, 0)
    no_logits = {"logits": cuda.new(0, 4, 9), "labels": no_labels, "temperature": new_temperature(cuda, 0)}
    for name, changed in {
        "selective_logprobs": no_logits,
        "linear_logprobs": linear(cuda, torch.bfloat16, n=0),
        "gae": gae(cuda, torch.float32, rows=0),
        "whiten": {"x": empty, "mask": empty.bool()},
        "group_advantages": {"rewards": empty, "group_ids": no_labels},
    }.items():
        cuda.run(OPS[name], **{**ARGUMENTS[name](cuda, torch.float32), **changed})
    assert not cuda.launches.made


POLICIES = [
    {"normalizer": True},
    {"per_token": True, "aggregation": "seq-mean-token-mean"},
    {"optional": True, "dual_clip": 3.0, "kl_coef": 0.1, "aggregation": "seq-mean-token-sum"},
    {"optional": True, "rollout_correction": "sequence_mask", "kl_estimator": "k1"},
]


@pytest.mark.parametrize("settings", POLICIES, ids=range(len(POLICIES)))
@pytest.mark.parametrize("level", policy_loss.RATIO_LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_policy_loss(cuda, dtype, level, settings):
    coefficients = {name: settings.get(name, default) for name, default in (("dual_clip", None), ("kl_coef", 0.0))}
    cuda.launches.sizes = {"B": 7, "BLOCK": 1024, "RATIO_LEVEL": level, **coefficients}
    cuda.run(OPS["policy_loss"], **policy(cuda, dtype, ratio_level=level, **settings))
    *sums, launch = cuda.launches.made
    assert launch.kernel == "policy_loss_fwd_bwd_kernel"
    # 10,000 tokens fill 9 blocks of 1,024; the cuts between 7 sequences make at most 7 more pieces.
    assert launch.grid == (9 + 7,)
    masked_mean = settings.get("optional", False) and settings.get("aggregation", "token-mean") != "token-mean"
    weight_of_sequence = "rollout_correction" in settings
    assert [first.kernel for first in sums] == ["policy_loss_sums_kernel"] * (
        level != "token" or weight_of_sequence or masked_mean
    )
    assert all(first.grid == launch.grid for first in sums)


@pytest.mark.parametrize("packed", [False, True])
def test_prompt_values(cuda, packed):
    cuda.launches.sizes = {"B": 5, "T": 300, "H": 1000}
    for name in ("prompt_value_loss", "prompt_value_grad_hidden", "prompt_value_grad_weight"):
        cuda.run(OPS[name], **ARGUMENTS[name](cuda, torch.bfloat16, packed=packed))
    assert len(cuda.launches.made) == 3
