"""Self-test of the operations: values and gradients on a device, compared with the float64 reference on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import reference
from .ops.gae import gae
from .ops.group_advantages import group_advantages
from .ops.linear_logprobs import linear_logprobs
from .ops.linear_policy_loss import linear_policy_loss
from .ops.policy_loss import policy_loss
from .ops.prompt_value import prompt_value_loss
from .ops.selective_logprobs import selective_logprobs
from .ops.whiten import whiten

TOLERANCE = 5e-3
"""Relative to the largest value; allows for TF32 on tensor cores, which keeps 10 bits of a float32's mantissa."""

TOKENS, HIDDEN, VOCABULARY = 33, 64, 1000


def errors(device: torch.device, backend: str | None = None) -> Iterator[tuple[str, float | Exception]]:
    """Run each operation on a device in float32, with a backend; None picks it by the device.

    Yields:
        The name of an operation, and the largest error of its results and gradients, relative to the largest value, or
        the exception that it raised.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    cu_seqlens = torch.tensor([0, 7, 20, TOKENS], dtype=torch.int32)
    mask = torch.rand(3, 11, generator=generator) < 0.8
    group_ids = torch.tensor([0, 0, 0, 1, 1, 1])
    outcomes = torch.tensor([1.0, 0.0, 1.0])
    hidden, weight = normal(TOKENS, HIDDEN), normal(VOCABULARY, HIDDEN) / 8
    old, advantages = normal(TOKENS) - 7, normal(3)

    # An operation, its differentiable tensors, and a call that returns the tensors to compare.
    calls: Sequence[tuple[Callable[..., Any], Sequence[Tensor], Callable[..., Sequence[Tensor]]]] = (
        (linear_logprobs, (hidden, weight), lambda op, on, h, w: _without_entropy_gradient(op(h, w, labels.to(on)))),
        (
            linear_policy_loss,
            (hidden, weight, old, advantages),
            lambda op, on, h, w, old, adv: op(h, w, labels.to(on), old, adv, cu_seqlens=cu_seqlens.to(on))[:1],
        ),
        (selective_logprobs, (normal(TOKENS, VOCABULARY),), lambda op, on, x: op(x, labels.to(on))[:2]),
        (
            policy_loss,
            (normal(TOKENS) - 7, old, advantages),
            lambda op, on, new, old, adv: op(new, old, adv, cu_seqlens=cu_seqlens.to(on), dual_clip=3.0)[:1],
        ),
        (
            prompt_value_loss,
            (hidden, normal(1, HIDDEN)),
            lambda op, on, h, w: op(h, w, torch.tensor([6, 19, TOKENS - 1]).to(on), outcomes.to(on, h.dtype))[:1],
        ),
        (gae, (normal(3, 11), normal(3, 11)), lambda op, on, r, v: op(r, v, mask.to(on), lam=0.95)),
        (whiten, (normal(3, 11),), lambda op, on, x: (op(x, mask.to(on)),)),
        (group_advantages, (normal(6),), lambda op, on, r: (op(r, group_ids.to(on)),)),
    )
    cpu = torch.device("cpu")
    for operation, tensors, call in calls:
        try:
            actual = _results(partial(operation, backend=backend), call, tensors, device, torch.float32)
        except Exception as error:
            yield operation.__name__, error
            continue
        expected = _results(getattr(reference, operation.__name__), call, tensors, cpu, torch.float64)
        yield operation.__name__, max(_error(a, e) for a, e in zip(actual, expected, strict=True))


def _results(
    operation: Callable[..., Any],
    call: Callable[..., Sequence[Tensor]],
    tensors: Sequence[Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Return results, and gradients of a weighted sum of those that are differentiable."""
    inputs = [tensor.to(device, dtype, copy=True).requires_grad_() for tensor in tensors]
    outputs = list(call(operation, device, *inputs))
    gradients: Sequence[Tensor | None] = ()
    if differentiable := [output for output in outputs if output.requires_grad]:
        # Every element has a weight of its own, so that a gradient of another token is found.
        weighted = [(output * _weights(output)).sum() for output in differentiable]
        gradients = torch.autograd.grad(sum(weighted[1:], weighted[0]), inputs, allow_unused=True)
    found = [*outputs, *(gradient for gradient in gradients if gradient is not None)]
    return [tensor.detach().cpu().double() for tensor in found]


def _without_entropy_gradient(out: Any) -> tuple[Tensor, Tensor]:
    """Detach the entropies, whose gradient makes the operation compute the logits again, with a warning."""
    return out.logprobs, out.entropy.detach()


def _weights(output: Tensor) -> Tensor:
    return torch.linspace(-1, 2, max(output.numel(), 2), dtype=output.dtype, device=output.device)[
        : output.numel()
    ].view_as(output)


def _error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest error over the largest magnitude; infinite if a value is not finite."""
    error = ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
    return error if error == error else float("inf")
