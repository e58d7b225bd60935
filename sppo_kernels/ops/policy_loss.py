"""policy_loss: the clipped surrogate of PPO, GSPO and SPPO, from log-probabilities to one number and its gradient.

For token t of sequence i with d_t = logprob_t - old_t and n tokens in the sequence:

    ratio       token r = exp(d_t)      sequence_mean r = exp(sum d / n)      sequence_sum r = exp(sum d)
    surrogate   max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high));  with dual_clip c and A < 0: min(that, -A c)
    loss_t      w * surrogate + kl_coef * kl_t       w: the rollout correction, a constant in the gradient
    loss        sum_i sum_t a_i loss_t / normalizer

    aggregation            a_i      normalizer, unless given
    token-mean             1        tokens
    seq-mean-token-mean    1 / n    sequences that have tokens
    seq-mean-token-sum     1        sequences that have tokens
    any, sequence ratio    1 / n    sequences that have tokens

A sequence ratio is one number a sequence, so its terms are too: written as a token mean it takes per-token KL and,
where advantages differ inside a sequence, per-token advantages (each token is then pushed by its own advantage:
GSPO-token, arXiv 2507.18071, section 4.3).

Traffic: each of the N-element inputs is read once (twice where a sum over the sequence comes first), the gradient is
written once; forward and gradient are one kernel. Backward scales the gradient by one number.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._backend import NAMESPACE, pick_backend
from .._validation import (
    as_normalizer,
    check_choice,
    check_device,
    check_floating,
    check_integer,
    check_normalizer_value,
    check_shape,
    check_tensor,
    reject,
    values_are_checked,
)
from ..tuning import Config, Tunable

try:
    import triton
    import triton.language as tl

    from .._triton_utils import is_last_program, launch
except ImportError:
    triton = None

RATIO_LEVELS = ("token", "sequence_mean", "sequence_sum")
AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum")
KL_ESTIMATORS = ("k1", "k2", "k3")
ROLLOUT_CORRECTIONS = ("token_truncate", "sequence_truncate", "sequence_mask")
METRICS = (
    "clip_fraction",
    "clip_fraction_low",
    "clip_fraction_high",
    "dual_clip_fraction",
    "approx_kl",
    "kl",
    "ratio_mean",
    "ratio_min",
    "ratio_max",
    "rollout_kl",
    "rollout_weight_mean",
)
# exp of more overflows float32. Only the value stops here: the gradient of a ratio this large stays that of the ratio.
MAX_LOG = 80.0


class PolicyLossOutput(NamedTuple):
    """``loss``: 0-d float32, differentiable in the log-probabilities. ``metrics``: 0-d float32 tensors, detached."""

    loss: Tensor
    metrics: dict[str, Tensor]


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ratio_level: str = "token",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    aggregation: str = "token-mean",
    normalizer: float | Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    rollout_logprobs: Tensor | None = None,
    rollout_correction: str | None = None,
    rollout_cap: float = 2.0,
    backend: str | None = None,
) -> PolicyLossOutput:
    """Clipped policy-gradient loss at token or sequence level, with its gradient in the same launch.

    Sources: PPO clip (arXiv 1707.06347), dual clip (arXiv 1912.09729), sequence_mean is GSPO (arXiv 2507.18071), a
    scalar advantage a sequence is SPPO (arXiv 2604.08865), KL estimators (J. Schulman, "Approximating KL Divergence",
    2020), truncated importance weights (Ionides, 2008). docs/mathematics.md has them all.

    Args:
        logprobs: padded ``[B, T]``, or packed ``[N]`` with ``cu_seqlens``; nats, any floating dtype. Differentiated.
        old_logprobs: same shape; of the policy before the update.
        advantages: ``[B]``, one a sequence, or the shape of ``logprobs``.
        mask: same shape as ``logprobs``, nonzero where a token bears loss; None: all do.
        cu_seqlens: int32 ``[B + 1]``, where each packed sequence starts, from 0 to N; empty sequences are allowed.
        ratio_level: ``"token"``, ``"sequence_mean"`` or ``"sequence_sum"``.
        clip_low, clip_high: the ratio is clipped to ``[1 - clip_low, 1 + clip_high]``; at least 0.
        dual_clip: bound on ``ratio`` for negative advantages, greater than 1; None for none. There is no clamp on the
            log-ratio: it would take the gradient away just where a bad sample should be pushed off.
        aggregation: ``"token-mean"``, ``"seq-mean-token-mean"`` or ``"seq-mean-token-sum"``. A sequence-level ratio
            is averaged over the sequences that have tokens, whatever this says.
        normalizer: replaces the local count of tokens or sequences by that of the whole update, so that micro-batches
            and data-parallel ranks add up to one exact mean; greater than 0.
        ref_logprobs: same shape, of the reference policy, for the KL penalty and its metric.
        kl_coef: weight of the KL penalty, which needs ``ref_logprobs``.
        kl_estimator: ``"k1"``, ``"k2"`` or ``"k3"``.
        rollout_logprobs: same shape, of the engine that sampled.
        rollout_correction: weights by ``exp(old - rollout)``, a constant in the gradient: ``"token_truncate"`` (each
            token, at most ``rollout_cap``), ``"sequence_truncate"`` (their product over the sequence, at most
            ``rollout_cap``), ``"sequence_mask"`` (the product, 0 where it passes ``rollout_cap``).
        rollout_cap: greater than 0.
        backend: ``"reference"``, ``"torch"``, ``"triton"``, or None for triton on an accelerator and torch elsewhere.

    Returns:
        ``PolicyLossOutput(loss, metrics)``. Fractions, ``ratio_*`` and ``rollout_weight_mean`` are means over tokens at
        token level and over sequences at sequence level; ``approx_kl`` (old - new), ``kl`` and ``rollout_kl`` (rollout
        - old) are means over tokens. Without tokens the loss, its gradient and the metrics are 0, the ratios 1.

    Raises:
        ValueError: a wrong shape, device, choice or bound (values of ``cu_seqlens`` and a tensor ``normalizer`` are
        looked
            at on a CPU, and elsewhere under ``SPPO_KERNELS_CHECK=1``).
        TypeError: a tensor of the wrong kind.
    """
    check_tensors(logprobs, old_logprobs, advantages, mask, cu_seqlens, ref_logprobs, rollout_logprobs)
    settings = Settings.checked(
        ratio_level,
        clip_low,
        clip_high,
        dual_clip,
        aggregation,
        ref_logprobs,
        kl_coef,
        kl_estimator,
        rollout_logprobs,
        rollout_correction,
        rollout_cap,
    )
    if normalizer is not None:
        normalizer = as_normalizer(normalizer, logprobs.device)
    backend = pick_backend(backend, logprobs)
    per_token = is_per_token(advantages, logprobs, cu_seqlens)
    if cu_seqlens is None:
        # A padded batch is packed sequences of equal length, whose padding the mask takes out.
        rows, length = logprobs.shape
        cu_seqlens = torch.arange(rows + 1, dtype=torch.int32, device=logprobs.device) * length
    tensors = [
        None if x is None else x.reshape(-1)
        for x in (logprobs, old_logprobs, advantages, mask, cu_seqlens, normalizer, ref_logprobs, rollout_logprobs)
    ]
    if backend == "reference":
        check_values(cu_seqlens, normalizer, logprobs.numel())
        arguments: Any = (*tensors, per_token, settings)
        terms = _terms(*arguments)
        return PolicyLossOutput(terms.loss, named(torch.stack(terms.metrics)))
    loss, metrics, _, _ = _policy_loss(*tensors, per_token, *settings, backend)
    return PolicyLossOutput(loss, named(metrics))


def named(metrics: Tensor) -> dict[str, Tensor]:
    """``[11]`` by name, detached."""
    return dict(zip(METRICS, metrics.detach().unbind(), strict=True))


def reference(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, **settings: Any) -> PolicyLossOutput:
    """The definition: plain differentiable PyTorch in float32, or float64 for float64 log-probabilities."""
    return policy_loss(logprobs, old_logprobs, advantages, **settings, backend="reference")


class Settings(NamedTuple):
    """The arguments that are not tensors, in the order of the registered operation."""

    ratio_level: str
    clip_low: float
    clip_high: float
    dual_clip: float | None
    aggregation: str
    kl_coef: float
    kl_estimator: str
    rollout_correction: str
    rollout_cap: float

    @classmethod
    def checked(
        cls,
        ratio_level: str,
        clip_low: float,
        clip_high: float,
        dual_clip: float | None,
        aggregation: str,
        ref_logprobs: Tensor | None,
        kl_coef: float,
        kl_estimator: str,
        rollout_logprobs: Tensor | None,
        rollout_correction: str | None,
        rollout_cap: float,
    ) -> Settings:
        """Of the arguments of the public function. Raises what that says."""
        settings = cls(
            ratio_level,
            float(clip_low),
            float(clip_high),
            None if dual_clip is None else float(dual_clip),
            aggregation,
            float(kl_coef),
            kl_estimator,
            rollout_correction or "none",
            float(rollout_cap),
        )
        settings._check(ref_logprobs, rollout_logprobs)
        return settings

    def _check(self, ref_logprobs: Tensor | None, rollout_logprobs: Tensor | None) -> None:
        check_choice("ratio_level", self.ratio_level, RATIO_LEVELS)
        check_choice("aggregation", self.aggregation, AGGREGATIONS)
        check_choice("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        check_choice("rollout_correction", self.rollout_correction, ("none", *ROLLOUT_CORRECTIONS))
        for name, value in (("clip_low", self.clip_low), ("clip_high", self.clip_high)):
            if not value >= 0:
                reject(name, value, "at least 0")
        if self.dual_clip is not None and not self.dual_clip > 1:
            reject("dual_clip", self.dual_clip, "greater than 1, or None for no dual clip")
        if not self.rollout_cap > 0:
            reject("rollout_cap", self.rollout_cap, "greater than 0")
        if self.kl_coef and ref_logprobs is None:
            reject("ref_logprobs", None, f"given when kl_coef is not 0 (it is {self.kl_coef})")
        if self.rollout_correction != "none" and rollout_logprobs is None:
            reject("rollout_logprobs", None, f"given when rollout_correction is {self.rollout_correction!r}")

    @property
    def sequence_level(self) -> bool:
        return self.ratio_level != "token"

    @property
    def mean_in_sequence(self) -> bool:
        """Whether a token counts 1 / n in the loss."""
        return self.sequence_level or self.aggregation == "seq-mean-token-mean"

    @property
    def mean_over_tokens(self) -> bool:
        """Whether the loss is divided by the number of tokens, not of sequences."""
        return not self.sequence_level and self.aggregation == "token-mean"


def check_tensors(logprobs, old_logprobs, advantages, mask, cu_seqlens, ref_logprobs, rollout_logprobs) -> None:
    same = {"old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "rollout_logprobs": rollout_logprobs}
    check_floating(logprobs=logprobs, advantages=advantages, **same)
    check_integer(cu_seqlens=cu_seqlens)
    check_tensor(mask=mask)
    if cu_seqlens is None and logprobs.ndim != 2:
        reject(
            "logprobs", f"shape {tuple(logprobs.shape)}", "[B, T] (padded), or [N] together with cu_seqlens (packed)"
        )
    if cu_seqlens is not None and logprobs.ndim != 1:
        reject("logprobs", f"shape {tuple(logprobs.shape)}", "[N] when cu_seqlens is given")
    if cu_seqlens is not None and (cu_seqlens.ndim != 1 or not cu_seqlens.numel() or cu_seqlens.dtype != torch.int32):
        reject("cu_seqlens", f"{cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}", "int32 of shape [B + 1]")
    check_shape(logprobs.shape, "the shape of logprobs", mask=mask, **same)
    sequences = logprobs.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if advantages.shape not in ((sequences,), logprobs.shape):
        want = f"of shape ({sequences},), one a sequence, or {tuple(logprobs.shape)}, one a token"
        reject("advantages", f"shape {tuple(advantages.shape)}", want)
    check_device(logprobs.device, advantages=advantages, mask=mask, cu_seqlens=cu_seqlens, **same)


def check_values(cu_seqlens: Tensor, normalizer: Tensor | None, tokens: int) -> None:
    """``cu_seqlens`` starts at 0, never falls and ends at ``tokens``; ``normalizer`` is positive. Reads the values."""
    if normalizer is not None:
        check_normalizer_value(normalizer)
    if not values_are_checked(cu_seqlens):
        return
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != tokens or bool((cu_seqlens.diff() < 0).any()):
        reject("cu_seqlens", cu_seqlens.tolist()[:16], f"rising from 0 to the number of tokens, {tokens}")


def is_per_token(advantages: Tensor, logprobs: Tensor, cu_seqlens: Tensor | None) -> bool:
    """Packed with as many tokens as sequences, the shapes are the same: then it is one advantage a sequence."""
    return advantages.shape == logprobs.shape and (cu_seqlens is None or advantages.shape[0] != cu_seqlens.shape[0] - 1)


# The definition, on packed tokens. The reference differentiates it; the torch backend adds the gradient by hand.


class _Terms(NamedTuple):
    loss: Tensor
    metrics: list[Tensor]
    keep: Tensor
    advantages: Tensor
    ratio: Tensor
    slope: Tensor | float  # d log ratio_t / d logprob_t
    weight: Tensor | float  # the rollout correction
    ref_gap: Tensor | None  # ref - logprob
    share: Tensor | float  # a_i
    scale: Tensor  # 1 / normalizer


def _terms(logprobs, old, advantages, mask, cu_seqlens, normalizer, ref, rollout, per_token, s: Settings) -> _Terms:
    dtype = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
    lengths = cu_seqlens.diff().long()
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    keep = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask != 0

    def gap(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(keep, a.to(dtype) - b.to(dtype), 0.0)

    def sum_in_sequence(x: Tensor) -> Tensor:
        return x.new_zeros(len(lengths)).index_add(0, sequence, x)

    def total(x: Tensor | float) -> Tensor:
        return torch.where(keep, x, 0.0).sum(dtype=dtype)

    n = sum_in_sequence(keep.to(dtype))
    n_of_token = n.clamp(min=1)[sequence]
    tokens, sequences = n.sum(), (n > 0).sum().to(dtype)

    advantages = advantages.detach().to(dtype) if per_token else advantages.detach().to(dtype)[sequence]
    log_ratio = gap(logprobs, old.detach())
    approx_kl = -total(log_ratio.detach()) / tokens.clamp(min=1)
    slope: Tensor | float = 1.0
    if s.sequence_level:
        whole = sum_in_sequence(log_ratio.detach())[sequence]
        if s.ratio_level == "sequence_mean":
            whole = whole / n_of_token
        else:
            slope = n_of_token
        # The value is the sequence's; a token reaches it through its own log-probability, and the mean over the n
        # tokens below divides by n: in all, d ratio / d logprob_t is ratio / n for the mean and ratio for the sum, as
        # it should.
        log_ratio = whole + slope * (log_ratio - log_ratio.detach())
    ratio = _exp(log_ratio)

    surrogate = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - s.clip_low, 1 + s.clip_high))
    if s.dual_clip is not None:
        bounded = torch.minimum(surrogate, -advantages * s.dual_clip)
        surrogate = torch.where(advantages < 0, bounded, surrogate)

    weight, weight_mean, rollout_kl = _rollout_weight(
        old, rollout, gap, sum_in_sequence, total, sequence, n, tokens, sequences, s
    )
    loss_of_token = weight * surrogate
    kl, ref_gap = tokens.new_zeros(()), None
    if ref is not None:
        ref_gap = gap(ref.detach(), logprobs)
        kl_of_token = _kl(ref_gap, s.kl_estimator)
        kl = total(kl_of_token.detach()) / tokens.clamp(min=1)
        if s.kl_coef:
            loss_of_token = loss_of_token + s.kl_coef * kl_of_token

    share = 1 / n_of_token if s.mean_in_sequence else 1.0
    count = tokens if s.mean_over_tokens else sequences
    scale = 1 / (count.clamp(min=1) if normalizer is None else normalizer.to(dtype).squeeze())
    loss = total(share * loss_of_token) * scale

    # A unit is what the ratio belongs to: a token, or a sequence (as a mean over its tokens)
    units = sequences if s.sequence_level else tokens
    unit = 1 / n_of_token if s.sequence_level else 1.0
    value = ratio.detach()
    mean_over_units = lambda x: total(unit * x) / units.clamp(min=1)
    below = mean_over_units((advantages < 0) & (value < 1 - s.clip_low))
    above = mean_over_units((advantages > 0) & (value > 1 + s.clip_high))
    bound = float("inf") if s.dual_clip is None else s.dual_clip
    dual = mean_over_units((advantages < 0) & (value > bound))
    some = tokens > 0
    extreme = lambda fill, reduce: torch.where(
        some, reduce(torch.cat([torch.where(keep, value, fill), value.new_full((1,), fill)])), 1.0
    )
    metrics = [
        below + above,
        below,
        above,
        dual,
        approx_kl,
        kl,
        torch.where(some, mean_over_units(value), 1.0),
        extreme(float("inf"), torch.amin),
        extreme(-float("inf"), torch.amax),
        rollout_kl,
        weight_mean,
    ]
    return _Terms(loss, metrics, keep, advantages, value, slope, weight, ref_gap, share, scale)


def _exp(x: Tensor) -> Tensor:
    """exp, its value held at exp(MAX_LOG), its gradient that value."""
    return torch.exp(x - (x - x.clamp(max=MAX_LOG)).detach())


def _kl(ref_gap: Tensor, estimator: str) -> Tensor:
    """KL(policy || reference) of a token from ref - logprob."""
    if estimator == "k1":
        return -ref_gap
    if estimator == "k2":
        return ref_gap.square() / 2
    return _exp(ref_gap) - 1 - ref_gap


def _rollout_weight(old, rollout, gap, sum_in_sequence, total, sequence, n, tokens, sequences, s: Settings):
    """The correction's weight a token, its mean, and KL(rollout || old)."""
    zero = torch.zeros_like(tokens)
    if rollout is None:
        return 1.0, (tokens > 0).to(tokens.dtype), zero
    log_weight = gap(old.detach(), rollout.detach())
    rollout_kl = -total(log_weight) / tokens.clamp(min=1)
    if s.rollout_correction == "none":
        return 1.0, (tokens > 0).to(tokens.dtype), rollout_kl
    if s.rollout_correction == "token_truncate":
        weight = _exp(log_weight).clamp(max=s.rollout_cap)
        return weight, total(weight) / tokens.clamp(min=1), rollout_kl
    weight = _exp(sum_in_sequence(log_weight))
    if s.rollout_correction == "sequence_truncate":
        weight = weight.clamp(max=s.rollout_cap)
    else:
        weight = torch.where(weight > s.rollout_cap, 0.0, weight)
    return weight[sequence], torch.where(n > 0, weight, 0.0).sum() / sequences.clamp(min=1), rollout_kl


