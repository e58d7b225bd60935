"""verl."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.harness.peers.base import PeerFactory, Unavailable, needs_gpu, scatter
from benchmarks.harness.problem import IGNORE_INDEX, Implementation, Outputs


def linear_cross_entropy(finish: Implementation) -> PeerFactory:
    """Call it with its default backward, on the tokens with a loss: it knows no label that it ignores.

    For a label outside of the vocabulary it would return what was in memory. It sums the gradient of the hidden states
    over parts of the vocabulary in their dtype.
    """

    def build(device: torch.device) -> Implementation:
        needs_gpu(device)
        from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

        def call(hidden: Tensor, weight: Tensor, labels: Tensor, **other: Tensor) -> Outputs:
            if hidden.shape[-1] % 128:
                raise Unavailable("needs a hidden size that is a multiple of 128")
            keep = labels != IGNORE_INDEX
            found = linear_cross_entropy(hidden[keep], weight, labels[keep], 1.0, "none")  # at temperature 1
            logprobs, entropy = (scatter(x, keep) for x in found)
            return finish(logprobs=logprobs, entropy=entropy, labels=labels, **other)

        return call

    return build
