"""Other libraries' implementations of the measured operations, with the interface of this library's.

A peer is built when it is needed. Where it cannot be, it raises why: a package that is not installed, or a device that
it does not support. Each is called as its own documentation describes. What a user has to add, such as leaving out
tokens without a loss, is part of the call and therefore timed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.harness.operations import OPERATIONS, eager
from benchmarks.harness.operations.linear import LinearLogprobs, LinearPolicyLoss
from benchmarks.harness.problem import IGNORE_INDEX, Implementation, Outputs
from sppo_kernels import reference

PeerFactory = Callable[[torch.device], Implementation]


class Unavailable(Exception):
    """Raised by a factory whose peer cannot run here; the message is the reason."""


def explain(error: Exception) -> str:
    """Return in one line why something was not measured."""
    if isinstance(error, Unavailable):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _needs_gpu(device: torch.device) -> None:
    if device.type == "cpu":
        raise Unavailable("needs a GPU")


def on_any_device(implementation: Implementation) -> PeerFactory:
    """Return a factory of an implementation that is the same on every device."""
    return lambda device: implementation


# PyTorch


def _compiled(implementation: Implementation) -> PeerFactory:
    def build(device: torch.device) -> Implementation:
        torch.compiler.reset()  # what was compiled for another size must not decide how this one is
        return torch.compile(implementation, dynamic=False)

    return build


def _nll(hidden: Tensor, weight: Tensor, labels: Tensor) -> Outputs:
    """Compute the mean NLL as in supervised fine-tuning: logits raised to float32."""
    logits = functional.linear(hidden, weight).float()
    return {"loss": functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX)}


def _policy_loss(hidden: Tensor, weight: Tensor, labels: Tensor, **other: Tensor) -> Outputs:
    out = eager.linear_logprobs(hidden, weight, labels)
    return LinearPolicyLoss().finish(reference, **out, labels=labels, **other)


def _torch_chunked(reduction: str) -> PeerFactory:
    def call(hidden: Tensor, weight: Tensor, labels: Tensor) -> Outputs:
        loss = functional.linear_cross_entropy(
            hidden,
            weight,
            labels,
            reduction=reduction,
            ignore_index=IGNORE_INDEX,
            options=torch.nn.LinearCrossEntropyOptions(),
        )
        return {"loss": loss} if reduction == "mean" else {"logprobs": -loss}

    def build(device: torch.device) -> Implementation:
        if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            raise Unavailable(f"torch {torch.__version__} does not have it")
        return call

    return build


# TRL


def _trl_chunked(finish: Implementation) -> PeerFactory:
    """Call it as TRL's trainers do: only on tokens with a loss, the vocabulary in tiles of 32,768."""

    def build(device: torch.device) -> Implementation:
        from trl.kernels import ChunkedLogProbFunction

        def call(hidden: Tensor, weight: Tensor, labels: Tensor, **other: Tensor) -> Outputs:
            keep = labels != IGNORE_INDEX
            settings = (1.0, 32_768, None, 1.0, ("entropy",))  # temperature, tile, softcap, scale, what to give
            found = ChunkedLogProbFunction.apply(hidden[keep], weight, None, labels[keep], *settings)
            logprobs, entropy = (x.new_zeros(keep.shape).masked_scatter(keep, x) for x in found[:2])
            return finish(logprobs=logprobs, entropy=entropy, labels=labels, **other)

        return call

    return build


def _trl_selective(device: torch.device) -> Implementation:
    _needs_gpu(device)
    from trl.kernels import selective_log_softmax_and_entropy

    def call(logits: Tensor, labels: Tensor) -> Outputs:
        keep = labels != IGNORE_INDEX
        logprobs, entropy = selective_log_softmax_and_entropy(logits, labels.clamp(min=0), row_mask=keep)
        return {"logprobs": logprobs.float() * keep, "entropy": entropy.float() * keep}

    return call


# Liger


def _liger_cross_entropy(reduction: str) -> PeerFactory:
    """Call it with the weight gradient accumulated in float32, as in this library."""

    def build(device: torch.device) -> Implementation:
        _needs_gpu(device)
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        def call(hidden: Tensor, weight: Tensor, labels: Tensor) -> Outputs:
            settings = {"ignore_index": IGNORE_INDEX, "reduction": reduction, "accum_dtype": torch.float32}
            loss = liger_fused_linear_cross_entropy(hidden, weight, labels, **settings)
            return {"loss": loss} if reduction == "mean" else {"logprobs": -loss}

        return call

    return build


def _liger_grpo(device: torch.device) -> Implementation:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=0.0, compiled=device.type != "cpu", use_ref_model=False, loss_type="bnpo")

    def call(hidden: Tensor, weight: Tensor, labels: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Outputs:
        rows = lambda x: x.view(len(advantages), -1, *x.shape[1:])
        keep = labels != IGNORE_INDEX
        value, _ = loss(
            rows(hidden),
            weight,
            rows(labels.clamp(min=0)),
            rows(keep),
            advantages,
            old_per_token_logps=rows(old_logprobs),
        )
        return {"loss": value}

    return call


# Apple


def _cut_cross_entropy(reduction: str) -> PeerFactory:
    def build(device: torch.device) -> Implementation:
        _needs_gpu(device)
        from cut_cross_entropy import linear_cross_entropy

        def call(hidden: Tensor, weight: Tensor, labels: Tensor) -> Outputs:
            loss = linear_cross_entropy(hidden, weight, labels, ignore_index=IGNORE_INDEX, reduction=reduction)
            return {"loss": loss} if reduction == "mean" else {"logprobs": -loss}

        return call

    return build


def _pytorch(implementation: Implementation) -> dict[str, PeerFactory]:
    return {"eager PyTorch": on_any_device(implementation), "torch.compile": _compiled(implementation)}


PEERS: dict[str, dict[str, PeerFactory]] = {
    "linear_logprobs": {
        **_pytorch(eager.linear_logprobs),
        "torch linear_cross_entropy": _torch_chunked("none"),
        "TRL ChunkedLogProbFunction": _trl_chunked(partial(LinearLogprobs().finish, reference)),
        "Liger FLCE": _liger_cross_entropy("none"),
        "cut-cross-entropy": _cut_cross_entropy("none"),
    },
    "linear_logprobs, mean NLL": {
        **_pytorch(_nll),
        "torch linear_cross_entropy": _torch_chunked("mean"),
        "Liger FLCE": _liger_cross_entropy("mean"),
        "cut-cross-entropy": _cut_cross_entropy("mean"),
    },
    "linear_logprobs + policy_loss": {
        **_pytorch(_policy_loss),
        "TRL ChunkedLogProbFunction": _trl_chunked(partial(LinearPolicyLoss().finish, reference)),
        "Liger fused linear GRPO": _liger_grpo,
    },
    "linear_logprobs, support": _pytorch(eager.masked_logprobs),
    "selective_logprobs": {
        **_pytorch(eager.selective_logprobs),
        "TRL selective_log_softmax_and_entropy": _trl_selective,
    },
    **{
        name: _pytorch(OPERATIONS[name].eager)
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
