"""Inputs and checks shared by the tests of linear_logprobs."""

import itertools

import pytest
import torch
from against_float64 import (
    BACKENDS,
    DEVICE,
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


each_mode = pytest.mark.parametrize(("backend", "backward"), list(itertools.product(BACKENDS, MODES)))


# The logit gradient is rounded to half precision before the two matrix products, which costs each of its elements half
# an eps more than in the reference.
MATMUL_FLOOR = {**FLOOR, torch.float16: 4.0, torch.bfloat16: 4.0}


# The minimum: 64 tokens per chunk of logits (128 in torch's forward), 256 per block of logit gradients.
SMALL_CHUNKS = {"chunk_bytes": 1}


def uniform(n, width, vocab, dtype):
    """Return inputs with logits of standard deviation 1."""
    return randn(n, width, dtype=dtype), randn(vocab, width, dtype=dtype, scale=width**-0.5), randint(0, vocab, n)


def long_tailed(n, width, vocab, dtype):
    """Return inputs with a few dominant tokens and a slowly decaying tail, as in Zipf's law."""
    hidden, weight, labels = uniform(n, width, vocab, dtype)
    spread = (1 + torch.arange(vocab, device=DEVICE)).float().rsqrt().mul(8)[torch.randperm(vocab)]
    return hidden, (weight.float() * (0.5 + spread[:, None])).to(dtype), labels


def with_adapter(op):
    """Wrap ``op`` to take the two tensors of the adapter as separate arguments u and b."""
    return lambda *args, u=None, b=None, **kwargs: op(*args, adapter=None if u is None else (u, b), **kwargs)


def check(backend, hidden, weight, labels, *, bias=None, temperature=1.0, u=None, b=None, **kwargs):
    """Compare linear_logprobs with the float64 reference; ``kwargs`` are settings and ``upstream``."""
    tensors = {"hidden": hidden, "weight": weight, "labels": labels, "bias": bias, "u": u, "b": b}
    (tensors if isinstance(temperature, torch.Tensor) else kwargs)["temperature"] = temperature
    reference_kwargs = {k: v for k, v in kwargs.items() if k not in ("backward", "chunk_bytes", "logits_budget_bytes")}
    op_kwargs = {k: v for k, v in kwargs.items() if k not in reference_kwargs}
    upstream = reference_kwargs.pop("upstream", None)
    assert_close_to_float64(
        lambda *args, **more: with_adapter(linear_logprobs)(*args, **more, **op_kwargs),
        with_adapter(reference.linear_logprobs),
        backend,
        tensors,
        floor=MATMUL_FLOOR,
        upstream=upstream,
        **reference_kwargs,
    )


def row_bytes(vocab, itemsize=4):
    """Return the bytes that a row of cached logit gradients takes."""
    return row_stride(vocab) * itemsize


def inputs(n, width, vocab, dtype=torch.float32, bias=False, ignored=0, rank=0):
    """Return arguments by name: the first ``ignored`` labels are ignored, and ``rank`` is that of the adapter."""
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
    """Return how many multiply-adds of matrix products the profiler counts in ``run``."""
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as prof:
        run()
    return sum(event.flops for event in prof.key_averages() if event.key in ("aten::mm", "aten::addmm")) // 2
