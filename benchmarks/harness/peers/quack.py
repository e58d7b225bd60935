"""quack-kernels."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from benchmarks.harness.peers.base import Unavailable, cuda_capability, needs_gpu, needs_package
from benchmarks.harness.problem import IGNORE_INDEX, Implementation, Outputs

IS_OLD_PYTHON = sys.version_info < (3, 12)  # than its README requires; with 3.11 version 0.6.5 cannot be imported


def mean_nll(device: torch.device) -> Implementation:
    """Call the linear cross-entropy in chunks of 4,096 tokens, its default.

    It chooses a pipeline by itself: the one with scaled exponentials on Hopper in bfloat16 if the vocabulary is a
    multiple of 128, otherwise the one that needs multiples of 8. Both accumulate the weight gradient in float32. It has
    no losses of single tokens.
    """
    needs_gpu(device)
    if cuda_capability(device) < (9, 0):
        raise Unavailable("needs an NVIDIA GPU of compute capability 9.0 or newer")
    if IS_OLD_PYTHON:
        raise Unavailable("needs Python 3.12 or newer")
    needs_package("quack-kernels", "quack")
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def call(hidden: Tensor, weight: Tensor, labels: Tensor) -> Outputs:
        if any(n % 8 for n in (*hidden.shape, len(weight))):
            raise Unavailable("needs tokens, hidden size and vocabulary in multiples of 8")
        settings = {"ignore_index": IGNORE_INDEX, "reduction": "mean"}
        return {"loss": chunked_linear_cross_entropy(hidden, weight, labels, **settings)}

    return call
