"""selective_logprobs: log-probability of one label per row, and the entropy of the row, from given logits.

    z = cap(x) / tau,  cap(x) = s tanh(x / s) or x      lse = log sum exp z      p = exp(z - lse)
    logprob = z[label] - lse                            entropy = lse - sum p z
    dx = (g_l (onehot(label) - p) - g_e p (log p + entropy)) * cap'(x) / tau

Traffic, in elements of x: forward reads N*V; backward reads N*V and writes N*V. Three float32 per row are saved for
backward: the row's maximum, log sum exp(z - maximum) and the entropy. Maximum and logarithm stay separate because their
sum, at logits around 1e4, would round away what p in the gradient needs.

A row whose label is ``ignore_index`` is not read. A row whose upstream gradients are both zero is not read again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._backend import pick_backend
from .._registration import operation
from .._validation import (
    check_device,
    check_floating,
    check_integer,
    check_number,
    check_shape,
    reject,
    values_are_checked,
)
from .row_passes import ROW_PASSES, RowResults


class LogprobOutput(NamedTuple):
    """Log-probabilities and entropies in nats, float32, in the shape of the labels."""

    logprobs: Tensor
    entropy: Tensor


def selective_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    backend: str | None = None,
) -> LogprobOutput:
    """Compute the log-probability of each label and the entropy of each row in one read of the logits.

    Args:
        logits: ``[..., V]``, floating-point, any strides; ``-inf`` marks an impossible token. float64 is computed
            in float32, except with ``backend="reference"``.
        labels: ``[...]``, integers in ``[0, V)`` or ``ignore_index``.
        temperature: divides the logits; a float greater than 0, or a tensor ``[...]`` with one per row (not
            differentiated).
        softcap: ``s`` in ``s * tanh(logits / s)``, applied before the temperature (Gemma 2); None for no cap.
        ignore_index: marks a row without a loss: log-probability, entropy and gradients are exactly 0.
        backend: ``"reference"``, ``"torch"``, ``"triton"``, or None for triton on an accelerator and torch elsewhere.

    Returns:
        ``LogprobOutput(logprobs, entropy)``: both ``[...]``, float32, differentiable in ``logits``.

    Raises:
        ValueError: a shape or device does not match, temperature or softcap is out of range, or a label is outside
            ``[0, V)`` (checked on a CPU, and elsewhere under ``SPPO_KERNELS_CHECK=1``; unchecked, such a row is NaN).
        TypeError: logits are not floating-point, or labels are not integers.
    """
    check_floating(logits=logits)
    check_integer(labels=labels)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        reject("logits", f"shape {tuple(logits.shape)}", "[..., V] with at least one column")
    check_shape(logits.shape[:-1], "the shape of logits without its last dimension", labels=labels)
    check_device(logits.device, labels=labels)
    check_softcap(softcap)
    check_temperature(temperature, labels)
    backend = pick_backend(backend, logits)
    labels = labels.long()
    if backend == "reference":
        return reference(logits, labels, temperature=temperature, softcap=softcap, ignore_index=ignore_index)
    # [:, :-1] of [B, T, V] is not one block of rows; with two leading strides it is still read in place.
    rows = logits if logits.ndim == 3 else logits.reshape(1, -1, logits.shape[-1])
    output = RowResults(
        *_selective_logprobs(
            logits=rows,
            labels=labels.reshape(-1),
            temperature=temperature_per_row(temperature, labels),
            softcap=softcap or 0.0,
            ignore_index=ignore_index,
            backend=backend,
        )
    )
    return LogprobOutput(output.logprobs.view(labels.shape), output.entropy.view(labels.shape))


def reference(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> LogprobOutput:
    """Definition of ``selective_logprobs``: plain differentiable PyTorch in float32, or float64 for float64 logits."""
    check_label_and_temperature_values(labels, temperature, logits.shape[-1], ignore_index)
    z = logits if logits.dtype == torch.float64 else logits.float()
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    z = z / (temperature.to(z.dtype).unsqueeze(-1) if isinstance(temperature, Tensor) else temperature)
    keep = labels != ignore_index
    z = torch.where(keep.unsqueeze(-1), z, 0.0)  # the contents of an ignored row must not reach a gradient
    logp = torch.log_softmax(z, dim=-1)
    logprobs = logp.gather(-1, torch.where(keep, labels, 0).unsqueeze(-1)).squeeze(-1)
    # p log p is 0 where p is 0. log p is -inf there, and 0 * -inf would be NaN, also in backward.
    p_logp = torch.where(logp.exp() > 0, logp.exp() * torch.where(logp.exp() > 0, logp, 0.0), 0.0)
    return LogprobOutput(torch.where(keep, logprobs, 0.0), torch.where(keep, -p_logp.sum(-1), 0.0))


def check_temperature(temperature: float | Tensor, labels: Tensor) -> None:
    """Check for a float greater than 0, or a floating-point tensor in the shape of the labels."""
    if isinstance(temperature, Tensor):
        check_floating(temperature=temperature)
        check_shape(labels.shape, "one per label", temperature=temperature)
        check_device(labels.device, temperature=temperature)
        return
    check_number("temperature", temperature)
    if not temperature > 0:
        reject("temperature", temperature, "greater than 0 (for greedy decoding score with temperature=1.0)")


def check_softcap(softcap: float | None) -> None:
    """Check for None, or a float greater than 0."""
    if softcap is None:
        return
    check_number("softcap", softcap)
    if not 0 < softcap < float("inf"):
        reject("softcap", softcap, "greater than 0 and finite, or None for no cap")


def temperature_per_row(temperature: float | Tensor, labels: Tensor) -> Tensor:
    """Return ``[N]`` float32; a single temperature is one element expanded to N (stride 0)."""
    if isinstance(temperature, Tensor):
        return temperature.detach().float().reshape(-1)
    return torch.full((1,), temperature, dtype=torch.float32, device=labels.device).expand(labels.numel())


def check_label_and_temperature_values(
    labels: Tensor, temperature: float | Tensor, vocab: int, ignore_index: int
) -> None:
    """Check that labels are in [0, vocab) or ``ignore_index``, and temperatures positive. Reads the values."""
    if not labels.numel() or not values_are_checked(labels):
        return
    bad = (labels != ignore_index) & ((labels < 0) | (labels >= vocab))
    if bad.any():
        reject("labels", int(labels[bad][0]), f"in [0, {vocab}) or ignore_index={ignore_index}")
    if isinstance(temperature, Tensor) and not temperature.min() > 0:
        reject("temperature", float(temperature.min()), "greater than 0")


# The registered operation


@operation("selective_logprobs")
def _selective_logprobs(
    logits: Tensor, labels: Tensor, temperature: Tensor, *, softcap: float, ignore_index: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the fields of RowResults from logits [B, T, V], labels [B * T] and temperature [B * T]."""
    check_label_and_temperature_values(labels, temperature, logits.shape[-1], ignore_index)
    out = RowResults.empty(len(labels), logits.device)
    ROW_PASSES[backend].forward(
        logits=logits,
        labels=labels.contiguous(),
        temperature=temperature,
        softcap=softcap,
        ignore_index=ignore_index,
        out=out,
    )
    return out


