"""Triton backend of prompt_value."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton_utils import cdiv, is_last_program, launch, next_power_of_2
from .output import PromptValueOutput


@triton.jit
def _log1p(x):
    """Compute log(1 + x) for x >= 0, by the series where 1 + x would round x away."""
    series = x * (1.0 - x * (1.0 / 2.0 - x * (1.0 / 3.0 - x * (1.0 / 4.0 - x * (1.0 / 5.0)))))
    return tl.where(x < 0.05, series, tl.log(1.0 + x))


# One program per prompt. Without outcomes it ends at the logit; with them the last program sums the losses.
@triton.jit(do_not_specialize=["B", "T"])
def prompt_value_fwd_kernel(
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


# One program per prompt and block of columns. Prompts that share a row all write the same sum, so none adds to memory.
@triton.jit(do_not_specialize=["rows_per_prompt", "B", "T"])
def prompt_value_bwd_hidden_kernel(
    grad_ptr,
    weight_ptr,
    index_ptr,
    dh_ptr,
    rows_per_prompt,
    B,
    T,
    H,
    BLOCK_B: tl.constexpr,
    BLOCK: tl.constexpr,
):
    prompt = tl.program_id(0).to(tl.int64)
    index = tl.load(index_ptr + prompt).to(tl.int64)
    row = prompt * rows_per_prompt + index
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    grads = tl.zeros([BLOCK_B], tl.float32)
    for start in range(0, B, BLOCK_B):
        i = start + tl.arange(0, BLOCK_B)
        other = i.to(tl.int64) * rows_per_prompt + tl.load(index_ptr + i, mask=i < B, other=-1).to(tl.int64)
        same = (i < B) & (other == row)
        grads += tl.load(grad_ptr + i, mask=same, other=0.0)
    weight = tl.load(weight_ptr + col, mask=col < H, other=0.0).to(tl.float32)
    width = tl.where((index >= 0) & (index < T), H, 0)  # an index out of range writes nothing
    tl.store(dh_ptr + row * H + col, tl.sum(grads, 0) * weight, mask=col < width)


# One program per block of columns, which sums over the batch in a fixed order.
@triton.jit(do_not_specialize=["B", "T"])
def prompt_value_bwd_weight_kernel(
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


def _strides(hidden: Tensor) -> dict[str, int]:
    """Return the strides by kernel argument; packed prompts share one row of tokens."""
    prompt, row, column = hidden.stride()
    prompt = prompt if hidden.shape[0] > 1 else 0
    return {"prompt_stride": prompt, "row_stride": row, "col_stride": column}


def _launch_forward(
    hidden, weight, bias, last_index, *,
    outcomes=None, normalizer=None, values=None, advantages=None, losses=None, loss=None, counter=None,
):  # fmt: skip
    prompts, width = last_index.shape[0], hidden.shape[2]
    logits = torch.empty(prompts, dtype=torch.float32, device=hidden.device)
    if prompts:
        launch(
            prompt_value_fwd_kernel,
            (prompts,),
            hidden_ptr=hidden,
            weight_ptr=weight.contiguous(),
            bias_ptr=bias,
            index_ptr=last_index.contiguous(),
            outcome_ptr=outcomes,
            normalizer_ptr=normalizer,
            logit_ptr=logits,
            value_ptr=values,
            advantage_ptr=advantages,
            loss_of_prompt_ptr=losses,
            loss_ptr=loss,
            counter_ptr=counter,
            **_strides(hidden),
            B=prompts,
            T=hidden.shape[1],
            H=width,
            BLOCK=min(1024, next_power_of_2(width)),
            num_warps=4,
        )
    return logits


def logits(hidden, weight, bias, last_index):
    return _launch_forward(hidden, weight, bias, last_index)


def loss(hidden, weight, bias, last_index, outcomes, normalizer):
    values, advantages, losses = (torch.empty_like(last_index, dtype=torch.float32) for _ in range(3))
    loss = torch.empty((), dtype=torch.float32, device=hidden.device)
    if not last_index.shape[0]:
        loss.zero_()
    logits = _launch_forward(
        hidden,
        weight,
        bias,
        last_index,
        outcomes=outcomes.contiguous(),
        normalizer=normalizer,
        values=values,
        advantages=advantages,
        losses=losses,
        loss=loss,
        counter=torch.zeros((), dtype=torch.int32, device=hidden.device),
    )
    return PromptValueOutput(loss, logits, values, advantages)


def grad_hidden(grad_logits, hidden, weight, last_index):
    dh = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    prompts, width = last_index.shape[0], hidden.shape[2]
    if prompts:
        block = min(1024, next_power_of_2(width))
        launch(
            prompt_value_bwd_hidden_kernel,
            (prompts, cdiv(width, block)),
            grad_ptr=grad_logits.contiguous(),
            weight_ptr=weight.contiguous(),
            index_ptr=last_index.contiguous(),
            dh_ptr=dh,
            rows_per_prompt=hidden.shape[1] if hidden.shape[0] > 1 else 0,
            B=prompts,
            T=hidden.shape[1],
            H=width,
            BLOCK_B=256,
            BLOCK=block,
            num_warps=4,
        )
    return dh


def grad_weight(grad_logits, hidden, weight, last_index):
    dw = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    block = 64
    launch(
        prompt_value_bwd_weight_kernel,
        (cdiv(hidden.shape[2], block),),
        grad_ptr=grad_logits.contiguous(),
        hidden_ptr=hidden,
        index_ptr=last_index.contiguous(),
        dw_ptr=dw,
        **_strides(hidden),
        B=last_index.shape[0],
        T=hidden.shape[1],
        H=hidden.shape[2],
        BLOCK_B=16,
        BLOCK=block,
        num_warps=4,
    )
    return dw
