"""Row passes over logits: log-probability of a label and entropy forward, the gradient of the logits backward.

selective_logprobs runs them on given logits, linear_logprobs on its chunks of logits. The mathematics is in
selective_logprobs.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .._backend import HAS_TRITON
from ..tuning import Config, Tunable

if HAS_TRITON:
    import triton
    import triton.language as tl

    from .._triton_utils import launch, tanh, tanh_derivative


class RowResults(NamedTuple):
    """Results of the forward pass over N rows of logits, float32."""

    logprobs: Tensor  # [N]
    entropy: Tensor  # [N]
    row_stats: Tensor  # [2, N]: maximum, and log of the sum of exp(z - maximum)


class RowPass(NamedTuple):
    """Forward and backward pass of one backend over rows of logits. Arguments are named.

    forward(logits, labels, temperature, softcap, ignore_index) -> RowResults
    backward(grad_logprobs, grad_entropy, logits, labels, temperature, entropy, row_stats, softcap, ignore_index,
             grad_logits), which overwrites ``grad_logits``
    """

    forward: Callable[..., RowResults]
    backward: Callable[..., None]


# PyTorch backend: one block of rows at a time, so that its float32 temporaries stay in the cache

_BLOCK_ELEMENTS = 1 << 20  # 4 MB, and as much again for exp of it
_LOG_ZERO = -200.0  # exp is 0 in float32 below -104; a finite stand-in keeps 0 * -inf out of p log p


def rows_per_block(vocab: int) -> int:
    """Return how many rows have about _BLOCK_ELEMENTS elements in all."""
    return max(1, _BLOCK_ELEMENTS // vocab)


def scaled_rows(x: Tensor, temperature: Tensor, softcap: float) -> tuple[Tensor, Tensor | None]:
    """Overwrite rows x [R, V] with z. Return z, and x / softcap or None without a cap."""
    if not softcap:
        return x.div_(temperature[:, None]), None
    ratio = x / softcap
    return torch.tanh(ratio, out=x).mul_(softcap).div_(temperature[:, None]), ratio


def softcap_derivative(ratio: Tensor) -> Tensor:
    """Compute d cap(x) / dx at x / softcap = ``ratio``: 1 - tanh^2, in a form without cancellation at saturation."""
    e = (-2 * ratio.abs()).exp_()
    return 4 * e / (1 + e).square_()


def safe_labels(labels: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """Return which labels are in ``[0, vocab)``, and the labels with 0 in place of the others."""
    inside = (labels >= 0) & (labels < vocab)
    return inside, torch.where(inside, labels, 0)


def _row_blocks(rows: Tensor, labels: Tensor, ignore_index: int):
    """Return indices of the rows with a loss, in blocks."""
    keep = (labels != ignore_index).nonzero().squeeze(-1)
    return keep.split(rows_per_block(rows.shape[-1]))


def _block_of_rows(logits: Tensor, index: Tensor) -> Tensor:
    """Copy rows ``index`` of ``[B, T, V]`` viewed as ``[B * T, V]`` to float32, without copying all of it."""
    return logits[index // logits.shape[1], index % logits.shape[1]].float()


def row_statistics(z: Tensor, labels: Tensor, e: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute maximum, z[label] - maximum and sum of exp(z - maximum) of scaled rows z [R, V].

    Overwrites z with z - maximum, and ``e`` with exp(z - maximum).
    """
    maximum = z.amax(-1)
    # A row that contains only -inf has no distribution: NaN, as in PyTorch.
    z -= maximum[:, None]
    inside, label = safe_labels(labels, z.shape[-1])
    target = torch.where(inside, z.gather(-1, label[:, None]).squeeze(-1), float("nan"))
    torch.exp(z.clamp_(min=_LOG_ZERO), out=e)
    return maximum, target, e.sum(-1)


