"""Kernels whose traffic is known, for the tests of its counter."""

import triton
import triton.language as tl


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """Each element once, whatever the block leaves over."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n), mask=i < n)


@triton.jit
def copy_twice_read_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """The same, read once more."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n)
    tl.store(y_ptr + i, x + tl.load(x_ptr + i, mask=i < n), mask=i < n)


@triton.jit
def broadcast_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """One element for all lanes, and a scalar."""
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i * 0) + tl.load(x_ptr))


@triton.jit
def count_kernel(counter_ptr):
    tl.atomic_add(counter_ptr, 1)
