"""linear_logprobs: log-probabilities and entropies straight from hidden states; the logits never exist as a whole.

    logits = hidden weight^T + adapter + bias, then as in selective_logprobs

Only tokens that bear loss are projected; they go by in chunks, and what backward needs of them is kept or made again:
``_head.py`` has how, and _sparse.py how a few entries of the gradient do for a peaked distribution.

A pass is 2 N H V operations. Forward 1, d hidden 1, d weight 1: three with ``backward="cache"``; ``"recompute"`` makes
the logits again, four. ``"sparse"`` takes one, and three more for the tokens whose probability is too spread out.
"""

from __future__ import annotations

import logging
import warnings
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor
from torch.utils.flop_counter import register_flop_formula

from .. import _coverage as coverage
from .. import _sparse as sparse
from .. import _vocab_shard as vocab_shard
from .._backend import (
    NAMESPACE,
    OPS,
    autocast_is_on,
    matmul,
    pick_backend,
)
from .._head import EXACT_FROM_KEPT, Gradients, Head, Kept, Results, plan, row_stride, where
from .._validation import (
    check_choice,
    check_device,
    check_floating,
    check_int,
    check_integer,
    check_number,
    check_shape,
    reject,
)
from .selective_logprobs import (
    LogprobOutput,
    check_label_and_temperature_values,
    check_softcap,
    check_temperature,
    temperature_per_row,
)
from .selective_logprobs import reference as selective_reference

BACKWARDS = ("auto", "recompute", "cache", "sparse")
_CHUNK_BYTES_CPU = 1 << 28
_CHUNK_BYTES_ACCELERATOR = 1 << 31

_log = logging.getLogger(__name__)


class Certificate(NamedTuple):
    """Which way each token's gradient takes, and what is left out of it; nothing here waits for the device.

    ``sparse_share``, ``kept_share``, ``mean_entries``, ``mean_dropped_mass`` and ``max_dropped_mass`` sum it up.

    ``dropped_mass`` ``[...]`` float32: the probability that is in none of a token's entries; 0 where the gradient is
    exact. The gradient of the loss by a token's logits is off by at most ``|c| dropped_mass / temperature`` in the L1
    norm, float32's rounding apart, in which a tolerance below 1e-6 drowns. ``entries`` ``[...]`` int32: how many
    entries; 0 for a token without loss; for a token on an exact path -2 if its gradient by the logits was kept whole,
    -1 if its logits are made again (with ``group``: of entries -1 if that is so on one rank or more, and -2 as on this
    one).
    """

    dropped_mass: Tensor
    entries: Tensor

    @property
    def mean_dropped_mass(self) -> Tensor:
        """Over the tokens that bear loss, 0-d."""
        return self.dropped_mass.sum() / self._bearing_loss

    @property
    def max_dropped_mass(self) -> Tensor:
        """0-d; 0 without tokens."""
        return torch.cat([self.dropped_mass.flatten(), self.dropped_mass.new_zeros(1)]).amax()

    @property
    def sparse_share(self) -> Tensor:
        """How many of the tokens that bear loss have entries, 0-d in [0, 1]."""
        return (self.entries > 0).sum() / self._bearing_loss

    @property
    def kept_share(self) -> Tensor:
        """Of how many of them the gradient by the logits was kept whole, 0-d in [0, 1]."""
        return (self.entries == EXACT_FROM_KEPT).sum() / self._bearing_loss

    @property
    def mean_entries(self) -> Tensor:
        """Of the tokens that have some, 0-d."""
        return self.entries.clamp(min=0).sum() / (self.entries > 0).sum().clamp(min=1)

    @property
    def _bearing_loss(self) -> Tensor:
        return (self.entries != 0).sum().clamp(min=1)


class LinearLogprobOutput(LogprobOutput):
    """``LogprobOutput(logprobs, entropy)`` with a ``certificate`` beside the two.

    Whatever takes tuples apart and makes them anew (``DistributedDataParallel`` with ``find_unused_parameters``, or
    ``tree_map``) knows of the two alone: take the certificate inside the module.
    """

    certificate: Certificate


