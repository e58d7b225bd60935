"""prompt_value_logits, prompt_value_loss: a critic's value head on the last prompt token, in one launch.

    logit_b = hidden[last_index_b] . weight + bias
    value   = sigmoid(logit) = P(success | prompt)            advantage = outcome - value
    loss    = sum_b (max(logit, 0) - logit * outcome + log(1 + exp(-|logit|))) / normalizer
    d loss / d logit_b = (value - outcome) / normalizer

SPPO (arXiv 2604.08865) predicts success from the prompt only, so B rows of the [tokens, H] hidden states are read:
gather, dot product, sigmoid, cross-entropy and advantage are one kernel. Backward writes the gradient of ``hidden``
(zero outside of those rows) and sums that of ``weight`` over the batch in a fixed order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._backend import matmul, pick_backend
from ..._validation import (
    as_normalizer,
    check_device,
    check_floating,
    check_integer,
    check_normalizer_value,
    check_shape,
    check_tensor,
    reject,
)
from . import op
from .op import check_last_index, check_outcomes
from .output import PromptValueOutput


def prompt_value_logits(
    hidden: Tensor, weight: Tensor, last_index: Tensor, *, bias: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Compute the critic's logit of success for each prompt.

    Source: SPPO (arXiv 2604.08865).

    Args:
        hidden: ``[N, H]`` packed, or ``[B, T, H]``; float16, bfloat16 or float32 (float64 with
            ``backend="reference"``), any strides.
        weight: ``[H]`` or ``[1, H]``, floating-point.
        last_index: ``[B]`` integers, the last prompt token of each row: in ``[0, N)`` if packed, else in ``[0, T)``.
        bias: one element, ``[]`` or ``[1]``; or None.
        backend: ``"reference"``, ``"torch"``, ``"triton"``, or None for triton on an accelerator and torch elsewhere.

    Returns:
        ``[B]`` float32, differentiable in ``hidden``, ``weight`` and ``bias``.

    Raises:
        ValueError: a shape or device does not match, or an index is out of range (checked on a CPU, and elsewhere under
            ``SPPO_KERNELS_CHECK=1``; unchecked, the logit is NaN).
        TypeError: a tensor has the wrong kind of dtype.
    """
    _check(hidden, weight, last_index, bias)
    backend = pick_backend(backend, hidden)
    last_index = last_index.long()
    if backend == "reference":
        return _reference_logits(hidden, weight, last_index, bias)
    hidden, weight, bias = _canonical(hidden, weight, bias)
    return op.prompt_value_logits(hidden, weight, bias, last_index, backend=backend)


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
    """Compute the critic's binary cross-entropy against verified outcomes, with values and advantages.

    Source: SPPO (arXiv 2604.08865): the critic is P(success | prompt), the advantage R - V.

    ``hidden``, ``weight``, ``last_index``, ``bias`` and ``backend`` are those of :func:`prompt_value_logits`.

    Args:
        outcomes: ``[B]``, the reward of each prompt's response, in ``[0, 1]``.
        normalizer: replaces the batch size in the mean (the number of outcomes of the complete update); greater than 0.

    Returns:
        ``PromptValueOutput(loss, logits, values, advantages)``; the loss of an empty batch is 0.

    Raises:
        ValueError, TypeError: as in :func:`prompt_value_logits`; also for outcomes outside ``[0, 1]``, checked under
            the same conditions.
    """
    _check(hidden, weight, last_index, bias)
    check_tensor(outcomes=outcomes)
    check_shape(last_index.shape, "one per prompt", outcomes=outcomes)
    check_device(hidden.device, outcomes=outcomes)
    divisor = as_normalizer(max(last_index.shape[0], 1) if normalizer is None else normalizer, hidden.device)
    backend = pick_backend(backend, hidden)
    if backend == "reference":
        check_outcomes(outcomes)
        check_normalizer_value(divisor)
        logits = _reference_logits(hidden, weight, last_index, bias)
        outcomes = outcomes.detach().to(logits.dtype)
        losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, outcomes, reduction="none")
        values = logits.detach().sigmoid()
        return PromptValueOutput(losses.sum() / divisor.to(logits.dtype), logits, values, outcomes - values)
    hidden, weight, bias = _canonical(hidden, weight, bias)
    output = PromptValueOutput(
        *op.prompt_value_loss(
            hidden=hidden,
            weight=weight,
            bias=bias,
            last_index=last_index,
            outcomes=outcomes,
            normalizer=divisor,
            backend=backend,
        )
    )
    return output._replace(values=output.values.detach(), advantages=output.advantages.detach())


def reference_logits(hidden: Tensor, weight: Tensor, last_index: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """Definition of :func:`prompt_value_logits`: plain differentiable PyTorch in float32 or float64."""
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
    """Definition of :func:`prompt_value_loss`: plain differentiable PyTorch in float32 or float64."""
    return prompt_value_loss(
        hidden, weight, last_index, outcomes, bias=bias, normalizer=normalizer, backend="reference"
    )


def _reference_logits(hidden: Tensor, weight: Tensor, last_index: Tensor, bias: Tensor | None) -> Tensor:
    check_last_index(last_index, hidden.shape[-2])
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
        reject("last_index", f"shape {tuple(last_index.shape)}", "of shape [B], one per prompt")
    if bias is not None and bias.numel() != 1:
        reject("bias", f"shape {tuple(bias.shape)}", "a single element")
    check_device(hidden.device, weight=weight, last_index=last_index, bias=bias)


def _canonical(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return hidden as [B, T, H], or [1, N, H] if packed (all prompts are in one row), weight [H] and bias [1]."""
    rows = hidden if hidden.ndim == 3 else hidden.unsqueeze(0)
    return rows, weight.reshape(-1), None if bias is None else bias.reshape(1)
