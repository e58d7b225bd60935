"""Other ways to the same results, in the form in which the suites call ours.

A peer is made when it is asked for, and says why where it cannot be: a package that is not installed, a device that it
does not run on. Each is called as its own documentation has it; what a user would have to do around it (leave out
tokens without loss, say) is done here, inside what is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.harness import operations
from benchmarks.harness.operations import IGNORED, Function, Outputs
from sppo_kernels import reference

Maker = Callable[[torch.device], Function]


class Unavailable(Exception):
    """Why a peer cannot run here."""


def _needs_gpu(device: torch.device) -> None:
    if device.type == "cpu":
        raise Unavailable("needs a GPU")


# PyTorch's own


def _plain(function: Function) -> Maker:
    return lambda device: function


def _compiled(function: Function) -> Maker:
    def make(device: torch.device) -> Function:
        torch.compiler.reset()  # nothing compiled for another size decides how this one is
        return torch.compile(function, dynamic=False)

    return make


def eager_nll(hidden: Tensor, weight: Tensor, labels: Tensor) -> Outputs:
    """As in supervised fine-tuning: logits raised to float32."""
    return {"loss": functional.cross_entropy(functional.linear(hidden, weight).float(), labels, ignore_index=IGNORED)}


def eager_policy(hidden: Tensor, weight: Tensor, labels: Tensor, **other: Tensor) -> Outputs:
    """Logits, log-softmax, and the definition of the loss."""
    logprobs = operations.eager_linear_logprobs(hidden, weight, labels)["logprobs"]
    return operations.token_ppo(reference.policy_loss, logprobs=logprobs, labels=labels, **other)


def _torch_chunked(reduction: str) -> Maker:
    def call(hidden: Tensor, weight: Tensor, labels: Tensor) -> Outputs:
        loss = functional.linear_cross_entropy(
            hidden,
            weight,
            labels,
            reduction=reduction,
            ignore_index=IGNORED,
            options=torch.nn.LinearCrossEntropyOptions(),
        )
        return {"loss": loss} if reduction == "mean" else {"logprobs": -loss}

    def make(device: torch.device) -> Function:
        if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            raise Unavailable(f"torch {torch.__version__} does not have it")
        return call

    return make


# TRL's


def _trl_chunked(finish: Function) -> Maker:
    """As its trainers call it: with the vocabulary in tiles of 32,768, on the tokens that bear loss alone."""

    def make(device: torch.device) -> Function:
        from trl.kernels import ChunkedLogProbFunction

        def call(hidden: Tensor, weight: Tensor, labels: Tensor, **other: Tensor) -> Outputs:
            keep = labels != IGNORED
            settings = (1.0, 32_768, None, 1.0, ("entropy",))  # temperature, tile, softcap, scale, what to give
            found = ChunkedLogProbFunction.apply(hidden[keep], weight, None, labels[keep], *settings)
            logprobs, entropy = (x.new_zeros(keep.shape).masked_scatter(keep, x) for x in found[:2])
            return finish(logprobs=logprobs, entropy=entropy, labels=labels, **other)

        return call

    return make


def _trl_selective(device: torch.device) -> Function:
    _needs_gpu(device)
    from trl.kernels import selective_log_softmax_and_entropy

    def call(logits: Tensor, labels: Tensor) -> Outputs:
        keep = labels != IGNORED
        logprobs, entropy = selective_log_softmax_and_entropy(logits, labels.clamp(min=0), row_mask=keep)
        return {"logprobs": logprobs.float() * keep, "entropy": entropy.float() * keep}

    return call


# Liger's


def _liger_cross_entropy(reduction: str) -> Maker:
    """Its weight gradient added up in float32, as ours."""

    def make(device: torch.device) -> Function:
        _needs_gpu(device)
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        def call(hidden: Tensor, weight: Tensor, labels: Tensor) -> Outputs:
            settings = {"ignore_index": IGNORED, "reduction": reduction, "accum_dtype": torch.float32}
            loss = liger_fused_linear_cross_entropy(hidden, weight, labels, **settings)
            return {"loss": loss} if reduction == "mean" else {"logprobs": -loss}

        return call

    return make


def _liger_grpo(device: torch.device) -> Function:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=0.0, compiled=device.type != "cpu", use_ref_model=False, loss_type="bnpo")

    def call(hidden: Tensor, weight: Tensor, labels: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Outputs:
        rows = lambda x: x.view(len(advantages), -1, *x.shape[1:])
        keep = labels != IGNORED
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


# Apple's


def _cut_cross_entropy(reduction: str) -> Maker:
    def make(device: torch.device) -> Function:
        _needs_gpu(device)
        from cut_cross_entropy import linear_cross_entropy

        def call(hidden: Tensor, weight: Tensor, labels: Tensor) -> Outputs:
            loss = linear_cross_entropy(hidden, weight, labels, ignore_index=IGNORED, reduction=reduction)
            return {"loss": loss} if reduction == "mean" else {"logprobs": -loss}

        return call

    return make


def _of_pytorch(function: Function) -> dict[str, Maker]:
    return {"eager PyTorch": _plain(function), "torch.compile": _compiled(function)}


def _definition(name: str, *outputs: str, **settings: object) -> Function:
    return operations.named(getattr(reference, name), *outputs, **settings)


PEERS: dict[str, dict[str, Maker]] = {
    "linear_logprobs": {
        **_of_pytorch(operations.eager_linear_logprobs),
        "torch linear_cross_entropy": _torch_chunked("none"),
        "TRL ChunkedLogProbFunction": _trl_chunked(operations.values),
        "Liger FLCE": _liger_cross_entropy("none"),
        "cut-cross-entropy": _cut_cross_entropy("none"),
    },
    "linear_logprobs, mean NLL": {
        **_of_pytorch(eager_nll),
        "torch linear_cross_entropy": _torch_chunked("mean"),
        "Liger FLCE": _liger_cross_entropy("mean"),
        "cut-cross-entropy": _cut_cross_entropy("mean"),
    },
    "linear_logprobs + policy_loss": {
        **_of_pytorch(eager_policy),
        "TRL ChunkedLogProbFunction": _trl_chunked(partial(operations.token_ppo, reference.policy_loss)),
        "Liger fused linear GRPO": _liger_grpo,
    },
    "selective_logprobs": {
        **_of_pytorch(operations.eager_selective_logprobs),
        "TRL selective_log_softmax_and_entropy": _trl_selective,
    },
    "policy_loss, token": _of_pytorch(_definition("policy_loss")),
    "policy_loss, sequence_mean": _of_pytorch(_definition("policy_loss", ratio_level="sequence_mean")),
    "prompt_value_loss": _of_pytorch(_definition("prompt_value_loss")),
    # gae's definition is a loop over tokens, which torch.compile would unroll.
    "gae": {"eager PyTorch": _plain(_definition("gae", "advantages", "returns", gamma=0.99, lam=0.95))},
    "whiten": _of_pytorch(_definition("whiten", "x")),
    "group_advantages": _of_pytorch(_definition("group_advantages", "advantages")),
}