def _with_certificate(logprobs: Tensor, entropy: Tensor, dropped: Tensor, entries: Tensor) -> LinearLogprobOutput:
    output = LinearLogprobOutput(logprobs, entropy)
    output.certificate = Certificate(dropped, entries)
    return output


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
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
) -> LinearLogprobOutput:
    """Log-probability of each label and entropy of each token, from hidden states and the output embedding.

    Under autocast, ``hidden``, ``weight``, ``bias`` and ``adapter`` are cast as ``torch.nn.functional.linear`` would
    cast them. What each call chose is in its ``certificate``, and logged at level DEBUG below the logger
    ``sppo_kernels``.

    Args:
        hidden: ``[..., H]``, float16, bfloat16 or float32: the last hidden states of the positions that predict
            ``labels`` (a causal model's position before each of them; nothing is shifted here).
        weight: ``[V, H]``, the dtype of ``hidden``; with ``group`` the rows of this rank.
        labels: ``[...]``, integers in ``[0, V)`` or ``ignore_index``.
        bias: ``[V]`` or None.
        adapter: ``(u, B)``, ``[..., r]`` and ``[V, r]`` of the dtype of ``hidden``: adds ``u B^T`` to the logits
            without a merged weight. LoRA (arXiv 2106.09685) on the head is ``(scaling * dropout(hidden) @ A^T, B)``;
            the gradient of ``A`` comes through ``u``.
        temperature: divides the logits; a float greater than 0, or a tensor ``[...]`` of one a token (not
        differentiated).
        softcap: ``s`` in ``s * tanh(logits / s)``, applied before the temperature; None for no cap.
        ignore_index: marks a token without loss: it is not projected, its results and gradients are exactly 0.
        backward: ``"recompute"`` makes each chunk of logits again in backward; ``"cache"`` keeps the gradient of the
            log-probabilities by the logits, ``V`` elements a token of the dtype of ``hidden``, and saves a quarter of
            the work; ``"sparse"`` keeps only the few largest entries of it, and saves nearly all of backward's work for
            tokens whose distribution is peaked (the others are recomputed); ``"auto"`` is ``"cache"`` for as many
            tokens as the budget allows, and ``"sparse"`` once calls before this one were seen to have peaked
            distributions (of a vocabulary of at least ``8 * max_entries``): name another for gradients that do not
            depend on those. A token whose entropy has a gradient is recomputed all the same, with a warning where that
            makes what was kept useless. Nothing is kept where nothing requires a gradient.
        logits_budget_bytes: how much of that gradient ``"cache"`` and ``"auto"`` may keep; the tokens beyond it are
            recomputed. None: everything in ``"cache"``; in ``"auto"`` a quarter of the device memory that is free at
            the time, 1 GiB on a CPU. A token takes ``V`` elements, rounded up to a multiple of 64. The last bits of
            gradients depend on how many tokens are kept. Entries do not count: they are at most ``8 * max_entries``
            bytes a token.
        chunk_bytes: memory for a block of tokens under way, at least 256 tokens; None: 2 GiB on an accelerator, 256 MiB
            on a CPU. The last bits of results depend on it.
        mass_tolerance: of ``"sparse"``, and ``"auto"`` where it is: the most probability that a token's entries may
            leave out, in (0, 1). The gradient of the loss by a token's logits is then off by at most
            ``|c| mass_tolerance / temperature``, summed over the vocabulary, with ``c`` the upstream gradient; what was
            left out is in ``certificate``.
        max_entries: likewise the most entries of a token, 1 to 1024, 8 bytes each; one that needs more is
            recomputed.
        group: the process group over which ``weight``, ``bias`` and ``adapter[1]`` are split by rows, in the order of
            the ranks, at least one row each. ``hidden``, ``labels``, ``adapter[0]``, what requires a gradient, every
            setting, and what is done with the results, must be the same on each rank: else gradients are silently
            wrong, or ranks crash or wait forever. Results and gradients of ``hidden`` then are the same too.
        backend: ``"reference"``, ``"torch"``, ``"triton"``, or None for triton on an accelerator and torch elsewhere.

    Returns:
        ``LinearLogprobOutput(logprobs, entropy)``: both ``[...]``, float32, differentiable in ``hidden``, ``weight``,
        ``bias`` and both of ``adapter``. Its attribute ``certificate`` is a :class:`Certificate`.

    Raises:
        ValueError: a wrong shape, device or bound; a label outside ``[0, V)`` (looked at on a CPU, and elsewhere under
            ``SPPO_KERNELS_CHECK=1``; without it such a token is NaN).
        TypeError: a tensor of the wrong kind (a DTensor, say), or ``hidden`` and ``weight`` of different dtypes.
    """
    settings = checked(
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
    if settings.backend == "reference":
        pairs = list(zip(settings.hiddens, settings.weights, strict=True))
        exact = reference(
            *pairs[0],
            labels.long(),
            bias=settings.bias,
            adapter=pairs[1] if adapter is not None else None,
            temperature=temperature,
            softcap=softcap,
            ignore_index=ignore_index,
        )
        nothing = torch.zeros(labels.shape, device=labels.device)
        return _with_certificate(*exact, nothing, nothing.int() - (labels != ignore_index).int())
    logprobs, entropy, _, dropped, entries, *_ = _linear_logprobs(*settings)
    return _with_certificate(*(x.view(labels.shape) for x in (logprobs, entropy, dropped.detach(), entries)))


def reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> LogprobOutput:
    """The definition: all logits at once, plain differentiable PyTorch in float32, or float64 for float64 input."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    keep = (labels != ignore_index).unsqueeze(-1)  # what an ignored token holds stays out
    logits = matmul(torch.where(keep, hidden, 0.0).to(dtype), weight.to(dtype).t())
    if adapter is not None:
        logits = logits + matmul(torch.where(keep, adapter[0], 0.0).to(dtype), adapter[1].to(dtype).t())
    if bias is not None:
        logits = logits + bias.to(dtype)
    return selective_reference(logits, labels, temperature=temperature, softcap=softcap, ignore_index=ignore_index)


class Arguments(NamedTuple):
    """Those of the registered operation: checked, cast as autocast would, tokens in one dimension."""

    hiddens: list[Tensor]
    weights: list[Tensor]
    bias: Tensor | None
    labels: Tensor
    temperature: Tensor
    softcap: float
    ignore_index: int
    backward: str
    logits_budget_bytes: int | None
    chunk_bytes: int
    mass_tolerance: float
    max_entries: int
    group: str
    backend: str


def checked(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    adapter: tuple[Tensor, Tensor] | None,
    temperature: float | Tensor,
    softcap: float | None,
    ignore_index: int,
    backward: str,
    logits_budget_bytes: int | None,
    chunk_bytes: int | None,
    mass_tolerance: float,
    max_entries: int,
    group: dist.ProcessGroup | None,
    backend: str | None,
) -> Arguments:
    """What was given to linear_logprobs. Raises what that says."""
    for name, x in (("hidden", hidden), ("weight", weight), ("labels", labels)):
        if x is None:
            reject(name, None, "a torch.Tensor", TypeError)
    check_floating(hidden=hidden, weight=weight, bias=bias)
    check_integer(labels=labels)
    if hidden.ndim == 0 or hidden.shape[-1] == 0:
        reject("hidden", f"shape {tuple(hidden.shape)}", "[..., H] with at least one column")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        reject("weight", f"shape {tuple(weight.shape)}", f"[V, H] with H = {hidden.shape[-1]}")
    check_shape(hidden.shape[:-1], "the shape of hidden without its last dimension", labels=labels)
    check_shape(weight.shape[:1], "one a row of weight", bias=bias)
    check_device(hidden.device, weight=weight, labels=labels, bias=bias)
    hiddens, weights = [hidden], [weight]
    if adapter is not None:
        _check_adapter(adapter, hidden, weight)
        hiddens.append(adapter[0])
        weights.append(adapter[1])
    check_softcap(softcap)
    check_temperature(temperature, labels)
    check_choice("backward", backward, BACKWARDS)
    if logits_budget_bytes is not None:
        check_int("logits_budget_bytes", logits_budget_bytes, least=0)
    if chunk_bytes is not None:
        check_int("chunk_bytes", chunk_bytes, least=1)
    check_int("ignore_index", ignore_index, least=-(2**63))
    check_number("mass_tolerance", mass_tolerance)
    if not 0 < mass_tolerance < 1:
        reject("mass_tolerance", mass_tolerance, "in (0, 1)")
    check_int("max_entries", max_entries, least=1)
    if max_entries > sparse.MAX_CAPACITY:
        reject("max_entries", max_entries, f"at most {sparse.MAX_CAPACITY} (more would cost what they save)")
    backend = pick_backend(backend, hidden)
    group_name = _name_of(group, backend)
    if autocast_is_on(hidden.device):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hiddens, weights = [x.to(dtype) for x in hiddens], [x.to(dtype) for x in weights]
        bias = None if bias is None else bias.to(dtype)
    for name, x in zip(("weight", "adapter[0]", "adapter[1]"), (weights[0], hiddens[-1], weights[-1]), strict=True):
        if x.dtype != hiddens[0].dtype:
            want = f"of the dtype of hidden, {hiddens[0].dtype} (cast one, or use autocast)"
            reject(name, x.dtype, want, TypeError)
    if backend != "reference" and hiddens[0].dtype not in (torch.float16, torch.bfloat16, torch.float32):
        want = "float16, bfloat16 or float32 (float64: backend='reference')"
        reject("hidden", hiddens[0].dtype, want, TypeError)
    differentiated = torch.is_grad_enabled() and any(
        x.requires_grad for x in (*hiddens, *weights, bias) if x is not None
    )
    if chunk_bytes is None:
        chunk_bytes = _CHUNK_BYTES_CPU if hidden.device.type == "cpu" else _CHUNK_BYTES_ACCELERATOR
    return Arguments(
        [x.reshape(-1, x.shape[-1]) for x in hiddens],
        weights,
        bias,
        labels.reshape(-1).long(),
        temperature_per_row(temperature, labels),
        softcap or 0.0,
        ignore_index,
        backward if differentiated else "recompute",
        logits_budget_bytes,
        chunk_bytes,
        max(float(mass_tolerance), 1e-30),  # less is beyond float32
        max_entries,
        group_name,
        backend,
    )


def _check_adapter(adapter: tuple[Tensor, Tensor], hidden: Tensor, weight: Tensor) -> None:
    if not isinstance(adapter, tuple | list) or len(adapter) != 2 or any(x is None for x in adapter):
        got = [type(x).__name__ for x in adapter] if isinstance(adapter, tuple | list) else type(adapter).__name__
        reject("adapter", got, "a pair of tensors (u [..., r], B [V, r]), or None", TypeError)
    u, b = adapter
    for name, x in (("adapter[0]", u), ("adapter[1]", b)):
        check_floating(**{name: x})
        check_device(hidden.device, **{name: x})
    if u.ndim == 0 or u.shape[:-1] != hidden.shape[:-1] or u.shape[-1] == 0:
        reject("adapter[0]", f"shape {tuple(u.shape)}", f"of shape {(*hidden.shape[:-1], 'r')} (one row a token)")
    check_shape((weight.shape[0], u.shape[-1]), "a row for each of weight", **{"adapter[1]": b})


def _name_of(group: dist.ProcessGroup | None, backend: str) -> str:
    """How a registered operation, which takes no objects, is told of a process group; "" for none."""
    if group is None:
        return ""
    if backend == "reference":
        reject("group", group, "None with backend='reference', which is defined on the whole weight")
    if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        want = "a torch.distributed.ProcessGroup that this process is in (of a mesh: mesh.get_group()), or None"
        reject("group", group, want, TypeError)
    return group.group_name


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hiddens [N, H] and weights [V, H] (then those of the adapter), bias [V], labels and temperature [N]
    -> logprobs, entropy [N], stats [2, N] (row maximum, log-sum), dropped, entries [N] (of the certificate),
    kept [tokens, row_stride(V)], slot_index and slot_value [tokens, K], count [N] (of slots, on this rank), first_row
    [1] (of the shard).
    """
    vocab = weights[0].shape[0]
    shards = vocab_shard.sizes(group, vocab, labels.device)
    check_label_and_temperature_values(labels, temperature, sum(shards), ignore_index)
    first_row = labels.new_full((1,), vocab_shard.first_row(group, shards))
    head = Head(hiddens, weights, bias, labels, temperature, softcap, ignore_index, chunk_bytes, group, backend)
    head = head.of_rank(first_row)
    tokens = where(head.bears_loss())
    tolerance = mass_tolerance, max_entries
    to_keep = plan(head, backward, logits_budget_bytes, len(tokens), *tolerance, shards, entropies=True)
    chosen = f"up to {max_entries} entries of each are kept" if to_keep.entries else f"E of {to_keep.dense} is kept"
    _log.debug("forward: %d of %d tokens bear loss, %s (%s)", len(tokens), len(labels), chosen, backward)
    results = head.no_results()
    kept = head.forward(tokens, results, to_keep, shards)
    entries, dropped = results.entries.clone(), results.dropped
    if group and to_keep.entries:
        entries, dropped = over_ranks(group, results.entries, results.dropped)
    return *results[:3], dropped, entries, *kept, results.entries, first_row


def over_ranks(group: str, count: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
    """Entries and dropped mass of all ranks. A token that is exact on one of them is called exact, though others may
    have left out a part of it."""
    sums = torch.stack([count.clamp(min=0).float(), (count < 0).float(), dropped])
    total, exact, dropped = vocab_shard.all_reduce(sums, group)
    return torch.where(exact > 0, -1, total.int()), dropped


_linear_logprobs = torch.library.custom_op(f"{NAMESPACE}::linear_logprobs", _forward, mutates_args=())


@_linear_logprobs.register_fake
def _(hiddens, weights, bias, labels, temperature, softcap, ignore_index, backward, *settings):
    n = labels.shape[0]
    kept = _size_known_when_run(at_most=n) if backward in ("cache", "auto") else 0
    slots = (_size_known_when_run(at_most=n) if backward in ("sparse", "auto") else 0), settings[3]
    new = lambda *shape, dtype=torch.float32: labels.new_empty(shape, dtype=dtype)
    kept_e = weights[0].new_empty(kept, row_stride(len(weights[0])))
    return (
        new(n), new(n), new(2, n), new(n), new(n, dtype=torch.int32), kept_e,
        new(*slots, dtype=torch.int32), new(*slots), new(n, dtype=torch.int32), labels.new_empty(1),
    )  # fmt: skip


def _size_known_when_run(at_most: int):
    try:
        return torch.library.get_ctx().new_dynamic_size()
    except (DynamicOutputShapeException, RuntimeError):  # fake tensors without symbolic sizes; meta tensors
        return at_most


def _backward(
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    hiddens: list[Tensor],
    weights: list[Tensor],
    bias: Tensor | None,
    labels: Tensor,
    temperature: Tensor,
    entropy: Tensor,
    stats: Tensor,
    kept_e: Tensor,
    slot_index: Tensor,
    slot_value: Tensor,
    count: Tensor,
    first_row: Tensor,
    needs: list[bool],
    softcap: float,
    ignore_index: int,
    backward: str,
    chunk_bytes: int,
    group: str,
    backend: str,
) -> list[Tensor]:
    """Gradients of hiddens, weights and bias, in this order; an empty tensor for one that is not needed."""
    head = Head(hiddens, weights, bias, labels, temperature, softcap, ignore_index, chunk_bytes, group, backend)
    head = head.of_rank(first_row)
    tokens = where(head.bears_loss())
    kept = Kept(kept_e, slot_index, slot_value)
    results = Results(entropy, entropy, stats, entropy, count)  # of which backward reads three
    has_entropy = head.bears_loss() & (grad_entropy != 0)
    has_any = head.bears_loss() & (grad_logprobs != 0) | has_entropy
    if backward == "auto":
        coverage.of(weights[0]).note_entropies(has_entropy, has_any)
    sums = Gradients(head, needs, torch.float32 if group else weights[0].dtype)
    scale = sums.admit(torch.where(has_any, torch.maximum(grad_logprobs.abs(), grad_entropy.abs()) / temperature, 0.0))
    served = head.backward(sums, tokens, kept, results, grad_logprobs / scale, grad_entropy / scale)
    if len(kept.e) and not served and has_any[tokens[: len(kept.e)]].any():
        warnings.warn(
            f"linear_logprobs kept {kept.e.nbytes} bytes for nothing: the entropies have gradients, for which the "
            "logits are computed again; pass backward='recompute'",
            stacklevel=1,  # autograd's thread knows no caller
        )
    return head.over_ranks(sums.results(), needs)


_linear_logprobs_backward = torch.library.custom_op(
    f"{NAMESPACE}::linear_logprobs_backward", _backward, mutates_args=()
)


@_linear_logprobs_backward.register_fake
def _(grad_logprobs, grad_entropy, hiddens, weights, bias, labels, tau, entropy, stats, kept, slots, value, count, row,
      needs, *_):  # fmt: skip
    inputs = (*hiddens, *weights, weights[0][:, 0] if bias is None else bias)
    return [x.new_empty(x.shape if need else (0,)) for x, need in zip(inputs, needs, strict=True)]


def _save(ctx, inputs, output):
    hiddens, weights, bias, labels, temperature, *settings = inputs
    ctx.softcap, ctx.ignore_index, backward, _, chunk_bytes, _, _, *rest = settings
    ctx.rest = backward, chunk_bytes, *rest
    ctx.pairs = len(hiddens)
    ctx.set_materialize_grads(False)  # or there were one for kept, of its size
    ctx.save_for_backward(*hiddens, *weights, bias, labels, temperature, *output[1:3], *output[5:])


def _grad(ctx, grad_logprobs, grad_entropy, *_):
    n, saved = ctx.pairs, ctx.saved_tensors  # read once: under activation checkpointing that is when they are made
    hiddens, weights, others = saved[:n], saved[n : 2 * n], saved[2 * n :]
    needs_hiddens, needs_weights, needs_bias = ctx.needs_input_grad[:3]
    needs = [*needs_hiddens, *needs_weights, needs_bias]
    settings = ctx.softcap, ctx.ignore_index, *ctx.rest
    no_gradient = torch.zeros_like(others[2], dtype=torch.float32)
    grad_logprobs, grad_entropy = (no_gradient if g is None else g for g in (grad_logprobs, grad_entropy))
    grads = _linear_logprobs_backward(grad_logprobs, grad_entropy, hiddens, weights, *others, needs, *settings)
    grads = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
    return grads[:n], grads[n:-1], grads[-1], *[None] * 11


_linear_logprobs.register_autograd(_grad, setup_context=_save)


# FlopCounterMode does not see into a registered operation; it is told what the chunks below will multiply.


@register_flop_formula(OPS.linear_logprobs, get_raw=True)
def _forward_flops(hiddens, weights, bias, labels, temperature, softcap, ignore_index, *_, **__) -> int:
    return 2 * how_many(labels != ignore_index) * sum(weight.numel() for weight in weights)


@register_flop_formula(OPS.linear_logprobs_backward, get_raw=True)
def _backward_flops(
    grad_logprobs, grad_entropy, hiddens, weights, bias, labels, tau, entropy, stats, kept, slots, value, count, row,
    needs, softcap, ignore_index, *_, **__,
) -> int:  # fmt: skip
    bears_loss = labels != ignore_index
    live = bears_loss & ((grad_logprobs != 0) | (grad_entropy != 0))
    there = (bears_loss.cumsum(0) <= len(kept)) | (count >= 0)
    again = how_many(live & ~(there & (grad_entropy == 0)), without_values=len(labels) - len(kept) - len(slots))
    dense = how_many(live & ~((count >= 0) & (grad_entropy == 0)), without_values=len(labels) - len(slots))
    sizes = [weight.numel() for weight in weights]
    products = sum(size for size, need in zip((*sizes, *sizes), needs[:-1], strict=True) if need)
    return 2 * (again * sum(sizes) + dense * products)  # a few entries a token are not worth counting


def how_many(mask: Tensor, without_values: int | None = None) -> int:
    """How many are set. Fake and meta tensors have no values: all, or as many as said."""
    if isinstance(mask, FakeTensor) or mask.is_meta:
        return len(mask) if without_values is None else without_values
    return int(mask.sum())
