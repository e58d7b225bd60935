"""The definition of every operation, under its public name: plain differentiable PyTorch, float32 or float64."""

from sppo_kernels.ops.gae import reference as gae
from sppo_kernels.ops.group_advantages import reference as group_advantages
from sppo_kernels.ops.linear_logprobs import reference as linear_logprobs
from sppo_kernels.ops.linear_policy_loss import reference as linear_policy_loss
from sppo_kernels.ops.policy_loss import reference as policy_loss
from sppo_kernels.ops.prompt_value import reference_logits as prompt_value_logits
from sppo_kernels.ops.prompt_value import reference_loss as prompt_value_loss
from sppo_kernels.ops.selective_logprobs import reference as selective_logprobs
from sppo_kernels.ops.whiten import reference as whiten

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
