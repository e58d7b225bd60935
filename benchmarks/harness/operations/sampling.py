"""Random labels, logit margins, gradients and response masks that several operations share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.harness.problem import IGNORE_INDEX, ProblemSize

RESPONSE_LENGTH = 8192  # tokens of a response, about


def labels(size: ProblemSize, device: torch.device) -> Tensor:
    """Draw labels ``[tokens]``, some of them ignored."""
    drawn = torch.randint(size.vocab, (size.tokens,), device=device)
    drawn[torch.rand(size.tokens, device=device) < size.ignored] = IGNORE_INDEX
    return drawn


def noise_std(size: ProblemSize) -> float:
    """Return the standard deviation of the logits' noise.

    With "sharp" it is twice sqrt(2 log V): the k-th largest of V probabilities then falls like k ** -2, and some 65
    tokens hold all but 1e-4 of the mass, about as many as in a language model at T = 0.6.
    """
    return 2.0 * math.sqrt(2.0 * math.log(size.vocab)) if size.logits == "sharp" else 1.0


def margins(size: ProblemSize, device: torch.device) -> Tensor:
    """Draw how far each label's logit stands above the noise: near its maximum, or log V from its log-sum-exp."""
    if size.logits == "uniform":
        return torch.zeros(size.tokens, device=device)
    shares = torch.rand(size.tokens, device=device)
    if size.logits == "sharp":
        return noise_std(size) * math.sqrt(2.0 * math.log(size.vocab)) * (0.9 + 0.2 * shares)
    return math.log(size.vocab) + 8.0 * shares - 2.0


def token_gradient(size: ProblemSize, device: torch.device) -> Tensor:
    """Draw upstream gradients of a loss that averages over tokens; 0 for the clipped share."""
    gradient = torch.randn(size.tokens, device=device) / size.tokens
    return gradient * (torch.rand(size.tokens, device=device) >= size.clipped)


def equal_cu_seqlens(tokens: int, responses: int, device: torch.device) -> Tensor:
    """Return offsets ``[responses + 1]`` of packed responses of equal length."""
    return torch.arange(responses + 1, dtype=torch.int32, device=device) * (tokens // responses)


def padded_shape(size: ProblemSize) -> tuple[int, int]:
    """Return ``[B, T]`` of padded responses with ``tokens`` places."""
    length = min(RESPONSE_LENGTH, size.tokens)
    return size.tokens // length, length


def prefix_mask(shape: tuple[int, int], device: torch.device) -> Tensor:
    """Draw a mask that keeps a prefix of each row, of half its length or more, as padded responses do."""
    lengths = torch.randint(shape[1] // 2, shape[1] + 1, (shape[0], 1), device=device)
    return torch.arange(shape[1], device=device) < lengths
