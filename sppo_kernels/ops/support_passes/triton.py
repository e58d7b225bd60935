"""Triton backend of the support passes."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..._triton_utils import cdiv, launch
from ..row_passes import RowResults
from ..row_passes.triton.shared import LN_2, LOG2_E, LOG2_ZERO, capped
from .arguments import Support
from .torch_backend import SupportPass

_TOKENS, _ENTRIES = 16, 32  # per program and step: most supports have fewer entries
_BLOCK = 1024  # entries per program in backward


# One program per 16 tokens. It reads their supports side by side: for the largest logit, then from the cache for the
# sums.
@triton.jit(do_not_specialize=["N", "stride_stat", "ignore_index"])
def support_fwd_kernel(
    x_ptr,
    id_ptr,
    offset_ptr,
    label_ptr,
    tau_ptr,
    logprob_ptr,
    entropy_ptr,
    stat_ptr,
    stride_tau,
    stride_stat,
    N,
    V,
    softcap,
    ignore_index,
    HAS_SOFTCAP: tl.constexpr,
    TOKENS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    mask = token < N
    label = tl.load(label_ptr + token, mask=mask, other=ignore_index)
    first = tl.load(offset_ptr + token, mask=mask, other=0)
    size = tl.load(offset_ptr + token + 1, mask=mask, other=0) - first
    mask &= (label != ignore_index) & (size > 0)
    size = tl.where(mask, size, 0).to(tl.int32)
    longest = tl.max(size, 0)
    c = LOG2_E / tl.load(tau_ptr + token * stride_tau, mask=mask, other=1.0)
    top = tl.full([TOKENS], float("-inf"), tl.float32)
    target = tl.full([TOKENS], float("nan"), tl.float32)
    for start in range(0, longest, ENTRIES):
        place = start + tl.arange(0, ENTRIES)
        at = first[:, None] + place[None, :]
        there = place[None, :] < size[:, None]
        ids = tl.load(id_ptr + at, mask=there, other=-1)
        y, _slope = capped(tl.load(x_ptr + at, mask=there, other=0.0), softcap, HAS_SOFTCAP)
        y = tl.where((ids >= 0) & (ids < V), y, float("-inf"))
        top = tl.maximum(top, tl.max(y, 1))
        is_label = there & (ids == label[:, None])
        found = tl.max(tl.where(is_label, y, float("-inf")), 1)
        target = tl.where(tl.max(is_label.to(tl.int32), 1) > 0, found, target)
    total = tl.zeros([TOKENS, ENTRIES], tl.float32)
    weighted = tl.zeros([TOKENS, ENTRIES], tl.float32)
    for start in range(0, longest, ENTRIES):
        place = start + tl.arange(0, ENTRIES)
        at = first[:, None] + place[None, :]
        there = place[None, :] < size[:, None]
        ids = tl.load(id_ptr + at, mask=there, other=-1)
        y, _slope = capped(tl.load(x_ptr + at, mask=there, other=0.0), softcap, HAS_SOFTCAP)
        z = (y - top[:, None]) * c[:, None]
        e = tl.where((ids >= 0) & (ids < V), tl.exp2(z), 0.0)
        total += e
        weighted += tl.where(e > 0.0, e * z, 0.0)
    total_of_token = tl.sum(total, 1)
    log_total = tl.log2(total_of_token) * LN_2
    tl.store(logprob_ptr + token, (target - top) * c * LN_2 - log_total, mask=mask)
    tl.store(entropy_ptr + token, log_total - tl.sum(weighted, 1) / total_of_token * LN_2, mask=mask)
    tl.store(stat_ptr + token, top, mask=mask)
    tl.store(stat_ptr + stride_stat + token, log_total, mask=mask)


# One program per block of entries. A token's numbers are read once for each of its entries, mostly from the cache.
@triton.jit(do_not_specialize=["E", "stride_stat"])
def support_bwd_kernel(
    x_ptr,
    id_ptr,
    label_ptr,
    tau_ptr,
    entry_ptr,
    token_ptr,
    entropy_ptr,
    stat_ptr,
    grad_logprob_ptr,
    grad_entropy_ptr,
    dx_ptr,
    stride_tau,
    stride_stat,
    E,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = number < E
    entry = tl.load(entry_ptr + number, mask=mask, other=0)
    token = tl.load(token_ptr + number, mask=mask, other=0)
    ids = tl.load(id_ptr + entry, mask=mask, other=-1)
    label = tl.load(label_ptr + token, mask=mask, other=-1)
    tau = tl.load(tau_ptr + token * stride_tau, mask=mask, other=1.0)
    y, slope = capped(tl.load(x_ptr + entry, mask=mask, other=0.0), softcap, HAS_SOFTCAP)
    top = tl.load(stat_ptr + token, mask=mask, other=0.0)
    log2_total = tl.load(stat_ptr + stride_stat + token, mask=mask, other=0.0) * LOG2_E
    log2_p = (y - top) * (LOG2_E / tau) - log2_total
    p = tl.exp2(log2_p)
    grad = tl.load(grad_logprob_ptr + token, mask=mask, other=0.0)
    grad *= tl.where(ids == label, 1.0 - p, -p)
    if grad_entropy_ptr is not None:
        entropy = tl.load(entropy_ptr + token, mask=mask, other=0.0)
        slack = tl.maximum(log2_p, LOG2_ZERO) * LN_2 + entropy
        grad -= tl.load(grad_entropy_ptr + token, mask=mask, other=0.0) * p * slack
    if HAS_SOFTCAP:
        grad *= slope
    tl.store(dx_ptr + number, grad / tau, mask=mask)


def _forward(
    *,
    logits: Tensor,
    support: Support,
    labels: Tensor,
    temperature: Tensor,
    softcap: float,
    ignore_index: int,
    vocab: int,
    out: RowResults,
) -> None:
    if not len(labels):
        return
    launch(
        support_fwd_kernel,
        (cdiv(len(labels), _TOKENS),),
        x_ptr=logits,
        id_ptr=support.token_ids,
        offset_ptr=support.offsets,
        label_ptr=labels,
        tau_ptr=temperature,
        logprob_ptr=out.logprobs,
        entropy_ptr=out.entropy,
        stat_ptr=out.row_stats,
        stride_tau=temperature.stride(0),
        stride_stat=out.row_stats.stride(0),
        N=len(labels),
        V=vocab,
        softcap=softcap,
        ignore_index=ignore_index,
        HAS_SOFTCAP=softcap > 0,
        TOKENS=_TOKENS,
        ENTRIES=_ENTRIES,
        num_warps=2,
    )


def _backward(
    *,
    logits: Tensor,
    support: Support,
    labels: Tensor,
    temperature: Tensor,
    softcap: float,
    entry: Tensor,
    token: Tensor,
    entropy: Tensor,
    row_stats: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
) -> Tensor:
    grads = logits.new_empty(len(entry))
    if len(entry):
        launch(
            support_bwd_kernel,
            (cdiv(len(entry), _BLOCK),),
            x_ptr=logits,
            id_ptr=support.token_ids,
            label_ptr=labels,
            tau_ptr=temperature,
            entry_ptr=entry,
            token_ptr=token,
            entropy_ptr=entropy,
            stat_ptr=row_stats,
            grad_logprob_ptr=grad_logprobs,
            grad_entropy_ptr=grad_entropy,
            dx_ptr=grads,
            stride_tau=temperature.stride(0),
            stride_stat=row_stats.stride(0),
            E=len(entry),
            softcap=softcap,
            HAS_SOFTCAP=softcap > 0,
            BLOCK=_BLOCK,
            num_warps=4,
        )
    return grads


TRITON_SUPPORT_PASS = SupportPass(_forward, _backward)
