"""Inputs and checks that the tests of policy_loss share."""

import torch
from against_float64 import (
    DEVICE,
    assert_close_to_float64,
    randn,
)

from sppo_kernels import policy_loss, reference

LEVELS = ["token", "sequence_mean", "sequence_sum"]


AGGREGATIONS = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"]


CORRECTIONS = ["token_truncate", "sequence_truncate", "sequence_mask"]


NAN = float("nan")


def offsets(lengths):
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()


def packed(lengths, dtype=torch.float32, spread=0.3, per_token=False):
    """Sequences whose log-ratios spread over both sides of the clip range."""
    n, old = sum(lengths), randn(sum(lengths)) - 2
    near = lambda: (old + randn(n, scale=spread)).to(dtype)
    return {
        "logprobs": near().requires_grad_(),
        "old_logprobs": old.to(dtype),
        "advantages": randn(n if per_token else len(lengths), dtype=dtype),
        "ref_logprobs": near(),
        "rollout_logprobs": near(),
        "cu_seqlens": offsets(lengths),
    }


def check(backend, tensors, **arguments):
    """The terms of the loss and of its metrics are as large as the log-ratios."""
    term = (tensors["logprobs"] - tensors["old_logprobs"]).abs().mean().item() if tensors["logprobs"].numel() else 0.0
    assert_close_to_float64(policy_loss, reference.policy_loss, backend, tensors, term=term, **arguments)


SEQUENCES = [4, 1, 0, 9, 3]  # one of them is an empty response


def as_packed(columns, advantages):
    return {**columns, "advantages": advantages, "cu_seqlens": offsets(SEQUENCES)}


def as_padded(columns, advantages):
    """Pad with NaN, which must not reach any result."""
    pad = lambda x: torch.nn.utils.rnn.pad_sequence(list(x.split(SEQUENCES)), batch_first=True, padding_value=NAN)
    if advantages.shape != (len(SEQUENCES),):
        advantages = pad(advantages)
    padded = {name: pad(x) for name, x in columns.items()}
    return {**padded, "advantages": advantages, "mask": ~padded["old_logprobs"].isnan()}
