"""linear_policy_loss: from hidden states to the policy loss and its gradients in one operation.

    per block of tokens:    hidden --> log-probabilities, logit gradients                            (linear_logprobs)
                            log-probabilities of all so far --> c = d loss / d log-probability       (policy_loss)
                            logit gradients, c --> d hidden; d weight, accumulated; logit gradients are dropped

The results are those of linear_logprobs followed by policy_loss. There, the logit gradients of all tokens wait for the
loss, or are computed twice. Here a block's coefficients c are known as soon as its log-probabilities are, so only one
block's logit gradients are alive at a time: the three passes of "cache" need only the memory of "recompute". Without a
KL penalty, tokens and sequences that are clipped have c = 0 and cost only the forward pass.

A token's coefficient depends on its own log-probability and, with a sequence-level ratio, on those of its sequence. A
block then consists of complete sequences, as many as fit. Of a sequence longer than a block, as many logit gradients
are cached as ``logits_budget_bytes`` allows, and the rest is recomputed. The loss is computed again after each block,
with the old log-probabilities in place of those not computed yet. Its coefficients for the block are final, and after
the last block so is the loss. That is one launch over about 20 bytes per token, next to 6 H V FLOPs per token.

The gradients are complete before backward, which multiplies them by the gradient of the loss. They have the H N and H V
elements of ``hidden`` and ``weight`` that backward would have allocated anyway.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
import torch.distributed as dist
from torch import Tensor

from ..._validation import as_normalizer, check_device, check_floating, check_integer, check_shape, reject
from ..linear_logprobs import AutoBackward
from ..linear_logprobs import reference as linear_reference
from ..linear_logprobs.arguments import Arguments
from ..linear_logprobs.output import Certificate, reference_entries
from ..policy_loss import PolicyLossOutput
from ..policy_loss import reference as policy_reference
from ..policy_loss.output import metrics_dict
from ..policy_loss.settings import Settings, check_tensors, has_token_advantages
from . import op


class LinearPolicyLossOutput(NamedTuple):
    """Policy loss and its metrics, with per-token results.

    Attributes:
        loss: 0-d float32, differentiable.
        metrics: 0-d float32 tensors by name, detached.
        logprobs: ``[N]`` float32, detached; 0 for a token without a loss.
        entropy: ``[N]`` float32, detached; 0 for a token without a loss.
        certificate: that of ``linear_logprobs``, ``[N]``.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    logprobs: Tensor
    entropy: Tensor
    certificate: Certificate


@overload
def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    cu_seqlens: Tensor,
    mask: Tensor | None = None,
    objective: str = "clip",
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
    rollout_floor: float = 0.0,
    rollout_cap: float = 2.0,
    bias: Tensor | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    backward: str | AutoBackward = "auto",
    logits_budget_bytes: int | None = None,
    chunk_bytes: int | None = None,
    mass_tolerance: float = 1e-4,
    max_entries: int = 512,
    projection: str = "auto",
    group: dist.ProcessGroup | None = None,
    support: tuple[Tensor, Tensor] | None = None,
    return_per_token: Literal[False] = False,
    backend: str | None = None,
) -> PolicyLossOutput: ...


