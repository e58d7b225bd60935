"""Inputs and checks shared by the tests of policy_loss."""

import torch
from against_float64 import (
    DEVICE,
    assert_close_to_float64,
    randn,
)

from sppo_kernels import policy_loss, reference

LEVELS = ["token", "sequence_mean", "sequence_sum"]


AGGREGATIONS = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"]


CORRECTIONS = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


NAN = float("nan")


def offsets(lengths):
    """Return the cu_seqlens of sequences of these lengths."""
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()


def packed(lengths, dtype=torch.float32, spread=0.3, per_token=False):
    """Return packed sequences with log-ratios on both sides of the clip range."""
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
    """Compare with float64.

    Terms are as large as the log-ratios, and those of the loss as advantages times ratios, or with CISPO advantages
    times log-probabilities.
    """
    term = 0.0
    if tensors["logprobs"].numel():
        log_ratio = (tensors["logprobs"] - tensors["old_logprobs"]).abs().mean().item()
        factor = tensors["logprobs"].abs().max().item() if arguments.get("objective") == "cispo" else 1.0
        term = max(log_ratio, factor * tensors["advantages"].abs().mean().item() / (arguments.get("normalizer") or 1.0))
    assert_close_to_float64(policy_loss, reference.policy_loss, backend, tensors, term=term, **arguments)


SEQUENCES = [4, 1, 0, 9, 3]  # one of them is an empty response


def as_packed(columns, advantages):
    """Return arguments for the packed layout."""
    return {**columns, "advantages": advantages, "cu_seqlens": offsets(SEQUENCES)}


def as_padded(columns, advantages):
    """Return arguments for the padded layout; the padding holds NaN, which must not reach a result."""
    pad = lambda x: torch.nn.utils.rnn.pad_sequence(list(x.split(SEQUENCES)), batch_first=True, padding_value=NAN)
    if advantages.shape != (len(SEQUENCES),):
        advantages = pad(advantages)
    padded = {name: pad(x) for name, x in columns.items()}
    return {**padded, "advantages": advantages, "mask": ~padded["old_logprobs"].isnan()}
