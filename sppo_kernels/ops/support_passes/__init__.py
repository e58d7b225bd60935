"""Passes over the sampler's support: log-probability and entropy forward, the gradient of the logits backward.

With top-k, top-p or min-p a sampler draws from the few tokens that it kept, its support S, with their probabilities
renormalized (arXiv 2512.02556, section 3.1). With z = cap(x) / tau as in selective_logprobs.py:

    lse = log sum over S of exp z       p = exp(z - lse) on S, 0 elsewhere
    logprob = z[label] - lse            entropy = lse - sum over S of p z
    dx = (g_l (onehot(label) - p) - g_e p (log p + entropy)) * cap'(x) / tau          on S, 0 elsewhere

These passes see only the logits of the support, one after the other: ``[M]`` for N tokens. linear_logprobs computes
nothing else, selective_logprobs reads nothing else.
"""

from __future__ import annotations

from ..._backend import HAS_TRITON
from .arguments import Support, check_support, check_support_values, offsets_of, read_support
from .torch_backend import TORCH_SUPPORT_PASS, SupportPass

__all__ = [
    "SUPPORT_PASSES",
    "Support",
    "SupportPass",
    "check_support",
    "check_support_values",
    "offsets_of",
    "read_support",
]

SUPPORT_PASSES: dict[str, SupportPass] = {"torch": TORCH_SUPPORT_PASS}

if HAS_TRITON:
    from .triton import TRITON_SUPPORT_PASS

    SUPPORT_PASSES["triton"] = TRITON_SUPPORT_PASS
