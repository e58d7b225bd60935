"""PyTorch backend of the support passes: reductions over segments, and elementwise operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..row_passes import RowResults
from ..row_passes.torch import softcap_derivative
from .arguments import Support


class SupportPass(NamedTuple):
    """Forward and backward pass of one backend over the logits [M] of N tokens' supports. Arguments are named.

    forward(logits, support, labels, temperature, softcap, ignore_index, vocab, out): fills the rows of ``out``, a
        ``RowResults``, of tokens that have a loss and a support, and leaves the others as they are. A support without
        its label gives NaN. An entry outside [0, vocab) is left out.
    backward(logits, support, labels, temperature, softcap, entry, token, entropy, row_stats, grad_logprobs,
        grad_entropy): returns the gradients of the logits of entries ``entry`` [E], which are in [0, vocab) and belong
        to ``token`` [E]
    """

    forward: Callable[..., None]
    backward: Callable[..., Tensor]


def _forward(
    *,
    logits: Tensor,
    support: Support,
    labels: Tensor,
    temperature: Tensor,
    softcap: float,
    ignore_index: int,
    vocab: int,
    out: RowResults,
) -> None:
    ids, token, sizes = support.token_ids, support.tokens(), support.sizes()
    inside = (ids >= 0) & (ids < vocab)
    y = torch.where(inside, softcap * torch.tanh(logits / softcap) if softcap else logits, float("-inf"))

    def reduce(x: Tensor, how: str) -> Tensor:
        return torch.segment_reduce(x, how, offsets=support.offsets, initial=float("-inf") if how == "max" else 0.0)

    top = reduce(y, "max")
    z = (y - top[token]) / temperature[token]
    e = z.exp()
    total = reduce(e, "sum")
    weighted = reduce(torch.where(e > 0, e * z, 0.0), "sum")
    target = torch.full_like(top, float("nan"))
    at_label = ids == labels[token]
    target[token[at_label]] = z[at_label]
    keep = (sizes > 0) & (labels != ignore_index)
    log_total = total.log()
    for field, value in (
        (out.logprobs, target - log_total),
        (out.entropy, log_total - weighted / total),
        (out.row_stats[0], top),
        (out.row_stats[1], log_total),
    ):
        field.copy_(torch.where(keep, value, field))


def _backward(
    *,
    logits: Tensor,
    support: Support,
    labels: Tensor,
    temperature: Tensor,
    softcap: float,
    entry: Tensor,
    token: Tensor,
    entropy: Tensor,
    row_stats: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
) -> Tensor:
    x, ids, tau = logits[entry], support.token_ids[entry], temperature[token]
    ratio = x / softcap if softcap else x
    y = softcap * torch.tanh(ratio) if softcap else x
    log_p = (y - row_stats[0, token]) / tau - row_stats[1, token]
    p = log_p.exp()
    grad = grad_logprobs[token] * torch.where(ids == labels[token], 1 - p, -p)
    if grad_entropy is not None:
        grad -= grad_entropy[token] * torch.where(p > 0, p * (log_p + entropy[token]), 0.0)
    if softcap:
        grad *= softcap_derivative(ratio)
    return grad / tau


TORCH_SUPPORT_PASS = SupportPass(_forward, _backward)
