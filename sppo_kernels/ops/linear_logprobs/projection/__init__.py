"""The fused projection: hidden states to log-probabilities in one product, whose logits are never stored.

    logits of a tile, in registers --> y = cap(x) --> d = (y - base) / temperature

    statistics      sums of exp(d) and exp(d) d over the columns other than the label's
                    with a cache: exp(d) cap'(x) in the dtype of the factors, as ``CachedRows`` keeps it
                    with sparse entries: which d are above a floor, a bit each
    gradient        -exp(d) (factor + entropy_factor d) cap'(x), the gradient of the logits
    maximum         the largest y

The sums need no maximum: any base near the log-sum-exp keeps exp(d) within float32, and the label's own logit is one
that a single row of the weight gives. The label's share of the sum of exp(d) is then exactly 1, and

    logprob = -log1p(sum of the others),    1 - p = (sum of the others) / (1 + sum of the others)

are exact to rounding even where p is nearly 1. A token whose label is so unlikely that the base was of no use is
computed again, with its log-sum-exp as the base, or its maximum if the sums overflowed.

A token's results depend on no other token, and not on how a batch is split into calls: they have the same bits in every
batch. Tiles of columns are added in their order. Every mode sums alike, so that old and new log-probabilities of the
same weights are equal, whatever else is kept for backward.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ...._backend import HAS_TRITON
from ...row_passes import CachedRows, RowResults
from ...row_passes.torch import softcap_derivative
from .. import indexing, vocab_parallel
from ..entry_logits import ENTRY_LOGITS
from ..sparse import Candidates, Selected, fill, sums_of_rows
from .factors import Factors, ProjectionPass
from .torch_backend import TORCH_PROJECTION

__all__ = ["PROJECTIONS", "Factors", "FusedProjection", "block_size", "choose_projection"]

PROJECTIONS = ("auto", "vendor", "fused")
_PASSES: dict[str, ProjectionPass] = {"torch": TORCH_PROJECTION}

if HAS_TRITON:
    from . import tiling
    from . import triton as triton_backend

    _PASSES["triton"] = triton_backend.TRITON_PROJECTION

_WORKSPACE_BYTES = 1 << 26  # for a block of tokens, their hidden states included
_TOKENS_MULTIPLE = 256

# The least log-probability of a label whose logit is the base, in nats: of the statistics; of cached probabilities,
# which in float16 must not overflow; and of candidates, of which an unlikely label would let too many pass.
_LEAST_LOGPROB = -10.0
_LEAST_LOGPROB_CACHED = {torch.float16: -3.0, torch.bfloat16: _LEAST_LOGPROB, torch.float32: _LEAST_LOGPROB}
_LEAST_LOGPROB_CANDIDATES = -3.0
_SCALE = {torch.float16: 16.0, torch.bfloat16: 1.0, torch.float32: 1.0}  # keeps probabilities of float16 normal
_MOST_CANDIDATES = 4  # per sparse entry
_LEAST_RATIO = 2.0**-100  # of exp at the label to that at the base, whose inverse is a float32
_LOG_ZERO = -200.0  # a finite stand-in for the logarithm of 0, whose exp is 0


def choose_projection(projection: str, weight: Tensor, *, backend: str, group: str) -> str:
    """Return "vendor" or "fused"; for "auto" what was measured to be faster, "vendor" if nothing was.

    With a group, whose ranks must decide alike and may have shards of other shapes, "auto" is "vendor".
    """
    if projection != "auto":
        return projection
    return "fused" if backend == "triton" and not group and tiling.is_chosen(weight) else "vendor"


class _Logits(NamedTuple):
    """Single logits, capped: y = cap(x), and cap'(x)."""

    y: Tensor
    slope: Tensor

    @classmethod
    def compute(cls, factors: Factors, *, token: Tensor, column: Tensor, backend: str, group: str = "") -> _Logits:
        """Compute logits of tokens at columns. NaN for a column that no rank has."""
        x = torch.empty(len(token), dtype=torch.float32, device=token.device)
        for i, (hidden, weight) in enumerate(zip(factors.hiddens, factors.weights, strict=True)):
            bias = None if i else factors.bias
            ENTRY_LOGITS[backend](out=x, hidden=hidden, weight=weight, bias=bias, token=token, column=column, add=i > 0)
        exists = (column >= 0) & (column < len(factors.weights[0]))
        if group:
            x, owners = vocab_parallel.all_reduce(torch.stack([torch.where(exists, x, 0.0), exists.float()]), group)
            exists = owners > 0
        x = torch.where(exists, x, float("nan"))
        if not factors.softcap:
            return cls(x, torch.ones_like(x))
        ratio = x / factors.softcap
        return cls(ratio.tanh() * factors.softcap, softcap_derivative(ratio))


