"""Registered operations of linear_logprobs: forward, backward, fake implementations, gradients and FLOP formulas."""

from __future__ import annotations

import logging
import warnings

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException
from torch.utils.flop_counter import register_flop_formula

from ..._backend import OPS
from ..._registration import Operation
from ..selective_logprobs import check_label_and_temperature_values
from ..support_passes import Support, check_support_values
from . import auto_mode, indexing, support, vocab_parallel
from .cache import Cache, plan_cache
from .lm_head import LMHead
from .matmul import row_stride
from .output import RECOMPUTED, ForwardOutput
from .support import SupportHead
from .tokens import SavedForBackward

_log = logging.getLogger(__name__)


def forward(
    hiddens: list[Tensor],
    weights: list[Tensor],
    bias: Tensor | None,
    labels: Tensor,
    temperature: Tensor,
    support_ids: Tensor | None,
    support_offsets: Tensor | None,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the fields of ForwardOutput. Arguments are those of ``Arguments``."""
    vocab = weights[0].shape[0]
    shards = vocab_parallel.sizes(group, vocab, labels.device)
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
    supported: SupportHead | None = None
    if support_ids is None or support_offsets is None:
        tokens = indexing.nonzero_indices(head.loss_mask)
    else:
        given = Support(support_ids, support_offsets)
        check_support_values(given, labels, sum(shards), ignore_index)
        supported = SupportHead(head, given, labels=labels, ignore_index=ignore_index, first_row=first_row)
        by_kind = supported.partition(head.loss_mask)
        tokens = by_kind.dense
    plan = plan_cache(
        weight=weights[0],
        backward=backward,
        monitor=auto_mode.find(auto_key, weights[0]) if backward == "auto" else None,
        logits_budget_bytes=logits_budget_bytes,
        num_tokens=len(tokens),
        mass_tolerance=mass_tolerance,
        max_entries=max_entries,
        shards=shards,
        entropies=True,
        agree_in=group if head.is_fused else "",  # it communicates for cached tokens apart
    )
    kept = (
        f"up to {max_entries} sparse entries per token"
        if plan.sparse
        else f"the probabilities of {plan.num_dense} tokens"
    )
    beside = "" if supported is None else " and no support"
    how = f"{backward}, fused projection" if head.is_fused else backward
    _log.debug("forward: %d of %d tokens have a loss%s, keeping %s (%s)", len(tokens), len(labels), beside, kept, how)
    results, cached = head.forward(tokens, plan, shards)
    results = results.among(len(labels), tokens)
    num_entries, dropped_mass = results.num_entries.clone(), results.dropped_mass
    if group and plan.sparse:
        num_entries, dropped_mass = reduce_certificate(group, results.num_entries, results.dropped_mass)
    support_logits = results.dropped_mass.new_empty(0)
    if supported is not None:
        support_logits = supported.forward(by_kind, results.row, sum(shards))
        num_entries = supported.count(num_entries)
    return ForwardOutput(
        logprobs=results.row.logprobs,
        entropy=results.row.entropy,
        row_stats=results.row.row_stats,
        dropped_mass=dropped_mass,
        num_entries=num_entries,
        cached_probs=cached.probs,
        cached_factors=cached.factors,
        sparse_index=cached.sparse_index,
        sparse_value=cached.sparse_value,
        local_num_entries=results.num_entries,
        first_row=first_row,
        tokens=tokens,
        support_logits=support_logits,
    )


def reduce_certificate(group: str, num_entries: Tensor, dropped_mass: Tensor) -> tuple[Tensor, Tensor]:
    """Sum entries and dropped mass over the ranks.

    A token on the dense path on any rank counts as such, though others may have dropped a part of it.
    """
    sums = torch.stack([num_entries.clamp(min=0).float(), (num_entries < 0).float(), dropped_mass])
    total, dense, dropped_mass = vocab_parallel.all_reduce(sums, group)
    return torch.where(dense > 0, RECOMPUTED, total.int()), dropped_mass


linear_logprobs = Operation("linear_logprobs", forward)


@linear_logprobs.register_fake
def _(hiddens, weights, bias, labels, temperature, support_ids, support_offsets, *, backward, max_entries, **settings):
    n = labels.shape[0]
    num_dense = _size_known_at_run_time(at_most=n) if backward in ("cache", "auto") else 0
    sparse = _size_known_at_run_time(at_most=n) if backward in ("sparse", "auto") else 0

    def new(*shape, dtype=torch.float32):
        return labels.new_empty(shape, dtype=dtype)

    return ForwardOutput(
        logprobs=new(n),
        entropy=new(n),
        row_stats=new(2, n),
        dropped_mass=new(n),
        num_entries=new(n, dtype=torch.int32),
        cached_probs=weights[0].new_empty(num_dense, row_stride(len(weights[0]))),
        cached_factors=new(2, num_dense),
        sparse_index=new(sparse, max_entries, dtype=torch.int32),
        sparse_value=new(sparse, max_entries),
        local_num_entries=new(n, dtype=torch.int32),
        first_row=labels.new_empty(1),
        tokens=labels.new_empty(_size_known_at_run_time(at_most=n)),
        support_logits=new(0 if support_ids is None else support_ids.shape[0]),
    )


def _size_known_at_run_time(at_most: int):
    try:
        return torch.library.get_ctx().new_dynamic_size()
    except (DynamicOutputShapeException, RuntimeError):  # fake tensors without symbolic sizes; meta tensors
        if torch._guards.TracingContext.try_get() is not None:
            raise  # torch.compile then runs the operation between two graphs: it would rely on a size that is wrong
        return at_most


def backward_pass(
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    hiddens: list[Tensor],
    weights: list[Tensor],
    bias: Tensor | None,
    labels: Tensor,
    temperature: Tensor,
    support_ids: Tensor | None,
    support_offsets: Tensor | None,
    entropy: Tensor,
    row_stats: Tensor,
    cached_probs: Tensor,
    cached_factors: Tensor,
    sparse_index: Tensor,
    sparse_value: Tensor,
    local_num_entries: Tensor,
    first_row: Tensor,
    tokens: Tensor,
    support_logits: Tensor,
    *,
    needs: list[bool],
    softcap: float,
    ignore_index: int,
    backward: str,
    auto_key: str,
    chunk_bytes: int,
    projection: str,
    group: str,
    backend: str,
) -> list[Tensor]:
    """Compute the gradients of hiddens, weights and bias, in this order; an empty tensor for one not needed."""
    grad_logprobs, grad_entropy = (
        grad_logprobs.contiguous(),
        None if grad_entropy is None else grad_entropy.contiguous(),
    )
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
    has_grad = head.loss_mask & (grad_logprobs != 0)
    has_entropy_grad = None if grad_entropy is None else head.loss_mask & (grad_entropy != 0)
    if has_entropy_grad is not None:
        has_grad |= has_entropy_grad
    monitor = auto_mode.find(auto_key, weights[0]) if backward == "auto" else None
    if monitor is not None and len(tokens):
        monitor.record_entropies(
            None if has_entropy_grad is None else indexing.take(has_entropy_grad, tokens),
            indexing.take(has_grad, tokens),
        )
    accumulator = head.accumulator(needs, torch.float32 if group else weights[0].dtype)
    if accumulator.scaled:
        largest = (
            grad_logprobs.abs() if grad_entropy is None else torch.maximum(grad_logprobs.abs(), grad_entropy.abs())
        )
        scale = accumulator.rescale(torch.where(has_grad, largest / temperature, 0.0))
        grad_logprobs = grad_logprobs / scale
        grad_entropy = None if grad_entropy is None else grad_entropy / scale
    num_served = 0
    if len(tokens) or support_ids is None:
        num_served = head.backward(
            tokens,
            accumulator=accumulator,
            cached=Cache(cached_probs, cached_factors, sparse_index, sparse_value),
            saved=SavedForBackward(entropy=entropy, row_stats=row_stats, num_entries=local_num_entries),
            grad_logprobs=grad_logprobs,
            grad_entropy=grad_entropy,
            is_only_call=support_ids is None,
        )
    if support_ids is not None and support_offsets is not None:
        supported = SupportHead(
            head,
            Support(support_ids, support_offsets),
            labels=labels,
            ignore_index=ignore_index,
            first_row=first_row,
        )
        supported.backward(
            accumulator,
            logits=support_logits,
            entropy=entropy,
            row_stats=row_stats,
            grad_logprobs=grad_logprobs,
            grad_entropy=grad_entropy,
            is_only_call=not len(tokens),
        )
    if len(cached_probs) and not num_served and has_grad[tokens[: len(cached_probs)]].any():
        warnings.warn(
            f"linear_logprobs cached {cached_probs.nbytes} bytes for nothing: the entropies have gradients, for which "
            "the logits are computed again; pass backward='recompute'",
            stacklevel=1,  # autograd's thread has no caller
        )
    return head.reduce_hidden_grads(accumulator.results(), needs)


linear_logprobs_backward = Operation("linear_logprobs_backward", backward_pass)


@linear_logprobs_backward.register_fake
def _(grad_logprobs, grad_entropy, hiddens, weights, bias, *tensors, needs, **settings):
    inputs = (*hiddens, *weights, weights[0][:, 0] if bias is None else bias)
    return [x.new_empty(x.shape if need else (0,)) for x, need in zip(inputs, needs, strict=True)]


_BACKWARD_SETTINGS = (
    "softcap", "ignore_index", "backward", "auto_key", "chunk_bytes", "projection", "group", "backend"
)  # fmt: skip


def _save(ctx, inputs, keyword_only_inputs, output):
    hiddens, weights, bias, labels, temperature, support_ids, support_offsets = inputs
    output = ForwardOutput(*output)
    ctx.settings = {name: keyword_only_inputs[name] for name in _BACKWARD_SETTINGS}
    ctx.num_pairs = len(hiddens)
    ctx.set_materialize_grads(False)  # otherwise the cache would get a gradient of its size
    saved = {
        "bias": bias,
        "labels": labels,
        "temperature": temperature,
        "support_ids": support_ids,
        "support_offsets": support_offsets,
        "entropy": output.entropy,
        "row_stats": output.row_stats,
        "cached_probs": output.cached_probs,
        "cached_factors": output.cached_factors,
        "sparse_index": output.sparse_index,
        "sparse_value": output.sparse_value,
        "local_num_entries": output.local_num_entries,
        "first_row": output.first_row,
        "tokens": output.tokens,
        "support_logits": output.support_logits,
    }
    ctx.names = tuple(saved)
    ctx.save_for_backward(*hiddens, *weights, *saved.values())


def _grad(ctx, grad_logprobs, grad_entropy, *_):
    n, saved = ctx.num_pairs, ctx.saved_tensors  # read once: activation checkpointing recomputes them then
    others = dict(zip(ctx.names, saved[2 * n :], strict=True))
    needs_hiddens, needs_weights, needs_bias, *_ = ctx.needs
    needs = [*needs_hiddens, *needs_weights, needs_bias]
    if grad_logprobs is None:
        grad_logprobs = torch.zeros_like(others["labels"], dtype=torch.float32)
    grads = linear_logprobs_backward(
        grad_logprobs=grad_logprobs,
        grad_entropy=grad_entropy,
        hiddens=list(saved[:n]),
        weights=list(saved[n : 2 * n]),
        **others,
        needs=needs,
        **ctx.settings,
    )
    grads = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
    return grads[:n], grads[n:-1], grads[-1], None, None, None, None


linear_logprobs.register_autograd(_grad, setup_context=_save)


# FlopCounterMode does not see into a registered operation. These formulas count what the chunks multiply. An entry of a
# support counts once, also where a dense product computes it.


def _dense_mask(labels: Tensor, ignore_index: int, support_offsets: Tensor | None) -> Tensor:
    """Return which tokens have a loss and no support."""
    has_loss = labels != ignore_index
    return has_loss if support_offsets is None else has_loss & (support_offsets.diff() <= 0)


@register_flop_formula(OPS.linear_logprobs, get_raw=True)
def _forward_flops(
    hiddens, weights, bias, labels, temperature, support_ids, support_offsets, *, ignore_index, **_
) -> int:
    num_dense = indexing.count(_dense_mask(labels, ignore_index, support_offsets))
    num_entries = support.count_entries(labels != ignore_index, support_ids, support_offsets)
    return 2 * sum(num_dense * weight.numel() + num_entries * weight.shape[1] for weight in weights)


@register_flop_formula(OPS.linear_logprobs_backward, get_raw=True)
def _backward_flops(
    grad_logprobs,
    grad_entropy,
    hiddens,
    weights,
    bias,
    labels,
    temperature,
    support_ids,
    support_offsets,
    entropy,
    row_stats,
    cached_probs,
    cached_factors,
    sparse_index,
    sparse_value,
    local_num_entries,
    first_row,
    tokens,
    support_logits,
    *,
    needs,
    ignore_index,
    **_,
) -> int:
    loss_mask = _dense_mask(labels, ignore_index, support_offsets)
    has_entropy_grad = torch.zeros_like(loss_mask) if grad_entropy is None else grad_entropy != 0
    has_grad = loss_mask & ((grad_logprobs != 0) | has_entropy_grad)
    is_sparse = local_num_entries >= 0
    is_kept = (loss_mask.cumsum(0) <= len(cached_probs)) | is_sparse
    num_recomputed = indexing.count(
        has_grad & ~(is_kept & ~has_entropy_grad),
        without_values=len(labels) - len(cached_probs) - len(sparse_index),
    )
    num_dense = indexing.count(
        has_grad & ~(is_sparse & ~has_entropy_grad), without_values=len(labels) - len(sparse_index)
    )
    products = [*weights, *weights]
    needed = [weight for weight, need in zip(products, needs[:-1], strict=True) if need]
    dense = num_recomputed * sum(weight.numel() for weight in weights) + num_dense * sum(w.numel() for w in needed)
    has_any_grad = (labels != ignore_index) & ((grad_logprobs != 0) | has_entropy_grad)
    num_entries = support.count_entries(has_any_grad, support_ids, support_offsets)
    return 2 * (dense + num_entries * sum(w.shape[1] for w in needed))  # sparse entries are not worth counting
