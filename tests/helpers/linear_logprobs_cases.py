"""Inputs and checks that the tests of linear_logprobs share."""

import itertools

import pytest
import torch
from against_float64 import (
    BACKENDS,
    FLOOR,
    assert_close_to_float64,
    randint,
    randn,
)
from torch.profiler import ProfilerActivity, profile

from sppo_kernels import linear_logprobs, reference
from sppo_kernels.ops.linear_logprobs.matmul import row_stride

IGNORED = -100


MODES = ["recompute", "cache"]


each_way = pytest.mark.parametrize(("backend", "backward"), list(itertools.product(BACKENDS, MODES)))


# The row's gradient is rounded to half precision before the two matrix products, which costs each of its elements half
# an eps more than the reference loses.
PRODUCTS_FLOOR = {**FLOOR, torch.float16: 4.0, torch.bfloat16: 4.0}


SMALL_CHUNKS = {"chunk_bytes": 1}  # the minimum: blocks of 256 tokens, chunks of 64 (128 in torch's forward)


def with_adapter(op):
    """``op`` with the two tensors of the adapter as arguments u and b of their own."""
    return lambda *args, u=None, b=None, **kwargs: op(*args, adapter=None if u is None else (u, b), **kwargs)


def check(backend, hidden, weight, labels, *, bias=None, temperature=1.0, u=None, b=None, **kwargs):
    tensors = {"hidden": hidden, "weight": weight, "labels": labels, "bias": bias, "u": u, "b": b}
    (tensors if isinstance(temperature, torch.Tensor) else kwargs)["temperature"] = temperature
    reference_kwargs = {k: v for k, v in kwargs.items() if k not in ("backward", "chunk_bytes", "logits_budget_bytes")}
    ours = {k: v for k, v in kwargs.items() if k not in reference_kwargs}
    upstream = reference_kwargs.pop("upstream", None)
    assert_close_to_float64(
        lambda *args, **more: with_adapter(linear_logprobs)(*args, **more, **ours),
        with_adapter(reference.linear_logprobs),
        backend,
        tensors,
        floor=PRODUCTS_FLOOR,
        upstream=upstream,
        **reference_kwargs,
    )


def row_bytes(vocab, itemsize=4):
    """Return the bytes of one cached logit gradient."""
    return row_stride(vocab) * itemsize


def inputs(n, width, vocab, dtype=torch.float32, bias=False, ignored=0, rank=0):
    labels = randint(0, vocab, n)
    labels[:ignored] = IGNORED
    given = {
        "hidden": randn(n, width, dtype=dtype, grad=True),
        "weight": randn(vocab, width, dtype=dtype, scale=width**-0.5, grad=True),
        "labels": labels,
        "bias": randn(vocab, dtype=dtype, grad=True) if bias else None,
    }
    if rank:
        given["u"] = randn(n, rank, dtype=dtype, grad=True)
        given["b"] = randn(vocab, rank, dtype=dtype, grad=True)
    return given


def multiply_adds(run):
    """Count the multiply-adds of matrix products in ``run`` with the profiler."""
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as prof:
        run()
    return sum(event.flops for event in prof.key_averages() if event.key in ("aten::mm", "aten::addmm")) // 2