@overload
def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    cu_seqlens: Tensor,
    mask: Tensor | None = None,
    objective: str = "clip",
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
    rollout_floor: float = 0.0,
    rollout_cap: float = 2.0,
    bias: Tensor | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    backward: str | AutoBackward = "auto",
    logits_budget_bytes: int | None = None,
    chunk_bytes: int | None = None,
    mass_tolerance: float = 1e-4,
    max_entries: int = 512,
    projection: str = "auto",
    group: dist.ProcessGroup | None = None,
    support: tuple[Tensor, Tensor] | None = None,
    return_per_token: Literal[True],
    backend: str | None = None,
) -> LinearPolicyLossOutput: ...


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    cu_seqlens: Tensor,
    mask: Tensor | None = None,
    objective: str = "clip",
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
    rollout_floor: float = 0.0,
    rollout_cap: float = 2.0,
    bias: Tensor | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    backward: str | AutoBackward = "auto",
    logits_budget_bytes: int | None = None,
    chunk_bytes: int | None = None,
    mass_tolerance: float = 1e-4,
    max_entries: int = 512,
    projection: str = "auto",
    group: dist.ProcessGroup | None = None,
    support: tuple[Tensor, Tensor] | None = None,
    return_per_token: bool = False,
    backend: str | None = None,
) -> PolicyLossOutput | LinearPolicyLossOutput:
    """Compute the policy loss of packed sequences from hidden states: ``linear_logprobs`` and ``policy_loss`` in one.

    Sources: those of :func:`sppo_kernels.policy_loss`. Neither second derivatives nor gradients of the entropies are
    supported.

    The settings of ``policy_loss`` mean what they mean there: ``mask``, ``objective``, ``ratio_level``, ``clip_low``,
    ``clip_high``, ``dual_clip``, ``aggregation``, ``normalizer``, ``ref_logprobs``, ``kl_coef``, ``kl_estimator``,
    ``rollout_logprobs``, ``rollout_correction``, ``rollout_floor`` and ``rollout_cap``. So do those of
    ``linear_logprobs``: ``bias``, ``adapter``, ``temperature``, ``softcap``, ``ignore_index``, ``chunk_bytes``,
    ``mass_tolerance``, ``max_entries``, ``projection``, ``group`` and ``support``. ``old_logprobs`` and the others must
    be over the same support.

    Args:
        hidden: ``[N, H]``, float16, bfloat16 or float32; of the positions that predict ``labels``.
        weight: ``[V, H]``, the dtype of ``hidden``; with ``group`` the rows of this rank.
        labels: ``[N]``, integers in ``[0, V)``, or ``ignore_index`` for tokens without a loss, like ``mask`` 0.
        old_logprobs: ``[N]``, of the policy before the update.
        advantages: ``[B]``, one per sequence, or ``[N]``, one per token.
        cu_seqlens: int32 ``[B + 1]``, the start of each sequence, from 0 to N; empty sequences are allowed.
        backward: as in ``linear_logprobs``. ``"recompute"`` takes another pass and saves no memory here, unless with a
            sequence-level ratio a sequence is longer than a block.
        logits_budget_bytes: as in ``linear_logprobs``, for what is cached at any one time.
        return_per_token: return :class:`LinearPolicyLossOutput`, with log-probabilities, entropies and the certificate.
        backend: ``"reference"``, ``"torch"``, ``"triton"``, or None for triton on an accelerator and torch elsewhere.

    Returns:
        ``PolicyLossOutput(loss, metrics)``, ``loss`` differentiable in ``hidden``, ``weight``, ``bias`` and both of
        ``adapter``. The metrics are those of ``policy_loss``, and ``entropy``, a mean over tokens.

    Raises:
        ValueError, TypeError: as ``linear_logprobs`` and ``policy_loss`` raise.
    """
    if isinstance(hidden, Tensor) and hidden.ndim != 2:
        reject("hidden", f"shape {tuple(hidden.shape)}", "[N, H], packed sequences")
    arguments = Arguments.validate(
        hidden=hidden,
        weight=weight,
        labels=labels,
        bias=bias,
        adapter=adapter,
        temperature=temperature,
        softcap=softcap,
        ignore_index=ignore_index,
        backward=backward,
        logits_budget_bytes=logits_budget_bytes,
        chunk_bytes=chunk_bytes,
        mass_tolerance=mass_tolerance,
        max_entries=max_entries,
        projection=projection,
        group=group,
        support=support,
        backend=backend,
    )
    check_floating(old_logprobs=old_logprobs, advantages=advantages)
    check_integer(cu_seqlens=cu_seqlens)
    for name, x in (("old_logprobs", old_logprobs), ("advantages", advantages), ("cu_seqlens", cu_seqlens)):
        if x is None:
            reject(name, None, "a torch.Tensor", TypeError)
    check_shape(labels.shape, "the shape of labels", old_logprobs=old_logprobs)
    check_device(hidden.device, old_logprobs=old_logprobs)
    check_tensors(
        logprobs=old_logprobs,
        old_logprobs=old_logprobs,
        advantages=advantages,
        mask=mask,
        cu_seqlens=cu_seqlens,
        ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs,
    )
    settings = Settings.validate(
        objective=objective,
        ratio_level=ratio_level,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        aggregation=aggregation,
        ref_logprobs=ref_logprobs,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        rollout_logprobs=rollout_logprobs,
        rollout_correction=rollout_correction,
        rollout_floor=rollout_floor,
        rollout_cap=rollout_cap,
    )
    if arguments.backend == "reference":
        output = _reference(
            arguments.hiddens[0],
            arguments.weights[0],
            arguments.labels,
            old_logprobs,
            advantages,
            cu_seqlens=cu_seqlens,
            mask=mask,
            normalizer=normalizer,
            ref_logprobs=ref_logprobs,
            rollout_logprobs=rollout_logprobs,
            bias=arguments.bias,
            adapter=arguments.adapter,
            temperature=temperature,
            softcap=softcap,
            ignore_index=ignore_index,
            support=arguments.support,
            **{**settings._asdict(), "rollout_correction": rollout_correction},
        )
    else:
        differentiable = (*arguments.hiddens, *arguments.weights, arguments.bias)
        results = op.ForwardOutput(
            *op.linear_policy_loss(
                **arguments._asdict(),
                needs=[x is not None and x.requires_grad and torch.is_grad_enabled() for x in differentiable],
                old_logprobs=old_logprobs.detach(),
                advantages=advantages.detach(),
                mask=mask,
                cu_seqlens=cu_seqlens,
                normalizer=None if normalizer is None else as_normalizer(normalizer, hidden.device),
                ref_logprobs=None if ref_logprobs is None else ref_logprobs.detach(),
                rollout_logprobs=None if rollout_logprobs is None else rollout_logprobs.detach(),
                per_token=has_token_advantages(advantages, old_logprobs, cu_seqlens),
                **settings._asdict(),
            )
        )
        output = _detached(
            loss=results.loss,
            metrics=metrics_dict(results.metrics),
            logprobs=results.logprobs,
            entropy=results.entropy,
            dropped_mass=results.dropped_mass,
            num_entries=results.num_entries,
        )
    return output if return_per_token else PolicyLossOutput(output.loss, output.metrics)


