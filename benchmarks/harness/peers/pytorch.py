"""PyTorch: eager, compiled, and its chunked linear cross-entropy."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.harness.operations import eager
from benchmarks.harness.operations.linear import LinearPolicyLoss
from benchmarks.harness.peers.base import PeerFactory, Unavailable, on_any_device, outputs_of_nll
from benchmarks.harness.problem import IGNORE_INDEX, Implementation, Outputs
from sppo_kernels import reference


def eager_and_compiled(implementation: Implementation) -> dict[str, PeerFactory]:
    """Return the peers of an operation that plain PyTorch code computes."""
    return {"eager PyTorch": on_any_device(implementation), "torch.compile": _compiled(implementation)}


def _compiled(implementation: Implementation) -> PeerFactory:
    def build(device: torch.device) -> Implementation:
        torch.compiler.reset()  # what was compiled for another size must not decide how this one is
        return torch.compile(implementation, dynamic=False)

    return build


def mean_nll(hidden: Tensor, weight: Tensor, labels: Tensor) -> Outputs:
    """Compute the mean NLL as in supervised fine-tuning: logits raised to float32."""
    logits = functional.linear(hidden, weight).float()
    return {"loss": functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX)}


def policy_loss(hidden: Tensor, weight: Tensor, labels: Tensor, **other: Tensor) -> Outputs:
    """Compute log-probabilities from all logits, then the policy loss."""
    out = eager.linear_logprobs(hidden, weight, labels)
    return LinearPolicyLoss().finish(reference, **out, labels=labels, **other)


def linear_cross_entropy(reduction: str) -> PeerFactory:
    """Call ``torch.nn.functional.linear_cross_entropy`` in chunks."""

    def call(hidden: Tensor, weight: Tensor, labels: Tensor) -> Outputs:
        nll = functional.linear_cross_entropy(
            hidden,
            weight,
            labels,
            reduction=reduction,
            ignore_index=IGNORE_INDEX,
            options=torch.nn.LinearCrossEntropyOptions(),
        )
        return outputs_of_nll(nll, reduction)

    def build(device: torch.device) -> Implementation:
        if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            raise Unavailable(f"torch {torch.__version__} does not have it")
        return call

    return build
