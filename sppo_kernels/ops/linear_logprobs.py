"""linear_logprobs: log-probabilities and entropies straight from hidden states; the logits never exist as a whole.

    logits = hidden weight^T + bias, then as in selective_logprobs

Only tokens that bear loss are projected. They go by in chunks; of each chunk the vendor's matrix product makes the
logits in float32, one row pass takes what is needed, and the chunk is dropped:

    forward     hidden chunk --(W^T)--> logits [C, V] --(row pass)--> logprob, entropy, row maximum, log-sum
    backward    hidden chunk --(W^T)--> logits [C, V] --(row pass)--> E = d loss / d logits [C, V]
                E --(W)--> d hidden chunk        E^T --(hidden chunk)--> added to d weight, float32

With 2 N H V operations a pass: one forward, three backward (two where hidden or weight is frozen). Memory beyond inputs
and gradients: the chunk, 4 C V bytes of float32 logits and C V elements of E, and 4 V H bytes of d weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sppo_kernels._common import (
    autocast_is_on,
    check_choice,
    check_device,
    check_floating,
    check_integer,
    check_shape,
    matmul,
    pick_backend,
    reject,
)
from sppo_kernels.ops.selective_logprobs import (
    ROW_PASSES,
    LogprobOutput,
    check_label_and_temperature_values,
    check_softcap,
    check_temperature,
    temperature_per_row,
)
from sppo_kernels.ops.selective_logprobs import reference as selective_reference

BACKWARDS = ("auto", "recompute")
# Logits alive at a time. More on an accelerator: d weight is read and written once a chunk, 8 V H bytes, which a chunk
# of C tokens has to hide behind 6 C H V operations.
_CHUNK_ELEMENTS_CPU = 1 << 25
_CHUNK_ELEMENTS_ACCELERATOR = 1 << 28


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    backward: str = "auto",
    logits_budget_bytes: int | None = None,
    mass_tolerance: float = 1e-4,
    group: Any = None,
    backend: str | None = None,
) -> LogprobOutput:
    """Log-probability of each label and entropy of each token, from hidden states and the output embedding.

    Under autocast, ``hidden``, ``weight`` and ``bias`` are cast as ``torch.nn.functional.linear`` would cast them.

    Args:
        hidden: ``[..., H]``, float16, bfloat16 or float32.
        weight: ``[V, H]``, the dtype of ``hidden``.
        labels: ``[...]``, integers in ``[0, V)`` or ``ignore_index``.
        bias: ``[V]`` or None.
        temperature: divides the logits; a float greater than 0, or a tensor ``[...]`` of one a token (not
        differentiated).
        softcap: ``s`` in ``s * tanh(logits / s)``, applied before the temperature; None for no cap.
        ignore_index: marks a token without loss: it is not projected, its results and gradients are exactly 0.
        backward: ``"recompute"`` makes each chunk of logits again in backward; ``"auto"`` chooses, today always that.
        logits_budget_bytes: bound on what later modes may keep between forward and backward; recompute keeps nothing.
        mass_tolerance: for later modes that drop small probabilities, in (0, 1); recompute is exact.
        group: reserved for a vocabulary-parallel ``weight``; must be None.
        backend: ``"reference"``, ``"torch"``, ``"triton"``, or None for triton on an accelerator and torch elsewhere.

    Returns:
        ``LogprobOutput(logprobs, entropy)``: both ``[...]``, float32, differentiable in ``hidden``, ``weight``,
        ``bias``.

    Raises:
        ValueError: a wrong shape, device or bound; a label outside ``[0, V)`` (looked at on a CPU, and elsewhere under
            ``SPPO_KERNELS_CHECK=1``; without it such a token is NaN).
        TypeError: a tensor of the wrong kind, or ``hidden`` and ``weight`` of different dtypes.
    """
    check_floating(hidden=hidden, weight=weight, bias=bias)
    check_integer(labels=labels)
    if hidden.ndim == 0 or hidden.shape[-1] == 0:
        reject("hidden", f"shape {tuple(hidden.shape)}", "[..., H] with at least one column")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        reject("weight", f"shape {tuple(weight.shape)}", f"[V, H] with H = {hidden.shape[-1]}")
    check_shape(hidden.shape[:-1], "the shape of hidden without its last dimension", labels=labels)
    check_shape(weight.shape[:1], "one a row of weight", bias=bias)
    check_device(hidden.device, weight=weight, labels=labels, bias=bias)
    check_softcap(softcap)
    check_temperature(temperature, labels)
    check_choice("backward", backward, BACKWARDS)
    if logits_budget_bytes is not None and not logits_budget_bytes >= 0:
        reject("logits_budget_bytes", logits_budget_bytes, "at least 0, or None")
    if not 0 < mass_tolerance < 1:
        reject("mass_tolerance", mass_tolerance, "in (0, 1)")
    if group is not None:
        reject("group", group, "None: vocabulary-parallel weights are not supported yet")
    backend = pick_backend(backend, hidden)
    labels = labels.long()
    if autocast_is_on(hidden.device):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if hidden.dtype != weight.dtype:
        reject("weight", weight.dtype, f"of the dtype of hidden, {hidden.dtype} (cast one, or use autocast)", TypeError)
    if backend == "reference":
        return reference(
            hidden, weight, labels, bias=bias, temperature=temperature, softcap=softcap, ignore_index=ignore_index
        )
    logprobs, entropy, _ = _linear_logprobs(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        labels.reshape(-1),
        temperature_per_row(temperature, labels),
        softcap or 0.0,
        ignore_index,
        backend,
    )
    return LogprobOutput(logprobs.view(labels.shape), entropy.view(labels.shape))


def reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> LogprobOutput:
    """The definition: all logits at once, plain differentiable PyTorch in float32, or float64 for float64 input."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    hidden = torch.where((labels != ignore_index).unsqueeze(-1), hidden, 0.0)  # what an ignored token holds stays out
    logits = matmul(hidden.to(dtype), weight.to(dtype).t())
    if bias is not None:
        logits = logits + bias.to(dtype)
    return selective_reference(logits, labels, temperature=temperature, softcap=softcap, ignore_index=ignore_index)


