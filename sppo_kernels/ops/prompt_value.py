"""prompt_value_logits, prompt_value_loss: a critic's head on the last prompt token, in one launch.

    logit_b = hidden[last_index_b] . weight + bias
    value   = sigmoid(logit) = P(success | prompt)            advantage = outcome - value
    loss    = sum_b (max(logit, 0) - logit * outcome + log(1 + exp(-|logit|))) / normalizer
    d loss / d logit_b = (value - outcome) / normalizer

SPPO (arXiv 2604.08865) predicts the success of a prompt from the prompt alone, so of [tokens, H] hidden states only B
rows are read: gather, dot, sigmoid, cross-entropy and advantage are one kernel. Backward writes the gradient of
``hidden`` (zeros but for those rows) and sums that of ``weight`` over the batch in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .._backend import NAMESPACE, matmul, pick_backend
from .._validation import (
    as_normalizer,
    check_device,
    check_floating,
    check_integer,
    check_normalizer_value,
    check_shape,
    check_tensor,
    reject,
    values_are_checked,
)

try:
    import triton
    import triton.language as tl

    from .._triton_utils import is_last_program, launch
except ImportError:
    triton = None


class PromptValueOutput(NamedTuple):
    """All float32: ``loss`` [] and ``logits`` [B], differentiable; ``values`` [B] and ``advantages`` [B], detached."""

    loss: Tensor
    logits: Tensor
    values: Tensor
    advantages: Tensor


def prompt_value_logits(
    hidden: Tensor, weight: Tensor, last_index: Tensor, *, bias: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """The critic's logit of success for each prompt.

    Args:
        hidden: ``[N, H]`` packed, or ``[B, T, H]``; float16, bfloat16 or float32, any strides.
        weight: ``[H]`` or ``[1, H]``.
        last_index: ``[B]`` integers, the last prompt token of each row: in ``[0, N)`` packed, in ``[0, T)`` otherwise.
        bias: one element, ``[]`` or ``[1]``; or None.
        backend: ``"reference"``, ``"torch"``, ``"triton"``, or None for triton on an accelerator and torch elsewhere.

    Returns:
        ``[B]`` float32, differentiable in ``hidden``, ``weight`` and ``bias``.

    Raises:
        ValueError: a wrong shape or device; an index out of range (looked at on a CPU, and elsewhere under
            ``SPPO_KERNELS_CHECK=1``; without it the logit is NaN).
        TypeError: a tensor of the wrong kind.
    """
    _check(hidden, weight, last_index, bias)
    backend = pick_backend(backend, hidden)
    last_index = last_index.long()
    if backend == "reference":
        return _reference_logits(hidden, weight, last_index, bias)
    return _prompt_value_logits(*_rows_and_head(hidden, weight, bias), last_index, backend)


def prompt_value_loss(
    hidden: Tensor,
    weight: Tensor,
    last_index: Tensor,
    outcomes: Tensor,
    *,
    bias: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    backend: str | None = None,
) -> PromptValueOutput:
    """Binary cross-entropy of the critic against verified outcomes, with values and advantages.

    Source: SPPO (arXiv 2604.08865), the critic as P(success | prompt), advantage R - V.

    Args:
        hidden, weight, last_index, bias, backend: as in :func:`prompt_value_logits`.
        outcomes: ``[B]``, the reward of each prompt's response, in ``[0, 1]``.
        normalizer: replaces the batch size in the mean (the number of prompts of the whole update); greater than 0.

    Returns:
        ``PromptValueOutput(loss, logits, values, advantages)``; without prompts the loss is 0.

    Raises:
        ValueError, TypeError: as in :func:`prompt_value_logits`; and outcomes outside ``[0, 1]`` (looked at likewise).
    """
    _check(hidden, weight, last_index, bias)
    check_tensor(outcomes=outcomes)
    check_shape(last_index.shape, "one a prompt", outcomes=outcomes)
    check_device(hidden.device, outcomes=outcomes)
    divisor = as_normalizer(max(last_index.shape[0], 1) if normalizer is None else normalizer, hidden.device)
    backend = pick_backend(backend, hidden)
    if backend == "reference":
        _check_outcomes(outcomes)
        check_normalizer_value(divisor)
        logits = _reference_logits(hidden, weight, last_index, bias)
        outcomes = outcomes.detach().to(logits.dtype)
        each = torch.nn.functional.binary_cross_entropy_with_logits(logits, outcomes, reduction="none")
        values = logits.detach().sigmoid()
        return PromptValueOutput(each.sum() / divisor.to(logits.dtype), logits, values, outcomes - values)
    loss, logits, values, advantages = _prompt_value_loss(
        *_rows_and_head(hidden, weight, bias), last_index, outcomes, divisor, backend
    )
    return PromptValueOutput(loss, logits, values.detach(), advantages.detach())


def reference_logits(hidden: Tensor, weight: Tensor, last_index: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """The definition of :func:`prompt_value_logits`: plain differentiable PyTorch, float32 or float64."""
    return prompt_value_logits(hidden, weight, last_index, bias=bias, backend="reference")


def reference_loss(
    hidden: Tensor,
    weight: Tensor,
    last_index: Tensor,
    outcomes: Tensor,
    *,
    bias: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> PromptValueOutput:
    """The definition of :func:`prompt_value_loss`: plain differentiable PyTorch, float32 or float64."""
    return prompt_value_loss(
        hidden, weight, last_index, outcomes, bias=bias, normalizer=normalizer, backend="reference"
    )


def _reference_logits(hidden: Tensor, weight: Tensor, last_index: Tensor, bias: Tensor | None) -> Tensor:
    _check_last_index(last_index, hidden.shape[-2])
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    rows = hidden[last_index] if hidden.ndim == 2 else hidden[torch.arange(len(hidden)), last_index]
    logits = matmul(rows.to(dtype), weight.reshape(-1).to(dtype))
    return logits if bias is None else logits + bias.reshape(()).to(dtype)


def _check(hidden: Tensor, weight: Tensor, last_index: Tensor, bias: Tensor | None) -> None:
    check_floating(hidden=hidden, weight=weight, bias=bias)
    check_integer(last_index=last_index)
    if hidden.ndim not in (2, 3) or hidden.shape[-1] == 0:
        reject("hidden", f"shape {tuple(hidden.shape)}", "[N, H] or [B, T, H] with at least one column")
    width = hidden.shape[-1]
    if tuple(weight.shape) not in ((width,), (1, width)):
        reject("weight", f"shape {tuple(weight.shape)}", f"of shape ({width},) or (1, {width})")
    if last_index.ndim != 1 or (hidden.ndim == 3 and last_index.shape[0] != hidden.shape[0]):
        reject("last_index", f"shape {tuple(last_index.shape)}", "of shape [B], one a prompt")
    if bias is not None and bias.numel() != 1:
        reject("bias", f"shape {tuple(bias.shape)}", "a single element")
    check_device(hidden.device, weight=weight, last_index=last_index, bias=bias)


def _check_last_index(last_index: Tensor, length: int) -> None:
    """Reads the values."""
    if last_index.numel() and values_are_checked(last_index):
        bad = (last_index < 0) | (last_index >= length)
        if bad.any():
            reject("last_index", int(last_index[bad][0]), f"in [0, {length})")


def _check_outcomes(outcomes: Tensor) -> None:
    """Reads the values."""
    if outcomes.numel() and values_are_checked(outcomes):
        bad = ~((outcomes >= 0) & (outcomes <= 1))
        if bad.any():
            reject(
                "outcomes", float(outcomes[bad][0]), "in [0, 1]: scale the rewards, the critic predicts a probability"
            )


def _rows_and_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """hidden as [B, T, H], or [1, N, H] where packed (every prompt lies in the one row); weight [H]; bias [1]."""
    rows = hidden if hidden.ndim == 3 else hidden.unsqueeze(0)
    return rows, weight.reshape(-1), None if bias is None else bias.reshape(1)


# The registered operations


@torch.library.custom_op(f"{NAMESPACE}::prompt_value_logits", mutates_args=())
def _prompt_value_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, last_index: Tensor, backend: str
) -> Tensor:
    """hidden [B or 1, T, H], weight [H], bias [1], last_index [B] -> logits [B]."""
    _check_last_index(last_index, hidden.shape[1])
    return _BACKENDS[backend].logits(hidden, weight, bias, last_index)


@_prompt_value_logits.register_fake
def _(hidden, weight, bias, last_index, backend):
    return hidden.new_empty(last_index.shape[0], dtype=torch.float32)


@torch.library.custom_op(f"{NAMESPACE}::prompt_value_loss", mutates_args=())
def _prompt_value_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    last_index: Tensor,
    outcomes: Tensor,
    normalizer: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As above, with outcomes [B] and normalizer [] -> loss [], logits, values, advantages [B]."""
    _check_last_index(last_index, hidden.shape[1])
    _check_outcomes(outcomes)
    check_normalizer_value(normalizer)
    return _BACKENDS[backend].loss(hidden, weight, bias, last_index, outcomes, normalizer)


