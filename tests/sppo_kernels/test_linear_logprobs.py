"""linear_logprobs against float64; how much it projects and how much it holds."""

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

from sppo_kernels import linear_logprobs, reference
from sppo_kernels.ops import linear_logprobs as module

IGNORED = -100
# On a GPU the row's gradient is rounded to half precision before the two matrix products, which costs each of its
# elements half an eps more than the reference loses.
PRODUCTS_FLOOR = FLOOR if DEVICE == "cpu" else {**FLOOR, torch.float16: 4.0, torch.bfloat16: 4.0}


def check(backend, hidden, weight, labels, *, bias=None, temperature=1.0, **kwargs):
    tensors = {"hidden": hidden, "weight": weight, "labels": labels, "bias": bias}
    (tensors if isinstance(temperature, torch.Tensor) else kwargs)["temperature"] = temperature
    assert_close_to_float64(
        linear_logprobs, reference.linear_logprobs, backend, tensors, floor=PRODUCTS_FLOOR, **kwargs
    )


def inputs(n, width, vocab, dtype=torch.float32, bias=False, ignored=0):
    labels = randint(0, vocab, n)
    labels[:ignored] = IGNORED
    return {
        "hidden": randn(n, width, dtype=dtype, grad=True),
        "weight": randn(vocab, width, dtype=dtype, scale=width**-0.5, grad=True),
        "labels": labels,
        "bias": randn(vocab, dtype=dtype, grad=True) if bias else None,
    }


@pytest.fixture
def small_chunks(monkeypatch):
    """64 tokens at a time, the least there is."""
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS_CPU", 1)
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS_ACCELERATOR", 1)


def multiply_adds(run):
    """How many multiply-adds ``run`` spends in matrix products."""
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as prof:
        run()
    return sum(event.flops for event in prof.key_averages() if event.key == "aten::mm") // 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@ragged_shapes
@given(
    n=st.integers(0, 6),
    width=st.integers(1, 33),
    vocab=st.integers(1, 300),
    bias=st.booleans(),
    temperature=st.sampled_from([0.6, 1.0]),
    softcap=st.sampled_from([None, 1.5]),
    ignored=st.integers(0, 6),
)
def test_agrees_with_float64(backend, dtype, n, width, vocab, bias, temperature, softcap, ignored):
    check(backend, **inputs(n, width, vocab, dtype, bias, ignored), temperature=temperature, softcap=softcap)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_many_chunks(backend, dtype, small_chunks):
    """The weight's gradient is added up over three chunks, the last of them short, in float32."""
    check(backend, **inputs(140, 9, 21, dtype, bias=True, ignored=3), temperature=0.6, softcap=4.0)


