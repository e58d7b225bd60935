"""selective_logprobs: log-probability of one label per row, and the entropy of the row, from given logits.

    z = cap(x) / tau,  cap(x) = s tanh(x / s) or x      lse = log sum exp z      p = exp(z - lse)
    logprob = z[label] - lse                            entropy = lse - sum p z
    dx = (g_l (onehot(label) - p) - g_e p (log p + entropy)) * cap'(x) / tau

Traffic, in elements of x: forward reads N*V; backward reads N*V and writes N*V. Three float32 per row are saved for
backward: the row's maximum, log sum exp(z - maximum) and the entropy. Maximum and logarithm stay separate because their
sum, at logits around 1e4, would round away what p in the gradient needs.

With the sampler's support of each row, only its logits are read (support_passes).

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
from .support_passes import SUPPORT_PASSES, Support, check_support, check_support_values


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
    support: tuple[Tensor, Tensor] | None = None,
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
        support: ``(token_ids, offsets)``, integers ``[M]`` and ``[N + 1]``, for N labels: the sampler kept
            ``token_ids[offsets[t] : offsets[t + 1]]`` for row t, by top-k, top-p or min-p. Log-probability and entropy
            are then those of the renormalized distribution over these tokens, and only their logits are read. An empty
            range stands for all V.
        backend: ``"reference"``, ``"torch"``, ``"triton"``, or None for triton on an accelerator and torch elsewhere.

    Returns:
        ``LogprobOutput(logprobs, entropy)``: both ``[...]``, float32, differentiable in ``logits``.

    Raises:
        ValueError: a shape or device does not match, temperature or softcap is out of range, or a label is outside
            ``[0, V)`` (checked on a CPU, and elsewhere under ``SPPO_KERNELS_CHECK=1``; unchecked, such a row is NaN),
            or a support does not have its label, or has a token twice or outside ``[0, V)`` (checked likewise).
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
    checked_support = check_support(support, labels)
    backend = pick_backend(backend, logits)
    labels = labels.long()
    if backend == "reference":
        return reference(
            logits,
            labels,
            temperature=temperature,
            softcap=softcap,
            ignore_index=ignore_index,
            support=checked_support,
        )
    support_ids, support_offsets = checked_support or (None, None)
    # [:, :-1] of [B, T, V] is not one block of rows; with two leading strides it is still read in place.
    rows = logits if logits.ndim == 3 else logits.reshape(1, -1, logits.shape[-1])
    output = RowResults(
        *_selective_logprobs(
            logits=rows,
            labels=labels.reshape(-1),
            temperature=temperature_per_row(temperature, labels),
            support_ids=support_ids,
            support_offsets=support_offsets,
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
    support: tuple[Tensor, Tensor] | None = None,
) -> LogprobOutput:
    """Definition of ``selective_logprobs``: plain differentiable PyTorch in float32, or float64 for float64 logits."""
    check_label_and_temperature_values(labels, temperature, logits.shape[-1], ignore_index)
    z = logits if logits.dtype == torch.float64 else logits.float()
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    z = z / (temperature.to(z.dtype).unsqueeze(-1) if isinstance(temperature, Tensor) else temperature)
    keep = labels != ignore_index
    if support is not None:
        z = z.masked_fill(~_kept(Support(*support), labels, logits.shape[-1], ignore_index), float("-inf"))
    z = torch.where(keep.unsqueeze(-1), z, 0.0)  # the contents of an ignored row must not reach a gradient
    logp = torch.log_softmax(z, dim=-1)
    logprobs = logp.gather(-1, torch.where(keep, labels, 0).unsqueeze(-1)).squeeze(-1)
    # p log p is 0 where p is 0. log p is -inf there, and 0 * -inf would be NaN, also in backward.
    p_logp = torch.where(logp.exp() > 0, logp.exp() * torch.where(logp.exp() > 0, logp, 0.0), 0.0)
    return LogprobOutput(torch.where(keep, logprobs, 0.0), torch.where(keep, -p_logp.sum(-1), 0.0))


def _kept(support: Support, labels: Tensor, vocab: int, ignore_index: int) -> Tensor:
    """Return which logits are in their row's support, ``[..., V]``; all where it is empty."""
    check_support_values(support, labels.reshape(-1), vocab, ignore_index)
    kept = (support.sizes() == 0)[:, None].repeat(1, vocab)
    kept[support.tokens(), support.token_ids.long().clamp(0, vocab - 1)] = True  # of ignored rows anything
    return kept.view(*labels.shape, vocab)


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
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor,
    support_ids: Tensor | None,
    support_offsets: Tensor | None,
    *,
    softcap: float,
    ignore_index: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the fields of RowResults from logits [B, T, V], and labels and temperature [B * T]."""
    vocab = logits.shape[-1]
    check_label_and_temperature_values(labels, temperature, vocab, ignore_index)
    labels = labels.contiguous()
    out = RowResults.empty(len(labels), logits.device)
    gathered = None
    if support_ids is not None and support_offsets is not None:
        support = Support(support_ids, support_offsets)
        check_support_values(support, labels, vocab, ignore_index)
        gathered = _Gathered(logits, labels, support, ignore_index)
    ROW_PASSES[backend].forward(
        logits=logits,
        labels=labels if gathered is None else gathered.dense_labels,
        temperature=temperature,
        softcap=softcap,
        ignore_index=ignore_index,
        out=out,
    )
    if gathered is not None:
        SUPPORT_PASSES[backend].forward(
            logits=gathered.logits(),
            support=gathered.support,
            labels=labels,
            temperature=temperature,
            softcap=softcap,
            ignore_index=ignore_index,
            vocab=vocab,
            out=out,
        )
    return out


class _Gathered:
    """The rows of logits [B, T, V] with a support, and where its entries are."""

    def __init__(self, logits: Tensor, labels: Tensor, support: Support, ignore_index: int) -> None:
        self.support = support.safe()
        self.token = self.support.tokens()
        sizes, ids = self.support.sizes(), self.support.token_ids
        has_support = (labels != ignore_index) & (sizes > 0)
        # A token alone has a log-probability of 0 and no gradient.
        self.is_read = (has_support & (sizes > 1))[self.token] & (ids >= 0) & (ids < logits.shape[-1])
        self.dense_labels = labels.masked_fill(has_support, ignore_index)  # of rows for the row passes
        self._all = logits

    def at(self, entry: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the indices in [B, T, V] of entries."""
        token = self.token[entry]
        length = max(1, self._all.shape[1])
        return token // length, token % length, self.support.token_ids[entry]

    def entries(self, selected: Tensor) -> Tensor:
        """Return which entries belong to the selected rows. The host waits for the device."""
        return (self.is_read & selected[self.token]).nonzero().squeeze(-1)

    def logits(self) -> Tensor:
        """Gather the logits of all entries, float32 [M]; 0 for those that are not read."""
        batch, row, column = self.at(torch.arange(len(self.token), device=self.token.device))
        gathered = self._all[batch, row, torch.where(self.is_read, column, 0)].float()
        return torch.where(self.is_read, gathered, 0.0)


