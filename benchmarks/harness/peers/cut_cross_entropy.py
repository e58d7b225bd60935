"""Apple's cut-cross-entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.harness.peers.base import PeerFactory, needs_gpu, outputs_of_nll
from benchmarks.harness.problem import IGNORE_INDEX, Implementation, Outputs


def linear_cross_entropy(reduction: str) -> PeerFactory:
    """Call it with its defaults."""

    def build(device: torch.device) -> Implementation:
        needs_gpu(device)
        from cut_cross_entropy import linear_cross_entropy

        def call(hidden: Tensor, weight: Tensor, labels: Tensor) -> Outputs:
            nll = linear_cross_entropy(hidden, weight, labels, ignore_index=IGNORE_INDEX, reduction=reduction)
            return outputs_of_nll(nll, reduction)

        return call

    return build