def test_gradient_of_the_weight_is_rounded_once(small_chunks):
    """Rounding to bfloat16 after each of 64 chunks would lose several times as much as rounding the sum."""
    given = inputs(64 * 64, 8, 16, torch.bfloat16)
    double = given["weight"].detach().double().requires_grad_()
    (got,) = torch.autograd.grad(linear_logprobs(**given, backend="torch").logprobs.sum(), given["weight"])
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_peaked_and_enormous_logits(backend):
    given = inputs(5, 16, 40, bias=True)
    with torch.no_grad():
        given["hidden"][0] = 100 * given["weight"][given["labels"][0]]  # nearly sure of its label
        given["hidden"][1] = 300 * given["weight"][given["labels"][0]]  # nearly sure of another
        given["hidden"][2] *= 1e4
        given["hidden"][3] = 0
    check(backend, **given)
    check(backend, **given, softcap=30.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_vocabulary_entries_that_a_bias_forbids(backend):
    given = inputs(4, 7, 30, bias=True)
    with torch.no_grad():
        given["bias"][::2] = float("-inf")
    given["labels"] = 2 * randint(0, 15, 4) + 1
    check(backend, **given)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_layout(backend):
    labels = randint(0, 17, 3, 2).t()
    for hidden in (
        randn(2, 4, 6)[:, :-1],
        randn(3, 2, 6).transpose(0, 1),
        randn(6, 2, 3).permute(1, 2, 0),
        randn(2, 3, 12)[..., ::2],
        randn(37)[1:].view(2, 3, 6),
    ):
        for weight in (randn(6, 17).t(), randn(17, 12)[:, ::2], randn(103)[1:].view(17, 6)):
            check(backend, hidden.requires_grad_(), weight.requires_grad_(), labels, bias=randn(34, grad=True)[::2])


@pytest.mark.parametrize("shape", [(), (3,), (2, 2, 2), (0,), (2, 0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_number_of_leading_dimensions(backend, shape):
    check(backend, randn(*shape, 5, grad=True), randn(11, 5, grad=True), randint(0, 11, *shape))


@pytest.mark.parametrize("backend", BACKENDS)
def test_temperature_a_token(backend):
    temperature = torch.tensor([0.2, 1.0, 3.0, 0.7], device=DEVICE)
    check(backend, **inputs(4, 6, 29, ignored=1), temperature=temperature, softcap=3.0)


@pytest.mark.parametrize("upstream", ["logprobs", "entropy"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_one_output_only(backend, upstream):
    check(backend, **inputs(4, 6, 29, bias=True), upstream=[upstream], temperature=0.7)


@pytest.mark.parametrize("frozen", [("hidden",), ("weight",), ("bias",), ("weight", "bias"), ("hidden", "weight")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_inputs_get_no_gradient(backend, frozen):
    given = inputs(4, 6, 29, bias=True)
    for name in frozen:
        given[name].requires_grad_(False)
    check(backend, **given)
    out = linear_logprobs(**given, backend=backend)
    out.logprobs.sum().backward()
    for name in ("hidden", "weight", "bias"):
        assert (given[name].grad is None) == (name in frozen)


@pytest.mark.parametrize(("frozen", "passes"), [((), 3), (("hidden",), 2), (("weight",), 2)])
def test_passes_over_the_vocabulary(frozen, passes):
    """One forward; backward one to make the logits again, and one for each input that wants a gradient."""
    given = inputs(10, 6, 29, ignored=4)
    for name in frozen:
        given[name].requires_grad_(False)
    one_pass = 6 * 6 * 29  # six tokens bear loss
    out = []
    assert multiply_adds(lambda: out.append(linear_logprobs(**given, backend="torch"))) == one_pass
    assert multiply_adds(lambda: out[0].logprobs.sum().backward()) == passes * one_pass


def test_tokens_without_upstream_gradient_cost_nothing():
    given = inputs(10, 6, 29)
    upstream = torch.zeros(10, device=DEVICE)
    upstream[[2, 7]] = torch.tensor([1.0, -0.5], device=DEVICE)
    out = linear_logprobs(**given, backend="torch")
    assert multiply_adds(lambda: out.logprobs.backward(upstream)) == 3 * 2 * 6 * 29
    assert given["hidden"].grad.abs().sum(-1).nonzero().flatten().tolist() == [2, 7]


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_upstream_gradients_zero(backend):
    given = inputs(5, 6, 29, bias=True)
    (0.0 * linear_logprobs(**given, backend=backend).logprobs).sum().backward()
    for name in ("hidden", "weight", "bias"):
        assert torch.equal(given[name].grad, torch.zeros_like(given[name]))


def test_never_holds_all_logits(small_chunks):
    """The largest single allocation, forward and backward, is that of a chunk."""
    n, vocab = 640, 64
    given = inputs(n, 4, vocab, bias=True)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (DEVICE == "cuda")
    with profile(activities=activities, profile_memory=True) as prof:
        out = linear_logprobs(**given, backend="torch")
        (out.logprobs.sum() + out.entropy.sum()).backward()
    largest = max(event.nbytes() for event in prof.profiler.kineto_results.events() if event.name() == "[memory]")
    assert 4 * 64 * vocab <= largest < 4 * n * vocab / 4


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
    given = inputs(5, 6, 29, bias=True, ignored=5)
    out = linear_logprobs(**given, backend=backend)
    (out.logprobs.sum() + out.entropy.sum()).backward()
    for x in (*out, *(given[name].grad for name in ("hidden", "weight", "bias"))):
        assert torch.equal(x, torch.zeros_like(x))
    assert multiply_adds(lambda: linear_logprobs(**given, backend="torch")) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_every_run(backend, small_chunks):
    given = inputs(70, 9, 43, bias=True)

    def run():
        out = linear_logprobs(**given, backend=backend)
        leaves = [given[name] for name in ("hidden", "weight", "bias")]
        return *out, *torch.autograd.grad(out.logprobs.sum() + out.entropy.sum(), leaves)

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_however_the_tokens_are_padded(backend, dtype, small_chunks):
    """Only tokens with loss reach the matrix product, so where the others lie cannot change a bit.

    A token alone has other last bits than in a batch: a matrix product of one row takes another path in the BLAS.
    """
    given = inputs(70, 9, 43, dtype, bias=True)
    packed = linear_logprobs(**given, backend=backend)
    where = torch.arange(70, device=DEVICE) * 2 + 30
    padded = {
        **given,
        "hidden": randn(200, 9, dtype=dtype).index_copy(0, where, given["hidden"]).view(2, 100, 9),
        "labels": torch.full((200,), IGNORED, device=DEVICE).index_copy(0, where, given["labels"]).view(2, 100),
    }
    with torch.no_grad():
        again = linear_logprobs(**padded, backend=backend)
    for x, y in zip(again, packed, strict=True):
        assert torch.equal(x.flatten()[where], y)


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


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_under_autocast(backend):
    given = inputs(6, 16, 29)
    want = torch.autograd.grad(linear_logprobs(**given, backend=backend).logprobs.sum(), given["weight"])
    loss = linear_logprobs(**given, backend=backend).logprobs.sum()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = torch.autograd.grad(loss, given["weight"])
    assert torch.equal(got[0], want[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_checkpointing(backend):
    given = inputs(6, 8, 29)

    def loss(hidden, weight):
        out = linear_logprobs(hidden.tanh(), weight, given["labels"], backend=backend)
        return (out.logprobs + out.entropy).sum()

    leaves = [given["hidden"], given["weight"]]
    want = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.autograd.grad(checkpoint(loss, *leaves, use_reentrant=False), leaves)
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)


def test_reference_is_its_own_derivative():
    given = inputs(3, 4, 7, torch.float64, bias=True, ignored=1)
    f = lambda h, w, b: tuple(reference.linear_logprobs(h, w, given["labels"], bias=b, temperature=0.7, softcap=2.0))
    assert torch.autograd.gradcheck(f, (given["hidden"], given["weight"], given["bias"]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_registration(backend):
    given = inputs(4, 6, 11, bias=True)
    hidden, weight, labels, bias = given.values()
    tau = torch.ones(4, device=DEVICE)
    torch.library.opcheck(module._linear_logprobs, (hidden, weight, bias, labels, tau, 2.0, IGNORED, backend))
    hidden, weight, bias = (x.detach() for x in (hidden, weight, bias))
    _, entropy, stats = module._linear_logprobs(hidden, weight, None, labels, tau, 0.0, IGNORED, backend)
    for needs in ((True, True, False), (True, False, False), (False, True, False)):
        grads = (randn(4), randn(4), hidden, weight, None, labels, tau, entropy, stats)
        # Inputs that are no leaves: the backward itself has no derivative to check.
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(
            module._linear_logprobs_backward, (*grads, *needs, 0.0, IGNORED, backend), test_utils=tests
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole(backend):
    given = inputs(6, 8, 29, bias=True, ignored=2)
    leaves = [given[name] for name in ("hidden", "weight", "bias")]

    def loss(hidden, weight, bias):
        out = linear_logprobs(hidden, weight, given["labels"], bias=bias, temperature=0.6, backend=backend)
        return (out.logprobs + 0.1 * out.entropy).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    eager = loss(*leaves)
    assert torch.equal(compiled, eager)
    for x, y in zip(torch.autograd.grad(compiled, leaves), torch.autograd.grad(eager, leaves), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fake_tensors(backend):
    with FakeTensorMode():
        hidden = torch.empty(2, 5, 8, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
        weight = torch.empty(31, 8, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
        labels = torch.empty(2, 5, dtype=torch.int64, device=DEVICE)
        out = linear_logprobs(hidden, weight, labels, backend=backend)
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
        ({"logits_budget_bytes": -1}, ValueError, "logits_budget_bytes must be at least 0, or None, got -1"),
        ({"mass_tolerance": 0.0}, ValueError, r"mass_tolerance must be in \(0, 1\), got 0.0"),
        ({"mass_tolerance": 1.0}, ValueError, r"mass_tolerance must be in \(0, 1\), got 1.0"),
        ({"group": "ranks"}, ValueError, "group must be None.*got ranks"),
        ({"backend": "cuda"}, ValueError, "backend must be one of reference, torch, triton.*got 'cuda'"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_wrong_input_is_named(backend, bad, error, says):
    if backend == "triton" and DEVICE == "cuda":
        pytest.skip("the tensors of this table are on the CPU")
    with pytest.raises(error, match=says):
        linear_logprobs(**{"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS, "backend": backend, **bad})


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


def test_meta_tensors():
    hidden, weight = torch.empty(3, 8, device="meta"), torch.empty(5, 8, device="meta")
    out = linear_logprobs(hidden, weight, torch.empty(3, dtype=torch.int64, device="meta"))
    assert out.logprobs.shape == (3,)
    assert out.logprobs.device.type == "meta"
