"""Fused operations for sequence-level policy optimisation of language models. It imports torch and triton alone."""

__version__ = "0.1.0"

from sppo_kernels import reference, tuning
from sppo_kernels.ops.gae import gae
from sppo_kernels.ops.group_advantages import group_advantages
from sppo_kernels.ops.linear_logprobs import Certificate, LinearLogprobOutput, linear_logprobs
from sppo_kernels.ops.linear_policy_loss import LinearPolicyLossOutput, linear_policy_loss
from sppo_kernels.ops.policy_loss import PolicyLossOutput, policy_loss
from sppo_kernels.ops.prompt_value import PromptValueOutput, prompt_value_logits, prompt_value_loss
from sppo_kernels.ops.selective_logprobs import LogprobOutput, selective_logprobs
from sppo_kernels.ops.whiten import whiten

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
