"""Tests that errors of policy_loss name the argument, its value and the remedy."""

import pytest
import torch
from against_float64 import (
    BACKENDS_ON_CPU,
)
from policy_loss_cases import NAN, offsets, packed

from sppo_kernels import policy_loss

X = torch.zeros(2, 3)


PADDED = {"logprobs": X, "old_logprobs": X, "advantages": torch.ones(2)}


CISPO = {"objective": "cispo"}
PACKED = {
    "logprobs": torch.zeros(5),
    "old_logprobs": torch.zeros(5),
    "advantages": torch.ones(2),
    "cu_seqlens": torch.tensor([0, 2, 5], dtype=torch.int32),
}


def cu(*values, dtype=torch.int32):
    return {"cu_seqlens": torch.tensor(values, dtype=dtype)}


@pytest.mark.parametrize(
    ("base", "bad", "error", "message"),
    [
        (PADDED, {"logprobs": [0.0]}, TypeError, "logprobs must be a torch.Tensor, got list"),
        (PADDED, {"logprobs": X.long()}, TypeError, "logprobs must be a floating-point tensor, got torch.int64"),
        (PADDED, {"logprobs": torch.zeros(3)}, ValueError, r"logprobs must be \[B, T\].*got shape \(3,\)"),
        (PACKED, {"logprobs": X}, ValueError, r"logprobs must be \[N\].*got shape \(2, 3\)"),
        (PADDED, {"old_logprobs": 0.0}, TypeError, "old_logprobs must be a torch.Tensor, got float"),
        (PADDED, {"old_logprobs": torch.zeros(2, 4)}, ValueError, r"old_logprobs must be .*got shape \(2, 4\)"),
        (PADDED, {"old_logprobs": X.to("meta")}, ValueError, "old_logprobs must be on cpu.*got meta"),
        (PADDED, {"advantages": torch.ones(2).int()}, TypeError, "advantages must be a floating.*torch.int32"),
        (PADDED, {"advantages": torch.ones(3)}, ValueError, r"advantages must be .*\(2,\).*\(2, 3\).*got shape \(3,\)"),
        (PACKED, {"advantages": torch.ones(3)}, ValueError, r"advantages must be .*\(2,\).*\(5,\).*got shape \(3,\)"),
        (PADDED, {"mask": [[1]]}, TypeError, "mask must be a torch.Tensor, got list"),
        (PADDED, {"mask": torch.ones(2)}, ValueError, r"mask must be of shape \(2, 3\).*got shape \(2,\)"),
        (PACKED, {"cu_seqlens": [0, 5]}, TypeError, "cu_seqlens must be a torch.Tensor, got list"),
        (PACKED, cu(0.0, 5.0, dtype=torch.float32), TypeError, "cu_seqlens must be an integer tensor.*float32"),
        (PACKED, cu(0, 2, 5, dtype=torch.int64), ValueError, "cu_seqlens must be int32.*got torch.int64"),
        (PACKED, cu(), ValueError, r"cu_seqlens must be int32 of shape \[B \+ 1\], got.*\(0,\)"),
        (PACKED, cu(0, 2, 4), ValueError, r"cu_seqlens must be rising from 0.*5, got \[0, 2, 4\]"),
        (PACKED, cu(1, 2, 5), ValueError, r"cu_seqlens must be rising from 0.*5, got \[1, 2, 5\]"),
        (PACKED, {**cu(0, 4, 2, 5), "advantages": torch.ones(3)}, ValueError, r"cu_seqlens .*got \[0, 4, 2, 5\]"),
        (PADDED, {"ratio_level": "sequence"}, ValueError, "ratio_level must be one of .*'token'.*got 'sequence'"),
        (PADDED, {"aggregation": "mean"}, ValueError, "aggregation must be one of .*'token-mean'.*got 'mean'"),
        (PADDED, {"clip_low": -0.1}, ValueError, "clip_low must be at least 0, got -0.1"),
        (PADDED, {"clip_high": -0.2}, ValueError, "clip_high must be at least 0, got -0.2"),
        (PADDED, {"clip_high": NAN}, ValueError, "clip_high must be at least 0, got nan"),
        (PADDED, {"dual_clip": 1.0}, ValueError, "dual_clip must be greater than 1.*got 1.0"),
        (PADDED, {"normalizer": 0.0}, ValueError, "normalizer must be greater than 0.*got 0.0"),
        (PADDED, {"normalizer": -2}, ValueError, "normalizer must be greater than 0.*got -2"),
        (PADDED, {"normalizer": torch.tensor(0.0)}, ValueError, "normalizer must be greater than 0.*got 0.0"),
        (PADDED, {"normalizer": torch.ones(2)}, ValueError, r"normalizer must be a single number, got shape \(2,\)"),
        (PADDED, {"normalizer": torch.ones((), device="meta")}, ValueError, "normalizer must be on cpu.*got meta"),
        (PADDED, {"kl_coef": 0.1}, ValueError, r"ref_logprobs must be given when kl_coef is not 0 \(it is 0.1\)"),
        (PADDED, {"ref_logprobs": torch.zeros(3)}, ValueError, r"ref_logprobs must be .*got shape \(3,\)"),
        (PADDED, {"kl_estimator": "k4"}, ValueError, "kl_estimator must be one of 'k1', 'k2', 'k3', got 'k4'"),
        (PADDED, {"rollout_correction": "tis"}, ValueError, "rollout_correction must be one of .*got 'tis'"),
        (
            PADDED,
            {"rollout_correction": "token_truncate"},
            ValueError,
            "rollout_logprobs must be given when .*token_tr",
        ),
        (PADDED, {"rollout_logprobs": torch.zeros(3)}, ValueError, r"rollout_logprobs must be .*got shape \(3,\)"),
        (PADDED, {"rollout_cap": 0.0}, ValueError, "rollout_cap must be greater than 0, got 0.0"),
        (PADDED, {"rollout_floor": 3.0}, ValueError, r"rollout_floor must be in \[0, rollout_cap=2.0\], got 3.0"),
        (
            PADDED,
            {"rollout_floor": 0.5},
            ValueError,
            "rollout_floor must be 0 when .* is None, got 0.5",
        ),
        (PADDED, {"objective": "ppo"}, ValueError, "objective must be one of 'clip', 'cispo', got 'ppo'"),
        (PADDED, {**CISPO, "ratio_level": "sequence_sum"}, ValueError, "ratio_level must be token when objective is"),
        (PADDED, {**CISPO, "dual_clip": 3.0}, ValueError, "dual_clip must be None when objective is 'cispo'.*got 3.0"),
        (PADDED, {"backend": "cuda"}, ValueError, "backend must be one of reference, torch, triton.*got 'cuda'"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS_ON_CPU)
def test_errors_name_the_invalid_argument(backend, base, bad, error, message):
    with pytest.raises(error, match=message):
        policy_loss(**{**base, "backend": backend, **bad})


@pytest.mark.gpu
def test_values_are_validated_only_on_request(monkeypatch):
    tensors = packed([2, 3])
    monkeypatch.setenv("SPPO_KERNELS_CHECK", "1")
    with pytest.raises(ValueError, match="cu_seqlens must be rising"):
        policy_loss(**{**tensors, **{"cu_seqlens": offsets([2, 2])}})
    monkeypatch.delenv("SPPO_KERNELS_CHECK")
    policy_loss(**{**tensors, **{"cu_seqlens": offsets([2, 2])}})
