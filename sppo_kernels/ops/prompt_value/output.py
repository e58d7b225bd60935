"""Result of prompt_value_loss."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PromptValueOutput(NamedTuple):
    """Loss ``[]`` and logits ``[B]``, differentiable; values and advantages ``[B]``, detached. All float32."""

    loss: Tensor
    logits: Tensor
    values: Tensor
    advantages: Tensor
