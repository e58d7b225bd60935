"""Liger."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.harness.peers.base import (
    PeerFactory,
    Unavailable,
    cuda_capability,
    needs_gpu,
    needs_package,
    outputs_of_nll,
)
from benchmarks.harness.problem import IGNORE_INDEX, Implementation, Outputs

HOPPER = 9, 0  # the compute capability for which Liger has a CuTe kernel of the scaled cross-entropy


def cross_entropy(reduction: str) -> PeerFactory:
    """Call it with the weight gradient accumulated in float32, as in this library."""

    def build(device: torch.device) -> Implementation:
        needs_gpu(device)
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        def call(hidden: Tensor, weight: Tensor, labels: Tensor) -> Outputs:
            settings = {"ignore_index": IGNORE_INDEX, "reduction": reduction, "accum_dtype": torch.float32}
            return outputs_of_nll(liger_fused_linear_cross_entropy(hidden, weight, labels, **settings), reduction)

        return call

    return build


# Liger chooses an implementation of the scaled cross-entropy by the device of the call. On Hopper that is the CuTe
# kernel, which raises without nvidia-cutlass-dsl; on other devices it is PyTorch code that takes 512 tokens at a time.


def scaled_cross_entropy_in_pytorch(finish: Implementation) -> PeerFactory:
    """Call it where Liger runs PyTorch code, which accumulates the weight gradient in the dtype of the weight."""

    def build(device: torch.device) -> Implementation:
        if cuda_capability(device) == HOPPER:
            raise Unavailable("on this GPU Liger runs its CuTe kernel instead")
        return _scaled_cross_entropy(finish)

    return build


def scaled_cross_entropy_in_cute(finish: Implementation) -> PeerFactory:
    """Call it where Liger runs its kernel for Hopper, which takes bfloat16 only."""

    def build(device: torch.device) -> Implementation:
        needs_gpu(device)
        if cuda_capability(device) != HOPPER:
            raise Unavailable("needs a GPU of compute capability 9.0")
        needs_package("nvidia-cutlass-dsl", "cutlass")
        return _scaled_cross_entropy(finish)

    return build


def _scaled_cross_entropy(finish: Implementation) -> Implementation:
    """Call it as verl does: with entropies, and with the tokens without a loss, whose outputs are 0.

    The entropies are not among the outputs. They have the dtype of the hidden states, so in bfloat16 they would fail
    the check where eager PyTorch's float32 entropies are much more accurate.
    """
    # Not from liger_kernel.ops, in which LIGER_KERNEL_IMPL=cutile replaces the function.
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    def call(hidden: Tensor, weight: Tensor, labels: Tensor, **other: Tensor) -> Outputs:
        settings = (1.0, IGNORE_INDEX, 1, True)  # temperature, ignored label, tiles per cluster, whether with entropies
        nll, _ = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, labels, *settings)
        return finish(logprobs=-nll, labels=labels, **other)

    return call


def grpo(device: torch.device) -> Implementation:
    """Call the fused linear GRPO loss."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=0.0, compiled=device.type != "cpu", use_ref_model=False, loss_type="bnpo")

    def call(hidden: Tensor, weight: Tensor, labels: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Outputs:
        rows = lambda x: x.view(len(advantages), -1, *x.shape[1:])
        keep = labels != IGNORE_INDEX
        value, _ = loss(
            rows(hidden),
            weight,
            rows(labels.clamp(min=0)),
            rows(keep),
            advantages,
            old_per_token_logps=rows(old_logprobs),
        )
        return {"loss": value}

    return call
