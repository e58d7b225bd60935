"""Outcomes of responses, from the per-token rewards of other trainers."""

import torch
from torch import Tensor

from .._validation import reject


def outcomes(rewards: Tensor, mask: Tensor, remedy: str) -> Tensor:
    """Sum each row's unmasked rewards: the outcome in [0, 1] that SPPO's critic predicts (arXiv 2604.08865).

    Args:
        rewards: ``[B, T]``, floating-point. A sum may exceed the bounds by one eps of this dtype and is clamped.
        mask: ``[B, T]``, nonzero where a token belongs to the response.
        remedy: how the user of the trainer can bring outcomes into [0, 1], for the error message.

    Returns:
        ``[B]``, float32.

    Raises:
        ValueError: a sum is outside [0, 1] or NaN.
    """
    sums = torch.where(mask != 0, rewards.double(), 0.0).sum(-1)
    eps = torch.finfo(rewards.dtype).eps
    invalid = ~((sums >= -eps) & (sums <= 1 + eps))
    if invalid.any():
        reject("rewards", f"{sums[invalid][0].item():.9g}", f"in [0, 1] when summed over a response: {remedy}")
    return sums.clamp(0, 1).float()
