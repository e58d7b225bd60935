"""linear_policy_loss: from hidden states to the policy loss and its gradients, in one go.

    per block of tokens:    hidden --> log-probabilities, E      (linear_logprobs)
                            log-probabilities of all so far --> c = d loss / d log-probability      (policy_loss)
                            E, c --> d hidden; d weight, added up;  E is dropped

The same numbers as linear_logprobs followed by policy_loss. What is gained: there, E of all tokens waits for the loss,
or is made again; here a block's coefficients are known as soon as its log-probabilities are, so that E of one block is
all there ever is: three passes over the vocabulary in the memory of four. Tokens and sequences that are clipped have
c = 0 and cost the forward alone.

A token's coefficient depends on its own log-probability, and with a ratio of the whole sequence on those of its
sequence: then a block is a run of whole sequences, as many as fit, and of one sequence that does not fit as much of E
is kept as ``logits_budget_bytes`` allows, the rest made again. The loss itself is computed anew after each block, with
the old log-probabilities standing in for those that are not there yet: what it says of the block is final, and after
the last block so is all the rest. That is one launch over some 20 bytes a token beside 6 H V operations each.

The gradients are ready before anything asks for them, and backward multiplies them by the gradient of the loss. They
are those of ``hidden`` and ``weight``, H N and H V elements, that backward would have made anyway.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import _vocab_shard as vocab_shard
from .._backend import NAMESPACE, OPS
from .._head import Gradients, Head, plan, split, where
from .._validation import (
    as_normalizer,
    check_device,
    check_floating,
    check_integer,
    check_shape,
    reject,
)
from .linear_logprobs import Certificate, checked, how_many, over_ranks
from .linear_logprobs import reference as linear_reference
from .policy_loss import (
    BACKENDS,
    METRICS,
    PolicyLossOutput,
    Settings,
    check_tensors,
    check_values,
    is_per_token,
    named,
)
from .policy_loss import reference as policy_reference
from .selective_logprobs import check_label_and_temperature_values

_log = logging.getLogger(__name__)


class LinearPolicyLossOutput(PolicyLossOutput):
    """``PolicyLossOutput(loss, metrics)`` with ``logprobs`` and ``entropy`` ``[N]`` float32, detached, and a
    ``certificate`` beside the two."""

    logprobs: Tensor
    entropy: Tensor
    certificate: Certificate


def _output(
    loss: Tensor, metrics: dict[str, Tensor], logprobs: Tensor, entropy: Tensor, dropped: Tensor, entries: Tensor
) -> LinearPolicyLossOutput:
    entropy_mean = entropy.detach().sum() / (entries != 0).sum().clamp(min=1)
    output = LinearPolicyLossOutput(loss, {**metrics, "entropy": entropy_mean})
    output.logprobs, output.entropy = logprobs.detach(), entropy.detach()
    output.certificate = Certificate(dropped.detach(), entries)
    return output


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    cu_seqlens: Tensor,
    mask: Tensor | None = None,
    ratio_level: str = "token",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    aggregation: str = "token-mean",
    normalizer: float | Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    rollout_logprobs: Tensor | None = None,
    rollout_correction: str | None = None,
    rollout_cap: float = 2.0,
    bias: Tensor | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    backward: str = "auto",
    logits_budget_bytes: int | None = None,
    chunk_bytes: int | None = None,
    mass_tolerance: float = 1e-4,
    max_entries: int = 512,
    group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> LinearPolicyLossOutput:
    """Policy loss of packed sequences, straight from hidden states: ``linear_logprobs`` and ``policy_loss`` in one.

    Sources: those of :func:`sppo_kernels.policy_loss`. Not differentiated twice, nor in the entropies.

    Args:
        hidden: ``[N, H]``, float16, bfloat16 or float32; of the positions that predict ``labels``.
        weight: ``[V, H]``, the dtype of ``hidden``; with ``group`` the rows of this rank.
        labels: ``[N]``, integers in ``[0, V)``, or ``ignore_index``: without loss, as where ``mask`` is 0.
        old_logprobs: ``[N]``, of the policy before the update.
        advantages: ``[B]``, one a sequence, or ``[N]``.
        cu_seqlens: int32 ``[B + 1]``, where each sequence starts, from 0 to N; empty sequences are allowed.
        mask, ratio_level, clip_low, clip_high, dual_clip, aggregation, normalizer, ref_logprobs, kl_coef, kl_estimator,
            rollout_logprobs, rollout_correction, rollout_cap: as of ``policy_loss``.
        bias, adapter, temperature, softcap, ignore_index, chunk_bytes, mass_tolerance, max_entries, group: as of
            ``linear_logprobs``.
        backward: as of ``linear_logprobs``. ``"recompute"`` is of no use here: it takes another pass to save nothing,
            unless a ratio of whole sequences meets one longer than a block.
        logits_budget_bytes: as of ``linear_logprobs``, for what is kept at any one time.
        backend: ``"reference"``, ``"torch"``, ``"triton"``, or None for triton on an accelerator and torch elsewhere.

    Returns:
        ``LinearPolicyLossOutput(loss, metrics)``, ``loss`` differentiable in ``hidden``, ``weight``, ``bias`` and both
        of ``adapter``; the metrics are those of ``policy_loss`` and ``entropy``, a mean over tokens. Its attributes
        ``logprobs`` and ``entropy`` ``[N]`` are detached, and 0 where a token bears no loss, by its label or by
        ``mask``; ``certificate`` is that of ``linear_logprobs``.

    Raises:
        ValueError, TypeError: as ``linear_logprobs`` and ``policy_loss`` raise.
    """
    if isinstance(hidden, Tensor) and hidden.ndim != 2:
        reject("hidden", f"shape {tuple(hidden.shape)}", "[N, H], packed sequences")
    arguments = checked(
        hidden,
        weight,
        labels,
        bias,
        adapter,
        temperature,
        softcap,
        ignore_index,
        backward,
        logits_budget_bytes,
        chunk_bytes,
        mass_tolerance,
        max_entries,
        group,
        backend,
    )
    check_floating(old_logprobs=old_logprobs, advantages=advantages)
    check_integer(cu_seqlens=cu_seqlens)
    for name, x in (("old_logprobs", old_logprobs), ("advantages", advantages), ("cu_seqlens", cu_seqlens)):
        if x is None:
            reject(name, None, "a torch.Tensor", TypeError)
    check_shape(labels.shape, "the shape of labels", old_logprobs=old_logprobs)
    check_device(hidden.device, old_logprobs=old_logprobs)
    check_tensors(old_logprobs, old_logprobs, advantages, mask, cu_seqlens, ref_logprobs, rollout_logprobs)
    settings = Settings.checked(
        ratio_level,
        clip_low,
        clip_high,
        dual_clip,
        aggregation,
        ref_logprobs,
        kl_coef,
        kl_estimator,
        rollout_logprobs,
        rollout_correction,
        rollout_cap,
    )
    if arguments.backend == "reference":
        pairs = list(zip(arguments.hiddens, arguments.weights, strict=True))
        return reference(
            *pairs[0],
            arguments.labels,
            old_logprobs,
            advantages,
            cu_seqlens=cu_seqlens,
            mask=mask,
            normalizer=normalizer,
            ref_logprobs=ref_logprobs,
            rollout_logprobs=rollout_logprobs,
            bias=arguments.bias,
            adapter=pairs[1] if adapter is not None else None,
            temperature=temperature,
            softcap=softcap,
            ignore_index=ignore_index,
            **{**settings._asdict(), "rollout_correction": rollout_correction},
        )
    differentiable = (*arguments.hiddens, *arguments.weights, arguments.bias)
    needs = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in differentiable]
    loss, metrics, logprobs, entropy, dropped, entries, *_ = _linear_policy_loss(
        *arguments,
        needs,
        old_logprobs.detach(),
        advantages.detach(),
        mask,
        cu_seqlens,
        None if normalizer is None else as_normalizer(normalizer, hidden.device),
        None if ref_logprobs is None else ref_logprobs.detach(),
        None if rollout_logprobs is None else rollout_logprobs.detach(),
        is_per_token(advantages, old_logprobs, cu_seqlens),
        *settings,
    )
    return _output(loss, named(metrics), logprobs, entropy, dropped, entries)


def reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    **settings: Any,
) -> LinearPolicyLossOutput:
    """The definition: the references of linear_logprobs and policy_loss, one after the other."""
    bears_loss = labels != ignore_index if mask is None else (labels != ignore_index) & (mask != 0)
    labels = torch.where(bears_loss, labels, ignore_index)
    head = {"bias": bias, "adapter": adapter, "temperature": temperature, "softcap": softcap}
    logprobs, entropy = linear_reference(hidden, weight, labels, ignore_index=ignore_index, **head)  # type: ignore[arg-type]
    loss, metrics = policy_reference(logprobs, old_logprobs, advantages, mask=bears_loss, **settings)
    return _output(loss, metrics, logprobs, entropy, torch.zeros_like(logprobs), -bears_loss.int())


# The registered operation


def _forward(
    hiddens: list[Tensor],
    weights: list[Tensor],
    bias: Tensor | None,
    labels: Tensor,
    temperature: Tensor,
    softcap: float,
    ignore_index: int,
    backward: str,
    logits_budget_bytes: int | None,
    chunk_bytes: int,
    mass_tolerance: float,
    max_entries: int,
    group: str,
    backend: str,
    needs: list[bool],
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor,
    normalizer: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    per_token: bool,
    ratio_level: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    aggregation: str,
    kl_coef: float,
    kl_estimator: str,
    rollout_correction: str,
    rollout_cap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """-> loss [], metrics [11], logprobs, entropy, dropped, entries, d loss / d logprobs [N], and the gradients of
    hiddens, weights and bias, an empty tensor for one that is not needed.
    """
    shards = vocab_shard.sizes(group, weights[0].shape[0], labels.device)
    check_values(cu_seqlens, normalizer, labels.shape[0])
    bears_loss = labels != ignore_index if mask is None else (labels != ignore_index) & (mask != 0)
    labels = torch.where(bears_loss, labels, ignore_index)
    check_label_and_temperature_values(labels, temperature, sum(shards), ignore_index)
    head = Head(hiddens, weights, bias, labels, temperature, softcap, ignore_index, chunk_bytes, group, backend)
    head = head.of_rank(labels.new_full((1,), vocab_shard.first_row(group, shards)))
    settings = Settings(
        ratio_level,
        clip_low,
        clip_high,
        dual_clip,
        aggregation,
        kl_coef,
        kl_estimator,
        rollout_correction,
        rollout_cap,
    )

    def loss_of(logprobs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, metrics, d loss / d logprobs."""
        given = old_logprobs, advantages, bears_loss, cu_seqlens, normalizer, ref_logprobs, rollout_logprobs
        loss, metrics, gradient, scale = BACKENDS[backend](logprobs, *given, per_token, settings)
        return loss, metrics, gradient * scale

    results = head.no_results()
    sums = Gradients(head, needs, torch.float32 if group else _held_in(hiddens[0]))
    logprobs, coefficient = old_logprobs.float(), torch.zeros_like(results.logprobs)
    logprobs = logprobs.clone() if logprobs is old_logprobs else logprobs
    no_gradient = torch.zeros_like(coefficient)
    tokens = where(bears_loss)
    size = head.block(max(shards)) if any(needs) else len(tokens)
    blocks = _blocks(tokens, cu_seqlens if settings.sequence_level else None, size)
    longest = max(map(len, blocks), default=0)
    tolerance = mass_tolerance, max_entries
    to_keep = plan(head, backward, logits_budget_bytes, longest, *tolerance, shards, entropies=False)
    _log.debug("%d of %d tokens bear loss, in %d blocks (%s)", len(tokens), len(labels), len(blocks), backward)
    for block in blocks:
        kept = head.forward(block, results, to_keep._replace(dense=min(to_keep.dense, len(block))), shards)
        logprobs[block] = results.logprobs[block]
        if any(needs):
            coefficient[block] = loss_of(logprobs)[2][block]
            scale = sums.admit(coefficient[block] / temperature[block])
            head.backward(sums, block, kept, results, coefficient / scale, no_gradient)
        del kept  # before the next block's
    loss, metrics, _ = loss_of(logprobs)
    entries, dropped = results.entries, results.dropped
    if group and to_keep.entries:
        entries, dropped = over_ranks(group, entries, dropped)
    grads = head.over_ranks(sums.results(_held_in), needs, _held_in)
    return loss, metrics, *results[:2], dropped, entries, coefficient, grads


