"""Tests of the number of passes over the vocabulary and the memory of linear_logprobs."""

import logging
from contextlib import nullcontext

import pytest
import torch
from against_float64 import (
    DEVICE,
    randn,
)
from linear_logprobs_cases import SMALL_CHUNKS, inputs, multiply_adds, row_bytes
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from sppo_kernels import linear_logprobs
from sppo_kernels.ops.linear_logprobs.cache import _num_cacheable
from sppo_kernels.ops.linear_logprobs.matmul import Projection

pytestmark = pytest.mark.filterwarnings("ignore:linear_logprobs cached")  # all tests differentiate both outputs


def passes(given, upstream=1.0, **settings):
    """Return the passes of 2 N H V FLOPs, forward and backward, on which FLOP counter and profiler must agree."""
    n, per_token = len(given["labels"]), given["hidden"].shape[1] * given["weight"].shape[0]

    def run():
        out = linear_logprobs(**given, **settings, **SMALL_CHUNKS, backend="torch")
        (out.logprobs * upstream).sum().backward()

    with FlopCounterMode(display=False) as counter:
        run()
    assert counter.get_total_flops() == 2 * multiply_adds(run)
    return counter.get_total_flops() / (2 * n * per_token)


@pytest.mark.parametrize(
    ("backward", "frozen", "expected"),
    [
        ("recompute", None, 4),
        ("recompute", "hidden", 3),
        ("recompute", "weight", 3),
        ("cache", None, 3),
        ("cache", "hidden", 2),
        ("cache", "weight", 2),
        ("auto", None, 3),
    ],
)
def test_passes_over_the_vocabulary(backward, frozen, expected):
    """Forward takes one pass, each gradient one, and recomputing the logits that were not cached another."""
    given = inputs(330, 6, 29)
    if frozen:
        given[frozen].requires_grad_(False)
    assert passes(given, backward=backward) == expected


@pytest.mark.parametrize(("cached", "expected"), [(0, 4), (0.5, 3.5), (1, 3)])
def test_passes_with_a_limited_budget(cached, expected):
    given = inputs(330, 6, 29)
    assert passes(given, backward="auto", logits_budget_bytes=int(cached * 330) * row_bytes(29)) == expected


@pytest.mark.parametrize(("entropies", "expected"), [(0, 3), (110, 3 + 1 / 3), (330, 4)])
def test_entropies_with_a_gradient_recompute_their_logits(entropies, expected):
    """Only their tokens are recomputed; if no cached token can be used, there is a warning."""
    given = inputs(330, 6, 29)
    upstream = (torch.arange(330, device=DEVICE) < entropies).float()

    def run():
        out = linear_logprobs(**given, backward="cache", backend="torch")
        (out.logprobs.sum() + upstream @ out.entropy).backward()

    expectation = pytest.warns(UserWarning, match="pass backward='recompute'") if entropies == 330 else nullcontext()
    with FlopCounterMode(display=False) as counter, expectation:
        run()
    assert counter.get_total_flops() / (2 * 330 * 6 * 29) == pytest.approx(expected)
    with expectation:
        assert counter.get_total_flops() == 2 * multiply_adds(run)


@pytest.mark.parametrize(("backward", "total", "after_forward"), [("recompute", 4, 3), ("cache", 3, 2)])
def test_tokens_without_loss_or_upstream_gradient_cost_no_flops(backward, total, after_forward):
    given = inputs(330, 6, 29, ignored=110)
    assert passes(given, backward=backward) == pytest.approx(total * 2 / 3)
    given = inputs(330, 6, 29)
    upstream = torch.ones(330, device=DEVICE)
    upstream[::3] = 0.0  # for example of a clipped sequence
    assert passes(given, upstream, backward=backward) == pytest.approx(1 + after_forward * 2 / 3)
    assert torch.equal(given["hidden"].grad.abs().sum(-1) > 0, upstream > 0)


@pytest.mark.parametrize(("backward", "expected"), [("recompute", 4), ("cache", 3)])
@pytest.mark.parametrize("kind", ["fake", "meta"])
def test_flop_counter_on_tensors_without_values(kind, backward, expected):
    """Without label values every token counts."""
    with FakeTensorMode() if kind == "fake" else torch.device("meta"), FlopCounterMode(display=False) as counter:
        hidden, weight = (torch.empty(n, 8, requires_grad=True) for n in (20, 31))
        labels = torch.empty(20, dtype=torch.int64)
        linear_logprobs(hidden, weight, labels, backward=backward).logprobs.sum().backward()
    assert counter.get_total_flops() == expected * 2 * 20 * 31 * 8