def _torch_forward(*, logits, labels, temperature, softcap, ignore_index):
    n = labels.shape[0]
    logprobs, entropy, row_stats = (logits.new_zeros(shape, dtype=torch.float32) for shape in ((n,), (n,), (2, n)))
    for index in _row_blocks(logits, labels, ignore_index):
        z, _ = scaled_rows(_block_of_rows(logits, index), temperature[index], softcap)
        e = torch.empty_like(z)
        maximum, target, total = row_statistics(z, labels[index], e)
        log_total = total.log()
        logprobs[index] = target - log_total
        entropy[index] = log_total - z.mul_(e).sum(-1) / total
        row_stats[0, index], row_stats[1, index] = maximum, log_total
    return RowResults(logprobs, entropy, row_stats)


def _torch_backward(
    *, grad_logprobs, grad_entropy, logits, labels, temperature, entropy, row_stats, softcap, ignore_index, grad_logits
):
    rows_out = grad_logits.zero_().view(-1, logits.shape[-1])
    live = torch.where((grad_logprobs != 0) | (grad_entropy != 0), labels, ignore_index)
    for index in _row_blocks(logits, live, ignore_index):
        z, ratio = scaled_rows(_block_of_rows(logits, index), temperature[index], softcap)
        logp = z - row_stats[0, index, None] - row_stats[1, index, None]
        p = logp.exp()
        inside, label = safe_labels(labels[index], z.shape[-1])
        e = (-p).scatter_add_(-1, label[:, None], inside[:, None].float())  # 1 - p first: it is exact near p = 1
        spread = logp.clamp_(min=_LOG_ZERO) + entropy[index, None]
        g = grad_logprobs[index, None] * e - grad_entropy[index, None] * p * spread
        if ratio is not None:
            g *= softcap_derivative(ratio)
        rows_out[index] = (g / temperature[index, None]).to(grad_logits.dtype)


ROW_PASSES: dict[str, RowPass] = {"torch": RowPass(_torch_forward, _torch_backward)}


# Triton backend