@_selective_logprobs.register_fake
def _(logits, labels, temperature, *, softcap, ignore_index, backend):
    return RowResults.empty(len(labels), logits.device)


@operation("selective_logprobs_backward")
def _selective_logprobs_backward(
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor,
    entropy: Tensor,
    row_stats: Tensor,
    *,
    softcap: float,
    ignore_index: int,
    backend: str,
) -> Tensor:
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    ROW_PASSES[backend].backward(
        grad_logprobs=grad_logprobs.contiguous(),
        grad_entropy=grad_entropy.contiguous(),
        logits=logits,
        labels=labels.contiguous(),
        temperature=temperature,
        entropy=entropy,
        row_stats=row_stats,
        softcap=softcap,
        ignore_index=ignore_index,
        grad_logits=grad_logits,
    )
    return grad_logits


@_selective_logprobs_backward.register_fake
def _(grad_logprobs, grad_entropy, logits, *tensors, **settings):
    return logits.new_empty(logits.shape)


def _save(ctx, inputs, keyword_only_inputs, output):
    logits, labels, temperature = inputs
    output = RowResults(*output)
    ctx.settings = keyword_only_inputs
    ctx.save_for_backward(logits, labels, temperature, output.entropy, output.row_stats)


def _grad(ctx, grad_logprobs, grad_entropy, _):
    logits, labels, temperature, entropy, row_stats = ctx.saved_tensors
    grad_logits = _selective_logprobs_backward(
        grad_logprobs=grad_logprobs,
        grad_entropy=grad_entropy,
        logits=logits,
        labels=labels,
        temperature=temperature,
        entropy=entropy,
        row_stats=row_stats,
        **ctx.settings,
    )
    return grad_logits, None, None


_selective_logprobs.register_autograd(_grad, setup_context=_save)