def largest_allocation(run):
    """Return the bytes of the largest single allocation in ``run``."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (DEVICE == "cuda")
    with profile(activities=activities, profile_memory=True) as prof:
        run()
    return max(event.nbytes() for event in prof.profiler.kineto_results.events() if event.name() == "[memory]")


@pytest.mark.parametrize("upstream", ["logprobs", "entropy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_allocates_nothing_as_large_as_the_cache(dtype, upstream):
    """Autograd must not allocate a zero gradient for the cache that forward returns."""
    n, vocab = 2048, 64
    given = inputs(n, 4, vocab, dtype)
    out = linear_logprobs(**given, backend="torch", backward="cache", **SMALL_CHUNKS)
    assert largest_allocation(lambda: getattr(out, upstream).sum().backward()) <= 4 * 256 * vocab


def test_never_allocates_all_logits():
    """The largest single allocation, forward and backward, is a block of logit gradients."""
    n, vocab = 2048, 64
    given = inputs(n, 4, vocab, bias=True)

    def run():
        out = linear_logprobs(**given, backend="torch", backward="recompute", **SMALL_CHUNKS)
        (out.logprobs.sum() + out.entropy.sum()).backward()

    assert largest_allocation(run) == 4 * 256 * vocab


@pytest.mark.parametrize("backward", ["auto", "cache"])
def test_caches_nothing_if_no_input_requires_a_gradient(backward):
    """The largest single allocation is the row pass's workspace for a chunk of 128 tokens, two numbers per logit."""
    n, vocab = 2048, 256
    given = inputs(n, 4, vocab)
    with torch.no_grad():
        run = lambda: linear_logprobs(**given, backend="torch", backward=backward, **SMALL_CHUNKS)
        assert largest_allocation(run) == 2 * 4 * 128 * vocab
    frozen = {name: x.detach() for name, x in given.items() if x is not None}
    run = lambda: linear_logprobs(**frozen, backend="torch", backward=backward, **SMALL_CHUNKS)
    assert largest_allocation(run) == 2 * 4 * 128 * vocab


@pytest.mark.parametrize(
    ("settings", "cached"),
    [
        ({"backward": "recompute"}, 0),
        ({"backward": "cache"}, 6),
        ({"backward": "cache", "logits_budget_bytes": 3 * row_bytes(29, 2)}, 3),
        ({"backward": "cache", "logits_budget_bytes": 4 * row_bytes(29, 2) - 1}, 3),
        ({"backward": "auto", "logits_budget_bytes": 0}, 0),
        ({"backward": "auto", "logits_budget_bytes": 1 << 20}, 6),
        ({"backward": "auto"}, 6),
        ({}, 6),
    ],
)
def test_debug_log_reports_the_mode(settings, cached, caplog):
    """The log counts tokens with a loss; the others take nothing of the budget."""
    given = inputs(8, 4, 29, torch.bfloat16, ignored=2)
    with caplog.at_level(logging.DEBUG, logger="sppo_kernels"):
        linear_logprobs(**given, **settings, backend="torch").logprobs[:-1].sum().backward()
    forward, backward = caplog.messages
    assert f"6 of 8 tokens have a loss, keeping the probabilities of {cached} tokens" in forward
    used = min(cached, 5)
    assert f"{used} tokens cached, 0 sparse, {5 - used} recomputed" in backward


@pytest.mark.parametrize("cached", [0, 3, 6])
def test_rows_of_logits_and_their_gradients_are_aligned(cached, monkeypatch):
    """Matrix products read and write rows 16 bytes at a time for any vocabulary; only some cached rows are used."""
    strides = []
    product = Projection.product

    def recorded(self, a, b, **settings):
        result = product(self, a, b, **settings)
        strides.extend(x.stride(0) for x in (a, a.t(), result) if x.shape[1] == 29 and x.stride(1) == 1)
        return result

    monkeypatch.setattr(Projection, "product", recorded)
    given = inputs(8, 4, 29, ignored=2)
    budget = cached * row_bytes(29)
    out = linear_logprobs(**given, backward="cache", logits_budget_bytes=budget, backend="torch")
    out.logprobs[:-1].sum().backward()
    assert len(strides) == (5 if 0 < cached < 6 else 3) + (cached < 6)
    assert all(stride % 64 == 0 for stride in strides)


@pytest.mark.parametrize(("backward", "cached"), [("recompute", 0), ("cache", 10**6), ("auto", 2**30 // 4000)])
def test_default_budget_on_cpu(backward, cached):
    """On an accelerator the default depends on the free memory."""
    assert _num_cacheable(backward, None, 10**6, 4000, torch.device("cpu")) == cached


def test_auto_uses_a_quarter_of_the_free_memory(monkeypatch):
    """Free memory is that of the driver and what the allocator has reserved but not allocated."""
    device = torch.device("cuda:1")
    memory = {"mem_get_info": (1000 * 4000, 9000 * 4000), "memory_reserved": 700 * 4000, "memory_allocated": 300 * 4000}
    for name, value in memory.items():
        monkeypatch.setattr(torch.cuda, name, {device: value}.__getitem__)
    assert _num_cacheable("auto", None, 10**9, 4000, device) == (1000 + 700 - 300) / 4


def test_lora_on_the_lm_head_computes_no_weight_gradient():
    """The FLOPs are those of the logits, the gradient of hidden and the adapter; the weight is frozen."""
    given = inputs(300, 512, 64)
    given["weight"].requires_grad_(False)
    u, b = randn(300, 2, grad=True), randn(64, 2, grad=True)
    run = lambda: (
        linear_logprobs(
            given["hidden"], given["weight"], given["labels"], adapter=(u, b), backend="torch", **SMALL_CHUNKS
        )
        .logprobs.sum()
        .backward()
    )
    with FlopCounterMode(display=False) as counter:
        run()
    assert counter.get_total_flops() == 2 * 300 * 64 * (512 + 2 + 512 + 2 + 2)  # logits, dH, and the terms of u and b
    assert counter.get_total_flops() == 2 * multiply_adds(run)
