"""linear_logprobs against float64; how much it projects and how much it holds."""

import itertools
import logging
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from against_float64 import (
    BACKENDS,
    DEVICE,
    DTYPES,
    FLOOR,
    assert_close_to_float64,
    ragged_shapes,
    randint,
    randn,
)
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from sppo_kernels import linear_logprobs, reference
from sppo_kernels.ops.linear_logprobs import op
from sppo_kernels.ops.linear_logprobs.cache import _num_cacheable
from sppo_kernels.ops.linear_logprobs.matmul import Projection, row_stride
from sppo_kernels.ops.linear_logprobs.output import ForwardOutput

pytestmark = pytest.mark.filterwarnings("ignore:linear_logprobs kept")  # both outputs are differentiated everywhere
IGNORED = -100
MODES = ["recompute", "cache"]
each_way = pytest.mark.parametrize(("backend", "backward"), list(itertools.product(BACKENDS, MODES)))
# The row's gradient is rounded to half precision before the two matrix products, which costs each of its elements half
# an eps more than the reference loses.
PRODUCTS_FLOOR = {**FLOOR, torch.float16: 4.0, torch.bfloat16: 4.0}
SMALL_CHUNKS = {"chunk_bytes": 1}  # 64 tokens a chunk of logits (128 in torch's forward), 256 a block of E: the least


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
    """What a row of the kept gradient takes."""
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
    """How many multiply-adds ``run`` spends in matrix products, as the profiler sees them."""
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as prof:
        run()
    return sum(event.flops for event in prof.key_averages() if event.key in ("aten::mm", "aten::addmm")) // 2


@pytest.mark.parametrize("dtype", DTYPES)
@each_way
@ragged_shapes
@given(
    n=st.integers(0, 6),
    width=st.integers(1, 33),
    vocab=st.integers(1, 300),
    bias=st.booleans(),
    temperature=st.sampled_from([0.6, 1.0]),
    softcap=st.sampled_from([None, 1.5]),
    ignored=st.integers(0, 6),
    rank=st.sampled_from([0, 3]),
    upstream=st.sampled_from([None, ["logprobs"]]),
)
def test_agrees_with_float64(
    backend, backward, dtype, n, width, vocab, bias, temperature, softcap, ignored, rank, upstream
):
    given = inputs(n, width, vocab, dtype, bias, ignored, rank)
    check(backend, **given, temperature=temperature, softcap=softcap, upstream=upstream, backward=backward)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", [0, 100, None])
@pytest.mark.parametrize("backend", BACKENDS)
def test_many_chunks(backend, budget, dtype):
    """Several blocks, the last of them short, of which E is kept for no token, some (not whole chunks of them), all."""
    given = inputs(270, 9, 21, dtype, bias=True, ignored=3)
    budget = None if budget is None else budget * 21 * dtype.itemsize
    settings = {"backward": "cache", "logits_budget_bytes": budget, **SMALL_CHUNKS}
    check(backend, **given, temperature=0.6, softcap=4.0, **settings)
    check(backend, **{**given, "bias": None}, temperature=0.6, upstream=["logprobs"], **settings)


@pytest.mark.parametrize("backward", MODES)
def test_gradient_of_the_weight_is_rounded_once(backward):
    """Rounding to bfloat16 after each of 64 chunks would lose several times as much as rounding the sum."""
    given = inputs(64 * 64, 8, 16, torch.bfloat16)
    double = given["weight"].detach().double().requires_grad_()
    out = linear_logprobs(**given, backward=backward, **SMALL_CHUNKS, backend="torch")
    (got,) = torch.autograd.grad(out.logprobs.sum(), given["weight"])
    exact = reference.linear_logprobs(given["hidden"].double(), double, given["labels"])
    (want,) = torch.autograd.grad(exact.logprobs.sum(), double)
    once = (want.bfloat16().double() - want).square().mean()
    assert (got.double() - want).square().mean() <= 1.5**2 * once


@pytest.mark.parametrize("backend", BACKENDS)
def test_vocabulary_of_a_real_model(backend):
    check(backend, **inputs(3, 8, 151_936, torch.bfloat16, ignored=1), temperature=0.6)


@pytest.mark.parametrize("tokens", [1, 40_000])
def test_sequences_of_one_and_of_many_tokens(tokens):
    """Rows do not know their sequence; forty thousand of them in an interpreter would only be slow."""
    backend = "triton" if DEVICE == "cuda" else "torch"
    check(backend, **inputs(tokens, 5, 13, torch.bfloat16))


