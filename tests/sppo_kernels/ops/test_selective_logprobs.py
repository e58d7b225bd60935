"""Tests of selective_logprobs against float64, on difficult logits and layouts."""

import pytest
import torch
from against_float64 import (
    BACKENDS,
    BACKENDS_ON_CPU,
    DEVICE,
    DTYPES,
    assert_close_to_float64,
    ragged_shapes,
    randint,
    randn,
)
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from sppo_kernels import reference, selective_logprobs
from sppo_kernels.ops.selective_logprobs import _selective_logprobs, _selective_logprobs_backward

IGNORED = -100
MINUS_INF = float("-inf")


def check(backend, logits, labels, **kwargs):
    temperature = kwargs.pop("temperature", 1.0)
    tensors = {"logits": logits.requires_grad_(), "labels": labels}
    (tensors if isinstance(temperature, torch.Tensor) else kwargs)["temperature"] = temperature
    assert_close_to_float64(selective_logprobs, reference.selective_logprobs, backend, tensors, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@ragged_shapes
@given(
    n=st.integers(0, 5),
    vocab=st.integers(1, 300) | st.sampled_from([1024, 4096, 4097]),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    softcap=st.sampled_from([None, 1.5, 30.0]),
    ignored=st.integers(0, 5),
)
def test_agrees_with_float64(backend, dtype, n, vocab, temperature, softcap, ignored):
    labels = randint(0, vocab, n)
    labels[:ignored] = IGNORED
    check(backend, randn(n, vocab, dtype=dtype, scale=3), labels, temperature=temperature, softcap=softcap)


def uniform(n, vocab):
    return torch.zeros(n, vocab)


def peaked(n, vocab):
    return torch.randn(n, vocab) + 40.0 * torch.nn.functional.one_hot(torch.arange(n) % vocab, vocab)


def long_tailed(n, vocab):
    return -2.0 * torch.log1p(torch.arange(vocab).float()).expand(n, vocab)


def enormous(n, vocab):
    return 1e4 * (2.0 * torch.randint(0, 2, (n, vocab)) - 1) + torch.randn(n, vocab)


def far_below_zero(n, vocab):
    """Return logits for which a running maximum initialized to 0 would make every exp 0."""
    return torch.randn(n, vocab) - 500


def rising(n, vocab):
    """Return logits with a new maximum in each block of columns, so that running sums are rescaled every time."""
    return torch.linspace(-300, 300, vocab).expand(n, vocab)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", [uniform, peaked, long_tailed, enormous, far_below_zero, rising])
@pytest.mark.parametrize("backend", BACKENDS)
def test_distributions(backend, distribution, dtype):
    logits = distribution(4, 9000).to(DEVICE, dtype)
    check(backend, logits, torch.tensor([0, 1, 4097, 8999], device=DEVICE))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_vocabulary_of_a_real_model(backend, dtype):
    labels = torch.tensor([151_935, IGNORED, 77], device=DEVICE)
    check(backend, randn(3, 151_936, dtype=dtype, scale=4), labels, temperature=0.6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_enormous_logits_through_softcap_and_low_temperature(backend):
    logits = enormous(3, 70).to(DEVICE)
    check(backend, logits, randint(0, 70, 3), softcap=30.0)
    check(backend, logits, randint(0, 70, 3), temperature=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_softcap_where_it_saturates(backend):
    """The derivative of the cap, as small as 6e-8, is accurate, unlike ``1 - tanh^2`` in float32."""
    logits = torch.tensor([[8.0, -8.5, 6.0, -4.0, 7.3, 0.5]], device=DEVICE)
    label = torch.tensor([1], device=DEVICE)

    def gradient(op, x, **settings):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(op(x, label, softcap=1.0, **settings).logprobs.sum(), x)[0]

    exact = gradient(reference.selective_logprobs, logits.double())
    torch.testing.assert_close(
        gradient(selective_logprobs, logits, backend=backend).double(), exact, rtol=2e-5, atol=0.0
    )


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_impossible_tokens(backend, softcap):
    """-inf in some columns, in a complete first block of columns, in all but one, and at the label."""
    logits = randn(4, 9000)
    logits[0, ::3] = MINUS_INF
    logits[1, :5000] = MINUS_INF
    logits[2, :-1] = MINUS_INF
    logits[3, 7] = MINUS_INF
    check(backend, logits, torch.tensor([1, 5001, 8999, 7], device=DEVICE), softcap=softcap)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_row_without_a_possible_token_is_nan(backend):
    logits = randn(3, 50)
    logits[1] = MINUS_INF
    out = selective_logprobs(logits, randint(0, 50, 3), backend=backend)
    for x in out:
        assert x.isnan().tolist() == [False, True, False]


def sliced(b, t, v):
    return randn(b, t + 1, v)[:, :-1]


def time_first(b, t, v):
    return randn(t, b, v).transpose(0, 1)


def vocabulary_first(b, t, v):
    return randn(v, b, t).permute(1, 2, 0)


def every_other_column(b, t, v):
    return randn(b, t, 2 * v)[..., ::2]


def misaligned(b, t, v):
    return randn(b * t * v + 1)[1:].view(b, t, v)


def one_row_expanded(b, t, v):
    return randn(1, 1, v).expand(b, t, v)


LAYOUTS = [sliced, time_first, vocabulary_first, every_other_column, misaligned, one_row_expanded]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_layout(backend, layout):
    check(backend, layout(2, 3, 37), randint(0, 37, 3, 2).t())


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 2, 2), (0,), (2, 0), (0, 4)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_number_of_leading_dimensions(backend, shape):
    check(backend, randn(*shape, 11), randint(0, 11, *shape))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_any_integer_labels(backend, dtype):
    logits, labels = randn(3, 11, grad=True), randint(0, 11, 3)
    got = selective_logprobs(logits, labels.to(dtype), backend=backend)
    got.logprobs.sum().backward()
    assert torch.equal(got.logprobs, selective_logprobs(logits, labels, backend=backend).logprobs)


@pytest.mark.parametrize("tokens", [1, 40_000])
def test_one_and_many_tokens(tokens):
    """Rows are independent, so forty thousand of them would only be slow in the interpreter."""
    backend = "triton" if DEVICE == "cuda" else "torch"
    check(backend, randn(1, tokens, 17, dtype=torch.bfloat16), randint(0, 17, 1, tokens))


@pytest.mark.parametrize("upstream", ["logprobs", "entropy"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_one_output_only(backend, upstream):
    check(backend, randn(3, 41), randint(0, 41, 3), upstream=[upstream], temperature=0.7, softcap=4.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_temperature_per_row(backend):
    temperature = torch.tensor([[0.2, 1.0, 3.0], [1.0, 0.5, 9.0]], device=DEVICE)
    check(backend, randn(2, 3, 29), randint(0, 29, 2, 3), temperature=temperature, softcap=8.0)
    check(backend, randn(3, 2, 29), randint(0, 29, 3, 2), temperature=temperature.t())


@pytest.mark.parametrize("ignore_index", [-100, 5])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_ignored_rows_are_exactly_zero(backend, ignore_index):
    logits = randn(5, 13)
    logits[1], logits[2], logits[3] = float("nan"), float("inf"), MINUS_INF
    labels = torch.tensor([2, ignore_index, ignore_index, ignore_index, 4], device=DEVICE)
    logits.requires_grad_()
    out = selective_logprobs(logits, labels, ignore_index=ignore_index, backend=backend)
    (out.logprobs.sum() + out.entropy.sum()).backward()
    for x in (*out, logits.grad):
        assert torch.equal(x[1:4], torch.zeros_like(x[1:4]))
        assert (x[[0, 4]] != 0).any()
        assert x.isfinite().all()


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_all_rows_ignored(backend):
    logits = randn(3, 13, grad=True)
    out = selective_logprobs(logits, torch.full((3,), IGNORED, device=DEVICE), backend=backend)
    (out.logprobs.sum() + out.entropy.sum()).backward()
    for x in (*out, logits.grad):
        assert torch.equal(x, torch.zeros_like(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_without_upstream_gradient_gets_no_gradient(backend):
    logits, labels, upstream = randn(3, 13, grad=True), randint(0, 13, 3), torch.tensor([0.5, 0.0, -2.0], device=DEVICE)
    (selective_logprobs(logits, labels, backend=backend).logprobs * upstream).sum().backward()
    assert torch.equal(logits.grad[1], torch.zeros_like(logits.grad[1]))
    assert (logits.grad[[0, 2]] != 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_every_run_and_in_any_batch(backend):
    logits, labels = randn(5, 4500, grad=True), randint(0, 4500, 5)

    def run(rows):
        out = selective_logprobs(logits[rows], labels[rows], backend=backend)
        return *out, torch.autograd.grad(out.logprobs.sum() + out.entropy.sum(), logits)[0][rows]

    full_batch = run(slice(None))
    for second, single, first in zip(run(slice(None)), run(slice(2, 3)), full_batch, strict=True):
        assert torch.equal(second, first)
        assert torch.equal(single, first[2:3])


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_are_float32(backend, dtype):
    for x in selective_logprobs(randn(2, 5, dtype=dtype), randint(0, 5, 2), backend=backend):
        assert x.dtype == torch.float32


def test_reference_passes_gradcheck():
    logits, labels = randn(3, 7, dtype=torch.float64, grad=True), torch.tensor([1, IGNORED, 6], device=DEVICE)
    f = lambda x: tuple(reference.selective_logprobs(x, labels, temperature=0.7, softcap=3.0))
    assert torch.autograd.gradcheck(f, logits)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_is_computed_in_float32(backend):
    logits, labels = randn(3, 5, dtype=torch.float64, grad=True), randint(0, 5, 3)
    out = selective_logprobs(logits, labels, backend=backend)
    assert out.logprobs.dtype == torch.float32
    assert torch.equal(out.logprobs, selective_logprobs(logits.float(), labels, backend=backend).logprobs)
    (grad,) = torch.autograd.grad(out.logprobs.sum(), logits)
    assert grad.dtype == torch.float64


@pytest.mark.parametrize("backend", BACKENDS)
def test_registration_passes_opcheck(backend):
    logits, labels, tau = randn(2, 3, 5, grad=True), randint(0, 5, 6), torch.ones(6, device=DEVICE)
    settings = {"softcap": 2.0, "ignore_index": IGNORED, "backend": backend}
    torch.library.opcheck(_selective_logprobs.overload, (logits, labels, tau, None, None), settings)
    _, entropy, row_stats = _selective_logprobs(logits.detach(), labels, tau, None, None, **settings)
    tensors = (randn(6), randn(6), logits.detach(), labels, tau, None, None, entropy, row_stats)
    torch.library.opcheck(_selective_logprobs_backward.overload, tensors, settings)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_graph_breaks(backend):
    def loss(logits, labels):
        out = selective_logprobs(logits[:, :-1], labels, temperature=0.6, backend=backend)
        return (out.logprobs + 0.1 * out.entropy).sum()

    logits, labels = randn(2, 4, 19, grad=True), randint(0, 19, 2, 3)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(logits, labels)
    (got,) = torch.autograd.grad(compiled, logits)
    eager = loss(logits, labels)
    (want,) = torch.autograd.grad(eager, logits)
    assert torch.equal(compiled, eager)
    assert torch.equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fake_tensors(backend):
    with FakeTensorMode():
        logits = torch.empty(2, 5, 31, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
        out = selective_logprobs(logits, torch.empty(2, 5, dtype=torch.int64, device=DEVICE), backend=backend)
        for x in out:
            assert (x.shape, x.dtype) == ((2, 5), torch.float32)
        out.entropy.sum().backward()
        assert (logits.grad.shape, logits.grad.dtype) == (logits.shape, torch.bfloat16)


X, LABELS = torch.zeros(2, 5), torch.tensor([0, 4])


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"logits": [[1.0]]}, TypeError, "logits must be a torch.Tensor, got list"),
        ({"logits": X.long()}, TypeError, "logits must be a floating-point tensor, got torch.int64"),
        ({"logits": torch.zeros(())}, ValueError, r"logits must be .*at least one column, got shape \(\)"),
        ({"logits": torch.zeros(2, 0)}, ValueError, r"logits must be .*at least one column, got shape \(2, 0\)"),
        ({"labels": [0, 4]}, TypeError, "labels must be a torch.Tensor, got list"),
        ({"labels": LABELS.float()}, TypeError, "labels must be an integer tensor, got torch.float32"),
        ({"labels": LABELS.bool()}, TypeError, "labels must be an integer tensor, got torch.bool"),
        ({"labels": torch.zeros(3).long()}, ValueError, r"labels must be of shape \(2,\).*got shape \(3,\)"),
        ({"labels": LABELS.to("meta")}, ValueError, "labels must be on cpu.*got meta"),
        ({"labels": torch.tensor([0, 5])}, ValueError, r"labels must be in \[0, 5\) or ignore_index=-100, got 5"),
        ({"labels": torch.tensor([-1, 0])}, ValueError, r"labels must be in \[0, 5\) or ignore_index=-100, got -1"),
        ({"labels": torch.tensor([-100, 0]), "ignore_index": -1}, ValueError, "ignore_index=-1, got -100"),
        ({"temperature": 0.0}, ValueError, "temperature must be greater than 0.*got 0.0"),
        ({"temperature": -1.0}, ValueError, "temperature must be greater than 0.*got -1.0"),
        ({"temperature": float("nan")}, ValueError, "temperature must be greater than 0.*got nan"),
        ({"temperature": torch.ones(3)}, ValueError, r"temperature must be of shape \(2,\).*got shape \(3,\)"),
        ({"temperature": torch.ones(2).long()}, TypeError, "temperature must be a floating-point.*got torch.int64"),
        ({"temperature": torch.ones(2, device="meta")}, ValueError, "temperature must be on cpu.*got meta"),
        ({"temperature": torch.tensor([1.0, 0.0])}, ValueError, "temperature must be greater than 0, got 0.0"),
        ({"temperature": torch.tensor([1.0, float("nan")])}, ValueError, "temperature must be greater than 0, got nan"),
        ({"softcap": 0.0}, ValueError, "softcap must be greater than 0 and finite, or None for no cap, got 0.0"),
        ({"softcap": -3.0}, ValueError, "softcap must be greater than 0.*got -3.0"),
        ({"backend": "cuda"}, ValueError, "backend must be one of reference, torch, triton.*got 'cuda'"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS_ON_CPU)
def test_errors_name_the_invalid_argument(backend, bad, error, message):
    with pytest.raises(error, match=message):
        selective_logprobs(**{"logits": X, "labels": LABELS, "backend": backend, **bad})


@pytest.mark.gpu
def test_values_are_validated_only_on_request(monkeypatch):
    logits, labels = randn(3, 5), torch.tensor([0, 5, -1], device=DEVICE)
    monkeypatch.delenv("SPPO_KERNELS_CHECK", raising=False)
    assert selective_logprobs(logits, labels).logprobs.isnan().tolist() == [False, True, True]
    monkeypatch.setenv("SPPO_KERNELS_CHECK", "1")
    with pytest.raises(ValueError, match="labels must be in"):
        selective_logprobs(logits, labels)


@pytest.mark.gpu
def test_no_host_sync():
    logits, labels = randn(3, 4, 700, grad=True), randint(0, 700, 3, 3)
    selective_logprobs(logits[:, :-1], labels).logprobs.sum().backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        selective_logprobs(logits[:, :-1], labels).logprobs.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_rows_may_exceed_a_grid_axis():
    check("triton", randn(70_000, 5, dtype=torch.bfloat16), randint(0, 5, 70_000))


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31():
    rows, vocab = 14_200, 151_936
    logits = torch.empty(1, rows, vocab, dtype=torch.bfloat16, device=DEVICE).normal_().requires_grad_()
    labels = randint(0, vocab, 1, rows)
    out = selective_logprobs(logits, labels, backend="triton")
    (grad,) = torch.autograd.grad(out.logprobs.sum(), logits)
    last = logits.detach()[:, -2:].clone().requires_grad_()
    want = selective_logprobs(last, labels[:, -2:], backend="triton")
    (want_grad,) = torch.autograd.grad(want.logprobs.sum(), last)
    assert torch.equal(out.logprobs[:, -2:], want.logprobs)
    assert torch.equal(grad[:, -2:], want_grad)
