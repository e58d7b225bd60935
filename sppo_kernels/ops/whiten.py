"""whiten: zero mean and unit variance over the tokens of a mask.

    y = (x - mean) / sqrt(var + 1e-8)      var with Bessel's correction      0 where masked

Two launches, since every element depends on all others. The first writes count, mean and sum of squared deviations of
each block. In the second every program combines them in the same order (Chan, Golub and LeVeque, 1979) and writes its
block. Squares are taken after the block's mean is subtracted, so a large common offset does not cancel.

Traffic: x and mask are read twice, y is written once, 16 bytes per thread and access. Masked elements are read too,
because a load that depends on the mask moves one element at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._backend import HAS_TRITON, pick_backend
from .._registration import operation
from .._validation import (
    check_device,
    check_floating,
    check_shape,
    check_tensor,
)

if HAS_TRITON:
    import triton
    import triton.language as tl

    from .._triton_utils import cdiv, launch

EPS = 1e-8


def whiten(x: Tensor, mask: Tensor, *, backend: str | None = None) -> Tensor:
    """Standardize the unmasked elements, as PPO does with advantages (arXiv 2005.12729, "implementation matters").

    Args:
        x: ``[...]``, floating-point. Not differentiated.
        mask: ``[...]``, nonzero where an element counts.
        backend: ``"reference"``, ``"torch"``, ``"triton"``, or None for triton on an accelerator and torch elsewhere.

    Returns:
        ``[...]`` float32, 0 where masked; all 0 if fewer than two elements are unmasked.

    Raises:
        ValueError: a shape or device does not match.
        TypeError: ``x`` is not floating-point.
    """
    check_floating(x=x)
    check_tensor(mask=mask)
    check_shape(x.shape, "the shape of x", mask=mask)
    check_device(x.device, mask=mask)
    backend = pick_backend(backend, x)
    if backend == "reference":
        return reference(x, mask)
    return _whiten(x.detach(), mask != 0, backend=backend)


def reference(x: Tensor, mask: Tensor) -> Tensor:
    """Definition of ``whiten``, in float32, or float64 for float64 input."""
    x, keep = x.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32), mask != 0
    n = keep.sum()
    mean = torch.where(keep, x, 0.0).sum() / n.clamp(min=1)
    deviation = torch.where(keep, x - mean, 0.0)
    return deviation * torch.rsqrt(deviation.square().sum() / (n - 1).clamp(min=1) + EPS)


@operation("whiten")
def _whiten(x: Tensor, mask: Tensor, *, backend: str) -> Tensor:
    return _BACKENDS[backend](x, mask)


@_whiten.register_fake
def _(x, mask, *, backend):
    return torch.empty(x.shape, dtype=torch.float32, device=x.device)


# PyTorch backend: the definition


def _torch_whiten(x, mask):
    return reference(x, mask).contiguous()


_BACKENDS = {"torch": _torch_whiten}


# Triton backend

if HAS_TRITON:
    # Rows of the partial results, [_NUM_MOMENTS, BLOCKS]
    COUNT: tl.constexpr = tl.constexpr(0)
    MEAN: tl.constexpr = tl.constexpr(1)
    SQUARES: tl.constexpr = tl.constexpr(2)
    _NUM_MOMENTS = 3

    @triton.jit
    def _load_elements(x_ptr, mask_ptr, index, inside):
        keep = tl.load(mask_ptr + index, mask=inside, other=0) != 0
        return keep, tl.where(keep, tl.load(x_ptr + index, mask=inside, other=0.0).to(tl.float32), 0.0)

    @triton.jit
    def _load_block(x_ptr, mask_ptr, N, BLOCK: tl.constexpr):
        """Load this program's block. Only the last may be partial and is loaded with a bound."""
        first = tl.program_id(0).to(tl.int64) * BLOCK
        index = first + tl.arange(0, BLOCK)
        full = first + BLOCK <= N
        if full:
            keep, x = _load_elements(x_ptr, mask_ptr, index, tl.full([BLOCK], 1, tl.int1))
        else:
            keep, x = _load_elements(x_ptr, mask_ptr, index, index < N)
        return index, full, keep, x

    @triton.jit(do_not_specialize=["N", "BLOCKS"])
    def whiten_moments_kernel(x_ptr, mask_ptr, partial_ptr, N, BLOCKS, BLOCK: tl.constexpr):
        _, _, keep, x = _load_block(x_ptr, mask_ptr, N, BLOCK)
        n = tl.sum(keep.to(tl.float32), 0)
        mean = tl.sum(x, 0) / tl.maximum(n, 1.0)
        deviation = tl.where(keep, x - mean, 0.0)
        partial_ptr += tl.program_id(0)
        tl.store(partial_ptr + COUNT * BLOCKS, n)
        tl.store(partial_ptr + MEAN * BLOCKS, mean)
        tl.store(partial_ptr + SQUARES * BLOCKS, tl.sum(deviation * deviation, 0))

    @triton.jit(do_not_specialize=["N", "BLOCKS"])
    def whiten_normalize_kernel(
        x_ptr,
        mask_ptr,
        partial_ptr,
        y_ptr,
        N,
        BLOCKS,
        EPS: tl.constexpr,
        BLOCKS_AT_ONCE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        index, full, keep, x = _load_block(x_ptr, mask_ptr, N, BLOCK)
        total = tl.zeros([BLOCKS_AT_ONCE], tl.float32)
        mean_sum = tl.zeros([BLOCKS_AT_ONCE], tl.float32)
        for start in range(0, BLOCKS, BLOCKS_AT_ONCE):
            i = start + tl.arange(0, BLOCKS_AT_ONCE)
            n = tl.load(partial_ptr + COUNT * BLOCKS + i, mask=i < BLOCKS, other=0.0)
            total += n
            mean_sum += n * tl.load(partial_ptr + MEAN * BLOCKS + i, mask=i < BLOCKS, other=0.0)
        count = tl.sum(total, 0)
        mean = tl.sum(mean_sum, 0) / tl.maximum(count, 1.0)
        squares = tl.zeros([BLOCKS_AT_ONCE], tl.float32)
        for start in range(0, BLOCKS, BLOCKS_AT_ONCE):
            i = start + tl.arange(0, BLOCKS_AT_ONCE)
            n = tl.load(partial_ptr + COUNT * BLOCKS + i, mask=i < BLOCKS, other=0.0)
            shift = tl.load(partial_ptr + MEAN * BLOCKS + i, mask=i < BLOCKS, other=0.0) - mean
            squares += tl.load(partial_ptr + SQUARES * BLOCKS + i, mask=i < BLOCKS, other=0.0) + n * shift * shift
        variance = tl.sum(squares, 0) / tl.maximum(count - 1.0, 1.0)
        y = tl.where(keep, (x - mean) / tl.sqrt(variance + EPS), 0.0)
        if full:
            tl.store(y_ptr + index, y)
        else:
            tl.store(y_ptr + index, y, mask=index < N)

    def _triton_whiten(x, mask):
        x, mask = x.contiguous(), mask.contiguous()
        y = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        n, block = x.numel(), 2048
        if n:
            blocks = cdiv(n, block)
            partial = torch.empty(_NUM_MOMENTS, blocks, dtype=torch.float32, device=x.device)
            launch(
                whiten_moments_kernel,
                (blocks,),
                x_ptr=x,
                mask_ptr=mask,
                partial_ptr=partial,
                N=n,
                BLOCKS=blocks,
                BLOCK=block,
                num_warps=4,
            )
            launch(
                whiten_normalize_kernel,
                (blocks,),
                x_ptr=x,
                mask_ptr=mask,
                partial_ptr=partial,
                y_ptr=y,
                N=n,
                BLOCKS=blocks,
                EPS=EPS,
                BLOCKS_AT_ONCE=256,
                BLOCK=block,
                num_warps=4,
            )
        return y

    _BACKENDS["triton"] = _triton_whiten
