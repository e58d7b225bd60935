"""Registered operations of prompt_value: schemas, fake implementations, gradients and the PyTorch backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..._backend import HAS_TRITON, matmul
from ..._registration import operation
from ..._validation import check_normalizer_value, reject, values_are_checked
from .output import PromptValueOutput


def check_last_index(last_index: Tensor, length: int) -> None:
    """Check that indices are in ``[0, length)``. Reads the values."""
    if last_index.numel() and values_are_checked(last_index):
        bad = (last_index < 0) | (last_index >= length)
        if bad.any():
            reject("last_index", int(last_index[bad][0]), f"in [0, {length})")


def check_outcomes(outcomes: Tensor) -> None:
    """Check that outcomes are in ``[0, 1]``. Reads the values."""
    if outcomes.numel() and values_are_checked(outcomes):
        bad = ~((outcomes >= 0) & (outcomes <= 1))
        if bad.any():
            reject(
                "outcomes", float(outcomes[bad][0]), "in [0, 1]: scale the rewards, the critic predicts a probability"
            )


@operation("prompt_value_logits")
def prompt_value_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, last_index: Tensor, *, backend: str
) -> Tensor:
    """Map hidden [B or 1, T, H], weight [H], bias [1] and last_index [B] to logits [B]."""
    check_last_index(last_index, hidden.shape[1])
    return BACKENDS[backend].logits(hidden, weight, bias, last_index)


@prompt_value_logits.register_fake
def _(hidden, weight, bias, last_index, *, backend):
    return hidden.new_empty(last_index.shape[0], dtype=torch.float32)


@operation("prompt_value_loss")
def prompt_value_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    last_index: Tensor,
    outcomes: Tensor,
    normalizer: Tensor,
    *,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the fields of PromptValueOutput. Tensors as above, with outcomes [B] and normalizer []."""
    check_last_index(last_index, hidden.shape[1])
    check_outcomes(outcomes)
    check_normalizer_value(normalizer)
    return BACKENDS[backend].loss(hidden, weight, bias, last_index, outcomes, normalizer)


@prompt_value_loss.register_fake
def _(hidden, weight, bias, last_index, outcomes, normalizer, *, backend):
    loss = hidden.new_empty((), dtype=torch.float32)
    return loss, *(hidden.new_empty(last_index.shape[0], dtype=torch.float32) for _ in range(3))


@operation("prompt_value_grad_hidden")
def _grad_hidden(grad_logits: Tensor, hidden: Tensor, weight: Tensor, last_index: Tensor, *, backend: str) -> Tensor:
    return BACKENDS[backend].grad_hidden(grad_logits, hidden, weight, last_index)


@_grad_hidden.register_fake
def _(grad_logits, hidden, weight, last_index, *, backend):
    return torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)


@operation("prompt_value_grad_weight")
def _grad_weight(grad_logits: Tensor, hidden: Tensor, weight: Tensor, last_index: Tensor, *, backend: str) -> Tensor:
    return BACKENDS[backend].grad_weight(grad_logits, hidden, weight, last_index)


@_grad_weight.register_fake
def _(grad_logits, hidden, weight, last_index, *, backend):
    return torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)


def _gradients(
    ctx, grad_logits: Tensor, hidden: Tensor, weight: Tensor, last_index: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute the gradients of hidden, weight and bias from that of the logits, skipping frozen ones."""
    inputs = (grad_logits, hidden, weight, last_index)
    return (
        _grad_hidden(*inputs, backend=ctx.backend) if ctx.needs[0] else None,
        _grad_weight(*inputs, backend=ctx.backend) if ctx.needs[1] else None,
        grad_logits.sum().to(ctx.bias_dtype).reshape(1) if ctx.needs[2] else None,
    )


def _save_logits(ctx, inputs, keyword_only_inputs, output):
    hidden, weight, bias, last_index = inputs
    ctx.backend = keyword_only_inputs["backend"]
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(hidden, weight, last_index)


def _grad_of_logits(ctx, grad_logits):
    return *_gradients(ctx, grad_logits, *ctx.saved_tensors), None


def _save_loss(ctx, inputs, keyword_only_inputs, output):
    hidden, weight, bias, last_index, _, normalizer = inputs
    ctx.backend = keyword_only_inputs["backend"]
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(hidden, weight, last_index, PromptValueOutput(*output).advantages, normalizer)


def _grad_of_loss(ctx, grad_loss, grad_logits, *_):
    *inputs, advantages, normalizer = ctx.saved_tensors  # read once: activation checkpointing recomputes them then
    return *_gradients(ctx, grad_logits - advantages * (grad_loss / normalizer), *inputs), None, None, None


prompt_value_logits.register_autograd(_grad_of_logits, setup_context=_save_logits)
prompt_value_loss.register_autograd(_grad_of_loss, setup_context=_save_loss)


class Backend(NamedTuple):
    """Implementation of the four registered operations by one backend."""

    logits: Callable[..., Tensor]
    loss: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    grad_hidden: Callable[..., Tensor]
    grad_weight: Callable[..., Tensor]


# PyTorch backend


def _torch_rows(hidden: Tensor, last_index: Tensor) -> Tensor:
    batch = 0 if hidden.shape[0] == 1 else torch.arange(hidden.shape[0], device=hidden.device)
    return hidden[batch, last_index].float()


def _torch_logits(hidden, weight, bias, last_index):
    logits = matmul(_torch_rows(hidden, last_index), weight.float())
    return logits if bias is None else logits + bias.float()


def _torch_loss(hidden, weight, bias, last_index, outcomes, normalizer):
    logits, outcomes = _torch_logits(hidden, weight, bias, last_index), outcomes.float()
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, outcomes, reduction="sum") / normalizer
    values = logits.sigmoid()
    return PromptValueOutput(loss.float().reshape(()), logits, values, outcomes - values)


def _torch_grad_hidden(grad_logits, hidden, weight, last_index):
    batch, length, width = hidden.shape
    row = last_index if batch == 1 else last_index + length * torch.arange(batch, device=hidden.device)
    dh = torch.zeros(batch * length, width, dtype=torch.float32, device=hidden.device)
    dh.index_add_(0, row, grad_logits[:, None] * weight.float())
    return dh.view(hidden.shape).to(hidden.dtype)


def _torch_grad_weight(grad_logits, hidden, weight, last_index):
    return matmul(grad_logits.float(), _torch_rows(hidden, last_index)).to(weight.dtype)


BACKENDS = {"torch": Backend(_torch_logits, _torch_loss, _torch_grad_hidden, _torch_grad_weight)}

if HAS_TRITON:
    from . import triton as kernels

    BACKENDS["triton"] = Backend(kernels.logits, kernels.loss, kernels.grad_hidden, kernels.grad_weight)