class _Totals(NamedTuple):
    """Results of n tokens over the complete vocabulary."""

    row: RowResults
    mass: Tensor  # [1 or 2, n]: probability of this rank's columns but the label's, and of those below the floor
    factors: Tensor  # [2, n], of CachedRows
    bits: Tensor | None  # of Statistics

    def replace(self, out: RowResults, index: Tensor) -> None:
        """Set the results of tokens whose statistics were of no use; the others keep their own last bits."""
        far = ~(out.logprobs[index] >= _LEAST_LOGPROB)
        for mine, theirs in zip(out, self.row, strict=True):
            mine[..., index] = torch.where(far, theirs, mine[..., index])


class FusedProjection:
    """The product of n hidden states with an output embedding, whose logits are never stored.

    Args:
        factors: of n tokens.
        labels: ``[n]``, columns; V for one that another rank has.
        temperature: ``[n]``.
        backend: "torch" or "triton".
        group: name of the process group over which the weights are split by rows, "" for none.
    """

    def __init__(self, factors: Factors, *, labels: Tensor, temperature: Tensor, backend: str, group: str) -> None:
        self.factors, self.labels, self.temperature = factors, labels, temperature.contiguous()
        self.backend, self.group = backend, group
        self.vocab = len(factors.weights[0])
        self.is_local = (labels >= 0) & (labels < self.vocab)

    def forward(self, out: RowResults, cached: CachedRows | None = None) -> None:
        """Fill ``out``, and ``cached`` for as many of the first tokens as it has rows.

        The host waits for the device once, and once more where only some are cached.
        """
        label = self._label_logits(self.group)
        num_cached = 0 if cached is None else len(cached.probs)
        for first, last, target in ((0, num_cached, cached), (num_cached, len(self.labels), None)):
            if first < last:
                self._forward(slice(first, last), label, out, target)

    def _forward(self, tokens: slice, label: _Logits, out: RowResults, cached: CachedRows | None) -> None:
        base = _usable(label.y[tokens])
        totals = self._compute(tokens, label, base, probs=None if cached is None else cached.probs)
        for mine, theirs in zip(out.rows(tokens.start, tokens.stop), totals.row, strict=True):
            mine.copy_(theirs)
        least = _LEAST_LOGPROB
        if cached is not None:
            cached.factors.copy_(totals.factors)
            least = _LEAST_LOGPROB_CACHED[cached.probs.dtype]
        unlikely = indexing.nonzero_indices(~(totals.row.logprobs >= least))  # of NaN too
        # In blocks, since their probabilities are computed apart and copied.
        for block in indexing.ranges(len(unlikely), len(unlikely) if cached is None else _TOKENS_MULTIPLE):
            index = unlikely[block.start : block.stop]
            probs = None if cached is None else cached.probs.new_empty(len(index), self.vocab)
            again = self._compute_again(index + tokens.start, label, out, probs=probs)
            again.replace(out, index + tokens.start)
            if cached is not None and probs is not None:
                cached.probs[index], cached.factors[:, index] = probs, again.factors

    def select(self, out: RowResults, *, mass_tolerance: float, index: Tensor, value: Tensor) -> Selected:
        """Fill ``out``, and select sparse entries into ``index`` and ``value`` [n, max_entries]."""
        n, max_entries = index.shape
        label, every = self._label_logits(self.group), slice(0, n)
        log_floor = math.log(mass_tolerance / max_entries)
        totals = self._compute(every, label, _usable(label.y), log_floor=log_floor)
        for mine, theirs in zip(out, totals.row, strict=True):
            mine.copy_(theirs)
        bits, mass = totals.bits, totals.mass
        assert bits is not None
        unlikely = indexing.nonzero_indices(~(out.logprobs >= _LEAST_LOGPROB_CANDIDATES))
        if len(unlikely):
            again = self._compute_again(unlikely, label, out, log_floor=log_floor)
            again.replace(out, unlikely)
            assert again.bits is not None
            bits[unlikely], mass[:, unlikely] = again.bits, again.mass
        # A row with many more candidates than entries is not looked at: what it leaves out is too much.
        too_many = _count_bits(bits) > _MOST_CANDIDATES * max_entries
        bits[too_many] = 0
        others, left_out = mass[0], torch.where(too_many, 1.0, mass[1])
        token, column = _places_of_bits(bits)
        logits = _Logits.compute(self.factors, token=token, column=column, backend=self.backend)
        top, log_total = out.row_stats
        p = torch.exp((logits.y - top[token]) / self.temperature[token] - log_total[token])
        # These logits come from another product, in which rounding differs. Their sum is that of the tiles.
        p *= ((others - left_out) / sums_of_rows(p, row=token, num_rows=n))[token]
        local = indexing.nonzero_indices(self.is_local)
        candidates = Candidates(
            row=torch.cat([token, local]),
            column=torch.cat([column, self.labels[local]]),
            p=torch.cat([p, out.logprobs[local].exp()]),
            is_label=torch.arange(len(token) + len(local), device=token.device) >= len(token),
            value=torch.cat([-p * logits.slope, (-torch.expm1(out.logprobs) * label.slope)[local]]),
        )
        order = (candidates.row * self.vocab + candidates.column).argsort()
        candidates = Candidates(*(field[order] for field in candidates))
        return Selected(*fill(candidates, rest=left_out, mass_tolerance=mass_tolerance, index=index, value=value))

    def gradient(
        self,
        *,
        row_stats: Tensor,
        entropy: Tensor,
        grad_logprobs: Tensor,
        grad_entropy: Tensor | None,
        out: Tensor,
    ) -> None:
        """Fill ``out`` [n, V], in the dtype of the factors, with the gradient of the logits.

        Args:
            row_stats: ``[2, n]``, of ``RowResults``.
            entropy: ``[n]``.
            grad_logprobs: ``[n]``.
            grad_entropy: ``[n]``, or None for zeros.
            out: see above.
        """
        top, log_total = row_stats
        label = self._label_logits("")
        logprob = (label.y - top) / self.temperature - log_total
        factor, at_label = grad_logprobs, -torch.expm1(logprob) * grad_logprobs
        rescaled = torch.exp(-log_total) / self.temperature  # exp(d) is relative to ``top``
        if grad_entropy is not None:
            factor = factor + grad_entropy * (entropy - log_total)
            at_label = at_label - grad_entropy * logprob.exp() * (logprob.clamp(min=_LOG_ZERO) + entropy)
        _PASSES[self.backend].gradient(
            self.factors,
            labels=self.labels,
            temperature=self.temperature,
            base=top,
            factor=factor * rescaled,
            entropy_factor=None if grad_entropy is None else grad_entropy * rescaled,
            at_label=at_label * label.slope / self.temperature,
            out=out,
        )

    def _label_logits(self, group: str) -> _Logits:
        token = torch.arange(len(self.labels), device=self.labels.device)
        return _Logits.compute(self.factors, token=token, column=self.labels, backend=self.backend, group=group)

    def _compute(
        self,
        tokens: slice | Tensor,
        label: _Logits,
        base: Tensor,
        *,
        probs: Tensor | None = None,
        log_floor: float | None = None,
    ) -> _Totals:
        """Compute the results of some tokens, with their probabilities or the bits of their candidates."""
        is_local, temperature = self.is_local[tokens], self.temperature[tokens]
        scale = 1.0 if probs is None else _SCALE[probs.dtype]
        sums, bits = _PASSES[self.backend].statistics(
            self.factors.tokens(tokens),
            labels=self.labels[tokens],
            temperature=temperature,
            base=base,
            probs=probs,
            scale=scale,
            log_floor=log_floor,
        )
        local = sums[::2].clone()  # of this rank
        if bits is not None and log_floor is not None:
            local[1] -= _count_bits(bits) * math.exp(log_floor)  # leaves those below the floor
        if self.group:
            vocab_parallel.all_reduce(sums, self.group)
        others, weighted = sums[:2]
        distance = (label.y[tokens] - base) / temperature
        own = distance.exp()
        total = own + others
        log_total = torch.where(own == 1, others.log1p(), total.log())
        entropy = log_total - (weighted + own * distance.clamp(min=_LOG_ZERO)) / total
        logprobs = torch.where(own >= _LEAST_RATIO, -torch.log1p(others / own), distance - log_total)
        # From here on relative to the log-sum-exp, rounded, so that what remains is small.
        top = base + temperature * log_total
        log_total = log_total - (top - base) / temperature
        return _Totals(
            row=RowResults(logprobs, entropy, torch.stack([top, log_total])),
            mass=local / total,
            factors=torch.stack(
                [1 / (total * scale), torch.where(is_local, others / total * label.slope[tokens], 0.0)]
            ),
            bits=bits,
        )

    def _compute_again(self, index: Tensor, label: _Logits, out: RowResults, **keep: Any) -> _Totals:
        """Compute tokens about their log-sum-exp, or about their maximum if the sums overflowed."""
        base = out.row_stats[0, index]
        overflowed = indexing.nonzero_indices(~base.isfinite())
        if len(overflowed):
            largest = _PASSES[self.backend].maximum(self.factors.tokens(index[overflowed]))
            if self.group:
                vocab_parallel.all_reduce(largest, self.group, dist.ReduceOp.MAX)
            base[overflowed] = largest
        return self._compute(index, label, base, **keep)


