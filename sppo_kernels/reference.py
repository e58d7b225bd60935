"""Definitions of all operations under their public names: plain differentiable PyTorch in float32 or float64."""

from .ops.gae import reference as gae
from .ops.group_advantages import reference as group_advantages
from .ops.linear_logprobs import reference as linear_logprobs
from .ops.linear_policy_loss import reference as linear_policy_loss
from .ops.policy_loss import reference as policy_loss
from .ops.prompt_value import reference_logits as prompt_value_logits
from .ops.prompt_value import reference_loss as prompt_value_loss
from .ops.selective_logprobs import reference as selective_logprobs
from .ops.whiten import reference as whiten

__all__ = [
    "gae",
    "group_advantages",
    "linear_logprobs",
    "linear_policy_loss",
    "policy_loss",
    "prompt_value_logits",
    "prompt_value_loss",
    "selective_logprobs",
    "whiten",
]
