"""TRL."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.harness.peers.base import PeerFactory, needs_gpu, scatter
from benchmarks.harness.problem import IGNORE_INDEX, Implementation, Outputs


def chunked_logprobs(finish: Implementation) -> PeerFactory:
    """Call it as TRL's trainers do: only on tokens with a loss, the vocabulary in tiles of 32,768."""

    def build(device: torch.device) -> Implementation:
        from trl.kernels import ChunkedLogProbFunction

        def call(hidden: Tensor, weight: Tensor, labels: Tensor, **other: Tensor) -> Outputs:
            keep = labels != IGNORE_INDEX
            settings = (1.0, 32_768, None, 1.0, ("entropy",))  # temperature, tile, softcap, scale, what to give
            found = ChunkedLogProbFunction.apply(hidden[keep], weight, None, labels[keep], *settings)
            logprobs, entropy = (scatter(x, keep) for x in found[:2])
            return finish(logprobs=logprobs, entropy=entropy, labels=labels, **other)

        return call

    return build


def selective_logprobs(device: torch.device) -> Implementation:
    """Call ``selective_log_softmax_and_entropy``."""
    needs_gpu(device)
    from trl.kernels import selective_log_softmax_and_entropy

    def call(logits: Tensor, labels: Tensor) -> Outputs:
        keep = labels != IGNORE_INDEX
        logprobs, entropy = selective_log_softmax_and_entropy(logits, labels.clamp(min=0), row_mask=keep)
        return {"logprobs": logprobs.float() * keep, "entropy": entropy.float() * keep}

    return call
