"""selective_logprobs: log-probability of one label a row, and the entropy of the row, from given logits.

    z = cap(x) / tau,  cap(x) = s tanh(x / s) or x      lse = log sum exp z      p = exp(z - lse)
    logprob = z[label] - lse                            entropy = lse - sum p z
    dx = (g_l (onehot(label) - p) - g_e p (log p + entropy)) * cap'(x) / tau

Traffic, in elements of x: forward reads N*V; backward reads N*V and writes N*V. Between the two only three float32 a
row are kept (the row's maximum, log sum exp(z - maximum), the entropy). The maximum and the logarithm stay apart
because their sum, at logits around 1e4, would round away what the gradient's p needs.

A row whose label is ``ignore_index`` is not read. A row whose upstream gradients are both zero is not read again.
``linear_logprobs`` runs the same two row passes on its chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .._backend import NAMESPACE, pick_backend
from .._validation import (
    check_device,
    check_floating,
    check_integer,
    check_number,
    check_shape,
    reject,
    values_are_checked,
)
from ..tuning import Config, Tunable

try:
    import triton
    import triton.language as tl

    from .._triton_utils import launch, tanh, tanh_derivative
except ImportError:
    triton = None


class LogprobOutput(NamedTuple):
    """Log-probabilities and entropies, float32, nats, in the shape of the labels."""

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
    """Log-probability of each label and entropy of each row, in one read of the logits.

    Args:
        logits: ``[..., V]``, float16, bfloat16 or float32 (float64 with ``backend="reference"``), any strides;
            ``-inf`` marks an impossible token.
        labels: ``[...]``, integers in ``[0, V)`` or ``ignore_index``.
        temperature: divides the logits; a float greater than 0, or a tensor ``[...]`` of one a row (not
        differentiated).
        softcap: ``s`` in ``s * tanh(logits / s)``, applied before the temperature (Gemma 2); None for no cap.
        ignore_index: marks a row without loss: log-probability, entropy and gradients are exactly 0.
        backend: ``"reference"``, ``"torch"``, ``"triton"``, or None for triton on an accelerator and torch elsewhere.

    Returns:
        ``LogprobOutput(logprobs, entropy)``: both ``[...]``, float32, differentiable in ``logits``.

    Raises:
        ValueError: a wrong shape, device, temperature or softcap; a label outside ``[0, V)`` (looked at on a CPU, and
            elsewhere under ``SPPO_KERNELS_CHECK=1``; without it such a row is NaN).
        TypeError: logits that are not floating-point, labels that are not integers.
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
    # [:, :-1] of [B, T, V] is not one block of rows: with two leading strides it is read in place all the same.
    rows = logits if logits.ndim == 3 else logits.reshape(1, -1, logits.shape[-1])
    logprobs, entropy, _ = _selective_logprobs(
        rows,
        labels.reshape(-1),
        temperature_per_row(temperature, labels),
        softcap or 0.0,
        ignore_index,
        backend,
    )
    return LogprobOutput(logprobs.view(labels.shape), entropy.view(labels.shape))


