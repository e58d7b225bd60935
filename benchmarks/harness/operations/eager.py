"""Log-probabilities as plain PyTorch code computes them, all logits at once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.harness.problem import IGNORE_INDEX, Outputs


def selective_logprobs(logits: Tensor, labels: Tensor) -> Outputs:
    """Compute log-probabilities and, without gradient, entropies from logits; float64 stays, the rest is float32."""
    logp = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
    keep = labels != IGNORE_INDEX
    with torch.no_grad():
        entropy = -(logp.exp() * logp).sum(-1) * keep
    logprobs = logp.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1) * keep
    return {"logprobs": logprobs, "entropy": entropy}


def linear_logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Outputs:
    """Compute log-probabilities and entropies from hidden states."""
    return selective_logprobs(functional.linear(hidden, weight), labels)


def masked_logprobs(
    hidden: Tensor, weight: Tensor, labels: Tensor, token_ids: Tensor, offsets: Tensor, temperature: float = 1.0
) -> Outputs:
    """Compute all logits, mask those outside of the supports, and normalize: what other libraries do.

    Rows whose label is ignored have a log-probability of 0. Every support has at least one token.
    """
    row = torch.repeat_interleave(offsets.diff(), output_size=len(token_ids))
    logits = functional.linear(hidden, weight)
    logits = (logits if logits.dtype == torch.float64 else logits.float()).div_(temperature)
    outside = torch.ones_like(logits, dtype=torch.bool)
    outside[row, token_ids.long()] = False
    logp = logits.masked_fill_(outside, float("-inf")).log_softmax(-1)
    logprobs = logp.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return {"logprobs": logprobs.where(labels != IGNORE_INDEX, 0.0)}