def _held_in(x: Tensor) -> torch.dtype:
    """What a gradient waits for backward in: a loss scale comes too late for what has underflowed in float16."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


_linear_policy_loss = torch.library.custom_op(f"{NAMESPACE}::linear_policy_loss", _forward, mutates_args=())


@_linear_policy_loss.register_fake
def _(hiddens, weights, bias, labels, temperature, *settings):
    needs = settings[9]
    n = labels.shape[0]
    new = lambda *shape, dtype=torch.float32: labels.new_empty(shape, dtype=dtype)
    inputs = (*hiddens, *weights, weights[0][:, 0] if bias is None else bias)
    grads = [new(*(x.shape if need else (0,)), dtype=_held_in(x)) for x, need in zip(inputs, needs, strict=True)]
    return new(), new(len(METRICS)), new(n), new(n), new(n), new(n, dtype=torch.int32), new(n), grads


def _save(ctx, inputs, output):
    hiddens, weights, bias = inputs[:3]
    ctx.pairs = len(hiddens)
    ctx.dtypes = [None if x is None else x.dtype for x in (*hiddens, *weights, bias)]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[-1])


def _grad(ctx, grad_loss, *_):
    if torch.is_grad_enabled():  # create_graph=True: the saved gradients are constants, their derivatives would be 0
        raise RuntimeError("linear_policy_loss has no second derivative; for one, use backend='reference'")
    needs_hiddens, needs_weights, needs_bias = ctx.needs_input_grad[:3]
    needs = [*needs_hiddens, *needs_weights, needs_bias]
    grads = [
        (grad * grad_loss).to(dtype) if need and grad_loss is not None else None
        for grad, dtype, need in zip(ctx.saved_tensors, ctx.dtypes, needs, strict=True)
    ]
    return grads[: ctx.pairs], grads[ctx.pairs : -1], grads[-1], *[None] * 29


_linear_policy_loss.register_autograd(_grad, setup_context=_save)


@register_flop_formula(OPS.linear_policy_loss, get_raw=True)
def _flops(hiddens, weights, bias, labels, temperature, softcap, ignore_index, *rest: Any, out_val: Any) -> int:
    """All that bear loss go forward; those with a coefficient back, the logits made again where E was not kept."""
    entries, coefficient = out_val[5], out_val[6]
    sizes = [weight.numel() for weight in weights]
    needs = rest[7]
    products = sum(size for size, need in zip((*sizes, *sizes), needs[:-1], strict=True) if need)
    live = (coefficient != 0) & (entries < 0)
    return 2 * (how_many(entries != 0) + how_many(live & (entries == -1))) * sum(sizes) + 2 * how_many(live) * products


def _blocks(tokens: Tensor, cu_seqlens: Tensor | None, size: int) -> Sequence[Tensor]:
    """Up to ``size`` tokens each; with ``cu_seqlens`` whole sequences, and a longer one by itself."""
    if cu_seqlens is None or not len(tokens):
        return split(tokens, size)
    ends = torch.searchsorted(tokens, cu_seqlens[1:].long()).tolist()
    bounds = [0]
    for end, following in zip(ends, [*ends[1:], None], strict=True):
        if following is None or following - bounds[-1] > size:
            bounds.append(end)
    return [tokens[first:last] for first, last in pairwise(bounds) if last > first]