def _detached(
    *,
    loss: Tensor,
    metrics: dict[str, Tensor],
    logprobs: Tensor,
    entropy: Tensor,
    dropped_mass: Tensor,
    num_entries: Tensor,
) -> LinearPolicyLossOutput:
    """Add the mean entropy to the metrics, and detach everything but the loss."""
    entropy_mean = entropy.detach().sum() / (num_entries != 0).sum().clamp(min=1)
    return LinearPolicyLossOutput(
        loss=loss,
        metrics={**metrics, "entropy": entropy_mean},
        logprobs=logprobs.detach(),
        entropy=entropy.detach(),
        certificate=Certificate(dropped_mass.detach(), num_entries),
    )


def reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    **settings: Any,
) -> PolicyLossOutput:
    """Definition of ``linear_policy_loss``: the references of linear_logprobs and policy_loss in succession."""
    output = _reference(hidden, weight, labels, old_logprobs, advantages, **settings)
    return PolicyLossOutput(output.loss, output.metrics)


def _reference(
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
    support: tuple[Tensor, Tensor] | None = None,
    **settings: Any,
) -> LinearPolicyLossOutput:
    loss_mask = labels != ignore_index if mask is None else (labels != ignore_index) & (mask != 0)
    logprobs, entropy = linear_reference(
        hidden,
        weight,
        torch.where(loss_mask, labels, ignore_index),
        bias=bias,
        adapter=adapter,
        temperature=temperature,
        softcap=softcap,
        ignore_index=ignore_index,
        support=support,
    )
    loss, metrics = policy_reference(logprobs, old_logprobs, advantages, mask=loss_mask, **settings)
    return _detached(
        loss=loss,
        metrics=metrics,
        logprobs=logprobs,
        entropy=entropy,
        dropped_mass=torch.zeros_like(logprobs),
        num_entries=reference_entries(loss_mask, support),
    )