@_selective_logprobs.register_fake
def _(logits, labels, temperature, support_ids, support_offsets, *, softcap, ignore_index, backend):
    return RowResults.empty(len(labels), logits.device)


@operation("selective_logprobs_backward")
def _selective_logprobs_backward(
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor,
    support_ids: Tensor | None,
    support_offsets: Tensor | None,
    entropy: Tensor,
    row_stats: Tensor,
    *,
    softcap: float,
    ignore_index: int,
    backend: str,
) -> Tensor:
    labels, grad_logprobs, grad_entropy = labels.contiguous(), grad_logprobs.contiguous(), grad_entropy.contiguous()
    gathered = None
    if support_ids is not None and support_offsets is not None:
        gathered = _Gathered(logits, labels, Support(support_ids, support_offsets), ignore_index)
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    ROW_PASSES[backend].backward(
        grad_logprobs=grad_logprobs,
        grad_entropy=grad_entropy,
        logits=logits,
        labels=labels if gathered is None else gathered.dense_labels,
        temperature=temperature,
        entropy=entropy,
        row_stats=row_stats,
        softcap=softcap,
        ignore_index=ignore_index,
        grad_logits=grad_logits,
    )
    if gathered is not None:
        entry = gathered.entries((grad_logprobs != 0) | (grad_entropy != 0))
        grads = SUPPORT_PASSES[backend].backward(
            logits=gathered.logits(),
            support=gathered.support,
            labels=labels,
            temperature=temperature,
            softcap=softcap,
            entry=entry,
            token=gathered.token[entry],
            entropy=entropy,
            row_stats=row_stats,
            grad_logprobs=grad_logprobs,
            grad_entropy=grad_entropy,
        )
        grad_logits[gathered.at(entry)] = grads.to(grad_logits.dtype)
    return grad_logits


@_selective_logprobs_backward.register_fake
def _(grad_logprobs, grad_entropy, logits, *tensors, **settings):
    return logits.new_empty(logits.shape)


def _save(ctx, inputs, keyword_only_inputs, output):
    output = RowResults(*output)
    ctx.settings = keyword_only_inputs
    ctx.save_for_backward(*inputs, output.entropy, output.row_stats)


def _grad(ctx, grad_logprobs, grad_entropy, _):
    logits, labels, temperature, support_ids, support_offsets, entropy, row_stats = ctx.saved_tensors
    grad_logits = _selective_logprobs_backward(
        grad_logprobs=grad_logprobs,
        grad_entropy=grad_entropy,
        logits=logits,
        labels=labels,
        temperature=temperature,
        support_ids=support_ids,
        support_offsets=support_offsets,
        entropy=entropy,
        row_stats=row_stats,
        **ctx.settings,
    )
    return grad_logits, None, None, None, None


_selective_logprobs.register_autograd(_grad, setup_context=_save)