def reference(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> LogprobOutput:
    """The definition: plain differentiable PyTorch, float32 or, for float64 logits, float64."""
    check_label_and_temperature_values(labels, temperature, logits.shape[-1], ignore_index)
    z = logits if logits.dtype == torch.float64 else logits.float()
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    z = z / (temperature.to(z.dtype).unsqueeze(-1) if isinstance(temperature, Tensor) else temperature)
    keep = labels != ignore_index
    z = torch.where(keep.unsqueeze(-1), z, 0.0)  # whatever an ignored row holds, it must not reach a gradient
    logp = torch.log_softmax(z, dim=-1)
    logprobs = logp.gather(-1, torch.where(keep, labels, 0).unsqueeze(-1)).squeeze(-1)
    # p log p is 0 where p is 0: log p is -inf there, and 0 * -inf would be NaN, backward too.
    p_logp = torch.where(logp.exp() > 0, logp.exp() * torch.where(logp.exp() > 0, logp, 0.0), 0.0)
    return LogprobOutput(torch.where(keep, logprobs, 0.0), torch.where(keep, -p_logp.sum(-1), 0.0))


def check_temperature(temperature: float | Tensor, labels: Tensor) -> None:
    """A float greater than 0, or a floating-point tensor in the shape of the labels."""
    if isinstance(temperature, Tensor):
        check_floating(temperature=temperature)
        check_shape(labels.shape, "one a label", temperature=temperature)
        check_device(labels.device, temperature=temperature)
        return
    check_number("temperature", temperature)
    if not temperature > 0:
        reject("temperature", temperature, "greater than 0 (for greedy decoding score with temperature=1.0)")


def check_softcap(softcap: float | None) -> None:
    """None, or a float greater than 0."""
    if softcap is None:
        return
    check_number("softcap", softcap)
    if not 0 < softcap < float("inf"):
        reject("softcap", softcap, "greater than 0 and finite, or None for no cap")


def temperature_per_row(temperature: float | Tensor, labels: Tensor) -> Tensor:
    """``[N]`` float32; a single temperature is one element seen N times (stride 0), not N elements."""
    if isinstance(temperature, Tensor):
        return temperature.detach().float().reshape(-1)
    return torch.full((1,), temperature, dtype=torch.float32, device=labels.device).expand(labels.numel())


def check_label_and_temperature_values(
    labels: Tensor, temperature: float | Tensor, vocab: int, ignore_index: int
) -> None:
    """Labels lie in [0, vocab) or are ``ignore_index``; temperatures are positive. Reads the values."""
    if not labels.numel() or not values_are_checked(labels):
        return
    bad = (labels != ignore_index) & ((labels < 0) | (labels >= vocab))
    if bad.any():
        reject("labels", int(labels[bad][0]), f"in [0, {vocab}) or ignore_index={ignore_index}")
    if isinstance(temperature, Tensor) and not temperature.min() > 0:
        reject("temperature", float(temperature.min()), "greater than 0")


# The registered operation


@torch.library.custom_op(f"{NAMESPACE}::selective_logprobs", mutates_args=())
def _selective_logprobs(
    logits: Tensor, labels: Tensor, temperature: Tensor, softcap: float, ignore_index: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [B, T, V], labels and temperature [B * T] -> logprobs, entropy [B * T], stats [2, B * T]."""
    check_label_and_temperature_values(labels, temperature, logits.shape[-1], ignore_index)
    return ROW_PASSES[backend].forward(logits, labels, temperature, softcap, ignore_index)


@_selective_logprobs.register_fake
def _(logits, labels, temperature, softcap, ignore_index, backend):
    n = labels.shape[0]
    return tuple(logits.new_empty(shape, dtype=torch.float32) for shape in ((n,), (n,), (2, n)))


@torch.library.custom_op(f"{NAMESPACE}::selective_logprobs_backward", mutates_args=())
def _selective_logprobs_backward(
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor,
    entropy: Tensor,
    stats: Tensor,
    softcap: float,
    ignore_index: int,
    backend: str,
) -> Tensor:
    dx = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    ROW_PASSES[backend].backward(
        grad_logprobs, grad_entropy, logits, labels, temperature, entropy, stats, softcap, ignore_index, dx
    )
    return dx


@_selective_logprobs_backward.register_fake
def _(grad_logprobs, grad_entropy, logits, labels, temperature, entropy, stats, softcap, ignore_index, backend):
    return logits.new_empty(logits.shape)


def _save(ctx, inputs, output):
    logits, labels, temperature, *ctx.settings = inputs
    ctx.save_for_backward(logits, labels, temperature, output[1], output[2])


def _grad(ctx, grad_logprobs, grad_entropy, _):
    dx = _selective_logprobs_backward(grad_logprobs, grad_entropy, *ctx.saved_tensors, *ctx.settings)
    return dx, None, None, None, None, None


_selective_logprobs.register_autograd(_grad, setup_context=_save)


class RowPass(NamedTuple):
    """The two passes over rows of logits that a backend provides."""

    forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    backward: Callable[..., None]


# PyTorch backend: a block of rows at a time, so that its float32 temporaries stay in the cache

_BLOCK_ELEMENTS = 1 << 20  # 4 MB, and as much again for exp of it
_LOG_ZERO = -200.0  # exp is 0 in float32 below -104; a finite stand-in keeps 0 * -inf out of p log p


def rows_per_block(vocab: int) -> int:
    """Rows of about _BLOCK_ELEMENTS elements together."""
    return max(1, _BLOCK_ELEMENTS // vocab)


def scaled_rows(x: Tensor, temperature: Tensor, softcap: float) -> tuple[Tensor, Tensor | None]:
    """z of rows x [R, V], which is written over x, and x / s where there is a cap."""
    if not softcap:
        return x.div_(temperature[:, None]), None
    ratio = x / softcap
    return torch.tanh(ratio, out=x).mul_(softcap).div_(temperature[:, None]), ratio


def softcap_derivative(ratio: Tensor) -> Tensor:
    """d cap(x) / dx at x / s = ``ratio``: 1 - tanh^2, written so that it does not cancel where tanh saturates."""
    e = (-2 * ratio.abs()).exp_()
    return 4 * e / (1 + e).square_()


def safe_labels(labels: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """Which labels are columns, and the labels with column 0 in place of those that are not."""
    inside = (labels >= 0) & (labels < vocab)
    return inside, torch.where(inside, labels, 0)


def _row_blocks(rows: Tensor, labels: Tensor, ignore_index: int):
    """Indices of the rows that bear loss, in blocks."""
    keep = (labels != ignore_index).nonzero().squeeze(-1)
    return keep.split(rows_per_block(rows.shape[-1]))


def _block_of_rows(logits: Tensor, index: Tensor) -> Tensor:
    """A copy of rows ``index`` of ``[B, T, V]`` seen as ``[B * T, V]``, float32, without copying the whole."""
    return logits[index // logits.shape[1], index % logits.shape[1]].float()


def row_statistics(z: Tensor, labels: Tensor, e: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of scaled rows z [R, V]: maximum, z[label] - maximum, sum of exp(z - maximum).

    z is overwritten with z - maximum, ``e`` with exp(z - maximum).
    """
    maximum = z.amax(-1)
    # A row of -inf alone has no distribution: NaN, as in PyTorch.
    z -= maximum[:, None]
    inside, label = safe_labels(labels, z.shape[-1])
    target = torch.where(inside, z.gather(-1, label[:, None]).squeeze(-1), float("nan"))
    torch.exp(z.clamp_(min=_LOG_ZERO), out=e)
    return maximum, target, e.sum(-1)


def _torch_forward(logits, labels, temperature, softcap, ignore_index):
    n = labels.shape[0]
    logprobs, entropy, stats = (logits.new_zeros(shape, dtype=torch.float32) for shape in ((n,), (n,), (2, n)))
    for index in _row_blocks(logits, labels, ignore_index):
        z, _ = scaled_rows(_block_of_rows(logits, index), temperature[index], softcap)
        e = torch.empty_like(z)
        maximum, target, total = row_statistics(z, labels[index], e)
        log_total = total.log()
        logprobs[index] = target - log_total
        entropy[index] = log_total - z.mul_(e).sum(-1) / total
        stats[0, index], stats[1, index] = maximum, log_total
    return logprobs, entropy, stats


def _torch_backward(
    grad_logprobs, grad_entropy, logits, labels, temperature, entropy, stats, softcap, ignore_index, dx
):
    rows_out = dx.zero_().view(-1, logits.shape[-1])
    live = torch.where((grad_logprobs != 0) | (grad_entropy != 0), labels, ignore_index)
    for index in _row_blocks(logits, live, ignore_index):
        z, ratio = scaled_rows(_block_of_rows(logits, index), temperature[index], softcap)
        logp = z - stats[0, index, None] - stats[1, index, None]
        p = logp.exp()
        inside, label = safe_labels(labels[index], z.shape[-1])
        e = (-p).scatter_add_(-1, label[:, None], inside[:, None].float())  # 1 - p first: it is exact near p = 1
        spread = logp.clamp_(min=_LOG_ZERO) + entropy[index, None]
        g = grad_logprobs[index, None] * e - grad_entropy[index, None] * p * spread
        if ratio is not None:
            g *= softcap_derivative(ratio)
        rows_out[index] = (g / temperature[index, None]).to(dx.dtype)


ROW_PASSES: dict[str, RowPass] = {"torch": RowPass(_torch_forward, _torch_backward)}


# Triton backend

if triton is not None:

    @triton.jit
    def scaled_logits(x_ptr, col, stride_v, V, softcap, tau, HAS_SOFTCAP: tl.constexpr, WHOLE: tl.constexpr):
        """z of some columns, float32, and the cap's derivative (without a cap: nothing of use).

        WHOLE: no column is past V. Else those that are become -inf, after the cap, not before it.
        """
        x_ptr += col.to(tl.int64) * stride_v
        x = (tl.load(x_ptr) if WHOLE else tl.load(x_ptr, mask=col < V, other=0.0)).to(tl.float32)
        slope = x
        if HAS_SOFTCAP:
            slope = tanh_derivative(x / softcap)
            x = softcap * tanh(x / softcap)
        z = x / tau
        return z if WHOLE else tl.where(col < V, z, float("-inf")), slope

    # A mask at V, which may be a multiple of nothing, narrows loads and stores to one element each: only the last block
    # of a row has one.
    @triton.jit
    def scaled_block(x_ptr, start, stride_v, V, softcap, tau, HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):
        """``scaled_logits`` of the columns from ``start`` on."""
        col = start + tl.arange(0, BLOCK)
        if start + BLOCK <= V:
            z, slope = scaled_logits(x_ptr, col, stride_v, V, softcap, tau, HAS_SOFTCAP, True)
        else:
            z, slope = scaled_logits(x_ptr, col, stride_v, V, softcap, tau, HAS_SOFTCAP, False)
        return z, slope

    @triton.jit
    def store_block(y_ptr, start, y, V, BLOCK: tl.constexpr):
        """Store ``y`` in the columns from ``start`` on, as far as V."""
        col = start + tl.arange(0, BLOCK)
        if start + BLOCK <= V:
            tl.store(y_ptr + col, y)
        else:
            tl.store(y_ptr + col, y, mask=col < V)

    # A row goes by once:
    #
    #   block of x --> z --> m' = max(m, max z)         one reduction over the block
    #                        e = exp(z - m')            one exp an element
    #                        s = s exp(m - m') + e                              \  kept as a vector of BLOCK lanes,
    #                        t = exp(m - m') (t + (m - m') s_old) + e (z - m')  /  added up once, after the last block
    #
    #   logprob = z[label] - m - log s      entropy = log s - t / s      t = sum e (z - m): no cancellation at 1e4
    @triton.jit
    def add_block(z, m, s, t):
        """m, s, t with a block more; e, and what sums up to now are multiplied by."""
        m_new = tl.maximum(m, tl.max(z, 0))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)  # nothing finite so far: keep -inf - -inf out
        shift = tl.where(m == float("-inf"), 0.0, m - base)
        scale = tl.where(m == float("-inf"), 0.0, tl.exp(shift))
        z -= base
        e = tl.exp(z)
        t = scale * (t + shift * s) + tl.where(e > 0.0, e * z, 0.0)
        s = scale * s + e
        return m_new, s, t, e, scale

    # Counts of tokens change from call to call: specialised on, each new kind of count would compile anew. One program
    # per row.
    @triton.jit(do_not_specialize=["T", "N"])
    def _forward_kernel(
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
        # Before the loop, so that registers hold one number through it, not the label and where it lies.
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

    # One program a row and block of columns: nothing is shared but three numbers a row, so rows need not be whole.
    @triton.jit(do_not_specialize=["T", "N"])
    def _backward_kernel(
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

    # Eight elements a thread: 16 bytes of a half-precision row in one load, and registers left for s and t. The others
    # trade bytes in flight (a larger block) for programs side by side (a smaller one).
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
        """For rows ``[..., V]``."""
        return fitted(tunable.config(rows.shape[-1], rows.itemsize), rows.shape[-1])

    def fitted(config: Config, length: int) -> dict[str, int]:
        """A row shorter than a block gets the smallest that holds it, with as much a thread."""
        block = min(config.block, triton.next_power_of_2(length))
        return {"BLOCK": block, "num_warps": max(1, config.num_warps * block // config.block)}

    def _strides(logits: Tensor) -> tuple[int, int, int]:
        """From batch to batch, row to row, column to column; a single batch has no first one that could change."""
        batch, row, column = logits.stride()
        return (batch if logits.shape[0] > 1 else 0), row, column

    def _triton_forward(logits, labels, temperature, softcap, ignore_index):
        n, vocab = labels.shape[0], logits.shape[-1]
        logprobs, entropy, stats = (logits.new_empty(shape, dtype=torch.float32) for shape in ((n,), (n,), (2, n)))
        if n:
            launch(
                _forward_kernel,
                (n,),
                logits,
                labels.contiguous(),
                temperature,
                logprobs,
                entropy,
                stats,
                *_strides(logits),
                temperature.stride(0),
                logits.shape[1],
                n,
                vocab,
                softcap,
                ignore_index,
                HAS_SOFTCAP=softcap > 0,
                **launch_shape(FORWARD, logits),
            )
        return logprobs, entropy, stats

    def _triton_backward(
        grad_logprobs, grad_entropy, logits, labels, temperature, entropy, stats, softcap, ignore_index, dx
    ):
        n, vocab = labels.shape[0], logits.shape[-1]
        if n:
            shape = launch_shape(BACKWARD, logits)
            launch(
                _backward_kernel,
                (n, triton.cdiv(vocab, shape["BLOCK"])),
                grad_logprobs.contiguous(),
                grad_entropy.contiguous(),
                logits,
                labels.contiguous(),
                temperature,
                entropy,
                stats,
                dx,
                *_strides(logits),
                dx.stride(-2),
                temperature.stride(0),
                logits.shape[1],
                n,
                vocab,
                softcap,
                ignore_index,
                HAS_SOFTCAP=softcap > 0,
                **shape,
            )

    ROW_PASSES["triton"] = RowPass(_triton_forward, _triton_backward)
