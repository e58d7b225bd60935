"""Fused operations for sequence-level policy optimisation of language models. It imports torch and triton alone."""

__version__ = "0.1.0"

from . import reference, tuning
from .ops.gae import gae
from .ops.group_advantages import group_advantages
from .ops.linear_logprobs import Certificate, LinearLogprobOutput, linear_logprobs
from .ops.linear_policy_loss import LinearPolicyLossOutput, linear_policy_loss
from .ops.policy_loss import PolicyLossOutput, policy_loss
from .ops.prompt_value import PromptValueOutput, prompt_value_logits, prompt_value_loss
from .ops.selective_logprobs import LogprobOutput, selective_logprobs
from .ops.whiten import whiten

__all__ = [
    "Certificate",
    "LinearLogprobOutput",
    "LinearPolicyLossOutput",
    "LogprobOutput",
    "PolicyLossOutput",
    "PromptValueOutput",
    "gae",
    "group_advantages",
    "linear_logprobs",
    "linear_policy_loss",
    "policy_loss",
    "prompt_value_logits",
    "prompt_value_loss",
    "reference",
    "selective_logprobs",
    "tuning",
    "whiten",
]