@_prompt_value_loss.register_fake
def _(hidden, weight, bias, last_index, outcomes, normalizer, backend):
    new = lambda: hidden.new_empty(last_index.shape[0], dtype=torch.float32)
    return hidden.new_empty((), dtype=torch.float32), new(), new(), new()


@torch.library.custom_op(f"{NAMESPACE}::prompt_value_grad_hidden", mutates_args=())
def _grad_hidden(grad_logits: Tensor, hidden: Tensor, weight: Tensor, last_index: Tensor, backend: str) -> Tensor:
    return _BACKENDS[backend].grad_hidden(grad_logits, hidden, weight, last_index)


@_grad_hidden.register_fake
def _(grad_logits, hidden, weight, last_index, backend):
    return torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)


@torch.library.custom_op(f"{NAMESPACE}::prompt_value_grad_weight", mutates_args=())
def _grad_weight(grad_logits: Tensor, hidden: Tensor, weight: Tensor, last_index: Tensor, backend: str) -> Tensor:
    return _BACKENDS[backend].grad_weight(grad_logits, hidden, weight, last_index)


@_grad_weight.register_fake
def _(grad_logits, hidden, weight, last_index, backend):
    return torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)


def _gradients(ctx, grad_logits: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias from that of the logits; nothing is done for a frozen one."""
    hidden, weight, last_index = ctx.saved_tensors[:3]
    inputs = (grad_logits, hidden, weight, last_index, ctx.backend)
    return (
        _grad_hidden(*inputs) if ctx.needs_input_grad[0] else None,
        _grad_weight(*inputs) if ctx.needs_input_grad[1] else None,
        grad_logits.sum().to(ctx.bias_dtype).reshape(1) if ctx.needs_input_grad[2] else None,
    )


def _save_logits(ctx, inputs, output):
    hidden, weight, bias, last_index, ctx.backend = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(hidden, weight, last_index)


def _grad_of_logits(ctx, grad_logits):
    return *_gradients(ctx, grad_logits), None, None


def _save_loss(ctx, inputs, output):
    hidden, weight, bias, last_index, _, normalizer, ctx.backend = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(hidden, weight, last_index, output[3], normalizer)


def _grad_of_loss(ctx, grad_loss, grad_logits, *_):
    advantages, normalizer = ctx.saved_tensors[3:]
    return *_gradients(ctx, grad_logits - advantages * (grad_loss / normalizer)), None, None, None, None


_prompt_value_logits.register_autograd(_grad_of_logits, setup_context=_save_logits)
_prompt_value_loss.register_autograd(_grad_of_loss, setup_context=_save_loss)


class _Backend(NamedTuple):
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
    return loss.float().reshape(()), logits, values, outcomes - values


def _torch_grad_hidden(grad_logits, hidden, weight, last_index):
    batch, length, width = hidden.shape
    row = last_index if batch == 1 else last_index + length * torch.arange(batch, device=hidden.device)
    dh = torch.zeros(batch * length, width, dtype=torch.float32, device=hidden.device)
    dh.index_add_(0, row, grad_logits[:, None] * weight.float())
    return dh.view(hidden.shape).to(hidden.dtype)


def _torch_grad_weight(grad_logits, hidden, weight, last_index):
    return matmul(grad_logits.float(), _torch_rows(hidden, last_index)).to(weight.dtype)


_BACKENDS = {"torch": _Backend(_torch_logits, _torch_loss, _torch_grad_hidden, _torch_grad_weight)}


# Triton backend

if triton is not None:

    @triton.jit
    def _log1p(x):
        """log(1 + x) for x >= 0: where 1 + x would round x away, the series."""
        series = x * (1.0 - x * (1.0 / 2.0 - x * (1.0 / 3.0 - x * (1.0 / 4.0 - x * (1.0 / 5.0)))))
        return tl.where(x < 0.05, series, tl.log(1.0 + x))

    # One program a prompt. Without outcomes it ends at the logit; with them the last program adds up the losses.
    @triton.jit(do_not_specialize=["B", "T"])
    def _forward_kernel(
        hidden_ptr,
        weight_ptr,
        bias_ptr,
        index_ptr,
        outcome_ptr,
        normalizer_ptr,
        logit_ptr,
        value_ptr,
        advantage_ptr,
        loss_of_prompt_ptr,
        loss_ptr,
        counter_ptr,
        prompt_stride,
        row_stride,
        col_stride,
        B,
        T,
        H,
        BLOCK: tl.constexpr,
    ):
        prompt = tl.program_id(0).to(tl.int64)
        index = tl.load(index_ptr + prompt).to(tl.int64)
        inside = (index >= 0) & (index < T)
        hidden_ptr += prompt * prompt_stride + tl.where(inside, index, 0) * row_stride
        products = tl.zeros([BLOCK], tl.float32)
        for start in range(0, H, BLOCK):
            col = start + tl.arange(0, BLOCK)
            h = tl.load(hidden_ptr + col.to(tl.int64) * col_stride, mask=col < H, other=0.0).to(tl.float32)
            products += h * tl.load(weight_ptr + col, mask=col < H, other=0.0).to(tl.float32)
        logit = tl.sum(products, 0)
        if bias_ptr is not None:
            logit += tl.load(bias_ptr).to(tl.float32)
        logit = tl.where(inside, logit, float("nan"))
        tl.store(logit_ptr + prompt, logit)
        if outcome_ptr is not None:
            outcome = tl.load(outcome_ptr + prompt).to(tl.float32)
            e = tl.exp(-tl.abs(logit))
            value = tl.where(logit >= 0.0, 1.0, e) / (1.0 + e)
            tl.store(value_ptr + prompt, value)
            tl.store(advantage_ptr + prompt, outcome - value)
            tl.store(loss_of_prompt_ptr + prompt, tl.maximum(logit, 0.0) - logit * outcome + _log1p(e))
            if is_last_program(counter_ptr, B):
                total = tl.zeros([BLOCK], tl.float32)
                for start in range(0, B, BLOCK):
                    i = start + tl.arange(0, BLOCK)
                    total += tl.load(loss_of_prompt_ptr + i, mask=i < B, other=0.0)
                tl.store(loss_ptr, tl.sum(total, 0) / tl.load(normalizer_ptr).to(tl.float32))

    # One program a prompt and block of columns. Prompts that share a row all write the same sum: nobody adds to memory.
    @triton.jit(do_not_specialize=["rows_a_prompt", "B", "T"])
    def _grad_hidden_kernel(
        grad_ptr,
        weight_ptr,
        index_ptr,
        dh_ptr,
        rows_a_prompt,
        B,
        T,
        H,
        BLOCK_B: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        prompt = tl.program_id(0).to(tl.int64)
        index = tl.load(index_ptr + prompt).to(tl.int64)
        row = prompt * rows_a_prompt + index
        col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        grads = tl.zeros([BLOCK_B], tl.float32)
        for start in range(0, B, BLOCK_B):
            i = start + tl.arange(0, BLOCK_B)
            other = i.to(tl.int64) * rows_a_prompt + tl.load(index_ptr + i, mask=i < B, other=-1).to(tl.int64)
            same = (i < B) & (other == row)
            grads += tl.load(grad_ptr + i, mask=same, other=0.0)
        weight = tl.load(weight_ptr + col, mask=col < H, other=0.0).to(tl.float32)
        width = tl.where((index >= 0) & (index < T), H, 0)  # a row that is not there is not written
        tl.store(dh_ptr + row * H + col, tl.sum(grads, 0) * weight, mask=col < width)

    # One program a block of columns: the batch goes by in a fixed order.
    @triton.jit(do_not_specialize=["B", "T"])
    def _grad_weight_kernel(
        grad_ptr,
        hidden_ptr,
        index_ptr,
        dw_ptr,
        prompt_stride,
        row_stride,
        col_stride,
        B,
        T,
        H,
        BLOCK_B: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        dw = tl.zeros([BLOCK_B, BLOCK], tl.float32)
        for start in range(0, B, BLOCK_B):
            i = start + tl.arange(0, BLOCK_B)
            index = tl.load(index_ptr + i, mask=i < B, other=0).to(tl.int64)
            rows = hidden_ptr + i.to(tl.int64) * prompt_stride + index * row_stride
            mask = ((i < B) & (index >= 0) & (index < T))[:, None] & (col < H)[None, :]
            h = tl.load(rows[:, None] + col.to(tl.int64)[None, :] * col_stride, mask=mask, other=0.0).to(tl.float32)
            dw += tl.load(grad_ptr + i, mask=i < B, other=0.0)[:, None] * h
        tl.store(dw_ptr + col, tl.sum(dw, 0), mask=col < H)

    def _strides(hidden: Tensor) -> tuple[int, int, int]:
        """From prompt to prompt, row to row, column to column; packed prompts share one row of tokens."""
        batch, row, col = hidden.stride()
        return (batch if hidden.shape[0] > 1 else 0), row, col

    def _launch_forward(hidden, weight, bias, last_index, outcomes, normalizer, values, advantages, loss):
        prompts, width = last_index.shape[0], hidden.shape[2]
        logits = torch.empty(prompts, dtype=torch.float32, device=hidden.device)
        if prompts:
            launch(
                _forward_kernel,
                (prompts,),
                hidden,
                weight.contiguous(),
                bias,
                last_index.contiguous(),
                outcomes,
                normalizer,
                logits,
                values,
                advantages,
                None if loss is None else torch.empty_like(logits),
                loss,
                None if loss is None else torch.zeros((), dtype=torch.int32, device=hidden.device),
                *_strides(hidden),
                prompts,
                hidden.shape[1],
                width,
                BLOCK=min(1024, triton.next_power_of_2(width)),
                num_warps=4,
            )
        return logits

    def _triton_logits(hidden, weight, bias, last_index):
        return _launch_forward(hidden, weight, bias, last_index, None, None, None, None, None)

    def _triton_loss(hidden, weight, bias, last_index, outcomes, normalizer):
        values, advantages = (torch.empty_like(last_index, dtype=torch.float32) for _ in range(2))
        loss = torch.empty((), dtype=torch.float32, device=hidden.device)
        if not last_index.shape[0]:
            loss.zero_()
        logits = _launch_forward(
            hidden, weight, bias, last_index, outcomes.contiguous(), normalizer, values, advantages, loss
        )
        return loss, logits, values, advantages

    def _triton_grad_hidden(grad_logits, hidden, weight, last_index):
        dh = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        prompts, width = last_index.shape[0], hidden.shape[2]
        if prompts:
            block = min(1024, triton.next_power_of_2(width))
            launch(
                _grad_hidden_kernel,
                (prompts, triton.cdiv(width, block)),
                grad_logits.contiguous(),
                weight.contiguous(),
                last_index.contiguous(),
                dh,
                hidden.shape[1] if hidden.shape[0] > 1 else 0,
                prompts,
                hidden.shape[1],
                width,
                BLOCK_B=256,
                BLOCK=block,
                num_warps=4,
            )
        return dh

    def _triton_grad_weight(grad_logits, hidden, weight, last_index):
        dw = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        block = 64
        launch(
            _grad_weight_kernel,
            (triton.cdiv(hidden.shape[2], block),),
            grad_logits.contiguous(),
            hidden,
            last_index.contiguous(),
            dw,
            *_strides(hidden),
            last_index.shape[0],
            hidden.shape[1],
            hidden.shape[2],
            BLOCK_B=16,
            BLOCK=block,
            num_warps=4,
        )
        return dw

    _BACKENDS["triton"] = _Backend(_triton_logits, _triton_loss, _triton_grad_hidden, _triton_grad_weight)
