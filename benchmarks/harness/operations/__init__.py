"""The operations that the suites measure: one class each, with inputs, reference, implementations and minimal cost."""

from __future__ import annotations

from benchmarks.harness.operations.advantages import GAE, GroupAdvantages, Whiten
from benchmarks.harness.operations.base import Operation
from benchmarks.harness.operations.linear import (
    LinearLogprobs,
    LinearNLL,
    LinearPolicyLoss,
    LinearProjection,
    LinearSupport,
)
from benchmarks.harness.operations.losses import PolicyLoss, PromptValueLoss
from benchmarks.harness.operations.selective import SelectiveLogprobs

OPERATIONS: dict[str, Operation] = {
    "linear_logprobs": LinearLogprobs(),
    "linear_logprobs, mean NLL": LinearNLL(),
    "linear_logprobs + policy_loss": LinearPolicyLoss(),
    "linear_logprobs, support": LinearSupport(),
    "linear_logprobs, projection": LinearProjection(),
    "selective_logprobs": SelectiveLogprobs(),
    "policy_loss, token": PolicyLoss("token"),
    "policy_loss, sequence_mean": PolicyLoss("sequence_mean"),
    "prompt_value_loss": PromptValueLoss(),
    "gae": GAE(),
    "whiten": Whiten(),
    "group_advantages": GroupAdvantages(),
}
