"""Tests of linear_logprobs against float64, on all backends and modes."""

import pytest
import torch
from against_float64 import (
    BACKENDS,
    DEVICE,
    DTYPES,
    ragged_shapes,
    randint,
    randn,
)
from hypothesis import given
from hypothesis import strategies as st
from linear_logprobs_cases import (
    IGNORED,
    MODES,
    SMALL_CHUNKS,
    check,
    each_mode,
    inputs,
    multiply_adds,
    row_bytes,
    with_adapter,
)

from sppo_kernels import linear_logprobs, reference
from sppo_kernels.ops.linear_logprobs import lm_head
from sppo_kernels.ops.linear_logprobs.matmul import Projection

pytestmark = pytest.mark.filterwarnings("ignore:linear_logprobs cached")  # all tests differentiate both outputs


@pytest.mark.parametrize("dtype", DTYPES)
@each_mode
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
@pytest.mark.parametrize("budget", [0, 7, None])
@pytest.mark.parametrize("backend", BACKENDS)
def test_many_chunks(small_blocks, backend, budget, dtype):
    """Two blocks, the second one shorter, with logit gradients cached for no, some or all tokens."""
    given = inputs(22, 9, 21, dtype, bias=True, ignored=3)
    budget = None if budget is None else budget * row_bytes(21, dtype.itemsize)
    settings = {"backward": "cache", "logits_budget_bytes": budget}
    check(backend, **given, temperature=0.6, softcap=4.0, **settings)
    check(backend, **{**given, "bias": None}, temperature=0.6, upstream=["logprobs"], **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("upstream", [None, ["logprobs"]], ids=["entropies", "logprobs"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_recomputes_in_blocks_of_columns(monkeypatch, backend, upstream, dtype):
    """Five blocks of the vocabulary, the last one narrower, for all six tokens at once."""
    monkeypatch.setattr(lm_head, "_LEAST_COLUMNS", 64)
    widths, logits = [], Projection.logits

    def recorded(self, hiddens, workspace=None, columns=slice(None)):
        result = logits(self, hiddens, workspace, columns)
        widths.append(result.shape[-1])
        return result

    monkeypatch.setattr(Projection, "logits", recorded)
    given = inputs(7, 9, 300, dtype, bias=True, ignored=1, rank=3)
    settings = {
        "temperature": 0.6,
        "softcap": 4.0,
        "upstream": upstream,
        "chunk_bytes": 4 * 6 * (4 + dtype.itemsize) * 64,
    }
    check(backend, **given, **settings, backward="recompute")
    assert widths == [300, 64, 64, 64, 64, 44]


@pytest.mark.parametrize("backward", MODES)
def test_weight_gradient_is_rounded_once(backward):
    """Rounding to bfloat16 after each of 64 chunks would have several times the error of rounding the sum."""
    given = inputs(64 * 64, 8, 16, torch.bfloat16)
    double = given["weight"].detach().double().requires_grad_()
    out = linear_logprobs(**given, backward=backward, **SMALL_CHUNKS, backend="torch")
    (got,) = torch.autograd.grad(out.logprobs.sum(), given["weight"])
    exact = reference.linear_logprobs(given["hidden"].double(), double, given["labels"])
    (want,) = torch.autograd.grad(exact.logprobs.sum(), double)
    rounding_error = (want.bfloat16().double() - want).square().mean()
    assert (got.double() - want).square().mean() <= 1.5**2 * rounding_error


@pytest.mark.parametrize("backward", ["recompute", "cache", "sparse"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_a_nearly_certain_label_in_bfloat16(backend, backward):
    """1 - p = 0.001 is exact to a percent; p rounded to bfloat16 before the subtraction would be off by all of it."""
    hidden = torch.ones(3, 8, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(32, 8, device=DEVICE, dtype=torch.bfloat16)
    weight[5] = 1.29  # p = 0.9991
    labels = torch.full((3,), 5, device=DEVICE)
    out = linear_logprobs(hidden, weight, labels, backward=backward, backend=backend)
    (got,) = torch.autograd.grad(out.logprobs.sum(), hidden)
    double = hidden.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(reference.linear_logprobs(double, weight.double(), labels).logprobs.sum(), double)
    assert 5e-4 < want[0, 0] < 2e-3
    torch.testing.assert_close(got.double(), want, rtol=0.01, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_vocabulary_of_a_real_model(backend):
    check(backend, **inputs(3, 8, 151_936, torch.bfloat16, ignored=1), temperature=0.6)


@pytest.mark.parametrize("tokens", [1, 40_000])
def test_one_and_many_tokens(tokens):
    """Rows are independent, so forty thousand of them would only be slow in the interpreter."""
    backend = "triton" if DEVICE == "cuda" else "torch"
    check(backend, **inputs(tokens, 5, 13, torch.bfloat16))


@pytest.mark.parametrize("backward", ["recompute", "cache", "sparse"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_softcap_where_it_saturates(backend, backward):
    """With the identity as weight, the gradient of hidden is the logit gradient."""
    hidden = torch.tensor([[8.0, -8.5, 6.0, -4.0, 7.3, 0.5]], device=DEVICE)
    weight, label = torch.eye(6, device=DEVICE), torch.tensor([1], device=DEVICE)

    def gradient(op, dtype, **settings):
        x = hidden.to(dtype).requires_grad_()
        return torch.autograd.grad(op(x, weight.to(dtype), label, softcap=1.0, **settings).logprobs.sum(), x)[0]

    got = gradient(linear_logprobs, torch.float32, backend=backend, backward=backward)
    exact = gradient(reference.linear_logprobs, torch.float64)
    torch.testing.assert_close(got.double(), exact, rtol=2e-5, atol=0.0)


@pytest.mark.parametrize("temperature", [0.05, 0.3, 1.0])
@each_mode
def test_softcap_with_a_nearly_impossible_label(backend, backward, temperature):
    """The probability of the label is 0 in float32; its log-probability and gradients are not."""
    hidden = torch.tensor([[40.0, -10.0, 3.0]], device=DEVICE, requires_grad=True)
    weight = torch.eye(3, device=DEVICE, requires_grad=True)
    label = torch.tensor([1], device=DEVICE)
    check(backend, hidden, weight, label, softcap=30.0, temperature=temperature, backward=backward)


@each_mode
def test_peaked_and_enormous_logits(backend, backward):
    given = inputs(5, 16, 40, bias=True)
    with torch.no_grad():
        given["hidden"][0] = 100 * given["weight"][given["labels"][0]]  # almost certain of its label
        given["hidden"][1] = 300 * given["weight"][given["labels"][0]]  # almost certain of another token
        given["hidden"][2] *= 1e4
        given["hidden"][3] = 0
    check(backend, **given, backward=backward)
    check(backend, **given, softcap=30.0, backward=backward)


@each_mode
def test_tokens_excluded_by_the_bias(backend, backward):
    given = inputs(4, 7, 30, bias=True)
    with torch.no_grad():
        given["bias"][::2] = float("-inf")
    given["labels"] = 2 * randint(0, 15, 4) + 1
    check(backend, **given, backward=backward)


@each_mode
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


@each_mode
def test_strided_labels_and_temperatures(backend, backward):
    labels, temperature = randint(0, 17, 12)[::2], torch.tensor([0.5, 9.0] * 6, device=DEVICE)[::2]
    hidden, weight = randn(6, 5, grad=True), randn(17, 5, grad=True)
    check(backend, hidden, weight, labels, temperature=temperature, upstream=["logprobs"], backward=backward)


@pytest.mark.parametrize("shape", [(), (3,), (2, 2, 2), (0,), (2, 0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_number_of_leading_dimensions(backend, shape):
    check(backend, randn(*shape, 5, grad=True), randn(11, 5, grad=True), randint(0, 11, *shape))


@pytest.mark.parametrize("softcap", [None, 3.0])
@each_mode
def test_temperature_per_token(backend, backward, softcap):
    temperature = torch.tensor([0.2, 1.0, 3.0, 0.7], device=DEVICE)
    check(backend, **inputs(4, 6, 29, ignored=1), temperature=temperature, softcap=softcap, backward=backward)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("upstream", ["logprobs", "entropy"])
@each_mode
def test_gradient_of_one_output_only(backend, backward, upstream, dtype):
    check(backend, **inputs(4, 6, 29, dtype), upstream=[upstream], temperature=0.7, backward=backward)


@pytest.mark.parametrize(
    "frozen",
    [("hidden",), ("weight",), ("bias",), ("weight", "bias"), ("hidden", "weight"), ("weight", "bias", "u"), ("b",)],
)
@each_mode
def test_frozen_inputs_get_no_gradient(backend, backward, frozen):
    given = inputs(4, 6, 29, bias=True, rank=2)
    for name in frozen:
        given[name].requires_grad_(False)
    check(backend, **given, backward=backward)
    out = with_adapter(linear_logprobs)(**given, backend=backend, backward=backward)
    out.logprobs.sum().backward()
    for name in ("hidden", "weight", "bias", "u", "b"):
        assert (given[name].grad is None) == (name in frozen)


@pytest.mark.parametrize("budget", [3, 6, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_token_gets_its_own_gradient(backend, dtype, budget):
    """Some tokens have no loss, no upstream gradient, an entropy gradient, or are over the budget."""
    given = inputs(12, 16, 29, dtype, bias=True)
    given["labels"][[0, 5]] = IGNORED
    logprob_coef = torch.linspace(-1, 2, 12, device=DEVICE)
    logprob_coef[[2, 3, 7, 11]] = 0.0
    entropy_coef = torch.zeros(12, device=DEVICE)
    entropy_coef[[3, 6, 9]] = 0.5
    settings = {"backward": "cache", "logits_budget_bytes": None if budget is None else budget * 29 * dtype.itemsize}

    def gradients(op, given, **settings):
        out = op(**given, temperature=0.7, **settings)
        loss = (out.logprobs * logprob_coef + out.entropy * entropy_coef).sum()
        return torch.autograd.grad(loss, [given[name] for name in ("hidden", "weight", "bias")])

    double = {k: x.detach().double().requires_grad_() if x.is_floating_point() else x for k, x in given.items()}
    exact = gradients(reference.linear_logprobs, double)
    for x, y in zip(gradients(linear_logprobs, given, backend=backend, **settings), exact, strict=True):
        assert (x - y).norm() <= 4 * torch.finfo(dtype).eps * y.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@each_mode
def test_bias_gradient_of_a_mean(backend, backward, dtype):
    """All tokens have the same coefficient, so rounding it would give them all the same relative error."""
    given = inputs(96, 8, 40, dtype, bias=True)
    given["bias"] = given["bias"].detach().float().requires_grad_()
    upstream = 1.498 / 96  # almost halfway between two numbers of bfloat16, and of float16
    out = linear_logprobs(**given, backend=backend, backward=backward)
    (got,) = torch.autograd.grad(out.logprobs.sum() * upstream, given["bias"])
    double = {k: x.detach().double() if x.is_floating_point() else x for k, x in given.items()}
    exact = reference.linear_logprobs(**{**double, "bias": double["bias"].requires_grad_()})
    (want,) = torch.autograd.grad(exact.logprobs.sum() * upstream, double["bias"])
    assert (got - want).norm() <= 0.25 * torch.finfo(dtype).eps * want.norm()


@each_mode
def test_all_upstream_gradients_zero(backend, backward):
    given = inputs(5, 6, 29, bias=True)
    (0.0 * linear_logprobs(**given, backend=backend, backward=backward).logprobs).sum().backward()
    for name in ("hidden", "weight", "bias"):
        assert torch.equal(given[name].grad, torch.zeros_like(given[name]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@each_mode
def test_upstream_gradients_below_the_range_of_the_inputs(backend, backward, dtype):
    """In a mean over many tokens scaled terms underflow in float16, but their sum over the tokens does not."""
    given = inputs(128, 8, 16, dtype)
    double = given["weight"].detach().double().requires_grad_()
    tiny = 2.0**-24
    out = linear_logprobs(**given, backend=backend, backward=backward)
    (got,) = torch.autograd.grad(out.logprobs.sum() * tiny, given["weight"])
    exact = reference.linear_logprobs(given["hidden"].double(), double, given["labels"])
    (want,) = torch.autograd.grad(exact.logprobs.sum() * tiny, double)
    rounded = want.to(dtype).double()
    assert (got.double() - want).norm() <= 0.005 * want.norm() + (rounded - want).norm()


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_budget_changes_only_rounding(small_blocks, backend, softcap):
    """Cached and recomputed logit gradients give the same float32 gradients to a few eps."""
    given = inputs(20, 6, 29)
    leaves = [given["hidden"], given["weight"]]
    grads = []
    for tokens in (0, 1, 7, 20):
        settings = {
            "backward": "cache",
            "logits_budget_bytes": tokens * row_bytes(29),
            "softcap": softcap,
        }
        out = linear_logprobs(**given, **settings, backend=backend)
        grads.append(torch.autograd.grad(out.logprobs.sum(), leaves))
    for other in grads[1:]:
        for x, y in zip(other, grads[0], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_ignored_tokens_are_exactly_zero(backend):
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


@each_mode
def test_same_bits_every_run(small_blocks, backend, backward):
    given = inputs(22, 9, 43, bias=True)

    def run():
        out = linear_logprobs(**given, backend=backend, backward=backward)
        leaves = [given[name] for name in ("hidden", "weight", "bias")]
        return *out, *torch.autograd.grad(out.logprobs.sum() + out.entropy.sum(), leaves)

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_for_any_padding(backend, dtype):
    """Only tokens with a loss enter the matrix product, so the positions of the others cannot change any bit.

    A single token has other last bits than in a batch, because BLAS computes a product of one row differently.
    """
    given = inputs(70, 9, 43, dtype, bias=True)
    packed = linear_logprobs(**given, **SMALL_CHUNKS, backend=backend)
    position = torch.arange(70, device=DEVICE) * 2 + 30
    padded = {
        **given,
        "hidden": randn(200, 9, dtype=dtype).index_copy(0, position, given["hidden"]).view(2, 100, 9),
        "labels": torch.full((200,), IGNORED, device=DEVICE).index_copy(0, position, given["labels"]).view(2, 100),
    }
    with torch.no_grad():
        got = linear_logprobs(**padded, **SMALL_CHUNKS, backend=backend)
    for x, y in zip(got, packed, strict=True):
        assert torch.equal(x.flatten()[position], y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_and_order_change_only_last_bits(dtype):
    """Differences stay within the documented bound for logits of typical magnitude."""
    given = inputs(300, 64, 1000, dtype)
    full = linear_logprobs(**given, **SMALL_CHUNKS, backend="torch")
    order = torch.randperm(300)
    for rows in (order, order[:37], order[5:6], torch.arange(100, 300)):
        part = linear_logprobs(given["hidden"][rows], given["weight"], given["labels"][rows], backend="torch")
        for x, y in zip(part, full, strict=True):
            assert (x - y[rows]).abs().max() <= 1e-5


@each_mode
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


@each_mode
def test_tied_embeddings(backend, backward):
    """Hidden states depend on the weight too, which gets both of its gradients."""
    ids = randint(0, 29, 7)
    weight = randn(29, 6, grad=True)

    def grad(op, weight, **settings):
        hidden = torch.nn.functional.embedding(ids, weight).tanh()
        return torch.autograd.grad(op(hidden, weight, ids.roll(-1), **settings).logprobs.sum(), weight)[0]

    got = grad(linear_logprobs, weight, backend=backend, backward=backward)
    want = grad(reference.linear_logprobs, weight.detach().double().requires_grad_())
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@each_mode
def test_lora_on_the_lm_head_equals_the_merged_weight(backend, backward):
    """With the weight frozen, values and the gradients of A, B and hidden equal those of the merged weight."""
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
