"""Launch of the Triton kernels, and functions that they share. Imported only where Triton is installed."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Run ``kernel[grid](**arguments)`` on the device of its first tensor. Every argument is named.

    Triton launches on the current device, which need not be the one that holds the tensors: with
    ``device_map="auto"`` the output embedding is on the last GPU while the current device is the first.
    """
    device = next(x.device for x in arguments.values() if isinstance(x, Tensor))
    guard = nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)
    with guard:
        kernel[grid](**arguments)


# Triton has functions of these names, which kernels can call too. On the host they take ten times as long.


def cdiv(a: int, b: int) -> int:
    """Return a / b rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Return the least power of two that is at least n, for n of at least 1."""
    return 1 << (n - 1).bit_length()


@triton.jit
def tanh(x):
    """Compute tanh from exp: libdevice is missing in Triton's interpreter, and differs between CUDA and ROCm.

    (1 - e) / (1 + e) with e = exp(-2|x|) never overflows; it cancels for small x, where five terms of the series are
    exact to float32 rounding.
    """
    e = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - e) / (1.0 + e)
    large = tl.where(x < 0.0, -large, large)
    xx = x * x
    small = x * (1.0 + xx * (-1.0 / 3.0 + xx * (2.0 / 15.0 + xx * (-17.0 / 315.0 + xx * (62.0 / 2835.0)))))
    return tl.where(tl.abs(x) < 0.3, small, large)


@triton.jit
def tanh_derivative(x):
    """Compute 1 - tanh(x)^2 as 4 e / (1 + e)^2 with e = exp(-2|x|), which does not cancel where tanh saturates."""
    e = tl.exp(-2.0 * tl.abs(x))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def is_last_program(counter_ptr, n_programs):
    """Return whether the stores of all other programs, made before they called this, are visible.

    The counter starts at 0. It is the only atomic in this library. It orders programs and sums nothing: the last
    program adds the partial results in a fixed order, so the bits do not depend on which program is last.
    """
    tl.debug_barrier()  # every thread of this program has stored before the count goes up
    arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    return arrived == n_programs - 1
