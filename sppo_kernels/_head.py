"""The head of a language model, some tokens at a time: hidden states to log-probabilities, and their gradients back.

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

E has the dtype of the inputs, as the gradient of the logits has in eager PyTorch, and d weight takes its own dtype
once, at the end. In float16 gradients go through here divided by the power of two next to the largest of them: a loss
averaged over 100,000 tokens leaves upstream gradients that it could not carry.

Memory beyond inputs and gradients: ``chunk_bytes`` for E and the logits under way, 4 V H bytes of d weight where it is
wanted, and what is kept (the PyTorch backend's forward, where it keeps E of a block: up to a third of ``chunk_bytes``
more). E is a block of four chunks of logits, because d weight is read and written once a block, 8 V H bytes, which have
to hide behind the 6 H V operations that each of the block's tokens costs. Rows of logits and of E begin at multiples of
64 elements, so that matrix products can copy 16 bytes at a time for any V.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _coverage as coverage
from . import _sparse as sparse
from . import _vocab_shard as vocab_shard
from ._backend import without_autocast
from .ops.selective_logprobs import ROW_PASSES, rows_per_block, safe_labels, scaled_rows, softcap_derivative
from .tuning import Config, Tunable

try:
    import triton
    import triton.language as tl

    from ._triton_utils import launch
    from .ops.selective_logprobs import launch_shape, scaled_block, store_block
except ImportError:
    triton = None

EXACT, EXACT_FROM_KEPT = -1, -2  # counts of entries that are none
_AUTO_BUDGET_CPU = 1 << 30
_ROW_MULTIPLE = 64  # elements: 128 bytes in half precision, for any V

_log = logging.getLogger(__name__)


class Plan(NamedTuple):
    """What forward keeps of its tokens for backward: a few entries of E of each, or all of E of the first ``dense``."""

    entries: bool
    capacity: int  # the most entries of a token
    tolerance: float  # the most probability that they leave out
    dense: int = 0
    watched: coverage.Coverage | None = None  # is told how many tokens entries do not do for


class Results(NamedTuple):
    """Of all N tokens; zeros for those that forward has not been given."""

    logprobs: Tensor  # [N]
    entropy: Tensor  # [N]
    stats: Tensor  # [2, N]: row maximum, log-sum
    dropped: Tensor  # [N]: probability that is in no entry
    entries: Tensor  # [N] int32: how many on this rank, or EXACT, or EXACT_FROM_KEPT


def row_stride(vocab: int) -> int:
    """Elements from one row of logits, or of E, to the next."""
    return -(-vocab // _ROW_MULTIPLE) * _ROW_MULTIPLE


class Kept(NamedTuple):
    """What forward leaves to backward besides, a row a token, in the order in which it was given them."""

    e: Tensor  # [dense, row_stride(V)], of which the first V columns are used
    slot_index: Tensor  # [tokens or 0, capacity] int32
    slot_value: Tensor  # the same


class Head(NamedTuple):
    """An output embedding, the hidden states of N tokens, and how they become log-probabilities."""

    hiddens: list[Tensor]  # [N, H], and that of an adapter
    weights: list[Tensor]  # [V, H], and that of an adapter
    bias: Tensor | None  # [V]
    labels: Tensor  # [N], of this rank's rows
    temperature: Tensor  # [N]
    softcap: float  # 0 for none
    ignore_index: int
    chunk_bytes: int
    group: str  # "" for none
    backend: str

    def of_rank(self, first_row: Tensor) -> Head:
        """With the labels of the shard that begins at ``first_row``."""
        if not self.group:
            return self
        labels, ignore_index = vocab_shard.local_labels(self.labels, self.ignore_index, first_row, self.vocab)
        return self._replace(labels=labels, ignore_index=ignore_index)

    @property
    def vocab(self) -> int:
        return self.weights[0].shape[0]

    def bears_loss(self) -> Tensor:
        return self.labels != self.ignore_index

    def block(self, vocab: int | None = None) -> int:
        """Tokens whose E, and float32 logits for a quarter of them, fit; a multiple of 256, which matrix products like.

        ``vocab``: of the largest shard, where all ranks have to meet in every block.
        """
        row = row_stride(vocab or self.vocab) * (self.weights[0].itemsize + 1)
        return max(256, self.chunk_bytes // row // 256 * 256)

    def no_results(self) -> Results:
        new = lambda *shape: self.labels.new_zeros(shape, dtype=torch.float32)
        n = len(self.labels)
        return Results(new(n), new(n), new(2, n), new(n), self.labels.new_zeros(n, dtype=torch.int32))

    def forward(self, tokens: Tensor, results: Results, plan: Plan, shards: list[int]) -> Kept:
        """Results of ``tokens``, into ``results``; rows of the weight on each rank: ``shards``."""
        logprobs, entropy, stats, dropped, entries = results
        kept = self._room(len(tokens), plan)
        entries[tokens] = EXACT
        entries[tokens[: plan.dense]] = EXACT_FROM_KEPT
        project = Projection(self.weights, self.bias)
        # Products on a CPU lay the weight out anew in each call, so that few tokens cost more each. Without the E that
        # backward has beside them, twice as many logits fit.
        chunk = self.block(max(shards)) // (2 if self.backend == "torch" else 4)
        room = project.room(min(chunk, len(tokens)))
        done = seen = 0
        exact = entries.new_zeros((), dtype=torch.int64)  # among those seen
        # As many chunks on each rank, whatever the size of its shard: they meet in every one.
        for index in split(tokens, chunk):
            logits = project([hidden[index] for hidden in self.hiddens], room)
            row, rows = (self.labels[index], self.temperature[index]), slice(done, done + len(index))
            whole: tuple[Tensor, ...] = ()
            if self.group or not plan.entries:
                found = ROW_PASSES[self.backend].forward(logits, *row, self.softcap, self.ignore_index)
                whole = vocab_shard.combine(self.group, *found, here=row[0] < self.vocab) if self.group else found
            if plan.entries:  # with statistics of their own, unless the whole row's sum comes from other ranks
                known = whole[2] if whole else None
                slots = kept.slot_index[rows], kept.slot_value[rows]
                selected = self._select(logits, index, known, plan, len(shards), *slots)
                entries[index], dropped[index] = selected[3:]
                whole = whole or selected[:3]
            else:
                if plan.watched:
                    probed = -(-len(index) // coverage.PROBED)
                    exact += self._exact_among(probed, logits, index, whole[2], plan, len(shards))
                    seen += probed
                KEEP[self.backend](logits, *row, whole[2], self.softcap, kept.e[rows, : self.vocab])
            logprobs[index], entropy[index], stats[:, index] = whole
            done += len(index)
            del logits  # before the next chunk's
        if plan.watched and plan.entries:
            exact, seen = (entries[tokens] < 0).sum(), len(tokens)
        if plan.watched and seen:
            plan.watched.note(exact, seen, self.group)
        return kept

    def _select(
        self,
        logits: Tensor,
        tokens: Tensor,
        known: Tensor | None,
        plan: Plan,
        ranks: int,
        slot_index: Tensor,
        slot_value: Tensor,
    ) -> sparse.Selected:
        """Each rank may leave out its part of what a token may. The PyTorch backend overwrites the logits."""
        row = self.labels[tokens], self.temperature[tokens]
        tolerance = plan.tolerance / ranks
        return sparse.SELECT[self.backend](logits, *row, self.softcap, tolerance, known, slot_index, slot_value)

    def _exact_among(
        self, probed: int, logits: Tensor, tokens: Tensor, stats: Tensor, plan: Plan, ranks: int
    ) -> Tensor:
        """Of how many of the first tokens of a chunk entries would not do, tried on a copy of their logits."""
        _, *slots = self._room(probed, plan._replace(entries=True, dense=0))
        some = logits[:, :probed].clone(), tokens[:probed], stats[:, :probed]
        return (self._select(*some, plan, ranks, *slots).entries < 0).sum()

    def _room(self, tokens: int, plan: Plan) -> Kept:
        slots = tokens if plan.entries else 0, plan.capacity
        return Kept(
            self.weights[0].new_empty(plan.dense, row_stride(self.vocab)),
            self.labels.new_empty(slots, dtype=torch.int32),
            self.labels.new_empty(slots, dtype=torch.float32),
        )

    def backward(
        self,
        sums: Gradients,
        tokens: Tensor,
        kept: Kept,
        results: Results,
        grad_logprobs: Tensor,
        grad_entropy: Tensor,
    ) -> int:
        """Adds the gradients of ``tokens``, for which forward kept ``kept``, to ``sums``; -> for how many that served.

        Upstream gradients are [N].
        """
        has_gradient = (grad_logprobs[tokens] != 0) | (grad_entropy[tokens] != 0)
        # What was kept knows nothing of the entropy: a token whose entropy has a gradient needs its logits again.
        as_kept = has_gradient & (grad_entropy[tokens] == 0)
        in_e = as_kept & (torch.arange(len(tokens), device=tokens.device) < len(kept.e))
        in_slots = as_kept & (results.entries[tokens] >= 0)
        from_e = where(in_e) if len(kept.e) else tokens[:0]
        from_slots = where(in_slots) if len(kept.slot_index) else tokens[:0]
        again = tokens[where(has_gradient & ~in_e & ~in_slots)]
        source, used = ("entries", from_slots) if len(kept.slot_index) else ("kept E", from_e)
        _log.debug("backward: %d tokens from %s, %d recomputed", len(used), source, len(again))
        coefficient = grad_logprobs / self.temperature
        # Those that are recomputed first: the product that is the first to reach d weight need not find it cleared.
        self._add_again(sums, again, results, grad_logprobs, grad_entropy)
        self._add_kept(sums, tokens, from_e, kept.e, coefficient)
        if len(from_slots):
            index = tokens[from_slots]
            entries = sparse.entries_of(
                kept.slot_index[from_slots], kept.slot_value[from_slots], results.entries[index], coefficient[index]
            )
            sums.add_entries(index, entries, sparse.WEIGHTED_ROWS[self.backend], self._rows_at_once())
        return len(used)

    def _add_kept(self, sums: Gradients, tokens: Tensor, rows: Tensor, e: Tensor, coefficient: Tensor) -> None:
        """Where all of it is of use and lies as it is multiplied, kept E is read in place, in blocks as large as their
        hidden states allow; else a block is gathered."""
        in_place = len(rows) == len(e) and sums.project.takes(e.dtype)
        size = self._rows_at_once() if in_place else self.block()
        for i, part in enumerate(split(rows, size)):
            block = e[i * size : (i + 1) * size] if in_place else e[part]
            sums.add(tokens[part], block[:, : self.vocab], coefficient[tokens[part]].unsqueeze(-1))
            del block  # before the next one

    def _add_again(
        self, sums: Gradients, tokens: Tensor, results: Results, grad_logprobs: Tensor, grad_entropy: Tensor
    ) -> None:
        block = self.block()
        room = sums.project.room(min(block // 4, len(tokens)))
        blocks = self.weights[0].new_empty(min(block, len(tokens)), row_stride(self.vocab))
        for index in split(tokens, block):
            e = blocks[: len(index), : self.vocab]
            for part, rows in zip(index.split(block // 4), e.split(block // 4), strict=True):
                logits = sums.project([hidden[part] for hidden in self.hiddens], room)
                ROW_PASSES[self.backend].backward(
                    grad_logprobs[part],
                    grad_entropy[part],
                    logits,
                    self.labels[part],
                    self.temperature[part],
                    results.entropy[part],
                    results.stats[:, part],
                    self.softcap,
                    self.ignore_index,
                    rows.unsqueeze(0),
                )
                del logits  # before the next chunk's, and before the products
            sums.add(index, e)

    def over_ranks(
        self,
        grads: list[Tensor],
        needs: Sequence[bool],
        dtype_of: Callable[[Tensor], torch.dtype] = lambda x: x.dtype,
    ) -> list[Tensor]:
        """Whole gradients of the hidden states: each rank has what its rows contribute."""
        for i, hidden in enumerate(self.hiddens):
            if self.group and needs[i]:
                grads[i] = vocab_shard.all_reduce(grads[i], self.group).to(dtype_of(hidden))
        return grads

    def _rows_at_once(self) -> int:
        """Tokens whose hidden states and their gradients, 16 H bytes each, fit."""
        return max(256, self.chunk_bytes // (16 * sum(hidden.shape[1] for hidden in self.hiddens)))


# What to keep


def plan(
    head: Head,
    backward: str,
    budget: int | None,
    tokens: int,
    tolerance: float,
    capacity: int,
    shards: list[int],
    entropies: bool,
) -> Plan:
    """What a call with these settings keeps of ``tokens`` tokens. In "auto" it waits for the call before.

    ``entropies``: whether those can have gradients.
    """
    watched, entries = None, backward == "sparse"
    if backward == "auto":
        watched = coverage.of(head.weights[0])
        if entropies and watched.wants_logits():
            return Plan(False, capacity, tolerance)
        if min(shards) >= coverage.LEAST_VOCAB * capacity:
            entries = watched.take_entries()
        else:
            watched = None
    row_bytes = row_stride(head.vocab) * head.weights[0].itemsize
    dense = 0 if entries else tokens_to_keep(backward, budget, tokens, row_bytes, head.labels.device)
    return Plan(entries, capacity, tolerance, dense, watched)


def tokens_to_keep(backward: str, budget: int | None, tokens: int, bytes_a_token: int, device: torch.device) -> int:
    """Whose E may be kept."""
    if backward == "recompute":
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


# Which tokens, and how many at a time. The host waits for the device in where, and for the sizes of shards, alone.


def where(mask: Tensor) -> Tensor:
    return mask.nonzero().squeeze(-1)


def split(index: Tensor, size: int) -> Sequence[Tensor]:
    return index.split(size) if len(index) else ()


# Matrix products: the vendor's, with float32 results


class Projection:
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

    def product(self, a: Tensor, b: Tensor, plus: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """``a b + plus``, float32, written over ``plus``: no second tensor of that size, unless it is one row, is ever
        beside it."""
        out_dtype: dict[str, Any] = {"out_dtype": torch.float32} if self.mixed else {}
        with without_autocast(a.device):
            if plus is None:
                return torch.mm(a, b, **out_dtype, out=out)
            if self.mixed and len(plus) == 1:  # addmm takes a row for a bias, which PyTorch refuses under TunableOp
                return plus.add_(torch.mm(a, b, **out_dtype))
            return torch.addmm(plus, a, b, **out_dtype, out=plus)

    def room(self, tokens: int) -> Tensor | None:
        """For the logits of one chunk after the other, where an allocator does not hand out the same memory again by
        itself: on a CPU the system clears each page of it first, which takes a third of the time of the product."""
        return self._logits(tokens) if self.weights[0].device.type == "cpu" and not self.mixed else None

    def _logits(self, tokens: int) -> Tensor:
        """Room for [tokens, V] float32, with rows that begin at multiples of 64 elements."""
        weight = self.weights[0]
        return weight.new_empty(tokens, row_stride(len(weight)), dtype=torch.float32)[:, : len(weight)]

    def __call__(self, hiddens: Sequence[Tensor], room: Tensor | None = None) -> Tensor:
        """Logits of a chunk, [1, C, V] float32, in ``room`` if there is some."""
        tokens = len(hiddens[0])
        room = self._logits(tokens) if room is None else room[:tokens]
        logits = None
        for hidden, weight in zip(hiddens, self.weights, strict=True):
            logits = self.product(self.factor(hidden), weight.t(), plus=logits, out=room)
        assert logits is not None
        return (logits if self.bias is None else logits.add_(self.bias)).unsqueeze(0)


class Gradients:
    """Gradients of hiddens, weights and bias, made of blocks of E. They come in divided by what ``admit`` returns."""

    def __init__(self, head: Head, needs: Sequence[bool], hidden_dtype: torch.dtype) -> None:
        n = len(head.hiddens)
        self.project = Projection(head.weights, head.bias)
        self.hiddens, self.weights, self.bias = head.hiddens, head.weights, head.bias
        self.needs_hiddens, self.needs_weights, self.needs_bias = needs[:n], needs[n:-1], needs[-1]
        self.dh = [
            x.new_zeros(x.shape if needed else (0,), dtype=hidden_dtype)
            for x, needed in zip(head.hiddens, self.needs_hiddens, strict=True)
        ]
        self.dw: list[Tensor | None] = [None] * n
        self.scaled = head.weights[0].dtype == torch.float16
        self.scale = head.temperature.new_full((), 2.0**-100 if self.scaled else 1.0)
        self.db = self.scale.new_zeros(head.vocab if self.needs_bias else 0)

    def admit(self, upstream: Tensor) -> Tensor:
        """What upstream gradients are to be divided by before they are added: in float16 a power of two above all that
        have come, and what is there is brought down to it."""
        if self.scaled and len(upstream):
            largest = upstream.abs().amax()
            exponent = torch.frexp(largest).exponent.clamp(-100, 100)
            exponent = torch.where(largest == 0, -100, exponent)  # zeros alone ask for nothing
            scale = torch.maximum(self.scale, torch.ldexp(torch.ones_like(self.scale), exponent))
            for total in (*self.dw, self.db):
                if total is not None:
                    total *= self.scale / scale
            self.scale = scale
        return self.scale

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

    def results(self, dtype_of: Callable[[Tensor], torch.dtype] = lambda x: x.dtype) -> list[Tensor]:
        """Of hiddens, weights, bias; an empty tensor for one that is not needed. ``dtype_of`` what, by default its own,
        each of the weights and the bias is returned in."""
        bias = self.weights[0] if self.bias is None else self.bias
        dw = [
            weight.new_zeros(weight.shape if needed else (0,), dtype=dtype_of(weight))
            if total is None
            else (total.mul_(self.scale) if self.scaled else total).to(dtype_of(weight))
            for total, weight, needed in zip(self.dw, self.weights, self.needs_weights, strict=True)
        ]
        return [*self.dh, *dw, (self.db * self.scale).to(dtype_of(bias))]


# The row pass that keeps E, right after the one that made its statistics. The other two are selective_logprobs's.


def _torch_keep(logits, labels, temperature, stats, softcap, kept):
    """Logits [1, C, V] -> E in kept, of as many rows as there is room for: [rows, V], rows <= C; any row strides."""
    inside, label = safe_labels(labels, kept.shape[1])
    for rows in torch.arange(len(kept), device=kept.device).split(rows_per_block(kept.shape[1])):
        z, ratio = scaled_rows(logits[0, rows], temperature[rows], softcap)
        e = (z - stats[0, rows, None] - stats[1, rows, None]).exp_().neg_()
        e.scatter_add_(-1, label[rows, None], inside[rows, None].float())
        if ratio is not None:
            e *= softcap_derivative(ratio)
        kept[rows] = e.to(kept.dtype)


KEEP: dict[str, Callable[..., None]] = {"torch": _torch_keep}


if triton is not None:
    # One program a row and block of columns. Reads 4 bytes an element and writes that of E, 2 in half precision.
    @triton.jit(do_not_specialize=["C"])
    def _keep_kernel(
        x_ptr, label_ptr, tau_ptr, stat_ptr, kept_ptr, stride_x, stride_kept, stride_tau, C, V, softcap,
        HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        start = tl.program_id(1) * BLOCK
        tau = tl.load(tau_ptr + row * stride_tau)
        z, slope = scaled_block(x_ptr + row * stride_x, start, 1, V, softcap, tau, HAS_SOFTCAP, BLOCK)
        p = tl.exp(z - tl.load(stat_ptr + row) - tl.load(stat_ptr + C + row))
        is_label = start + tl.arange(0, BLOCK) == tl.load(label_ptr + row)
        e = tl.where(is_label, 1.0 - p, -p)
        if HAS_SOFTCAP:
            e *= slope
        store_block(kept_ptr + row * stride_kept, start, e, V, BLOCK)

    # As selective_logprobs's backward, which does the same to the same rows.
    KEEP_CONFIGS = Tunable("linear_logprobs.keep", Config(2048, 8), Config(1024, 4), Config(2048, 4), Config(4096, 8))

    def _triton_keep(logits, labels, temperature, stats, softcap, kept):
        """As _torch_keep."""
        n, vocab = kept.shape
        if n:
            shape = launch_shape(KEEP_CONFIGS, logits)
            launch(_keep_kernel, (n, triton.cdiv(vocab, shape["BLOCK"])),
                logits, labels, temperature, stats, kept, logits.stride(1), kept.stride(0), temperature.stride(0),
                stats.shape[1], vocab, softcap, HAS_SOFTCAP=softcap > 0, **shape,
            )  # fmt: skip

    KEEP["triton"] = _triton_keep