# The registered operation


@torch.library.custom_op(f"{NAMESPACE}::policy_loss", mutates_args=())
def _policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor,
    normalizer: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    per_token: bool,
    ratio_level: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    aggregation: str,
    kl_coef: float,
    kl_estimator: str,
    rollout_correction: str,
    rollout_cap: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Packed tensors -> loss [], metrics [11], gradient before normalization [N], 1 / normalizer []."""
    check_values(cu_seqlens, normalizer, logprobs.shape[0])
    tensors = (logprobs, old_logprobs, advantages, mask, cu_seqlens, normalizer, ref_logprobs, rollout_logprobs)
    settings = Settings(
        ratio_level,
        clip_low,
        clip_high,
        dual_clip,
        aggregation,
        kl_coef,
        kl_estimator,
        rollout_correction,
        rollout_cap,
    )
    return BACKENDS[backend](*tensors, per_token, settings)


@_policy_loss.register_fake
def _(logprobs, *_):
    new = lambda *shape: logprobs.new_empty(shape, dtype=torch.float32)
    return new(), new(len(METRICS)), new(logprobs.shape[0]), new()


def _save(ctx, inputs, output):
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(output[2], output[3])


def _grad(ctx, grad_loss, *_):
    if torch.is_grad_enabled():  # create_graph=True: the saved gradient is a constant, its derivative would be 0
        raise RuntimeError("policy_loss has no second derivative; for one, use backend='reference'")
    gradient, scale = ctx.saved_tensors
    return (gradient * (grad_loss * scale)).to(ctx.dtype), *[None] * 18


_policy_loss.register_autograd(_grad, setup_context=_save)


# PyTorch backend


def _torch_policy_loss(*inputs):
    *_, s = inputs
    t = _terms(*inputs)
    passed = (t.advantages > 0) & (t.ratio > 1 + s.clip_high) | (t.advantages < 0) & (t.ratio < 1 - s.clip_low)
    if s.dual_clip is not None:
        passed |= (t.advantages < 0) & (t.ratio > s.dual_clip)
    gradient = torch.where(passed, 0.0, -t.advantages * t.ratio) * t.slope * t.weight
    if s.kl_coef:
        slopes = {"k1": lambda d: 1.0, "k2": lambda d: -d, "k3": lambda d: 1 - _exp(d)}
        gradient = gradient + s.kl_coef * slopes[s.kl_estimator](t.ref_gap)
    return t.loss, torch.stack(t.metrics), torch.where(t.keep, gradient * t.share, 0.0), t.scale


BACKENDS = {"torch": _torch_policy_loss}


# Triton backend: one program a sequence, and the one that comes last adds up what the others left
#
#   program i:  [pass 1: n, sum of d, sum of old - rollout]   only where something needs them before the first token
#               pass 2: every term of every token; gradient out; sums in registers
#               sums of the sequence -> partial [N_SUMS, B]
#   last one:   partial -> loss, metrics, 1 / normalizer, in a fixed order

if triton is not None:
    N_SUMS: tl.constexpr = tl.constexpr(12)

    @triton.jit
    def _load(ptr, index, keep):
        return tl.load(ptr + index, mask=keep, other=0.0).to(tl.float32)

    @triton.jit
    def _bounded_exp(x, MAX: tl.constexpr):
        return tl.exp(tl.minimum(x, MAX))

    @triton.jit(do_not_specialize=["B"])
    def _kernel(
        logprob_ptr,
        old_ptr,
        advantage_ptr,
        mask_ptr,
        cu_ptr,
        normalizer_ptr,
        ref_ptr,
        rollout_ptr,
        loss_ptr,
        metric_ptr,
        gradient_ptr,
        scale_ptr,
        partial_ptr,
        counter_ptr,
        B,
        clip_low,
        clip_high,
        dual_clip,
        kl_coef,
        rollout_cap,
        PER_TOKEN: tl.constexpr,
        RATIO_LEVEL: tl.constexpr,
        MEAN_IN_SEQUENCE: tl.constexpr,
        MEAN_OVER_TOKENS: tl.constexpr,
        KL: tl.constexpr,
        CORRECTION: tl.constexpr,
        TWO_PASSES: tl.constexpr,
        MAX_LOG: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        sequence = tl.program_id(0).to(tl.int64)
        start = tl.load(cu_ptr + sequence).to(tl.int64)
        end = tl.load(cu_ptr + sequence + 1).to(tl.int64)
        n = (end - start).to(tl.float32)
        log_ratio_of_sequence = 0.0
        log_weight_of_sequence = 0.0
        if TWO_PASSES:
            count = tl.zeros([BLOCK], tl.float32)
            ratio_sum = tl.zeros([BLOCK], tl.float32)
            weight_sum = tl.zeros([BLOCK], tl.float32)
            for first in range(start, end, BLOCK):
                index = first + tl.arange(0, BLOCK)
                keep = index < end
                if mask_ptr is not None:
                    keep &= tl.load(mask_ptr + index, mask=keep, other=0) != 0
                count += keep.to(tl.float32)
                old = _load(old_ptr, index, keep)
                if RATIO_LEVEL != "token":
                    ratio_sum += _load(logprob_ptr, index, keep) - old
                if CORRECTION == "sequence_truncate" or CORRECTION == "sequence_mask":
                    weight_sum += old - _load(rollout_ptr, index, keep)
            n = tl.sum(count, 0)
            log_ratio_of_sequence = tl.sum(ratio_sum, 0)
            log_weight_of_sequence = tl.sum(weight_sum, 0)
        divisor = tl.maximum(n, 1.0)
        slope = 1.0
        if RATIO_LEVEL == "sequence_mean":
            log_ratio_of_sequence /= divisor
        if RATIO_LEVEL == "sequence_sum":
            slope = divisor
        share = 1.0
        if MEAN_IN_SEQUENCE:
            share = 1.0 / divisor
        unit = 1.0
        if RATIO_LEVEL != "token":
            unit = 1.0 / divisor
        weight_of_sequence = 1.0
        if CORRECTION == "sequence_truncate" or CORRECTION == "sequence_mask":
            weight_of_sequence = _bounded_exp(log_weight_of_sequence, MAX_LOG)
            if CORRECTION == "sequence_truncate":
                weight_of_sequence = tl.minimum(weight_of_sequence, rollout_cap)
            else:
                weight_of_sequence = tl.where(weight_of_sequence > rollout_cap, 0.0, weight_of_sequence)

        loss_sum = tl.zeros([BLOCK], tl.float32)
        token_sum = tl.zeros([BLOCK], tl.float32)
        low_sum = tl.zeros([BLOCK], tl.float32)
        high_sum = tl.zeros([BLOCK], tl.float32)
        dual_sum = tl.zeros([BLOCK], tl.float32)
        gap_sum = tl.zeros([BLOCK], tl.float32)
        kl_sum = tl.zeros([BLOCK], tl.float32)
        ratio_sum = tl.zeros([BLOCK], tl.float32)
        ratio_min = tl.full([BLOCK], float("inf"), tl.float32)
        ratio_max = tl.full([BLOCK], float("-inf"), tl.float32)
        rollout_gap_sum = tl.zeros([BLOCK], tl.float32)
        weight_sum = tl.zeros([BLOCK], tl.float32)
        for first in range(start, end, BLOCK):
            index = first + tl.arange(0, BLOCK)
            inside = index < end
            keep = inside
            if mask_ptr is not None:
                keep &= tl.load(mask_ptr + index, mask=inside, other=0) != 0
            logprob = _load(logprob_ptr, index, keep)
            old = _load(old_ptr, index, keep)
            if PER_TOKEN:
                advantage = _load(advantage_ptr, index, keep)
            else:
                advantage = tl.load(advantage_ptr + sequence).to(tl.float32) + tl.zeros([BLOCK], tl.float32)
            gap = logprob - old
            log_ratio = gap
            if RATIO_LEVEL != "token":
                log_ratio = log_ratio_of_sequence + tl.zeros([BLOCK], tl.float32)
            ratio = _bounded_exp(log_ratio, MAX_LOG)
            clipped = tl.minimum(tl.maximum(ratio, 1.0 - clip_low), 1.0 + clip_high)
            surrogate = tl.maximum(-advantage * ratio, -advantage * clipped)
            low = (advantage < 0.0) & (ratio < 1.0 - clip_low)
            high = (advantage > 0.0) & (ratio > 1.0 + clip_high)
            passed = low | high
            if dual_clip is not None:
                surrogate = tl.where(advantage < 0.0, tl.minimum(surrogate, -advantage * dual_clip), surrogate)
                dual = (advantage < 0.0) & (ratio > dual_clip)
                passed |= dual
                dual_sum += tl.where(dual & keep, unit, 0.0)
            weight = weight_of_sequence + tl.zeros([BLOCK], tl.float32)
            if rollout_ptr is not None:
                log_weight = old - _load(rollout_ptr, index, keep)
                rollout_gap_sum += tl.where(keep, -log_weight, 0.0)
                if CORRECTION == "token_truncate":
                    weight = tl.minimum(_bounded_exp(log_weight, MAX_LOG), rollout_cap)
                    weight_sum += tl.where(keep, weight, 0.0)
            loss = weight * surrogate
            gradient = weight * slope * tl.where(passed, 0.0, -advantage * ratio)
            if ref_ptr is not None:
                d = _load(ref_ptr, index, keep) - logprob
                if KL == "k1":
                    kl = -d
                    kl_slope = tl.full([BLOCK], 1.0, tl.float32)
                elif KL == "k2":
                    kl = 0.5 * d * d
                    kl_slope = -d
                else:
                    e = _bounded_exp(d, MAX_LOG)
                    kl = e - 1.0 - d
                    kl_slope = 1.0 - e
                kl_sum += tl.where(keep, kl, 0.0)
                loss += kl_coef * kl
                gradient += kl_coef * kl_slope
            tl.store(gradient_ptr + index, tl.where(keep, share * gradient, 0.0), mask=inside)
            loss_sum += tl.where(keep, share * loss, 0.0)
            token_sum += tl.where(keep, 1.0, 0.0)
            low_sum += tl.where(low & keep, unit, 0.0)
            high_sum += tl.where(high & keep, unit, 0.0)
            gap_sum += tl.where(keep, gap, 0.0)
            ratio_sum += tl.where(keep, unit * ratio, 0.0)
            ratio_min = tl.where(keep, tl.minimum(ratio_min, ratio), ratio_min)
            ratio_max = tl.where(keep, tl.maximum(ratio_max, ratio), ratio_max)

        tokens = tl.sum(token_sum, 0)
        weight_total = tl.sum(weight_sum, 0)
        if CORRECTION == "sequence_truncate" or CORRECTION == "sequence_mask":
            weight_total = tl.where(tokens > 0.0, weight_of_sequence, 0.0)
        partial_ptr += sequence
        tl.store(partial_ptr + 0 * B, tl.sum(loss_sum, 0))
        tl.store(partial_ptr + 1 * B, tokens)
        tl.store(partial_ptr + 2 * B, tl.sum(low_sum, 0))
        tl.store(partial_ptr + 3 * B, tl.sum(high_sum, 0))
        tl.store(partial_ptr + 4 * B, tl.sum(dual_sum, 0))
        tl.store(partial_ptr + 5 * B, tl.sum(gap_sum, 0))
        tl.store(partial_ptr + 6 * B, tl.sum(kl_sum, 0))
        tl.store(partial_ptr + 7 * B, tl.sum(ratio_sum, 0))
        tl.store(partial_ptr + 8 * B, tl.min(ratio_min, 0))
        tl.store(partial_ptr + 9 * B, tl.max(ratio_max, 0))
        tl.store(partial_ptr + 10 * B, tl.sum(rollout_gap_sum, 0))
        tl.store(partial_ptr + 11 * B, weight_total)
        if is_last_program(counter_ptr, B):
            _finish(
                partial_ptr - sequence,
                normalizer_ptr,
                loss_ptr,
                metric_ptr,
                scale_ptr,
                B,
                RATIO_LEVEL,
                MEAN_OVER_TOKENS,
                CORRECTION,
                BLOCK,
            )

    @triton.jit
    def _column(partial_ptr, which, B, BLOCK: tl.constexpr):
        """Sum of one partial result over all sequences."""
        total = tl.zeros([BLOCK], tl.float32)
        for first in range(0, B, BLOCK):
            index = first + tl.arange(0, BLOCK)
            total += tl.load(partial_ptr + which * B + index, mask=index < B, other=0.0)
        return tl.sum(total, 0)

    @triton.jit
    def _finish(
        partial_ptr,
        normalizer_ptr,
        loss_ptr,
        metric_ptr,
        scale_ptr,
        B,
        RATIO_LEVEL: tl.constexpr,
        MEAN_OVER_TOKENS: tl.constexpr,
        CORRECTION: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        tokens = _column(partial_ptr, 1, B, BLOCK)
        nonempty = tl.zeros([BLOCK], tl.float32)
        lowest = tl.full([BLOCK], float("inf"), tl.float32)
        highest = tl.full([BLOCK], float("-inf"), tl.float32)
        for first in range(0, B, BLOCK):
            index = first + tl.arange(0, BLOCK)
            nonempty += (tl.load(partial_ptr + 1 * B + index, mask=index < B, other=0.0) > 0.0).to(tl.float32)
            lowest = tl.minimum(lowest, tl.load(partial_ptr + 8 * B + index, mask=index < B, other=float("inf")))
            highest = tl.maximum(highest, tl.load(partial_ptr + 9 * B + index, mask=index < B, other=float("-inf")))
        sequences = tl.maximum(tl.sum(nonempty, 0), 1.0)
        some = tokens > 0.0
        tokens = tl.maximum(tokens, 1.0)
        if normalizer_ptr is not None:
            scale = 1.0 / tl.load(normalizer_ptr).to(tl.float32)
        elif MEAN_OVER_TOKENS:
            scale = 1.0 / tokens
        else:
            scale = 1.0 / sequences
        units = sequences
        if RATIO_LEVEL == "token":
            units = tokens
        low = _column(partial_ptr, 2, B, BLOCK) / units
        high = _column(partial_ptr, 3, B, BLOCK) / units
        if CORRECTION == "none":
            weight_mean = tl.where(some, 1.0, 0.0)
        elif CORRECTION == "token_truncate":
            weight_mean = _column(partial_ptr, 11, B, BLOCK) / tokens
        else:
            weight_mean = _column(partial_ptr, 11, B, BLOCK) / sequences
        tl.store(loss_ptr, _column(partial_ptr, 0, B, BLOCK) * scale)
        tl.store(scale_ptr, scale)
        tl.store(metric_ptr + 0, low + high)
        tl.store(metric_ptr + 1, low)
        tl.store(metric_ptr + 2, high)
        tl.store(metric_ptr + 3, _column(partial_ptr, 4, B, BLOCK) / units)
        tl.store(metric_ptr + 4, -_column(partial_ptr, 5, B, BLOCK) / tokens)
        tl.store(metric_ptr + 5, _column(partial_ptr, 6, B, BLOCK) / tokens)
        tl.store(metric_ptr + 6, tl.where(some, _column(partial_ptr, 7, B, BLOCK) / units, 1.0))
        tl.store(metric_ptr + 7, tl.where(some, tl.min(lowest, 0), 1.0))
        tl.store(metric_ptr + 8, tl.where(some, tl.max(highest, 0), 1.0))
        tl.store(metric_ptr + 9, _column(partial_ptr, 10, B, BLOCK) / tokens)
        tl.store(metric_ptr + 10, weight_mean)

    # At most two elements a thread: twelve sums and a dozen terms of each fill its registers, and four spill.
    CONFIGS = Tunable("policy_loss", Config(512, 8), Config(256, 4), Config(256, 8))

    def _triton_policy_loss(
        logprobs, old_logprobs, advantages, mask, cu_seqlens, normalizer, ref_logprobs, rollout_logprobs, per_token, s
    ):
        inputs = (logprobs, old_logprobs, advantages, mask, cu_seqlens, normalizer, ref_logprobs, rollout_logprobs)
        sequences = cu_seqlens.shape[0] - 1
        if not sequences:
            return _torch_policy_loss(*inputs, per_token, s)
        new = lambda *shape: torch.empty(shape, dtype=torch.float32, device=logprobs.device)
        loss, metrics, gradient, scale = new(), new(len(METRICS)), new(logprobs.shape[0]), new()
        masked_mean = mask is not None and s.mean_in_sequence
        config = CONFIGS.config(logprobs.shape[0] // sequences, logprobs.itemsize)
        launch(
            _kernel,
            (sequences,),
            *(None if x is None else x.contiguous() for x in inputs),
            loss,
            metrics,
            gradient,
            scale,
            new(N_SUMS.value, sequences),
            torch.zeros((), dtype=torch.int32, device=logprobs.device),
            sequences,
            s.clip_low,
            s.clip_high,
            s.dual_clip,
            s.kl_coef,
            s.rollout_cap,
            PER_TOKEN=per_token,
            RATIO_LEVEL=s.ratio_level,
            MEAN_IN_SEQUENCE=s.mean_in_sequence,
            MEAN_OVER_TOKENS=s.mean_over_tokens,
            KL=s.kl_estimator,
            CORRECTION=s.rollout_correction,
            TWO_PASSES=s.sequence_level or masked_mean or s.rollout_correction.startswith("sequence"),
            MAX_LOG=MAX_LOG,
            BLOCK=config.block,
            num_warps=config.num_warps,
        )
        return loss, metrics, gradient, scale

    BACKENDS["triton"] = _triton_policy_loss