# The registered operation


@torch.library.custom_op("sppo_kernels::linear_logprobs", mutates_args=())
def _linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperature: Tensor,
    softcap: float,
    ignore_index: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [N, H], weight [V, H], bias [V], labels and temperature [N] -> logprobs, entropy [N], stats [2, N]."""
    check_label_and_temperature_values(labels, temperature, weight.shape[0], ignore_index)
    n = labels.shape[0]
    logprobs, entropy, stats = (hidden.new_zeros(shape, dtype=torch.float32) for shape in ((n,), (n,), (2, n)))
    project = _Projection(weight, bias)
    for index in _chunks(labels != ignore_index, weight.shape[0]):
        logprobs[index], entropy[index], stats[:, index] = ROW_PASSES[backend].forward(
            project(hidden[index]), labels[index], temperature[index], softcap, ignore_index
        )
    return logprobs, entropy, stats


@_linear_logprobs.register_fake
def _(hidden, weight, bias, labels, temperature, softcap, ignore_index, backend):
    n = labels.shape[0]
    return tuple(hidden.new_empty(shape, dtype=torch.float32) for shape in ((n,), (n,), (2, n)))


@torch.library.custom_op("sppo_kernels::linear_logprobs_backward", mutates_args=())
def _linear_logprobs_backward(
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperature: Tensor,
    entropy: Tensor,
    stats: Tensor,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    softcap: float,
    ignore_index: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; an empty tensor for one that is not needed."""
    dh = torch.zeros_like(hidden if needs_hidden else hidden[:0], memory_format=torch.contiguous_format)
    dw = torch.zeros(weight.shape if needs_weight else (0,), dtype=torch.float32, device=weight.device)
    db = torch.zeros(weight.shape[0] if needs_bias else 0, dtype=torch.float32, device=weight.device)
    project = _Projection(weight, bias)
    has_gradient = (labels != ignore_index) & ((grad_logprobs != 0) | (grad_entropy != 0))
    for index in _chunks(has_gradient, weight.shape[0]):
        h = hidden[index]
        e = project.weight.new_empty(len(index), weight.shape[0])
        ROW_PASSES[backend].backward(
            grad_logprobs[index],
            grad_entropy[index],
            project(h),
            labels[index],
            temperature[index],
            entropy[index],
            stats[:, index],
            softcap,
            ignore_index,
            e.unsqueeze(0),
        )
        if needs_hidden:
            dh[index] = project.product(e, project.weight).to(dh.dtype)
        if needs_weight:
            dw += project.product(e.t(), h)
        if needs_bias:
            db += e.sum(0, dtype=torch.float32)
    return dh, dw.to(weight.dtype), db.to(weight.dtype if bias is None else bias.dtype)


@_linear_logprobs_backward.register_fake
def _(
    grad_logprobs,
    grad_entropy,
    hidden,
    weight,
    bias,
    labels,
    temperature,
    entropy,
    stats,
    needs_hidden,
    needs_weight,
    needs_bias,
    softcap,
    ignore_index,
    backend,
):
    dh = hidden.new_empty(hidden.shape if needs_hidden else (0, hidden.shape[1]))
    dw = weight.new_empty(weight.shape if needs_weight else (0,))
    db = (weight if bias is None else bias).new_empty(weight.shape[0] if needs_bias else 0)
    return dh, dw, db


def _save(ctx, inputs, output):
    hidden, weight, bias, labels, temperature, *ctx.settings = inputs
    ctx.save_for_backward(hidden, weight, bias, labels, temperature, output[1], output[2])


def _grad(ctx, grad_logprobs, grad_entropy, _):
    needs = ctx.needs_input_grad[:3]
    grads = _linear_logprobs_backward(grad_logprobs, grad_entropy, *ctx.saved_tensors, *needs, *ctx.settings)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None, None, None


_linear_logprobs.register_autograd(_grad, setup_context=_save)


# What the backends share: chunks and matrix products. They differ in the row pass alone.


def _chunks(keep: Tensor, vocab: int) -> tuple[Tensor, ...]:
    """Indices of the tokens to project, as many at a time as the chunk of logits may hold. One device sync."""
    elements = _CHUNK_ELEMENTS_CPU if keep.device.type == "cpu" else _CHUNK_ELEMENTS_ACCELERATOR
    return keep.nonzero().squeeze(-1).split(max(64, elements // vocab))


class _Projection:
    """Products with the output embedding that give float32, from half-precision factors where the device can."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        half = weight.dtype in (torch.float16, torch.bfloat16)
        self.mixed = half and weight.device.type == "cuda" and torch.version.hip is None
        # Elsewhere float32 copies, made once a call: rounding logits to half precision is what must not happen.
        self.weight = weight if self.mixed else weight.float()
        self.bias = None if bias is None else bias.float()

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        if self.mixed:
            return torch.mm(a, b, out_dtype=torch.float32)
        return matmul(a.float(), b.float())

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits of a chunk, [1, C, V] float32."""
        logits = self.product(hidden, self.weight.t())
        return (logits if self.bias is None else logits.add_(self.bias)).unsqueeze(0)
