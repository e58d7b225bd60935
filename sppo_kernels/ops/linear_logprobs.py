"""linear_logprobs: log-probabilities and entropies straight from hidden states; the logits never exist as a whole.

    logits = hidden weight^T + adapter + bias, then as in selective_logprobs

Only tokens that bear loss are projected. They go by in chunks; of each chunk the vendor's matrix product makes the
logits in float32, and a row pass takes from them what is needed:

    forward     hidden --(W^T)--> logits --(row pass)--> logprob, entropy, row maximum, log-sum
                                  logits --(row pass)--> E, of as many tokens as may be kept; or the few entries of E
                                                         that matter, of every token
    backward    of a token whose E was kept:    E, c
                of a token whose entries were:  the entries, c    (see _sparse.py)
                of any other:    hidden --(W^T)--> logits --(row pass)--> c E, and the entropy's part
                E --(W)--> d hidden            E^T --(hidden)--> d weight, added up in float32

E = (onehot(label) - p) cap'(logit) does not depend on the loss: whatever is done with a log-probability reaches token
t's logits as c_t E_t / tau, with c_t its upstream gradient, and c_t goes on to d hidden's rows and to hidden's. Only
the entropy's gradient is not of this form: a token that has one is done again from its logits.

A pass is 2 N H V operations. Forward 1, d hidden 1, d weight 1: three with ``backward="cache"``; ``"recompute"`` makes
the logits again, four. ``"sparse"`` takes one, and three more for the tokens whose probability is too spread out.

E has the dtype of the inputs, as the gradient of the logits has in eager PyTorch, and d weight takes its own dtype
once, at the end. Gradients go through here divided by the power of two next to the largest of them: a loss averaged
over 100,000 tokens leaves upstream gradients that float16 could not carry.

Memory beyond inputs and gradients: ``chunk_bytes`` for E and the logits under way, 4 V H bytes of d weight where it is
wanted, and what is kept. E is a block of four chunks of logits, because d weight is read and written once a block,
8 V H bytes, which have to hide behind the 6 H V operations that each of the block's tokens costs.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor
from torch.utils.flop_counter import register_flop_formula

from sppo_kernels import _sparse as sparse
from sppo_kernels import _vocab_shard as vocab_shard
from sppo_kernels._common import (
    autocast_is_on,
    check_choice,
    check_device,
    check_floating,
    check_integer,
    check_number,
    check_shape,
    check_whole_number,
    matmul,
    pick_backend,
    reject,
    without_autocast,
)
from sppo_kernels.ops.selective_logprobs import (
    ROW_PASSES,
    LogprobOutput,
    check_label_and_temperature_values,
    check_softcap,
    check_temperature,
    rows_per_block,
    safe_labels,
    scaled_rows,
    temperature_per_row,
)
from sppo_kernels.ops.selective_logprobs import reference as selective_reference
from sppo_kernels.tuning import Config, Tunable

try:
    import triton
    import triton.language as tl

    from sppo_kernels.ops.selective_logprobs import launch_shape, scaled_logits
except ImportError:
    triton = None

BACKWARDS = ("auto", "recompute", "cache", "sparse")
_CHUNK_BYTES_CPU = 1 << 28
_CHUNK_BYTES_ACCELERATOR = 1 << 31
_AUTO_BUDGET_CPU = 1 << 30

_log = logging.getLogger(__name__)


class Certificate(NamedTuple):
    """What ``backward="sparse"`` left out of the gradient of each token; nothing here waits for the device.

    ``dropped_mass`` ``[...]`` float32: the probability that is in none of a token's entries; 0 where the gradient is
    exact. The gradient of the loss by a token's logits is off by at most ``|c| dropped_mass / temperature`` in the L1
    norm. ``entries`` ``[...]`` int32: how many entries; -1 for a token on an exact path (with ``group``: on one rank or
    more), 0 for one without loss.
    """

    dropped_mass: Tensor
    entries: Tensor

    @property
    def mean_dropped_mass(self) -> Tensor:
        """Over the tokens that bear loss, 0-d."""
        return self.dropped_mass.sum() / (self.entries != 0).sum().clamp(min=1)

    @property
    def max_dropped_mass(self) -> Tensor:
        """0-d; 0 without tokens."""
        return torch.cat([self.dropped_mass.flatten(), self.dropped_mass.new_zeros(1)]).amax()

    @property
    def sparse_share(self) -> Tensor:
        """How many of the tokens that bear loss have entries, 0-d in [0, 1]."""
        return (self.entries > 0).sum() / (self.entries != 0).sum().clamp(min=1)

    @property
    def mean_entries(self) -> Tensor:
        """Of the tokens that have some, 0-d."""
        return self.entries.clamp(min=0).sum() / (self.entries > 0).sum().clamp(min=1)


class LinearLogprobOutput(LogprobOutput):
    """``LogprobOutput(logprobs, entropy)`` with a ``certificate`` beside the two."""

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
    cast them. What each call chose is logged at level DEBUG by the logger ``sppo_kernels.ops.linear_logprobs``.

    Args:
        hidden: ``[..., H]``, float16, bfloat16 or float32.
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
            tokens as the budget allows. A token whose entropy has a gradient is recomputed all the same, with a warning
            where that makes what was kept useless. Nothing is kept where nothing requires a gradient.
        logits_budget_bytes: how much ``"cache"`` and ``"auto"`` may keep; the tokens beyond it are recomputed. None:
            everything in ``"cache"``; in ``"auto"`` a quarter of the device memory that is free at the time, 1 GiB on
            a CPU. The last bits of gradients depend on how many tokens are kept: give a number for the same bits
            whatever else is in memory.
        chunk_bytes: memory for a block of tokens under way, at least 256 tokens; None: 2 GiB on an accelerator, 256 MiB
            on a CPU. The last bits of results depend on it.
        mass_tolerance: of ``"sparse"``: the most probability that a token's entries may leave out, in (0, 1). The
            gradient of the loss by a token's logits is then off by at most ``|c| mass_tolerance / temperature``, summed
            over the vocabulary, with ``c`` the upstream gradient; what was left out is in ``certificate``.
        max_entries: of ``"sparse"``: the most entries of a token, 1 to 1024, 8 bytes each; one that needs more is
            recomputed.
        group: the process group over which ``weight``, ``bias`` and ``adapter[1]`` are split by rows, in the order of
            the ranks, at least one row each. ``hidden``, ``labels``, ``adapter[0]``, what requires a gradient, every
            setting, and what is done with the results, must be the same on each rank: else gradients are silently
            wrong, or ranks crash or wait forever. Results and gradients of ``hidden`` then are the same too.
        backend: ``"reference"``, ``"torch"``, ``"triton"``, or None for triton on an accelerator and torch elsewhere.

    Returns:
        ``LogprobOutput(logprobs, entropy)``: both ``[...]``, float32, differentiable in ``hidden``, ``weight``,
        ``bias`` and both of ``adapter``. Its attribute ``certificate`` tells what ``"sparse"`` left out.

    Raises:
        ValueError: a wrong shape, device or bound; a label outside ``[0, V)`` (looked at on a CPU, and elsewhere under
            ``SPPO_KERNELS_CHECK=1``; without it such a token is NaN).
        TypeError: a tensor of the wrong kind (a DTensor, say), or ``hidden`` and ``weight`` of different dtypes.
    """
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
        check_whole_number("logits_budget_bytes", logits_budget_bytes, least=0)
    if chunk_bytes is not None:
        check_whole_number("chunk_bytes", chunk_bytes, least=1)
    check_whole_number("ignore_index", ignore_index, least=-(2**63))
    check_number("mass_tolerance", mass_tolerance)
    if not 0 < mass_tolerance < 1:
        reject("mass_tolerance", mass_tolerance, "in (0, 1)")
    check_whole_number("max_entries", max_entries, least=1)
    if max_entries > sparse.MAX_CAPACITY:
        reject("max_entries", max_entries, f"at most {sparse.MAX_CAPACITY} (more would cost what they save)")
    backend = pick_backend(backend, hidden)
    group_name = _name_of(group, backend)
    labels = labels.long()
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
    if backend == "reference":
        exact = reference(
            hiddens[0],
            weights[0],
            labels,
            bias=bias,
            adapter=(hiddens[1], weights[1]) if adapter is not None else None,
            temperature=temperature,
            softcap=softcap,
            ignore_index=ignore_index,
        )
        nothing = torch.zeros(labels.shape, device=labels.device)
        return _with_certificate(*exact, nothing, nothing.int() - (labels != ignore_index).int())
    differentiated = torch.is_grad_enabled() and any(
        x.requires_grad for x in (*hiddens, *weights, bias) if x is not None
    )
    if chunk_bytes is None:
        chunk_bytes = _CHUNK_BYTES_CPU if hidden.device.type == "cpu" else _CHUNK_BYTES_ACCELERATOR
    logprobs, entropy, _, dropped, entries, *_ = _linear_logprobs(
        [x.reshape(-1, x.shape[-1]) for x in hiddens],
        weights,
        bias,
        labels.reshape(-1),
        temperature_per_row(temperature, labels),
        softcap or 0.0,
        ignore_index,
        backward if differentiated else "recompute",
        logits_budget_bytes,
        chunk_bytes,
        float(mass_tolerance),
        max_entries,
        group_name,
        backend,
    )
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
    kept [tokens, V], slot_index and slot_value [tokens, K], count [N] (of slots, on this rank), first_row [1] (of the
    shard).
    """
    n, vocab, dtype = labels.shape[0], weights[0].shape[0], weights[0].dtype
    shards = vocab_shard.sizes(group, vocab, labels.device)
    check_label_and_temperature_values(labels, temperature, sum(shards), ignore_index)
    first_row = labels.new_full((1,), vocab_shard.first_row(group, shards))
    if group:
        labels, ignore_index = vocab_shard.local_labels(labels, ignore_index, first_row, vocab)
    logprobs, entropy, stats = (labels.new_zeros(shape, dtype=torch.float32) for shape in ((n,), (n,), (2, n)))
    tokens = _where(labels != ignore_index)
    kept = weights[0].new_empty(
        _tokens_to_keep(backward, logits_budget_bytes, len(tokens), vocab * dtype.itemsize, labels.device), vocab
    )
    _log.debug("forward: %d of %d tokens bear loss, E of %d is kept (%s)", len(tokens), n, len(kept), backward)
    dropped, count = torch.zeros_like(logprobs), torch.zeros_like(labels, dtype=torch.int32)
    count[tokens] = -1
    slots = len(tokens) if backward == "sparse" else 0, max_entries
    slot_index, slot_value = labels.new_empty(slots, dtype=torch.int32), logprobs.new_empty(slots)
    project = _Projection(weights, bias)
    done = 0
    # As many chunks on each rank, whatever the size of its shard: they meet in every one.
    for index in _split(tokens, _block_size(chunk_bytes, max(shards), dtype) // 4):
        logits = project([hidden[index] for hidden in hiddens])
        row, rows = (labels[index], temperature[index]), slice(done, done + len(index))
        whole: tuple[Tensor, ...] = ()
        if group or backward != "sparse":
            found = ROW_PASSES[backend].forward(logits, *row, softcap, ignore_index)
            whole = vocab_shard.combine(group, *found, here=row[0] < vocab) if group else found
        if backward == "sparse":  # in the same read of the logits, unless the whole row's sum comes from other ranks
            known, share = whole[2] if whole else None, mass_tolerance / len(shards)
            room = slot_index[rows], slot_value[rows]
            selected = sparse.SELECT[backend](logits, *row, softcap, share, known, *room)
            count[index], dropped[index] = selected[3:]
            whole = whole or selected[:3]
        else:
            KEEP[backend](logits, *row, whole[2], softcap, kept[rows])
        logprobs[index], entropy[index], stats[:, index] = whole
        done += len(index)
        del logits  # before the next chunk's
    entries = count.clone()
    if group and backward == "sparse":
        entries, dropped = _over_ranks(group, count, dropped)
    return logprobs, entropy, stats, dropped, entries, kept, slot_index, slot_value, count, first_row


def _over_ranks(group: str, count: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
    """Entries and dropped mass of all ranks. A token that is exact on one of them is called exact, though others may
    have left out a part of it."""
    sums = torch.stack([count.clamp(min=0).float(), (count < 0).float(), dropped])
    total, exact, dropped = vocab_shard.all_reduce(sums, group)
    return torch.where(exact > 0, -1, total.int()), dropped


_linear_logprobs = torch.library.custom_op("sppo_kernels::linear_logprobs", _forward, mutates_args=())


@_linear_logprobs.register_fake
def _(hiddens, weights, bias, labels, temperature, softcap, ignore_index, backward, *settings):
    n = labels.shape[0]
    kept = _size_known_when_run(at_most=n) if backward in ("cache", "auto") else 0
    slots = (_size_known_when_run(at_most=n) if backward == "sparse" else 0), settings[3]
    new = lambda *shape, dtype=torch.float32: labels.new_empty(shape, dtype=dtype)
    return (
        new(n), new(n), new(2, n), new(n), new(n, dtype=torch.int32), weights[0].new_empty(kept, weights[0].shape[0]),
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
    kept: Tensor,
    slot_index: Tensor,
    slot_value: Tensor,
    count: Tensor,
    first_row: Tensor,
    needs: list[bool],
    softcap: float,
    ignore_index: int,
    chunk_bytes: int,
    group: str,
    backend: str,
) -> list[Tensor]:
    """Gradients of hiddens, weights and bias, in this order; an empty tensor for one that is not needed."""
    vocab, dtype = weights[0].shape[0], weights[0].dtype
    if group:
        labels, ignore_index = vocab_shard.local_labels(labels, ignore_index, first_row, vocab)
    bears_loss = labels != ignore_index
    live = bears_loss & ((grad_logprobs != 0) | (grad_entropy != 0))
    largest = torch.maximum(grad_logprobs.abs(), grad_entropy.abs()) / temperature
    scale = _power_of_two_near(torch.where(live, largest, 0.0))
    grad_logprobs, grad_entropy = grad_logprobs / scale, grad_entropy / scale
    sums = _Gradients(hiddens, weights, bias, needs, scale, torch.float32 if group else dtype)
    kept_row = bears_loss.cumsum(0) - 1  # of a token in kept, if it is there
    # Kept E knows nothing of the entropy: a token whose entropy has a gradient needs its logits again.
    in_kept = live & (kept_row < len(kept)) & (grad_entropy == 0)
    in_slots = live & (count >= 0) & (grad_entropy == 0)
    from_kept = _where(in_kept) if len(kept) else labels[:0]
    from_slots = _where(in_slots) if len(slot_index) else labels[:0]
    again = _where(live & ~in_kept & ~in_slots)
    source, used = ("entries", from_slots) if len(slot_index) else ("kept E", from_kept)
    _log.debug("backward: %d tokens from %s, %d recomputed", len(used), source, len(again))
    if len(kept) and not len(from_kept) and len(_where(live & (kept_row < len(kept)))):
        warnings.warn(
            f"linear_logprobs kept {kept.nbytes} bytes for nothing: the entropies have gradients, for which the logits "
            "are computed again; pass backward='recompute'",
            stacklevel=1,  # autograd's thread knows no caller
        )
    block = _block_size(chunk_bytes, vocab, dtype)

    # Where all of it is of use and lies as it is multiplied, kept E is read in place, in blocks as large as their
    # hidden states allow, some 16 H bytes a token; else a block is gathered.
    in_place = len(from_kept) == len(kept) and sums.project.takes(dtype)
    width = sum(hidden.shape[1] for hidden in hiddens)
    size = max(256, chunk_bytes // (16 * width)) if in_place else block
    for i, index in enumerate(_split(from_kept, size)):
        e = kept[i * size : (i + 1) * size] if in_place else kept[kept_row[index]]
        sums.add(index, e, (grad_logprobs[index] / temperature[index]).unsqueeze(-1))
        del e  # before the next block's

    if len(from_slots):
        filled = kept_row[from_slots]
        coefficient = grad_logprobs[from_slots] / temperature[from_slots]
        entries = sparse.entries_of(slot_index[filled], slot_value[filled], count[from_slots], coefficient)
        sums.add_entries(from_slots, entries, sparse.WEIGHTED_ROWS[backend], max(256, chunk_bytes // (16 * width)))

    for index in _split(again, block):
        e = weights[0].new_empty(len(index), vocab)
        for part, rows in zip(index.split(block // 4), e.split(block // 4), strict=True):
            logits = sums.project([hidden[part] for hidden in hiddens])
            ROW_PASSES[backend].backward(
                grad_logprobs[part],
                grad_entropy[part],
                logits,
                labels[part],
                temperature[part],
                entropy[part],
                stats[:, part],
                softcap,
                ignore_index,
                rows.unsqueeze(0),
            )
            del logits  # before the next chunk's, and before the products
        sums.add(index, e)
        del e, rows
    grads = sums.results()
    for i, hidden in enumerate(hiddens):
        if group and needs[i]:  # each rank has what its rows contribute
            grads[i] = vocab_shard.all_reduce(grads[i], group).to(hidden.dtype)
    return grads


_linear_logprobs_backward = torch.library.custom_op(
    "sppo_kernels::linear_logprobs_backward", _backward, mutates_args=()
)


@_linear_logprobs_backward.register_fake
def _(grad_logprobs, grad_entropy, hiddens, weights, bias, labels, tau, entropy, stats, kept, slots, value, count, row,
      needs, *_):  # fmt: skip
    inputs = (*hiddens, *weights, weights[0][:, 0] if bias is None else bias)
    return [x.new_empty(x.shape if need else (0,)) for x, need in zip(inputs, needs, strict=True)]


def _save(ctx, inputs, output):
    hiddens, weights, bias, labels, temperature, *settings = inputs
    ctx.softcap, ctx.ignore_index, _, _, chunk_bytes, _, _, *rest = settings
    ctx.rest = chunk_bytes, *rest
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


@register_flop_formula(torch.ops.sppo_kernels.linear_logprobs, get_raw=True)
def _forward_flops(hiddens, weights, bias, labels, temperature, softcap, ignore_index, *_, **__) -> int:
    return 2 * _count(labels != ignore_index) * sum(weight.numel() for weight in weights)


@register_flop_formula(torch.ops.sppo_kernels.linear_logprobs_backward, get_raw=True)
def _backward_flops(
    grad_logprobs, grad_entropy, hiddens, weights, bias, labels, tau, entropy, stats, kept, slots, value, count, row,
    needs, softcap, ignore_index, *_, **__,
) -> int:  # fmt: skip
    bears_loss = labels != ignore_index
    live = bears_loss & ((grad_logprobs != 0) | (grad_entropy != 0))
    there = (bears_loss.cumsum(0) <= len(kept)) | (count >= 0)
    again = _count(live & ~(there & (grad_entropy == 0)), without_values=len(labels) - len(kept) - len(slots))
    dense = _count(live & ~((count >= 0) & (grad_entropy == 0)), without_values=len(labels) - len(slots))
    sizes = [weight.numel() for weight in weights]
    products = sum(size for size, need in zip((*sizes, *sizes), needs[:-1], strict=True) if need)
    return 2 * (again * sum(sizes) + dense * products)  # a few entries a token are not worth counting


def _count(mask: Tensor, without_values: int | None = None) -> int:
    """How many are set. Fake and meta tensors have no values: all, or as many as said."""
    if isinstance(mask, FakeTensor) or mask.is_meta:
        return len(mask) if without_values is None else without_values
    return int(mask.sum())


# Which tokens, and how many at a time. The host waits for the device in _where, and for the sizes of shards, alone.


def _where(mask: Tensor) -> Tensor:
    return mask.nonzero().squeeze(-1)


def _split(index: Tensor, size: int) -> Sequence[Tensor]:
    return index.split(size) if len(index) else ()


def _block_size(chunk_bytes: int, vocab: int, dtype: torch.dtype) -> int:
    """Tokens whose E, and float32 logits for a quarter of them, fit; a multiple of 256, which matrix products like."""
    return max(256, chunk_bytes // (vocab * (dtype.itemsize + 1)) // 256 * 256)


def _tokens_to_keep(backward: str, budget: int | None, tokens: int, bytes_a_token: int, device: torch.device) -> int:
    if backward in ("recompute", "sparse"):
        return 0
    if budget is None and backward == "cache":
        return tokens
    if budget is None:
        budget = _AUTO_BUDGET_CPU if device.type == "cpu" else _free_memory(device) // 4
    return min(tokens, budget // bytes_a_token)


def _free_memory(device: torch.device) -> int:
    """Bytes that PyTorch could still hand out: what the driver has, and what its allocator holds unused."""
    accelerator = torch.get_device_module(device)
    free, _ = accelerator.mem_get_info(device)
    return free + accelerator.memory_reserved(device) - accelerator.memory_allocated(device)


def _power_of_two_near(x: Tensor) -> Tensor:
    """Above the largest element of x, at most twice as large; 0-d, on its device."""
    largest = x.amax() if len(x) else x.new_ones(())
    return torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent.clamp(-100, 100))


# Matrix products: the vendor's, with float32 results


class _Projection:
    """Products with the output embedding that give float32, from half-precision factors where the device can."""

    def __init__(self, weights: Sequence[Tensor], bias: Tensor | None) -> None:
        half = weights[0].dtype in (torch.float16, torch.bfloat16)
        self.mixed = half and weights[0].device.type == "cuda" and torch.version.hip is None
        # Elsewhere float32 copies, made once a call: rounding logits to half precision is what must not happen.
        self.weights = weights if self.mixed else [weight.float() for weight in weights]
        self.bias = None if bias is None else bias.float()

    def takes(self, dtype: torch.dtype) -> bool:
        """Whether factors of this dtype are multiplied without a copy."""
        return self.mixed or dtype == torch.float32

    def factor(self, x: Tensor) -> Tensor:
        """``x`` as ``product`` takes it."""
        return x if self.mixed else x.float()

    def product(self, a: Tensor, b: Tensor, plus: Tensor | None = None) -> Tensor:
        """``a b + plus``, float32, written over ``plus``: no second tensor of that size is ever beside it."""
        out_dtype: dict[str, Any] = {"out_dtype": torch.float32} if self.mixed else {}
        with without_autocast(a.device):
            if plus is None:
                return torch.mm(a, b, **out_dtype)
            return torch.addmm(plus, a, b, **out_dtype, out=plus)

    def __call__(self, hiddens: Sequence[Tensor]) -> Tensor:
        """Logits of a chunk, [1, C, V] float32."""
        logits = None
        for hidden, weight in zip(hiddens, self.weights, strict=True):
            logits = self.product(self.factor(hidden), weight.t(), plus=logits)
        assert logits is not None
        return (logits if self.bias is None else logits.add_(self.bias)).unsqueeze(0)


class _Gradients:
    """Gradients of hiddens, weights and bias, made of blocks of E. They come in divided by ``scale``."""

    def __init__(
        self,
        hiddens: Sequence[Tensor],
        weights: Sequence[Tensor],
        bias: Tensor | None,
        needs: Sequence[bool],
        scale: Tensor,
        hidden_dtype: torch.dtype,
    ) -> None:
        n = len(hiddens)
        self.project = _Projection(weights, bias)
        self.hiddens, self.weights, self.scale = hiddens, weights, scale
        self.needs_hiddens, self.needs_weights, self.needs_bias = needs[:n], needs[n:-1], needs[-1]
        self.bias_dtype = weights[0].dtype if bias is None else bias.dtype
        self.dh = [
            x.new_zeros(x.shape if needed else (0,), dtype=hidden_dtype)
            for x, needed in zip(hiddens, self.needs_hiddens, strict=True)
        ]
        self.dw: list[Tensor | None] = [None] * n
        self.db = scale.new_zeros(weights[0].shape[0] if self.needs_bias else 0)

    def add(self, index: Tensor, e: Tensor, coefficient: Tensor | None = None) -> None:
        """E [C, V] of tokens ``index``, which is still to be multiplied by ``coefficient`` [C, 1]."""
        factor = self.project.factor(e)
        for i, (hidden, weight) in enumerate(zip(self.hiddens, self.project.weights, strict=True)):
            if self.needs_hiddens[i]:
                dh = self.project.product(factor, weight)
                dh *= self.scale if coefficient is None else self.scale * coefficient
                self.dh[i][index] = dh.to(self.dh[i].dtype)
                del dh
            if self.needs_weights[i]:
                h = hidden[index] if coefficient is None else (hidden[index] * coefficient).to(hidden.dtype)
                self.dw[i] = self.project.product(factor.t(), self.project.factor(h), plus=self.dw[i])
        if not self.needs_bias:
            return
        if coefficient is None:
            self.db += e.sum(0, dtype=torch.float32)
        else:  # in two parts: where the coefficient is the same for all tokens, so is its rounding
            high = coefficient.to(e.dtype)
            parts = torch.cat([high, (coefficient - high).to(e.dtype)], 1)
            self.db += self.project.product(factor.t(), self.project.factor(parts)).sum(1)

    def add_entries(
        self, index: Tensor, entries: sparse.Entries, weighted_rows: Callable[..., None], size: int
    ) -> None:
        """Entries of the gradient of the logits of tokens ``index``, coefficients in them; ``size`` tokens at once."""
        columns = sparse.by_column(entries)
        token, weight = entries.token[columns.order], entries.weight[columns.order]
        for i, (hidden, factor) in enumerate(zip(self.hiddens, self.project.weights, strict=True)):
            if self.needs_hiddens[i]:
                for first in range(0, len(index), size):
                    part = index[first : first + size]
                    dh = self.scale.new_zeros(len(part), hidden.shape[1])
                    bounds = entries.bounds[first : first + len(part) + 1]
                    place = torch.arange(len(part), device=index.device)
                    weighted_rows(dh, place, entries.column, entries.weight, bounds, factor)
                    self.dh[i][part] = dh.mul_(self.scale).to(self.dh[i].dtype)
                    del dh  # before the next block's
            if self.needs_weights[i]:
                if self.dw[i] is None:
                    self.dw[i] = self.scale.new_zeros(self.weights[i].shape)
                weighted_rows(self.dw[i], columns.column, index[token], weight, columns.bounds, hidden)
        if self.needs_bias:
            ones = self.scale.new_ones(1, 1)
            weighted_rows(self.db[:, None], columns.column, torch.zeros_like(token), weight, columns.bounds, ones)

    def results(self) -> list[Tensor]:
        """Of hiddens, weights, bias; an empty tensor for one that is not needed."""
        dw = []
        for total, weight, needed in zip(self.dw, self.weights, self.needs_weights, strict=True):
            out = torch.zeros(weight.shape if needed else (0,), dtype=weight.dtype, device=weight.device)
            dw.append(out if total is None else torch.mul(total, self.scale, out=out))
        return [*self.dh, *dw, (self.db * self.scale).to(self.bias_dtype)]


# The row pass that keeps E, right after the one that made its statistics. The other two are selective_logprobs's.


def _torch_keep(logits, labels, temperature, stats, softcap, kept):
    """Logits [1, C, V] -> E in kept, of as many rows as there is room for: [rows, V], rows <= C."""
    inside, label = safe_labels(labels, kept.shape[1])
    for rows in torch.arange(len(kept), device=kept.device).split(rows_per_block(kept.shape[1])):
        z, capped = scaled_rows(logits[0, rows], temperature[rows], softcap)
        e = (z - stats[0, rows, None] - stats[1, rows, None]).exp_().neg_()
        e.scatter_add_(-1, label[rows, None], inside[rows, None].float())
        if capped is not None:
            e *= 1 - capped.square_()
        kept[rows] = e.to(kept.dtype)


KEEP: dict[str, Callable[..., None]] = {"torch": _torch_keep}


if triton is not None:
    # One program a row and block of columns. Reads 4 bytes an element and writes that of E, 2 in half precision.
    @triton.jit
    def _keep_kernel(
        x_ptr, label_ptr, tau_ptr, stat_ptr, kept_ptr, stride_tau, C, V, softcap,
        HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        tau = tl.load(tau_ptr + row * stride_tau)
        z, capped = scaled_logits(x_ptr + row * V, col, 1, V, softcap, tau, HAS_SOFTCAP)
        p = tl.exp(z - tl.load(stat_ptr + row) - tl.load(stat_ptr + C + row))
        e = tl.where(col == tl.load(label_ptr + row), 1.0 - p, -p)
        if HAS_SOFTCAP:
            e *= 1.0 - capped * capped
        tl.store(kept_ptr + row * V + col, e, mask=col < V)

    # As selective_logprobs's backward, which does the same to the same rows.
    KEEP_CONFIGS = Tunable("linear_logprobs.keep", Config(2048, 8), Config(1024, 4), Config(2048, 4), Config(4096, 8))

    def _triton_keep(logits, labels, temperature, stats, softcap, kept):
        """As _torch_keep."""
        n, vocab = kept.shape
        if n:
            shape = launch_shape(KEEP_CONFIGS, logits)
            _keep_kernel[(n, triton.cdiv(vocab, shape["BLOCK"]))](
                logits, labels, temperature, stats, kept, temperature.stride(0), stats.shape[1], vocab, softcap,
                HAS_SOFTCAP=softcap > 0, **shape,
            )  # fmt: skip

    KEEP["triton"] = _triton_keep
