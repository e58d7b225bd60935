"""Tests that backward="sparse" bounds and reports the dropped mass and is exact otherwise."""

import logging

import pytest
import torch
from against_float64 import BACKENDS, DEVICE, ragged_shapes, randint, randn
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from sppo_kernels import linear_logprobs, reference
from sppo_kernels.ops.linear_logprobs.weighted_rows import WEIGHTED_ROWS

IGNORED = -100


def inputs(n, width, vocab, spread, dtype=torch.float32):
    """Return inputs with logits of standard deviation ``spread``; every other label is the likeliest token."""
    hidden = randn(n, width, dtype=dtype, scale=spread)
    weight = randn(vocab, width, dtype=dtype, scale=width**-0.5)
    labels = randint(0, vocab, n)
    labels[::2] = (hidden.float() @ weight.float().t()).argmax(-1)[::2]
    return hidden, weight, labels


def gradients(op, hidden, weight, labels, **settings):
    """Return the output, the upstream gradient, and the gradients of hidden and weight."""
    leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    certificate = {"return_certificate": True} if op is linear_logprobs else {}
    out = op(*leaves, labels, **certificate, **settings)
    upstream = torch.linspace(-1, 2, len(labels), device=DEVICE, dtype=out.logprobs.dtype)
    return out, upstream, torch.autograd.grad((out.logprobs * upstream).sum(), leaves)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@ragged_shapes
