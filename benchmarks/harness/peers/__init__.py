"""Other libraries' implementations of the measured operations, with the interface of this library's.

A peer is built when it is needed. Where it cannot be, it raises why: a package that is not installed, or a device that
it does not support. A size that it does not support makes its call raise. Each is called as its own documentation
describes. What a user has to add, such as leaving out tokens without a loss, is part of the call and therefore timed.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from benchmarks.harness.operations import OPERATIONS, eager
from benchmarks.harness.operations.linear import LinearLogprobs, LinearPolicyLoss
from benchmarks.harness.peers import cut_cross_entropy, liger, pytorch, quack, trl, verl
from benchmarks.harness.peers.base import PeerFactory, Unavailable, explain, on_any_device
from benchmarks.harness.problem import Outputs
from sppo_kernels import reference

__all__ = ["PEERS", "PeerFactory", "Unavailable", "explain", "on_any_device"]

_logprobs_and_entropy = partial(LinearLogprobs().finish, reference)
_policy_loss = partial(LinearPolicyLoss().finish, reference)


def _only_logprobs(logprobs: Tensor, **_: Tensor) -> Outputs:
    return {"logprobs": logprobs}


PEERS: dict[str, dict[str, PeerFactory]] = {
    "linear_logprobs": {
        **pytorch.eager_and_compiled(eager.linear_logprobs),
        "torch linear_cross_entropy": pytorch.linear_cross_entropy("none"),
        "TRL ChunkedLogProbFunction": trl.chunked_logprobs(_logprobs_and_entropy),
        "Liger FLCE": liger.cross_entropy("none"),
        "Liger scaled CE (PyTorch)": liger.scaled_cross_entropy_in_pytorch(_only_logprobs),
        "Liger scaled CE (CuTe)": liger.scaled_cross_entropy_in_cute(_only_logprobs),
        "verl linear_cross_entropy": verl.linear_cross_entropy(_logprobs_and_entropy),
        "cut-cross-entropy": cut_cross_entropy.linear_cross_entropy("none"),
    },
    "linear_logprobs, mean NLL": {
        **pytorch.eager_and_compiled(pytorch.mean_nll),
        "torch linear_cross_entropy": pytorch.linear_cross_entropy("mean"),
        "Liger FLCE": liger.cross_entropy("mean"),
        "quack linear_cross_entropy": quack.mean_nll,
        "cut-cross-entropy": cut_cross_entropy.linear_cross_entropy("mean"),
    },
    "linear_logprobs + policy_loss": {
        **pytorch.eager_and_compiled(pytorch.policy_loss),
        "TRL ChunkedLogProbFunction": trl.chunked_logprobs(_policy_loss),
        "Liger fused linear GRPO": liger.grpo,
        "Liger scaled CE (PyTorch)": liger.scaled_cross_entropy_in_pytorch(_policy_loss),
        "Liger scaled CE (CuTe)": liger.scaled_cross_entropy_in_cute(_policy_loss),
        "verl linear_cross_entropy": verl.linear_cross_entropy(_policy_loss),
    },
    "linear_logprobs, projection": pytorch.eager_and_compiled(eager.linear_logprobs),
    "linear_logprobs, support": pytorch.eager_and_compiled(eager.masked_logprobs),
    "selective_logprobs": {
        **pytorch.eager_and_compiled(eager.selective_logprobs),
        "TRL selective_log_softmax_and_entropy": trl.selective_logprobs,
    },
    **{
        name: pytorch.eager_and_compiled(OPERATIONS[name].eager)
        for name in (
            "policy_loss, token",
            "policy_loss, sequence_mean",
            "prompt_value_loss",
            "whiten",
            "group_advantages",
        )
    },
    # The reference of gae is a loop over tokens, which torch.compile would unroll.
    "gae": {"eager PyTorch": on_any_device(OPERATIONS["gae"].eager)},
}
