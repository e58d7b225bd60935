"""The outcome of a response, from the rewards that other trainers give its tokens."""

import torch
from torch import Tensor

from .._validation import reject


def outcomes(rewards: Tensor, mask: Tensor, remedy: str) -> Tensor:
    """The sum of each row's rewards where the mask is, in [0, 1]: what SPPO's critic predicts (arXiv 2604.08865).

    Args:
        rewards: ``[B, T]``, floating; what their dtype rounds by may pass the bounds.
        mask: ``[B, T]``, nonzero where a token is the response's.
        remedy: what the user of the trainer can do about others.

    Returns:
        ``[B]``, float32.

    Raises:
        ValueError: a sum outside [0, 1], or NaN.
    """
    sums = torch.where(mask != 0, rewards.double(), 0.0).sum(-1)
    rounding = torch.finfo(rewards.dtype).eps
    wrong = ~((sums >= -rounding) & (sums <= 1 + rounding))
    if wrong.any():
        reject("rewards", f"{sums[wrong][0].item():.9g}", f"in [0, 1] when summed over a response: {remedy}")
    return sums.clamp(0, 1).float()
