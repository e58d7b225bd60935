"""Tests that errors of linear_logprobs name the argument, its value and the remedy."""

import numpy as np
import pytest
import torch
from against_float64 import (
    BACKENDS_ON_CPU,
    DEVICE,
    randn,
)

from sppo_kernels import linear_logprobs

HIDDEN, WEIGHT, LABELS = torch.zeros(2, 3), torch.zeros(5, 3), torch.tensor([0, 4])


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"hidden": 1.0}, TypeError, "hidden must be a torch.Tensor, got float"),
        ({"hidden": HIDDEN.long()}, TypeError, "hidden must be a floating-point tensor, got torch.int64"),
        ({"hidden": torch.zeros(())}, ValueError, r"hidden must be .*got shape \(\)"),
        ({"hidden": torch.zeros(2, 0), "weight": torch.zeros(5, 0)}, ValueError, r"hidden must be .*shape \(2, 0\)"),
        ({"weight": [1.0]}, TypeError, "weight must be a torch.Tensor, got list"),
        ({"weight": torch.zeros(5)}, ValueError, r"weight must be \[V, H\] with H = 3, got shape \(5,\)"),
        ({"weight": torch.zeros(5, 4)}, ValueError, r"weight must be \[V, H\] with H = 3, got shape \(5, 4\)"),
        ({"weight": torch.zeros(0, 3)}, ValueError, r"weight must be \[V, H\].*got shape \(0, 3\)"),
        ({"weight": WEIGHT.half()}, TypeError, "weight must be of the dtype of hidden, torch.float32.*torch.float16"),
        ({"weight": WEIGHT.to("meta")}, ValueError, "weight must be on cpu.*got meta"),
        ({"labels": LABELS.float()}, TypeError, "labels must be an integer tensor, got torch.float32"),
        ({"labels": torch.zeros(3).long()}, ValueError, r"labels must be of shape \(2,\).*got shape \(3,\)"),
        ({"labels": torch.tensor([0, 5])}, ValueError, r"labels must be in \[0, 5\) or ignore_index=-100, got 5"),
        ({"labels": torch.tensor([-7, 0])}, ValueError, r"labels must be in \[0, 5\) or ignore_index=-100, got -7"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must be of shape \(5,\).*got shape \(4,\)"),
        ({"bias": torch.zeros(5).int()}, TypeError, "bias must be a floating-point tensor, got torch.int32"),
        ({"bias": torch.zeros(5, device="meta")}, ValueError, "bias must be on cpu.*got meta"),
        ({"temperature": 0.0}, ValueError, "temperature must be greater than 0.*got 0.0"),
        ({"temperature": torch.ones(3)}, ValueError, r"temperature must be of shape \(2,\).*got shape \(3,\)"),
        ({"temperature": torch.tensor([1.0, -2.0])}, ValueError, "temperature must be greater than 0, got -2.0"),
        ({"softcap": -1.0}, ValueError, "softcap must be greater than 0.*got -1.0"),
        ({"backward": "magic"}, ValueError, "backward must be one of .*'recompute'.*got 'magic'"),
        ({"logits_budget_bytes": -1}, ValueError, "logits_budget_bytes must be at least 0, got -1"),
        ({"logits_budget_bytes": 1e9}, TypeError, "logits_budget_bytes must be an int, got 1000000000.0"),
        ({"logits_budget_bytes": 2**70}, ValueError, r"logits_budget_bytes must be below 2\*\*63, got \d+"),
        ({"logits_budget_bytes": "1"}, TypeError, "logits_budget_bytes must be an int, got '1'"),
        ({"mass_tolerance": 0.0}, ValueError, r"mass_tolerance must be in \(0, 1\), got 0.0"),
        ({"mass_tolerance": 1.0}, ValueError, r"mass_tolerance must be in \(0, 1\), got 1.0"),
        ({"chunk_bytes": 0}, ValueError, "chunk_bytes must be at least 1, got 0"),
        ({"chunk_bytes": True}, TypeError, "chunk_bytes must be an int, got True"),
        ({"ignore_index": None}, TypeError, "ignore_index must be an int, got None"),
        ({"mass_tolerance": None}, TypeError, "mass_tolerance must be a number, got None"),
        ({"temperature": "1"}, TypeError, "temperature must be a number, got '1'"),
        ({"softcap": [3.0]}, TypeError, r"softcap must be a number, got \[3.0\]"),
        ({"softcap": float("inf")}, ValueError, "softcap must be greater than 0 and finite.*got inf"),
        ({"hidden": None}, TypeError, "hidden must be a torch.Tensor, got None"),
        ({"labels": None}, TypeError, "labels must be a torch.Tensor, got None"),
        ({"adapter": torch.zeros(3)}, TypeError, "adapter must be a pair of tensors .*got Tensor"),
        ({"adapter": (HIDDEN, None)}, TypeError, r"adapter must be a pair of tensors .*got \['Tensor', 'NoneType'\]"),
        ({"adapter": (HIDDEN, 1.0)}, TypeError, r"adapter\[1\] must be a torch.Tensor, got float"),
        (
            {"adapter": (HIDDEN[:1], WEIGHT)},
            ValueError,
            r"adapter\[0\] must be of shape \(2, 'r'\).*got shape \(1, 3\)",
        ),
        ({"adapter": (HIDDEN, WEIGHT[:, :2])}, ValueError, r"adapter\[1\] must be of shape \(5, 3\).*shape \(5, 2\)"),
        (
            {"adapter": (HIDDEN, WEIGHT.half())},
            TypeError,
            r"adapter\[1\] must be of the dtype of hidden.*torch.float16",
        ),
        ({"adapter": (HIDDEN, WEIGHT.to("meta"))}, ValueError, r"adapter\[1\] must be on cpu.*got meta"),
        ({"backend": "cuda"}, ValueError, "backend must be one of reference, torch, triton.*got 'cuda'"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS_ON_CPU)
def test_errors_name_the_invalid_argument(backend, bad, error, message):
    with pytest.raises(error, match=message):
        linear_logprobs(**{"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS, "backend": backend, **bad})


def test_numpy_scalars_are_accepted():
    want = linear_logprobs(HIDDEN, WEIGHT, LABELS, temperature=0.5, softcap=3.0)
    got = linear_logprobs(HIDDEN, WEIGHT, LABELS, temperature=np.float32(0.5), softcap=np.float64(3.0))
    assert torch.equal(got.entropy, want.entropy)


@pytest.mark.parametrize("group", ["ranks", -100])
def test_invalid_process_group_raises(group):
    """torch.distributed.new_group returns -100 on a rank outside the new group."""
    with pytest.raises(TypeError, match=f"group must be a torch.distributed.ProcessGroup .*got {group}"):
        linear_logprobs(HIDDEN, WEIGHT, LABELS, group=group)


@pytest.mark.gpu
def test_values_are_validated_only_on_request(monkeypatch):
    hidden, weight, labels = randn(3, 8), randn(5, 8), torch.tensor([0, 5, -1], device=DEVICE)
    monkeypatch.delenv("SPPO_KERNELS_CHECK", raising=False)
    assert linear_logprobs(hidden, weight, labels).logprobs.isnan().tolist() == [False, True, True]
    monkeypatch.setenv("SPPO_KERNELS_CHECK", "1")
    with pytest.raises(ValueError, match="labels must be in"):
        linear_logprobs(hidden, weight, labels)
