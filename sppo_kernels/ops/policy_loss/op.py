"""Registered operation of policy_loss: schema, fake implementation and gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..._backend import HAS_TRITON
from ..._registration import operation
from .output import METRICS, LossAndGradient
from .settings import Settings, check_values
from .torch_backend import torch_policy_loss

BACKENDS: dict[str, Callable[..., LossAndGradient]] = {"torch": torch_policy_loss}

if HAS_TRITON:
    from .triton import triton_policy_loss

    BACKENDS["triton"] = triton_policy_loss

_NUM_TENSORS = 8


@operation("policy_loss")
def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor,
    normalizer: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    *,
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the fields of LossAndGradient from packed tensors: logprobs [N], cu_seqlens [B + 1], normalizer []."""
    check_values(cu_seqlens, normalizer, logprobs.shape[0])
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
    return BACKENDS[backend](
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        advantages=advantages,
        mask=mask,
        cu_seqlens=cu_seqlens,
        normalizer=normalizer,
        ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs,
        per_token=per_token,
        settings=settings,
    )


@policy_loss.register_fake
def _(logprobs, *tensors, backend, **settings):
    def new(*shape: int) -> Tensor:
        is_double = backend == "torch" and logprobs.dtype == torch.float64
        return logprobs.new_empty(shape, dtype=torch.float64 if is_double else torch.float32)

    return LossAndGradient(loss=new(), metrics=new(len(METRICS)), gradient=new(logprobs.shape[0]), scale=new())


def _save(ctx, inputs, keyword_only_inputs, output):
    output = LossAndGradient(*output)
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(output.gradient, output.scale)


def _grad(ctx, grad_loss, *_):
    if torch.is_grad_enabled():  # create_graph=True: the saved gradient is a constant, its derivative would be 0
        raise RuntimeError("policy_loss has no second derivative; for one, use backend='reference'")
    gradient, scale = ctx.saved_tensors
    return (gradient * (grad_loss * scale)).to(ctx.dtype), *(None,) * (_NUM_TENSORS - 1)


policy_loss.register_autograd(_grad, setup_context=_save)