if HAS_TRITON:

    @triton.jit
    def scaled_logits(x_ptr, col, stride_v, V, softcap, tau, HAS_SOFTCAP: tl.constexpr, WHOLE: tl.constexpr):
        """Load columns as z, float32, and the derivative of the cap (unused without one).

        WHOLE: no column is past V. Otherwise those past V become -inf, after the cap rather than before it.
        """
        x_ptr += col.to(tl.int64) * stride_v
        x = (tl.load(x_ptr) if WHOLE else tl.load(x_ptr, mask=col < V, other=0.0)).to(tl.float32)
        slope = x
        if HAS_SOFTCAP:
            slope = tanh_derivative(x / softcap)
            x = softcap * tanh(x / softcap)
        z = x / tau
        return z if WHOLE else tl.where(col < V, z, float("-inf")), slope

    # A mask at V, which need not be a multiple of anything, narrows loads and stores to one element each. Only the last
    # block of a row has one.
    @triton.jit
    def scaled_block(x_ptr, start, stride_v, V, softcap, tau, HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):
        """Load BLOCK columns from ``start`` on as ``scaled_logits`` does."""
        col = start + tl.arange(0, BLOCK)
        if start + BLOCK <= V:
            z, slope = scaled_logits(x_ptr, col, stride_v, V, softcap, tau, HAS_SOFTCAP, True)
        else:
            z, slope = scaled_logits(x_ptr, col, stride_v, V, softcap, tau, HAS_SOFTCAP, False)
        return z, slope

    @triton.jit
    def store_block(y_ptr, start, y, V, BLOCK: tl.constexpr):
        """Store ``y`` in the columns from ``start`` on, up to V."""
        col = start + tl.arange(0, BLOCK)
        if start + BLOCK <= V:
            tl.store(y_ptr + col, y)
        else:
            tl.store(y_ptr + col, y, mask=col < V)

    # A row is read once:
    #
    #   block of x --> z --> m' = max(m, max z)         one reduction over the block
    #                        e = exp(z - m')            one exp per element
    #                        s = s exp(m - m') + e                              \  vectors of BLOCK lanes, reduced once
    #                        t = exp(m - m') (t + (m - m') s_old) + e (z - m')  /  after the last block
    #
    #   logprob = z[label] - m - log s      entropy = log s - t / s      t = sum e (z - m): no cancellation at 1e4
    @triton.jit
    def add_block(z, m, s, t):
        """Add a block to m, s, t. Also return e, and the factor by which earlier sums are scaled."""
        m_new = tl.maximum(m, tl.max(z, 0))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)  # nothing finite so far: keep -inf - -inf out
        shift = tl.where(m == float("-inf"), 0.0, m - base)
        scale = tl.where(m == float("-inf"), 0.0, tl.exp(shift))
        z -= base
        e = tl.exp(z)
        t = scale * (t + shift * s) + tl.where(e > 0.0, e * z, 0.0)
        s = scale * s + e
        return m_new, s, t, e, scale

    # One program per row. Token counts change between calls; specializing on them would compile the kernel again.
    @triton.jit(do_not_specialize=["T", "N"])
    def selective_logprobs_fwd_kernel(
        x_ptr,
        label_ptr,
        tau_ptr,
        logprob_ptr,
        entropy_ptr,
        stat_ptr,
        stride_b,
        stride_t,
        stride_v,
        stride_tau,
        T,
        N,
        V,
        softcap,
        ignore_index,
        HAS_SOFTCAP: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        label = tl.load(label_ptr + row)
        if label == ignore_index:
            tl.store(logprob_ptr + row, 0.0)
            tl.store(entropy_ptr + row, 0.0)
            tl.store(stat_ptr + row, 0.0)
            tl.store(stat_ptr + N + row, 0.0)
            return
        tau = tl.load(tau_ptr + row * stride_tau)
        x_ptr += (row // T) * stride_b + (row % T) * stride_t
        # Before the loop, so that registers hold one number through it, rather than the label and its address.
        in_range = (label >= 0) & (label < V)
        safe_label = tl.where(in_range, label, 0)
        target, _ = scaled_logits(x_ptr, safe_label, stride_v, V, softcap, tau, HAS_SOFTCAP, True)
        target = tl.where(in_range, target, float("nan"))
        m = float("-inf")
        s = tl.zeros([BLOCK], tl.float32)
        t = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            z, _ = scaled_block(x_ptr, start, stride_v, V, softcap, tau, HAS_SOFTCAP, BLOCK)
            m, s, t, _, _ = add_block(z, m, s, t)
        total = tl.sum(s, 0)
        log_total = tl.log(total)
        tl.store(logprob_ptr + row, target - m - log_total)
        tl.store(entropy_ptr + row, log_total - tl.sum(t, 0) / total)
        tl.store(stat_ptr + row, m)
        tl.store(stat_ptr + N + row, log_total)

    # One program per row and block of columns, which share only three numbers per row.
    @triton.jit(do_not_specialize=["T", "N"])
    def selective_logprobs_bwd_kernel(
        grad_logprob_ptr,
        grad_entropy_ptr,
        x_ptr,
        label_ptr,
        tau_ptr,
        entropy_ptr,
        stat_ptr,
        dx_ptr,
        stride_b,
        stride_t,
        stride_v,
        stride_dx,
        stride_tau,
        T,
        N,
        V,
        softcap,
        ignore_index,
        HAS_SOFTCAP: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        start = tl.program_id(1) * BLOCK
        dx_ptr += row * stride_dx
        label = tl.load(label_ptr + row)
        g_logprob = tl.load(grad_logprob_ptr + row).to(tl.float32)
        g_entropy = tl.load(grad_entropy_ptr + row).to(tl.float32)
        if (label == ignore_index) | ((g_logprob == 0.0) & (g_entropy == 0.0)):
            store_block(dx_ptr, start, tl.zeros([BLOCK], tl.float32), V, BLOCK)
            return
        tau = tl.load(tau_ptr + row * stride_tau)
        x_ptr += (row // T) * stride_b + (row % T) * stride_t
        z, slope = scaled_block(x_ptr, start, stride_v, V, softcap, tau, HAS_SOFTCAP, BLOCK)
        logp = z - tl.load(stat_ptr + row) - tl.load(stat_ptr + N + row)
        p = tl.exp(logp)
        is_label = start + tl.arange(0, BLOCK) == label
        e = tl.where(is_label, 1.0 - p, -p)  # before it is multiplied: 1 - p is exact near p = 1
        g = g_logprob * e - tl.where(p > 0.0, g_entropy * p * (logp + tl.load(entropy_ptr + row)), 0.0)
        g = g / tau
        if HAS_SOFTCAP:
            g *= slope
        store_block(dx_ptr, start, g, V, BLOCK)

    # Eight elements per thread: 16 bytes of a half-precision row in one load, and registers left for s and t. The other
    # candidates trade bytes in flight (a larger block) against concurrent programs (a smaller one).
    FORWARD = Tunable(
        "selective_logprobs.forward",
        Config(2048, 8),
        Config(1024, 4),
        Config(4096, 16),
    )
    BACKWARD = Tunable(
        "selective_logprobs.backward", Config(2048, 8), Config(1024, 4), Config(2048, 4), Config(4096, 8)
    )

    def launch_shape(tunable: Tunable, rows: Tensor) -> dict[str, int]:
        """Return block and warps for rows ``[..., V]``."""
        return fitted(tunable.config(rows.shape[-1], rows.itemsize), rows.shape[-1])

    def fitted(config: Config, length: int) -> dict[str, int]:
        """Return block and warps of ``config``, reduced for shorter rows with the same elements per thread."""
        block = min(config.block, triton.next_power_of_2(length))
        return {"BLOCK": block, "num_warps": max(1, config.num_warps * block // config.block)}

    def _strides(logits: Tensor) -> dict[str, int]:
        """Return the strides of ``[B, T, V]`` by kernel argument; that of a single batch is 0 and never changes."""
        batch, row, column = logits.stride()
        return {"stride_b": batch if logits.shape[0] > 1 else 0, "stride_t": row, "stride_v": column}

    def _triton_forward(*, logits, labels, temperature, softcap, ignore_index):
        n, vocab = labels.shape[0], logits.shape[-1]
        logprobs, entropy, row_stats = (logits.new_empty(shape, dtype=torch.float32) for shape in ((n,), (n,), (2, n)))
        if n:
            launch(
                selective_logprobs_fwd_kernel,
                (n,),
                x_ptr=logits,
                label_ptr=labels.contiguous(),
                tau_ptr=temperature,
                logprob_ptr=logprobs,
                entropy_ptr=entropy,
                stat_ptr=row_stats,
                **_strides(logits),
                stride_tau=temperature.stride(0),
                T=logits.shape[1],
                N=n,
                V=vocab,
                softcap=softcap,
                ignore_index=ignore_index,
                HAS_SOFTCAP=softcap > 0,
                **launch_shape(FORWARD, logits),
            )
        return RowResults(logprobs, entropy, row_stats)

    def _triton_backward(
        *,
        grad_logprobs,
        grad_entropy,
        logits,
        labels,
        temperature,
        entropy,
        row_stats,
        softcap,
        ignore_index,
        grad_logits,
    ):
        n, vocab = labels.shape[0], logits.shape[-1]
        if n:
            shape = launch_shape(BACKWARD, logits)
            launch(
                selective_logprobs_bwd_kernel,
                (n, triton.cdiv(vocab, shape["BLOCK"])),
                grad_logprob_ptr=grad_logprobs.contiguous(),
                grad_entropy_ptr=grad_entropy.contiguous(),
                x_ptr=logits,
                label_ptr=labels.contiguous(),
                tau_ptr=temperature,
                entropy_ptr=entropy,
                stat_ptr=row_stats,
                dx_ptr=grad_logits,
                **_strides(logits),
                stride_dx=grad_logits.stride(-2),
                stride_tau=temperature.stride(0),
                T=logits.shape[1],
                N=n,
                V=vocab,
                softcap=softcap,
                ignore_index=ignore_index,
                HAS_SOFTCAP=softcap > 0,
                **shape,
            )

    ROW_PASSES["triton"] = RowPass(_triton_forward, _triton_backward)