def block_size(hiddens: list[Tensor], vocab: int, backend: str) -> int:
    """Return how many tokens to compute at a time, a multiple of 256; ``vocab`` is that of the largest shard."""
    parts = tiling.bytes_per_token(vocab) if backend == "triton" else 0
    row = parts + sum(hidden.shape[1] * hidden.itemsize for hidden in hiddens)
    return max(_TOKENS_MULTIPLE, _WORKSPACE_BYTES // row // _TOKENS_MULTIPLE * _TOKENS_MULTIPLE)


def _usable(y: Tensor) -> Tensor:
    """Return the labels' logits as bases: any number instead of one that is not finite."""
    return torch.where(y.isfinite(), y, 0.0)


def _count_bits(words: Tensor) -> Tensor:
    """Count the bits that are set in each row."""
    x = words.view(torch.uint8)
    x = x - ((x >> 1) & 0x55)  # in pairs of bits, then in fours, then in bytes
    x = (x & 0x33) + ((x >> 2) & 0x33)
    return ((x + (x >> 4)) & 0x0F).sum(1)


def _places_of_bits(words: Tensor) -> tuple[Tensor, Tensor]:
    """Return row and column of each bit that is set, in the order of rows and columns."""
    size = 8 * words.itemsize
    row, word = words.nonzero(as_tuple=True)
    bits = (words[row, word][:, None] >> torch.arange(size, dtype=words.dtype, device=words.device)) & 1
    at, bit = bits.nonzero(as_tuple=True)
    return row[at], word[at] * size + bit