@given(
    n=st.integers(1, 5),
    vocab=st.integers(2, 400),
    spread=st.sampled_from([0.1, 3.0, 10.0, 40.0]),
    temperature=st.sampled_from([0.3, 0.6, 1.0]),
    softcap=st.sampled_from([None, 20.0]),
    tolerance=st.sampled_from([1e-2, 1e-4]),
    max_entries=st.sampled_from([1, 7, 64]),
    ignored=st.integers(0, 2),
)
def test_the_bound_holds_and_is_what_was_left_out(
    backend, n, vocab, spread, temperature, softcap, tolerance, max_entries, ignored
):
    """With the identity as weight, the gradient of hidden is the logit gradient."""
    hidden, weight, labels = randn(n, vocab, scale=spread), torch.eye(vocab, device=DEVICE), randint(0, vocab, n)
    labels[:ignored] = IGNORED
    settings = {"temperature": temperature, "softcap": softcap}
    sparse = {"backward": "sparse", "mass_tolerance": tolerance, "max_entries": max_entries, "backend": backend}
    out, upstream, (got, _) = gradients(linear_logprobs, hidden, weight, labels, **settings, **sparse)
    double = hidden.double(), weight.double(), labels
    exact, _, (want, _) = gradients(reference.linear_logprobs, *double, **settings)
    error = (got - want).abs().sum(-1)
    dropped, num_entries = out.certificate
    rounding = 1e-5 * upstream.abs() / temperature
    assert (error <= upstream.abs() * dropped / temperature + rounding).all()
    if softcap is None:  # the error equals the dropped mass
        assert (error >= upstream.abs() * dropped / temperature - rounding).all()
    assert (dropped <= tolerance).all()
    assert (dropped[num_entries <= 0] == 0).all()
    assert torch.equal(num_entries == 0, labels == IGNORED)
    assert (num_entries <= max_entries).all()
    torch.testing.assert_close(out.logprobs.double(), exact.logprobs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_number_of_entries_is_minimal(backend):
    """Fewer entries would drop more than the tolerance, and a token is dense only if it needs more than the maximum."""
    hidden, weight, labels = inputs(12, 16, 3000, 8.0)
    max_entries, tolerance = 40, 1e-3
    sparse = {"backward": "sparse", "mass_tolerance": tolerance, "max_entries": max_entries, "backend": backend}
    num_entries = linear_logprobs(
        hidden, weight.requires_grad_(), labels, return_certificate=True, **sparse
    ).certificate.num_entries
    p = (hidden.double() @ weight.double().t()).softmax(-1)
    p = p.scatter(1, labels[:, None], 0.0).sort(-1).values
    needed = (p.cumsum(-1) > tolerance).sum(-1) + 1
    assert torch.equal(num_entries.long(), torch.where(needed <= max_entries, needed, -1))
    assert 0 < (num_entries > 0).sum() < 12


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_late_maximum_that_is_not_the_label(backend):
    """Before the maximum is found, more negligible logits than fit look like candidates."""
    vocab, peak = 5000, 4990
    hidden, weight, labels = (
        randn(3, vocab),
        torch.eye(vocab, device=DEVICE),
        torch.tensor([7, 100, 4000], device=DEVICE),
    )
    hidden[:, peak] = 60.0
    sparse = {"backward": "sparse", "max_entries": 8, "backend": backend}
    out, upstream, (got, _) = gradients(linear_logprobs, hidden, weight, labels, **sparse)
    assert out.certificate.num_entries.tolist() == [2, 2, 2]
    want = torch.zeros_like(got)
    want[range(3), labels], want[:, peak] = upstream, -upstream
    torch.testing.assert_close(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_peaked_logits_are_close_to_float64(backend, dtype):
    given = inputs(40, 32, 5000, 12.0, dtype)
    _, _, exact = gradients(reference.linear_logprobs, *(x.double() if x.is_floating_point() else x for x in given))
    error = lambda grads: [float((x - y).norm() / y.norm()) for x, y in zip(grads, exact, strict=True)]
    out, _, got = gradients(linear_logprobs, *given, backward="sparse", backend=backend)
    _, _, cached = gradients(linear_logprobs, *given, backward="cache", backend=backend)
    assert out.certificate.sparse_share > 0.9
    for sparse, cache in zip(error(got), error(cached), strict=True):
        assert sparse < (1e-3 if dtype == torch.float32 else cache)


@pytest.mark.parametrize("backend", BACKENDS)
def test_flat_rows_and_entropy_gradients_are_exact(backend):
    hidden, weight, labels = inputs(6, 16, 900, 0.2)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    results = []
    for backward in ("sparse", "recompute"):
        out = linear_logprobs(*leaves, labels, backward=backward, backend=backend, return_certificate=True)
        results.append(torch.autograd.grad(out.logprobs.sum() + out.entropy.sum(), leaves))
        assert (out.certificate.num_entries == -1).all()
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.fixture
def filled_memory():
    """Fill new memory with NaN and with the largest integers, which no kernel may use as a column."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("filled_memory")
@pytest.mark.parametrize("backend", BACKENDS)
def test_candidates_that_do_not_fit_are_not_read(backend):
    """One token has most of the mass, and all others are near the floor."""
    hidden, weight = torch.ones(8, 1, device=DEVICE), torch.zeros(400, 1, device=DEVICE)
    weight[7] = 6.0
    labels = torch.full((8,), 5, device=DEVICE)
    sparse = {"backward": "sparse", "max_entries": 16, "backend": backend}
    out, _, got = gradients(linear_logprobs, hidden, weight, labels, **sparse)
    assert (out.certificate.num_entries == -1).all()
    _, _, want = gradients(reference.linear_logprobs, hidden, weight, labels)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("spread", "expected"), [(60.0, 1), (0.1, 4)])
def test_passes_over_the_vocabulary(spread, expected):
    """One pass suffices if all rows are peaked; if none is, there are as many as with recompute."""
    hidden, weight, labels = inputs(300, 64, 2000, spread)
    labels = (hidden @ weight.t()).argmax(-1)
    hidden, weight = (10 * hidden if expected == 1 else hidden).requires_grad_(), weight.requires_grad_()
    settings = {"backward": "sparse", "chunk_bytes": 1, "backend": "torch"}
    run = lambda: linear_logprobs(hidden, weight, labels, **settings).logprobs.sum().backward()
    with FlopCounterMode(display=False) as counter:
        run()
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as profiler:
        run()
    seen = sum(event.flops for event in profiler.events() if event.name in ("aten::mm", "aten::addmm"))
    assert counter.get_total_flops() == seen
    assert seen / (2 * 300 * 64 * 2000) == pytest.approx(expected, abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_options_together_in_small_blocks(small_blocks, backend):
    """Adapter, bias, temperature per token, tokens without a loss or a gradient, several blocks, frozen inputs."""
    n, vocab = 40, 97
    hidden, weight, labels = inputs(n, 16, vocab, 10.0)
    labels[::7] = IGNORED
    leaves = {"hidden": hidden, "weight": weight, "bias": randn(vocab), "u": randn(n, 3), "b": randn(vocab, 3)}
    temperature = 0.5 + torch.rand(n).to(DEVICE)
    upstream = torch.linspace(-1, 2, n, device=DEVICE)
    upstream[1::5] = 0.0

    def grads(op, dtype, frozen, **settings):
        given = {name: x.detach().to(dtype).requires_grad_(name not in frozen) for name, x in leaves.items()}
        h, w, bias, u, b = given.values()
        out = op(h, w, labels, bias=bias, adapter=(u, b), temperature=temperature.to(dtype), **settings)
        return torch.autograd.grad((out.logprobs * upstream).sum(), [x for x in given.values() if x.requires_grad])

    for frozen in ((), ("hidden", "b", "bias")):
        sparse = {"backward": "sparse", "mass_tolerance": 1e-5, "max_entries": 64}
        exact = grads(reference.linear_logprobs, torch.float64, frozen)
        for x, y in zip(grads(linear_logprobs, torch.float32, frozen, backend=backend, **sparse), exact, strict=True):
            assert (x - y).norm() <= 1e-4 * y.norm()


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_as_without_and_every_run(backend):
    """Gradients repeat, and log-probabilities have the same bits as in a forward without gradients."""
    hidden, weight, labels = inputs(50, 16, 700, 10.0)
    first, _, grads = gradients(linear_logprobs, hidden, weight, labels, backward="sparse", backend=backend)
    _, _, second = gradients(linear_logprobs, hidden, weight, labels, backward="sparse", backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(grads, second, strict=True))
    with torch.no_grad():
        assert torch.equal(first.logprobs, linear_logprobs(hidden, weight, labels, backend=backend).logprobs)


@pytest.mark.parametrize("offset", [0.0, 300.0, -300.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_entries_just_above_the_floor_are_found(backend, offset):
    """Eight probabilities are 0.5% above ``mass_tolerance / max_entries``. Without them, too much would be left out."""
    p, likely = torch.full((512,), (1 - 8 * 0.067) / 504), torch.tensor([3, 4, 130, 131, 260, 389, 390, 511])
    p[likely], p[7] = 0.067, 9.3e-4  # 4.277 nats apart, which bfloat16 rounds down to 4.25, below the floor
    hidden, weight = torch.ones(1, 1, device=DEVICE), (p.log() + offset)[:, None].to(DEVICE).requires_grad_()
    settings = {"backward": "sparse", "mass_tolerance": 0.6, "max_entries": 9, "return_certificate": True}
    certificate = linear_logprobs(hidden, weight, torch.tensor([7]).to(DEVICE), **settings, backend=backend).certificate
    assert certificate.num_entries.tolist() == [9]  # and the label's
    assert float(certificate.dropped_mass) == pytest.approx(503 / 504 * (1 - 8 * 0.067), abs=1e-4)


@pytest.mark.parametrize("width", [1, 2, 3, 16, 130])
@pytest.mark.parametrize("backend", BACKENDS)
def test_weighted_rows(backend, width):
    """Places have one entry, fill a piece, span pieces, begin where a piece ends, and are past the end of ``out``."""
    counts = {5: 1, 0: 64, 3: 130, 1: 61, 4: 3, 7: 70, 6: 200}
    place = torch.cat([torch.full((n,), at) for at, n in sorted(counts.items())]).to(DEVICE)
    index, weight, rows = randint(0, 9, len(place)), randn(len(place)), randn(9, 2 * width)[:, ::2]
    out = randn(7, width)
    want, second = out.double(), out.clone()
    inside = place < len(out)
    want.index_add_(0, place[inside], weight[inside, None].double() * rows[index[inside]].double())
    for result in (out, second):
        WEIGHTED_ROWS[backend](out=result, place=place, index=index, weight=weight, rows=rows)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-4)
    assert torch.equal(out, second)
    third, fourth = torch.zeros_like(out), torch.zeros_like(out)
    WEIGHTED_ROWS[backend](out=third, place=place, index=index, weight=weight, rows=rows)
    WEIGHTED_ROWS[backend](out=fourth, place=place, index=index, weight=weight, rows=rows, out_is_zero=True)
    assert torch.equal(third, fourth)


@pytest.mark.parametrize(("value", "message"), [(0, "at least 1, got 0"), (2000, "at most 1024.*got 2000")])
def test_invalid_max_entries_raises(value, message):
    with pytest.raises(ValueError, match=f"max_entries must be {message}"):
        linear_logprobs(torch.zeros(2, 3), torch.zeros(5, 3), torch.tensor([0, 4]), max_entries=value)


def test_debug_log_counts_sparse_tokens(caplog):
    """One of five tokens with a loss is too flat; the sixth token has no loss."""
    hidden, weight, labels = inputs(6, 16, 900, 30.0)
    labels[4], hidden[3] = IGNORED, 0.0
    with caplog.at_level(logging.DEBUG, logger="sppo_kernels"):
        linear_logprobs(hidden, weight.requires_grad_(), labels, backward="sparse").logprobs.sum().backward()
    assert caplog.messages[-1] == "backward: 0 tokens cached, 4 sparse, 1 recomputed"