@pytest.mark.parametrize("backward", ["recompute", "cache", "sparse"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_softcap_where_it_saturates(backend, backward):
    """The weight is the identity, so that the gradient of hidden is that of the logits."""
    hidden = torch.tensor([[8.0, -8.5, 6.0, -4.0, 7.3, 0.5]], device=DEVICE)
    weight, label = torch.eye(6, device=DEVICE), torch.tensor([1], device=DEVICE)

    def gradient(op, dtype, **settings):
        x = hidden.to(dtype).requires_grad_()
        return torch.autograd.grad(op(x, weight.to(dtype), label, softcap=1.0, **settings).logprobs.sum(), x)[0]

    got = gradient(linear_logprobs, torch.float32, backend=backend, backward=backward)
    exact = gradient(reference.linear_logprobs, torch.float64)
    torch.testing.assert_close(got.double(), exact, rtol=2e-5, atol=0.0)


@pytest.mark.parametrize("temperature", [0.05, 0.3, 1.0])
@each_way
def test_softcap_where_the_label_is_next_to_impossible(backend, backward, temperature):
    """Its probability is 0 in float32, its log-probability and their gradients are not."""
    hidden = torch.tensor([[40.0, -10.0, 3.0]], device=DEVICE, requires_grad=True)
    weight = torch.eye(3, device=DEVICE, requires_grad=True)
    label = torch.tensor([1], device=DEVICE)
    check(backend, hidden, weight, label, softcap=30.0, temperature=temperature, backward=backward)


@each_way
def test_peaked_and_enormous_logits(backend, backward):
    given = inputs(5, 16, 40, bias=True)
    with torch.no_grad():
        given["hidden"][0] = 100 * given["weight"][given["labels"][0]]  # nearly sure of its label
        given["hidden"][1] = 300 * given["weight"][given["labels"][0]]  # nearly sure of another
        given["hidden"][2] *= 1e4
        given["hidden"][3] = 0
    check(backend, **given, backward=backward)
    check(backend, **given, softcap=30.0, backward=backward)


@each_way
def test_vocabulary_entries_that_a_bias_forbids(backend, backward):
    given = inputs(4, 7, 30, bias=True)
    with torch.no_grad():
        given["bias"][::2] = float("-inf")
    given["labels"] = 2 * randint(0, 15, 4) + 1
    check(backend, **given, backward=backward)


@each_way
def test_any_layout(backend, backward):
    labels = randint(0, 17, 3, 2).t()
    for hidden in (
        randn(2, 4, 6)[:, :-1],
        randn(3, 2, 6).transpose(0, 1),
        randn(6, 2, 3).permute(1, 2, 0),
        randn(2, 3, 12)[..., ::2],
        randn(37)[1:].view(2, 3, 6),
    ):
        for weight in (randn(6, 17).t(), randn(17, 12)[:, ::2], randn(103)[1:].view(17, 6)):
            bias = randn(34, grad=True)[::2]
            check(backend, hidden.requires_grad_(), weight.requires_grad_(), labels, bias=bias, backward=backward)


@pytest.mark.parametrize("shape", [(), (3,), (2, 2, 2), (0,), (2, 0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_number_of_leading_dimensions(backend, shape):
    check(backend, randn(*shape, 5, grad=True), randn(11, 5, grad=True), randint(0, 11, *shape))


@pytest.mark.parametrize("softcap", [None, 3.0])
@each_way
def test_temperature_a_token(backend, backward, softcap):
    temperature = torch.tensor([0.2, 1.0, 3.0, 0.7], device=DEVICE)
    check(backend, **inputs(4, 6, 29, ignored=1), temperature=temperature, softcap=softcap, backward=backward)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("upstream", ["logprobs", "entropy"])
@each_way
def test_gradient_of_one_output_only(backend, backward, upstream, dtype):
    check(backend, **inputs(4, 6, 29, dtype), upstream=[upstream], temperature=0.7, backward=backward)


@pytest.mark.parametrize(
    "frozen",
    [("hidden",), ("weight",), ("bias",), ("weight", "bias"), ("hidden", "weight"), ("weight", "bias", "u"), ("b",)],
)
@each_way
def test_frozen_inputs_get_no_gradient(backend, backward, frozen):
    given = inputs(4, 6, 29, bias=True, rank=2)
    for name in frozen:
        given[name].requires_grad_(False)
    check(backend, **given, backward=backward)
    out = with_adapter(linear_logprobs)(**given, backend=backend, backward=backward)
    out.logprobs.sum().backward()
    for name in ("hidden", "weight", "bias", "u", "b"):
        assert (given[name].grad is None) == (name in frozen)


def passes(given, upstream=1.0, **settings):
    """Passes of 2 N H V operations, forward and backward, by PyTorch's own counter; the profiler must see as many."""
    n, one = len(given["labels"]), given["hidden"].shape[1] * given["weight"].shape[0]

    def run():
        out = linear_logprobs(**given, **settings, **SMALL_CHUNKS, backend="torch")
        (out.logprobs * upstream).sum().backward()

    with FlopCounterMode(display=False) as counter:
        run()
    assert counter.get_total_flops() == 2 * multiply_adds(run)
    return counter.get_total_flops() / (2 * n * one)


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
    """One forward, one for each gradient, and one to make the logits again of what was not kept."""
    given = inputs(330, 6, 29)
    if frozen:
        given[frozen].requires_grad_(False)
    assert passes(given, backward=backward) == expected


@pytest.mark.parametrize(("kept", "expected"), [(0, 4), (0.5, 3.5), (1, 3)])
def test_passes_over_what_the_budget_holds(kept, expected):
    given = inputs(330, 6, 29)
    assert passes(given, backward="auto", logits_budget_bytes=int(kept * 330) * row_bytes(29)) == expected


@pytest.mark.parametrize(("entropies", "expected"), [(0, 3), (110, 3 + 1 / 3), (330, 4)])
def test_entropies_with_a_gradient_need_their_logits_again(entropies, expected):
    """Token by token; where nothing of what was kept is of use, a warning says so."""
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


@pytest.mark.parametrize(("backward", "in_all", "after_forward"), [("recompute", 4, 3), ("cache", 3, 2)])
def test_tokens_without_loss_or_without_upstream_gradient_are_not_paid_for(backward, in_all, after_forward):
    given = inputs(330, 6, 29, ignored=110)
    assert passes(given, backward=backward) == pytest.approx(in_all * 2 / 3)
    given = inputs(330, 6, 29)
    upstream = torch.ones(330, device=DEVICE)
    upstream[::3] = 0.0  # a clipped sequence, say
    assert passes(given, upstream, backward=backward) == pytest.approx(1 + after_forward * 2 / 3)
    assert torch.equal(given["hidden"].grad.abs().sum(-1) > 0, upstream > 0)


@pytest.mark.parametrize(("backward", "expected"), [("recompute", 4), ("cache", 3)])
@pytest.mark.parametrize("kind", ["fake", "meta"])
def test_flop_counter_on_tensors_without_values(kind, backward, expected):
    """There are no labels to look at: every token counts."""
    with FakeTensorMode() if kind == "fake" else torch.device("meta"), FlopCounterMode(display=False) as counter:
        hidden, weight = (torch.empty(n, 8, requires_grad=True) for n in (20, 31))
        labels = torch.empty(20, dtype=torch.int64)
        linear_logprobs(hidden, weight, labels, backward=backward).logprobs.sum().backward()
    assert counter.get_total_flops() == expected * 2 * 20 * 31 * 8


@pytest.mark.parametrize("budget", [3, 6, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_token_gets_its_own_gradient(backend, dtype, budget):
    """Holes everywhere: tokens without loss, without upstream gradient, with one of the entropy, beyond the budget."""
    given = inputs(12, 16, 29, dtype, bias=True)
    given["labels"][[0, 5]] = IGNORED
    of_logprobs = torch.linspace(-1, 2, 12, device=DEVICE)
    of_logprobs[[2, 3, 7, 11]] = 0.0
    of_entropy = torch.zeros(12, device=DEVICE)
    of_entropy[[3, 6, 9]] = 0.5
    settings = {"backward": "cache", "logits_budget_bytes": None if budget is None else budget * 29 * dtype.itemsize}

    def gradients(op, given, **settings):
        out = op(**given, temperature=0.7, **settings)
        loss = (out.logprobs * of_logprobs + out.entropy * of_entropy).sum()
        return torch.autograd.grad(loss, [given[name] for name in ("hidden", "weight", "bias")])

    double = {k: x.detach().double().requires_grad_() if x.is_floating_point() else x for k, x in given.items()}
    exact = gradients(reference.linear_logprobs, double)
    for x, y in zip(gradients(linear_logprobs, given, backend=backend, **settings), exact, strict=True):
        assert (x - y).norm() <= 4 * torch.finfo(dtype).eps * y.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@each_way
def test_gradient_of_the_bias_of_a_mean(backend, backward, dtype):
    """Every token has the same coefficient; rounded, it would be off by as much for all of them."""
    given = inputs(600, 8, 40, dtype, bias=True)
    given["bias"] = given["bias"].detach().float().requires_grad_()
    upstream = 1.498 / 600  # nearly half way between two of bfloat16, and of float16
    out = linear_logprobs(**given, backend=backend, backward=backward)
    (got,) = torch.autograd.grad(out.logprobs.sum() * upstream, given["bias"])
    double = {k: x.detach().double() if x.is_floating_point() else x for k, x in given.items()}
    exact = reference.linear_logprobs(**{**double, "bias": double["bias"].requires_grad_()})
    (want,) = torch.autograd.grad(exact.logprobs.sum() * upstream, double["bias"])
    assert (got - want).norm() <= 0.25 * torch.finfo(dtype).eps * want.norm()


@each_way
def test_all_upstream_gradients_zero(backend, backward):
    given = inputs(5, 6, 29, bias=True)
    (0.0 * linear_logprobs(**given, backend=backend, backward=backward).logprobs).sum().backward()
    for name in ("hidden", "weight", "bias"):
        assert torch.equal(given[name].grad, torch.zeros_like(given[name]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@each_way
def test_upstream_gradients_too_small_for_the_dtype_of_the_inputs(backend, backward, dtype):
    """A mean over many tokens: c h and c E would vanish in float16, their sum over the tokens does not."""
    given = inputs(512, 8, 16, dtype)
    double = given["weight"].detach().double().requires_grad_()
    tiny = 2.0**-24
    out = linear_logprobs(**given, backend=backend, backward=backward)
    (got,) = torch.autograd.grad(out.logprobs.sum() * tiny, given["weight"])
    exact = reference.linear_logprobs(given["hidden"].double(), double, given["labels"])
    (want,) = torch.autograd.grad(exact.logprobs.sum() * tiny, double)
    rounded = want.to(dtype).double()
    assert (got.double() - want).norm() <= 0.005 * want.norm() + (rounded - want).norm()


def largest_allocation(run):
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (DEVICE == "cuda")
    with profile(activities=activities, profile_memory=True) as prof:
        run()
    return max(event.nbytes() for event in prof.profiler.kineto_results.events() if event.name() == "[memory]")


@pytest.mark.parametrize("upstream", ["logprobs", "entropy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_makes_nothing_of_the_size_of_what_is_kept(dtype, upstream):
    """Forward, with its one such tensor, is over; autograd must not fill in a gradient for it."""
    n, vocab = 2048, 64
    given = inputs(n, 4, vocab, dtype)
    out = linear_logprobs(**given, backend="torch", backward="cache", **SMALL_CHUNKS)
    assert largest_allocation(lambda: getattr(out, upstream).sum().backward()) <= 4 * 256 * vocab


def test_never_holds_all_logits():
    """The largest single allocation, forward and backward, is that of a block of E."""
    n, vocab = 2048, 64
    given = inputs(n, 4, vocab, bias=True)

    def run():
        out = linear_logprobs(**given, backend="torch", backward="recompute", **SMALL_CHUNKS)
        (out.logprobs.sum() + out.entropy.sum()).backward()

    assert largest_allocation(run) == 4 * 256 * vocab


@pytest.mark.parametrize("backward", ["auto", "cache"])
def test_keeps_nothing_where_nothing_needs_a_gradient(backward):
    n, vocab = 2048, 256
    given = inputs(n, 4, vocab)
    with torch.no_grad():
        run = lambda: linear_logprobs(**given, backend="torch", backward=backward, **SMALL_CHUNKS)
        assert largest_allocation(run) == 4 * 128 * vocab
    frozen = {name: x.detach() for name, x in given.items() if x is not None}
    run = lambda: linear_logprobs(**frozen, backend="torch", backward=backward, **SMALL_CHUNKS)
    assert largest_allocation(run) == 4 * 128 * vocab


@pytest.mark.parametrize(
    ("settings", "kept"),
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
def test_says_what_it_chose(settings, kept, caplog):
    """Tokens without loss take nothing of the budget."""
    given = inputs(8, 4, 29, torch.bfloat16, ignored=2)
    with caplog.at_level(logging.DEBUG, logger="sppo_kernels"):
        linear_logprobs(**given, **settings, backend="torch").logprobs[:-1].sum().backward()
    forward, backward = caplog.messages
    assert f"6 of 8 tokens have a loss, keeping {kept} dense logit gradients" in forward
    cached = min(kept, 5)
    assert f"{cached} tokens cached, 0 sparse, {5 - cached} recomputed" in backward


@pytest.mark.parametrize("kept", [0, 3, 6])
def test_rows_of_logits_and_their_gradients_are_aligned(kept, monkeypatch):
    """Whatever the vocabulary: matrix products read and write them 16 bytes at a time. Of kept rows some are of use."""
    strides = []
    product = Projection.product

    def noted(self, a, b, plus=None, out=None):
        result = product(self, a, b, plus=plus, out=out)
        strides.extend(x.stride(0) for x in (a, a.t(), result) if x.shape[1] == 29 and x.stride(1) == 1)
        return result

    monkeypatch.setattr(Projection, "product", noted)
    given = inputs(8, 4, 29, ignored=2)
    budget = kept * row_bytes(29)
    out = linear_logprobs(**given, backward="cache", logits_budget_bytes=budget, backend="torch")
    out.logprobs[:-1].sum().backward()
    assert len(strides) == (5 if 0 < kept < 6 else 3) + (kept < 6)
    assert all(stride % 64 == 0 for stride in strides)


@pytest.mark.parametrize(("backward", "kept"), [("recompute", 0), ("cache", 10**6), ("auto", 2**30 // 4000)])
def test_budget_unless_it_is_given(backward, kept):
    """On a CPU; on an accelerator it depends on what is free."""
    assert _num_cacheable(backward, None, 10**6, 4000, torch.device("cpu")) == kept


def test_auto_keeps_a_quarter_of_the_free_memory(monkeypatch):
    """What the driver of that device has, and what its allocator holds unused."""
    device = torch.device("cuda:1")
    memory = {"mem_get_info": (1000 * 4000, 9000 * 4000), "memory_reserved": 700 * 4000, "memory_allocated": 300 * 4000}
    for name, value in memory.items():
        monkeypatch.setattr(torch.cuda, name, {device: value}.__getitem__)
    assert _num_cacheable("auto", None, 10**9, 4000, device) == (1000 + 700 - 300) / 4


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_budget_changes_rounding_alone(backend, softcap):
    """Kept for some tokens, recomputed for the others: in float32 the same gradients to a few eps."""
    given = inputs(260, 6, 29)
    leaves = [given["hidden"], given["weight"]]
    grads = []
    for tokens in (0, 1, 100, 260):
        settings = {
            "backward": "cache",
            "logits_budget_bytes": tokens * row_bytes(29),
            "softcap": softcap,
            **SMALL_CHUNKS,
        }
        out = linear_logprobs(**given, **settings, backend=backend)
        grads.append(torch.autograd.grad(out.logprobs.sum(), leaves))
    for other in grads[1:]:
        for x, y in zip(other, grads[0], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_ignored_tokens_are_exactly_zero_whatever_they_hold(backend):
    given = inputs(5, 6, 29, bias=True)
    given["labels"][1:4] = IGNORED
    with torch.no_grad():
        given["hidden"][1], given["hidden"][2], given["hidden"][3] = float("nan"), float("inf"), float("-inf")
    out = linear_logprobs(**given, backend=backend)
    (out.logprobs.sum() + out.entropy.sum()).backward()
    for x in out:
        assert torch.equal(x[1:4], torch.zeros_like(x[1:4]))
        assert (x[[0, 4]] != 0).all()
    assert torch.equal(given["hidden"].grad[1:4], torch.zeros(3, 6, device=DEVICE))
    for name in ("hidden", "weight", "bias"):
        assert given[name].grad.isfinite().all()
        assert (given[name].grad != 0).any()


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_all_tokens_ignored(backend):
    given = inputs(5, 6, 29, bias=True, ignored=5, rank=2)
    given["adapter"] = given.pop("u"), given.pop("b")
    out = linear_logprobs(**given, backend=backend)
    (out.logprobs.sum() + out.entropy.sum()).backward()
    for x in (*out, *(given[name].grad for name in ("hidden", "weight", "bias"))):
        assert torch.equal(x, torch.zeros_like(x))
    assert multiply_adds(lambda: linear_logprobs(**given, backend="torch")) == 0


@each_way
def test_same_bits_every_run(backend, backward):
    given = inputs(300, 9, 43, bias=True)

    def run():
        out = linear_logprobs(**given, backend=backend, backward=backward, **SMALL_CHUNKS)
        leaves = [given[name] for name in ("hidden", "weight", "bias")]
        return *out, *torch.autograd.grad(out.logprobs.sum() + out.entropy.sum(), leaves)

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_however_the_tokens_are_padded(backend, dtype):
    """Only tokens with loss reach the matrix product, so where the others lie cannot change a bit.

    A token alone has other last bits than in a batch: a matrix product of one row takes another path in the BLAS.
    """
    given = inputs(70, 9, 43, dtype, bias=True)
    packed = linear_logprobs(**given, **SMALL_CHUNKS, backend=backend)
    where = torch.arange(70, device=DEVICE) * 2 + 30
    padded = {
        **given,
        "hidden": randn(200, 9, dtype=dtype).index_copy(0, where, given["hidden"]).view(2, 100, 9),
        "labels": torch.full((200,), IGNORED, device=DEVICE).index_copy(0, where, given["labels"]).view(2, 100),
    }
    with torch.no_grad():
        again = linear_logprobs(**padded, **SMALL_CHUNKS, backend=backend)
    for x, y in zip(again, packed, strict=True):
        assert torch.equal(x.flatten()[where], y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_batches_and_orders_change_last_bits_at_most(dtype):
    """The size that the documentation names, with logits of a usual size."""
    given = inputs(300, 64, 1000, dtype)
    whole = linear_logprobs(**given, **SMALL_CHUNKS, backend="torch")
    order = torch.randperm(300)
    for rows in (order, order[:37], order[5:6], torch.arange(100, 300)):
        part = linear_logprobs(given["hidden"][rows], given["weight"], given["labels"][rows], backend="torch")
        for x, y in zip(part, whole, strict=True):
            assert (x - y[rows]).abs().max() <= 1e-5


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_rounds_inputs_and_not_logits(backend, dtype):
    """As if hidden, weight and bias had been cast outside; the gradients come back in their own dtype."""
    given = inputs(6, 16, 29, bias=True)
    with torch.autocast(DEVICE, dtype=dtype):
        inside = linear_logprobs(**given, backend=backend)
    cast = {k: x.to(dtype) if x.is_floating_point() else x for k, x in given.items()}
    outside = linear_logprobs(**cast, backend=backend)
    for x, y in zip(inside, outside, strict=True):
        assert x.dtype == torch.float32
        assert torch.equal(x, y)
    for name in ("hidden", "weight", "bias"):
        (grad,) = torch.autograd.grad(inside.logprobs.sum(), given[name], retain_graph=True)
        (want,) = torch.autograd.grad(outside.logprobs.sum(), given[name], retain_graph=True)
        assert grad.dtype == torch.float32
        assert torch.equal(grad, want)


@each_way
def test_backward_under_autocast(backend, backward):
    given = inputs(6, 16, 29)
    settings = {"backend": backend, "backward": backward}
    want = torch.autograd.grad(linear_logprobs(**given, **settings).logprobs.sum(), given["weight"])
    loss = linear_logprobs(**given, **settings).logprobs.sum()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = torch.autograd.grad(loss, given["weight"])
    assert torch.equal(got[0], want[0])


@each_way
def test_activation_checkpointing(backend, backward):
    given = inputs(6, 8, 29)

    def loss(hidden, weight):
        out = linear_logprobs(hidden.tanh(), weight, given["labels"], backend=backend, backward=backward)
        return (out.logprobs + out.entropy).sum()

    leaves = [given["hidden"], given["weight"]]
    want = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.autograd.grad(checkpoint(loss, *leaves, use_reentrant=False), leaves)
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)


@each_way
def test_outputs_used_twice_and_backward_twice(backend, backward):
    """Kept E is read, not used up: two losses on one output, the graph kept in between, add up in the gradients."""
    given = inputs(6, 8, 29, ignored=1)
    leaves = [given["hidden"], given["weight"]]
    run = lambda: linear_logprobs(**given, backend=backend, backward=backward)
    first = torch.autograd.grad(run().logprobs.sum(), leaves)
    second = torch.autograd.grad(run().logprobs.square().sum() - 0.5 * run().entropy.sum(), leaves)
    out = run()
    out.logprobs.sum().backward(retain_graph=True)
    (out.logprobs.square().sum() - 0.5 * out.entropy.sum()).backward()
    for leaf, x, y in zip(leaves, first, second, strict=True):
        torch.testing.assert_close(leaf.grad, x + y, rtol=1e-5, atol=1e-6)


@each_way
def test_gradients_accumulate_over_micro_batches(backend, backward):
    given = inputs(8, 6, 29)
    leaves = [given["hidden"], given["weight"]]
    run = lambda rows: linear_logprobs(
        given["hidden"][rows], given["weight"], given["labels"][rows], backend=backend, backward=backward
    )
    want = torch.autograd.grad(run(slice(None)).logprobs.sum(), leaves)
    for rows in (slice(0, 5), slice(5, 8)):
        run(rows).logprobs.sum().backward()
    for leaf, grad in zip(leaves, want, strict=True):
        torch.testing.assert_close(leaf.grad, grad, rtol=1e-5, atol=1e-6)


@each_way
def test_tied_embeddings(backend, backward):
    """The weight is also where the hidden states come from; both of its gradients arrive."""
    ids = randint(0, 29, 7)
    weight = randn(29, 6, grad=True)

    def grad(op, weight, **settings):
        hidden = torch.nn.functional.embedding(ids, weight).tanh()
        return torch.autograd.grad(op(hidden, weight, ids.roll(-1), **settings).logprobs.sum(), weight)[0]

    got = grad(linear_logprobs, weight, backend=backend, backward=backward)
    want = grad(reference.linear_logprobs, weight.detach().double().requires_grad_())
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@each_way
def test_lora_on_the_head_is_the_merged_weight(backend, backward):
    """Values, and the gradients of A, B and hidden, with the weight itself frozen."""
    given = inputs(6, 16, 29)
    weight = given["weight"].requires_grad_(False)
    a, b, scaling = randn(4, 16, grad=True), randn(29, 4, grad=True), 0.5
    leaves = [given["hidden"], a, b]
    u = scaling * given["hidden"] @ a.t()
    out = linear_logprobs(given["hidden"], weight, given["labels"], adapter=(u, b), backend=backend, backward=backward)
    hidden64, a64, b64 = (x.detach().double().requires_grad_() for x in leaves)
    merged = weight.double() + scaling * b64 @ a64
    want = reference.linear_logprobs(hidden64, merged, given["labels"])
    for x, y in zip(out, want, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)
    got = torch.autograd.grad(out.logprobs.sum() + out.entropy.sum(), leaves)
    expected = torch.autograd.grad(want.logprobs.sum() + want.entropy.sum(), [hidden64, a64, b64])
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-5)


def test_lora_on_the_head_makes_no_merged_copy():
    """A frozen weight costs no gradient, and nothing of its size is allocated."""
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
    assert counter.get_total_flops() == 2 * 300 * 64 * (512 + 2 + 512 + 2 + 2)  # logits, dH, and u's and b's parts
    assert counter.get_total_flops() == 2 * multiply_adds(run)


def test_reference_is_its_own_derivative():
    given = inputs(3, 4, 7, torch.float64, bias=True, ignored=1, rank=2)
    names = ("hidden", "weight", "bias", "u", "b")
    f = lambda h, w, bias, *adapter: tuple(
        reference.linear_logprobs(h, w, given["labels"], bias=bias, adapter=adapter, temperature=0.7, softcap=2.0)
    )
    assert torch.autograd.gradcheck(f, tuple(given[name] for name in names))


@each_way
def test_registration(backend, backward):
    hidden, weight, labels, bias, u, b = inputs(4, 6, 11, bias=True, rank=2).values()
    tau = torch.ones(4, device=DEVICE)
    common = {"ignore_index": IGNORED, "backward": backward, "auto_key": "", "chunk_bytes": 1000, "group": ""}
    common["backend"] = backend
    settings = {**common, "logits_budget_bytes": None, "mass_tolerance": 1e-4, "max_entries": 8}
    pairs = [hidden, u], [weight, b]
    # With a size that is known only when it runs, the checks of autograd and of dynamic shapes do not get along.
    tests = ["test_schema", "test_faketensor"] + ["test_autograd_registration", "test_aot_dispatch_dynamic"] * (
        backward == "recompute"
    )
    torch.library.opcheck(
        op.linear_logprobs, (*pairs, bias, labels, tau), {"softcap": 2.0, **settings}, test_utils=tests
    )
    pairs = tuple([x.detach() for x in pair] for pair in pairs)
    output = ForwardOutput(*op.linear_logprobs(*pairs, None, labels, tau, softcap=0.0, **settings))
    for needs in (
        [True, True, True, True, False],
        [True, False, False, True, False],
        [False, True, True, False, False],
    ):
        saved = output.entropy, output.row_stats, *output[5:]
        tensors = randn(4), randn(4), *pairs, None, labels, tau, *saved
        # Inputs that are no leaves: the backward itself has no derivative to check.
        torch.library.opcheck(
            op.linear_logprobs_backward,
            tensors,
            {"needs": needs, "softcap": 0.0, **common},
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("backward", [*MODES, "auto"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole(backend, backward, compiler):
    torch.compiler.reset()
    given = inputs(6, 8, 29, bias=True, ignored=2)
    leaves = [given[name] for name in ("hidden", "weight", "bias")]
    settings = {"temperature": 0.6, "backend": backend, "backward": backward}

    def loss(hidden, weight, bias):
        out = linear_logprobs(hidden, weight, given["labels"], bias=bias, **settings)
        return (out.logprobs + 0.1 * out.entropy).sum()

    compiled = torch.compile(loss, fullgraph=True, backend=compiler)(*leaves)
    eager = loss(*leaves)
    torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=0)
    for x, y in zip(torch.autograd.grad(compiled, leaves), torch.autograd.grad(eager, leaves), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("backward", [*MODES, "auto"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_fake_tensors(backend, backward):
    with FakeTensorMode():
        hidden = torch.empty(2, 5, 8, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
        weight = torch.empty(31, 8, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
        labels = torch.empty(2, 5, dtype=torch.int64, device=DEVICE)
        out = linear_logprobs(hidden, weight, labels, backend=backend, backward=backward)
        for x in out:
            assert (x.shape, x.dtype) == ((2, 5), torch.float32)
        out.logprobs.sum().backward()
        for x in (hidden, weight):
            assert (x.grad.shape, x.grad.dtype) == (x.shape, torch.bfloat16)


HIDDEN, WEIGHT, LABELS = torch.zeros(2, 3), torch.zeros(5, 3), torch.tensor([0, 4])


@pytest.mark.parametrize(
    ("bad", "error", "says"),
    [
        ({"hidden": 1.0}, TypeError, "hidden must be a torch.Tensor, got float"),
        ({"hidden": HIDDEN.long()}, TypeError, "hidden must be a floating-point tensor, got torch.int64"),
        ({"hidden": torch.zeros(())}, ValueError, r"hidden must be .*got shape \(\)"),
        ({"hidden": torch.zeros(2, 0), "weight": torch.zeros(5, 0)}, ValueError, r"hidden must be .*shape \(2, 0\)"),
        ({"weight": [1.0]}, TypeError, "weight must be a torch.Tensor, got list"),
        ({"weight": torch.zeros(5)}, ValueError, r"weight must be \[V, H\] with H = 3, got shape \(5,\)"),
        ({"weight": torch.zeros(5, 4)}, ValueError, r"weight must be \[V, H\] with H = 3, got shape \(5, 4\)"),
        ({"weight": torch.zeros(0, 3)}, ValueError, r"weight must be \[V, H\].*got shape \(0, 3\)"),
        ({"weight": WEIGHT.half()}, TypeError, "weight must be of the dtype of hidden, torch.float32.*torch.float16"),
        ({"weight": WEIGHT.to("meta")}, ValueError, "weight must be on cpu.*got meta"),
        ({"labels": LABELS.float()}, TypeError, "labels must be an integer tensor, got torch.float32"),
        ({"labels": torch.zeros(3).long()}, ValueError, r"labels must be of shape \(2,\).*got shape \(3,\)"),
        ({"labels": torch.tensor([0, 5])}, ValueError, r"labels must be in \[0, 5\) or ignore_index=-100, got 5"),
        ({"labels": torch.tensor([-7, 0])}, ValueError, r"labels must be in \[0, 5\) or ignore_index=-100, got -7"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must be of shape \(5,\).*got shape \(4,\)"),
        ({"bias": torch.zeros(5).int()}, TypeError, "bias must be a floating-point tensor, got torch.int32"),
        ({"bias": torch.zeros(5, device="meta")}, ValueError, "bias must be on cpu.*got meta"),
        ({"temperature": 0.0}, ValueError, "temperature must be greater than 0.*got 0.0"),
        ({"temperature": torch.ones(3)}, ValueError, r"temperature must be of shape \(2,\).*got shape \(3,\)"),
        ({"temperature": torch.tensor([1.0, -2.0])}, ValueError, "temperature must be greater than 0, got -2.0"),
        ({"softcap": -1.0}, ValueError, "softcap must be greater than 0.*got -1.0"),
        ({"backward": "magic"}, ValueError, "backward must be one of .*'recompute'.*got 'magic'"),
        ({"logits_budget_bytes": -1}, ValueError, "logits_budget_bytes must be at least 0, got -1"),
        ({"logits_budget_bytes": 1e9}, TypeError, "logits_budget_bytes must be an int, got 1000000000.0"),
        ({"logits_budget_bytes": 2**70}, ValueError, r"logits_budget_bytes must be below 2\*\*63, got \d+"),
        ({"logits_budget_bytes": "1"}, TypeError, "logits_budget_bytes must be an int, got '1'"),
        ({"mass_tolerance": 0.0}, ValueError, r"mass_tolerance must be in \(0, 1\), got 0.0"),
        ({"mass_tolerance": 1.0}, ValueError, r"mass_tolerance must be in \(0, 1\), got 1.0"),
        ({"chunk_bytes": 0}, ValueError, "chunk_bytes must be at least 1, got 0"),
        ({"chunk_bytes": True}, TypeError, "chunk_bytes must be an int, got True"),
        ({"ignore_index": None}, TypeError, "ignore_index must be an int, got None"),
        ({"mass_tolerance": None}, TypeError, "mass_tolerance must be a number, got None"),
        ({"temperature": "1"}, TypeError, "temperature must be a number, got '1'"),
        ({"softcap": [3.0]}, TypeError, r"softcap must be a number, got \[3.0\]"),
        ({"softcap": float("inf")}, ValueError, "softcap must be greater than 0 and finite.*got inf"),
        ({"hidden": None}, TypeError, "hidden must be a torch.Tensor, got None"),
        ({"labels": None}, TypeError, "labels must be a torch.Tensor, got None"),
        ({"adapter": torch.zeros(3)}, TypeError, "adapter must be a pair of tensors .*got Tensor"),
        ({"adapter": (HIDDEN, None)}, TypeError, r"adapter must be a pair of tensors .*got \['Tensor', 'NoneType'\]"),
        ({"adapter": (HIDDEN, 1.0)}, TypeError, r"adapter\[1\] must be a torch.Tensor, got float"),
        (
            {"adapter": (HIDDEN[:1], WEIGHT)},
            ValueError,
            r"adapter\[0\] must be of shape \(2, 'r'\).*got shape \(1, 3\)",
        ),
        ({"adapter": (HIDDEN, WEIGHT[:, :2])}, ValueError, r"adapter\[1\] must be of shape \(5, 3\).*shape \(5, 2\)"),
        (
            {"adapter": (HIDDEN, WEIGHT.half())},
            TypeError,
            r"adapter\[1\] must be of the dtype of hidden.*torch.float16",
        ),
        ({"adapter": (HIDDEN, WEIGHT.to("meta"))}, ValueError, r"adapter\[1\] must be on cpu.*got meta"),
        ({"backend": "cuda"}, ValueError, "backend must be one of reference, torch, triton.*got 'cuda'"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_wrong_input_is_named(backend, bad, error, says):
    if backend == "triton" and DEVICE == "cuda":
        pytest.skip("the tensors of this table are on the CPU")
    with pytest.raises(error, match=says):
        linear_logprobs(**{"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS, "backend": backend, **bad})


def test_numbers_of_numpy_are_numbers():
    want = linear_logprobs(HIDDEN, WEIGHT, LABELS, temperature=0.5, softcap=3.0)
    got = linear_logprobs(HIDDEN, WEIGHT, LABELS, temperature=np.float32(0.5), softcap=np.float64(3.0))
    assert torch.equal(got.entropy, want.entropy)


@pytest.mark.parametrize("group", ["ranks", -100])
def test_group_that_is_none_of_this_process(group):
    """-100 is what torch.distributed.new_group returns on a rank outside the new group."""
    with pytest.raises(TypeError, match=f"group must be a torch.distributed.ProcessGroup .*got {group}"):
        linear_logprobs(HIDDEN, WEIGHT, LABELS, group=group)


@pytest.mark.gpu
def test_values_are_looked_at_only_when_asked(monkeypatch):
    hidden, weight, labels = randn(3, 8), randn(5, 8), torch.tensor([0, 5, -1], device=DEVICE)
    monkeypatch.delenv("SPPO_KERNELS_CHECK", raising=False)
    assert linear_logprobs(hidden, weight, labels).logprobs.isnan().tolist() == [False, True, True]
    monkeypatch.setenv("SPPO_KERNELS_CHECK", "1")
    with pytest.raises(ValueError, match="labels must be in"):
        linear_logprobs(hidden, weight, labels)


@pytest.mark.gpu
def test_more_tokens_than_a_grid_axis_holds():
    check("triton", **inputs(70_000, 16, 9, torch.bfloat16))


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_meta_tensors(needs_gradient):
    hidden, weight = (torch.empty(n, 8, device="meta", requires_grad=needs_gradient) for n in (3, 5))
    out = linear_logprobs(hidden, weight, torch.empty(3, dtype=torch.int64, device="meta"))
    assert out.logprobs.shape == (3,)
    assert out.logprobs.device.type == "meta"
