"""Fused operations for sequence-level policy optimization of language models. Imports only torch and triton."""

__version__ = "0.1.0"

from . import reference, tuning
from .ops.gae import gae
from .ops.group_advantages import group_advantages
from .ops.linear_logprobs import AutoBackward, Certificate, CertifiedLogprobOutput, linear_logprobs
from .ops.linear_policy_loss import LinearPolicyLossOutput, linear_policy_loss
from .ops.policy_loss import PolicyLossOutput, policy_loss
from .ops.prompt_value import PromptValueOutput, prompt_value_logits, prompt_value_loss
from .ops.selective_logprobs import LogprobOutput, selective_logprobs
from .ops.support_passes import Support
from .ops.whiten import whiten

__all__ = [
    "AutoBackward",
    "Certificate",
    "CertifiedLogprobOutput",
    "LinearPolicyLossOutput",
    "LogprobOutput",
    "PolicyLossOutput",
    "PromptValueOutput",
    "Support",
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
