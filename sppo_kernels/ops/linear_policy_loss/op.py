"""Registered operation of linear_policy_loss: forward with its gradients, fake implementation and FLOP formula."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..._backend import OPS
from ..._registration import Operation
from ..linear_logprobs import auto_mode, indexing, support, vocab_parallel
from ..linear_logprobs.cache import plan_cache
from ..linear_logprobs.lm_head import LMHead
from ..linear_logprobs.op import reduce_certificate
from ..linear_logprobs.output import RECOMPUTED
from ..linear_logprobs.support import SupportHead
from ..linear_logprobs.tokens import SavedForBackward, TokenResults
from ..policy_loss.op import BACKENDS
from ..policy_loss.output import METRICS, LossAndGradient
from ..policy_loss.settings import Settings, check_values
from ..selective_logprobs import check_label_and_temperature_values
from ..support_passes import Support, check_support_values

_log = logging.getLogger(__name__)


class ForwardOutput(NamedTuple):
    """Output of the registered operation."""

    loss: Tensor  # []
    metrics: Tensor  # [len(METRICS)]
    logprobs: Tensor  # [N]
    entropy: Tensor  # [N]
    dropped_mass: Tensor  # [N]
    num_entries: Tensor  # [N] int32
    coefficients: Tensor  # [N], d loss / d logprobs
    grads: list[Tensor]  # of hiddens, weights and bias; an empty tensor for one that is not needed


def forward(
    hiddens: list[Tensor],
    weights: list[Tensor],
    bias: Tensor | None,
    labels: Tensor,
    temperature: Tensor,
    support_ids: Tensor | None,
    support_offsets: Tensor | None,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor,
    normalizer: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    *,
    softcap: float,
    ignore_index: int,
    backward: str,
    auto_key: str,
    logits_budget_bytes: int | None,
    chunk_bytes: int,
    mass_tolerance: float,
    max_entries: int,
    projection: str,
    group: str,
    backend: str,
    needs: list[bool],
    per_token: bool,
    objective: str,
    ratio_level: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    aggregation: str,
    kl_coef: float,
    kl_estimator: str,
    rollout_correction: str,
    rollout_floor: float,
    rollout_cap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """Compute the fields of ForwardOutput from the fields of Arguments and Settings."""
    shards = vocab_parallel.sizes(group, weights[0].shape[0], labels.device)
    check_values(cu_seqlens, normalizer, labels.shape[0])
    loss_mask = labels != ignore_index if mask is None else (labels != ignore_index) & (mask != 0)
    labels = torch.where(loss_mask, labels, ignore_index)
    check_label_and_temperature_values(labels, temperature, sum(shards), ignore_index)
    first_row = labels.new_full((1,), vocab_parallel.first_row(group, shards))
    head = LMHead(
        hiddens=hiddens,
        weights=weights,
        bias=bias,
        labels=labels,
        temperature=temperature,
        softcap=softcap,
        ignore_index=ignore_index,
        chunk_bytes=chunk_bytes,
        projection=projection,
        group=group,
        backend=backend,
        first_row=first_row,
    )
    settings = Settings(
        objective=objective,
        ratio_level=ratio_level,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        aggregation=aggregation,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        rollout_correction=rollout_correction,
        rollout_floor=rollout_floor,
        rollout_cap=rollout_cap,
    )

    def loss_of(logprobs: Tensor) -> LossAndGradient:
        return BACKENDS[backend](
            logprobs=logprobs,
            old_logprobs=old_logprobs,
            advantages=advantages,
            mask=loss_mask,
            cu_seqlens=cu_seqlens,
            normalizer=normalizer,
            ref_logprobs=ref_logprobs,
            rollout_logprobs=rollout_logprobs,
            per_token=per_token,
            settings=settings,
        )

    results = TokenResults.zeros(len(labels), labels.device)
    row = results.row
    saved = SavedForBackward(entropy=row.entropy, row_stats=row.row_stats, num_entries=results.num_entries)
    accumulator = head.accumulator(needs, torch.float32 if group else _grad_dtype(hiddens[0]))
    logprobs, coefficients = old_logprobs.float(), torch.zeros_like(row.logprobs)
    logprobs = logprobs.clone() if logprobs is old_logprobs else logprobs
    supported: SupportHead | None = None
    if support_ids is None or support_offsets is None:
        tokens = indexing.nonzero_indices(loss_mask)
    else:
        given = Support(support_ids, support_offsets)
        check_support_values(given, labels, sum(shards), ignore_index)
        supported = SupportHead(head, given, labels=labels, ignore_index=ignore_index, first_row=first_row)
        by_kind = supported.partition(loss_mask)
        tokens = by_kind.dense
        support_logits = supported.forward(by_kind, row, sum(shards))
        logprobs = torch.where(supported.has_support, row.logprobs, logprobs)
    block_size = head.block_size(max(shards)) if any(needs) else len(tokens)
    blocks = _blocks(tokens, cu_seqlens if settings.sequence_level else None, block_size)
    plan = plan_cache(
        weight=weights[0],
        backward=backward,
        monitor=auto_mode.find(auto_key, weights[0]) if backward == "auto" else None,
        logits_budget_bytes=logits_budget_bytes,
        num_tokens=max(map(len, blocks), default=0),
        mass_tolerance=mass_tolerance,
        max_entries=max_entries,
        shards=shards,
        entropies=False,
        agree_in=group if head.is_fused else "",  # it communicates for cached tokens apart
    )
    beside = "" if supported is None else " and no support"
    how = f"{backward}, fused projection" if head.is_fused else backward
    _log.debug("%d of %d tokens have a loss%s, in %d blocks (%s)", len(tokens), len(labels), beside, len(blocks), how)
    for block in blocks:
        computed, cached = head.forward(block, plan._replace(num_dense=min(plan.num_dense, len(block))), shards)
        results.set(block, computed)
        logprobs[block] = computed.row.logprobs
        if any(needs):
            loss = loss_of(logprobs)
            coefficients[block] = (loss.gradient * loss.scale)[block]
            scaled = coefficients
            if accumulator.scaled:
                scaled = coefficients / accumulator.rescale(coefficients[block] / temperature[block])
            head.backward(
                block,
                accumulator=accumulator,
                cached=cached,
                saved=saved,
                grad_logprobs=scaled,
                grad_entropy=None,
                is_only_call=len(blocks) == 1 and supported is None,
            )
        del cached  # before the next block's
    loss = loss_of(logprobs)
    if supported is not None and any(needs):
        coefficients = torch.where(supported.has_support, loss.gradient * loss.scale, coefficients)
        scaled = coefficients
        if accumulator.scaled:
            scaled = coefficients / accumulator.rescale(
                torch.where(supported.has_support, coefficients, 0.0) / temperature
            )
        supported.backward(
            accumulator,
            logits=support_logits,
            entropy=row.entropy,
            row_stats=row.row_stats,
            grad_logprobs=scaled,
            grad_entropy=None,
            is_only_call=not len(tokens),
        )
    num_entries, dropped_mass = results.num_entries, results.dropped_mass
    if group and plan.sparse:
        num_entries, dropped_mass = reduce_certificate(group, num_entries, dropped_mass)
    if supported is not None:
        num_entries = supported.count(num_entries)
    return ForwardOutput(
        loss=loss.loss,
        metrics=loss.metrics,
        logprobs=row.logprobs,
        entropy=row.entropy,
        dropped_mass=dropped_mass,
        num_entries=num_entries,
        coefficients=coefficients,
        grads=head.reduce_hidden_grads(accumulator.results(_grad_dtype), needs, _grad_dtype),
    )


def _grad_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a gradient waits for backward: a loss scale comes too late for float16 underflow."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


linear_policy_loss = Operation("linear_policy_loss", forward)
_NUM_TENSORS = 14


@linear_policy_loss.register_fake
def _(hiddens, weights, bias, labels, *tensors, needs, **settings):
    n = labels.shape[0]

    def new(*shape, dtype=torch.float32):
        return labels.new_empty(shape, dtype=dtype)

    inputs = (*hiddens, *weights, weights[0][:, 0] if bias is None else bias)
    return ForwardOutput(
        loss=new(),
        metrics=new(len(METRICS)),
        logprobs=new(n),
        entropy=new(n),
        dropped_mass=new(n),
        num_entries=new(n, dtype=torch.int32),
        coefficients=new(n),
        grads=[new(*(x.shape if need else (0,)), dtype=_grad_dtype(x)) for x, need in zip(inputs, needs, strict=True)],
    )


def _save(ctx, inputs, keyword_only_inputs, output):
    hiddens, weights, bias, *_ = inputs
    ctx.num_pairs = len(hiddens)
    ctx.dtypes = [None if x is None else x.dtype for x in (*hiddens, *weights, bias)]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*ForwardOutput(*output).grads)


def _grad(ctx, grad_loss, *_):
    if torch.is_grad_enabled():  # create_graph=True: the saved gradients are constants, their derivatives would be 0
        raise RuntimeError("linear_policy_loss has no second derivative; for one, use backend='reference'")
    n = ctx.num_pairs
    needs_hiddens, needs_weights, needs_bias, *_ = ctx.needs
    needs = [*needs_hiddens, *needs_weights, needs_bias]
    grads = [
        (grad * grad_loss).to(dtype) if need and grad_loss is not None else None
        for grad, dtype, need in zip(ctx.saved_tensors, ctx.dtypes, needs, strict=True)
    ]
    return grads[:n], grads[n:-1], grads[-1], *(None,) * (_NUM_TENSORS - 3)


linear_policy_loss.register_autograd(_grad, setup_context=_save)


@register_flop_formula(OPS.linear_policy_loss, get_raw=True)
def _flops(
    hiddens,
    weights,
    bias,
    labels,
    temperature,
    support_ids,
    support_offsets,
    *tensors: Any,
    needs,
    out_val: Any,
    **_: Any,
) -> int:
    """Count tokens with a loss forward and those with a coefficient backward, plus logits that are recomputed.

    Of a token with a support only the entries count.
    """
    output = ForwardOutput(*out_val)
    sizes = [weight.numel() for weight in weights]
    products = sum(size for size, need in zip((*sizes, *sizes), needs[:-1], strict=True) if need)
    has_loss = output.num_entries != 0
    num_entries = support.count_entries(has_loss, support_ids, support_offsets)
    num_grads = support.count_entries(output.coefficients != 0, support_ids, support_offsets)
    if support_offsets is not None:
        has_loss = has_loss & (support_offsets.diff() <= 0)
    is_dense = (output.coefficients != 0) & (output.num_entries < 0)
    num_projected = indexing.count(has_loss)
    num_recomputed = indexing.count(is_dense & (output.num_entries == RECOMPUTED))
    dense = (num_projected + num_recomputed) * sum(sizes) + indexing.count(is_dense) * products
    return 2 * (dense + (num_entries * sum(sizes) + num_grads * products) // len(weights[0]))


def _blocks(tokens: Tensor, cu_seqlens: Tensor | None, size: int) -> Sequence[Tensor]:
    """Split tokens into blocks of up to ``size``; with ``cu_seqlens`` of complete sequences, a longer one by itself."""
    if cu_seqlens is None or not len(tokens):
        return [tokens[part.start : part.stop] for part in indexing.ranges(len(tokens), size)]
    ends = torch.searchsorted(tokens, cu_seqlens[1:].long()).tolist()
    bounds = [0]
    for end, following in zip(ends, [*ends[1:], None], strict=True):
        if following is None or following - bounds[-1] > size:
            bounds.append(end)
    return [tokens[first:last] for first, last in pairwise(bounds) if last > first]
