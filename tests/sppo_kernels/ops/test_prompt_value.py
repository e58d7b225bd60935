"""Tests of prompt_value_logits and prompt_value_loss against float64 and PyTorch's cross-entropy."""

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
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from sppo_kernels import prompt_value_logits, prompt_value_loss, reference
from sppo_kernels.ops.prompt_value import op


def inputs(prompts, tokens, width, dtype=torch.float32, bias=True, padded=False):
    shape = (prompts, tokens, width) if padded else (tokens, width)
    return {
        "hidden": randn(*shape, dtype=dtype, grad=True),
        "weight": randn(width, dtype=dtype, scale=width**-0.5, grad=True),
        "bias": randn(1, dtype=dtype, grad=True) if bias else None,
        "last_index": randint(0, tokens, prompts) if tokens else randint(0, 1, 0),
    }


def check_logits(backend, tensors):
    assert_close_to_float64(prompt_value_logits, reference.prompt_value_logits, backend, tensors, term=1.0)


def check_loss(backend, tensors, term=1.0, **arguments):
    """Compare with float64; products in a logit, and values minus outcomes, are of magnitude 1."""
    tensors = {"outcomes": torch.rand(tensors["last_index"].shape).to(DEVICE), **tensors}
    assert_close_to_float64(prompt_value_loss, reference.prompt_value_loss, backend, tensors, term=term, **arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@ragged_shapes
@given(
    prompts=st.sampled_from([0, 1, 2, 3, 17]),
    tokens=st.integers(1, 9),
    width=st.integers(1, 70) | st.just(1025),
    bias=st.booleans(),
    padded=st.booleans(),
    normalizer=st.sampled_from([None, 3.5]),
    upstream=st.sampled_from([None, ["loss"], ["logits"]]),
)
def test_agrees_with_float64(backend, dtype, prompts, tokens, width, bias, padded, normalizer, upstream):
    tensors = inputs(prompts, tokens, width, dtype, bias, padded and prompts > 0)
    check_logits(backend, tensors)
    check_loss(backend, tensors, normalizer=normalizer, upstream=upstream)


@pytest.mark.parametrize("tokens", [1, 40_000])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_and_many_tokens(backend, tokens):
    tensors = inputs(2, tokens, 16)
    tensors["last_index"] = torch.tensor([0, tokens - 1], device=DEVICE)
    check_loss(backend, tensors)


@pytest.mark.parametrize("layout", ["time first", "slice", "columns", "misaligned", "expanded"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_layout(backend, layout):
    hidden = {
        "time first": randn(5, 3, 8).transpose(0, 1),
        "slice": randn(3, 6, 8)[:, :-1],
        "columns": randn(3, 5, 16)[..., ::2],
        "misaligned": randn(121)[1:].view(3, 5, 8),
        "expanded": randn(1, 5, 8).expand(3, 5, 8),
    }[layout]
    tensors = {
        "hidden": hidden.requires_grad_(),
        "weight": randn(1, 16, grad=True)[:, ::2],
        "bias": randn(3, grad=True)[1],
        "last_index": randint(0, 5, 6)[::2],
    }
    check_logits(backend, tensors)
    check_loss(backend, {**tensors, "outcomes": torch.rand(6).to(DEVICE)[::2]})
    check_loss(backend, {**tensors, "hidden": hidden[1].detach().requires_grad_()})


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_equals_pytorchs_cross_entropy(backend):
    """Values, loss, advantages and gradients in the notation of the paper: V = sigmoid(logit), A = R - V."""
    tensors = inputs(6, 20, 12)
    outcomes = torch.tensor([0.0, 1.0, 0.25, 1.0, 0.0, 0.5], device=DEVICE)
    out = prompt_value_loss(**tensors, outcomes=outcomes, backend=backend)
    hidden, weight, bias, index = tensors.values()
    values = torch.sigmoid(hidden.double()[index] @ weight.double() + bias.double())
    loss = torch.nn.functional.binary_cross_entropy(values, outcomes.double())
    leaves = [hidden, weight, bias]
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(out.values.double(), values, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(out.advantages.double(), outcomes - values, rtol=1e-5, atol=1e-7)
    for got, want in zip(torch.autograd.grad(out.loss, leaves), torch.autograd.grad(loss, leaves), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    assert not out.values.requires_grad
    assert not out.advantages.requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_a_shared_row_add_up(backend):
    """Responses to one prompt share a row; here they are more than fit in a block of the kernel."""
    tensors = inputs(300, 4, 5)
    tensors["last_index"] = torch.tensor([2] * 299 + [0], device=DEVICE)
    check_loss(backend, tensors)
    upstream = randn(300)
    prompt_value_logits(**tensors, backend=backend).backward(upstream)
    torch.testing.assert_close(tensors["hidden"].grad[2], upstream[:299].sum() * tensors["weight"].detach())
    assert torch.equal(tensors["hidden"].grad[[1, 3]], torch.zeros(2, 5, device=DEVICE))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_enormous_logits(backend):
    """The loss equals the logit, although it is -log of a probability that is 0 in float32."""
    tensors = inputs(4, 4, 3, bias=False)
    with torch.no_grad():
        tensors["hidden"].copy_(torch.tensor([[1e4], [-1e4], [1e4], [-1e4]]).expand(4, 3))
        tensors["weight"].fill_(1.0)
    tensors["last_index"] = torch.arange(4, device=DEVICE)
    out = prompt_value_loss(**tensors, outcomes=torch.tensor([0.0, 1.0, 1.0, 0.0], device=DEVICE), backend=backend)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(1.5e4)
    assert out.advantages.tolist() == [-1.0, 1.0, 0.0, 0.0]
    assert tensors["hidden"].grad[:, 0].tolist() == [0.25, -0.25, 0.0, 0.0]
    assert tensors["weight"].grad.tolist() == [5e3] * 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_nearly_certain_values(backend):
    """Accuracy of log(1 + exp(-|x|)) on both sides of the switch to a series, down to 1 + exp(-|x|) near 1."""
    tensors = inputs(40, 40, 1, bias=False)
    with torch.no_grad():
        tensors["hidden"].copy_(torch.linspace(-14, 14, 40)[:, None])
        tensors["weight"].fill_(1.0)
    for i in range(0, 40, 3):
        outcome = torch.tensor([float(i > 19)], device=DEVICE)
        check_loss(backend, {**tensors, "last_index": torch.tensor([i], device=DEVICE), "outcomes": outcome}, term=0.0)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_no_prompts_give_zero_loss_and_gradients(backend):
    tensors = inputs(0, 3, 4)
    out = prompt_value_loss(**tensors, outcomes=randn(0), backend=backend)
    (out.loss + out.logits.sum()).backward()
    assert out.loss.item() == 0
    assert [x.shape for x in out] == [(), (0,), (0,), (0,)]
    for name in ("hidden", "weight", "bias"):
        assert torch.equal(tensors[name].grad, torch.zeros_like(tensors[name]))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_micro_batches_add_up(backend):
    tensors, outcomes = inputs(5, 9, 4), torch.rand(5).to(DEVICE)
    leaves = [tensors[name] for name in ("hidden", "weight", "bias")]
    full = prompt_value_loss(**tensors, outcomes=outcomes, backend=backend).loss
    parts = [
        prompt_value_loss(
            **{**tensors, "last_index": tensors["last_index"][s]}, outcomes=outcomes[s], normalizer=n, backend=backend
        ).loss
        for s, n in ((slice(0, 3), 5.0), (slice(3, 5), torch.tensor([5.0], device=DEVICE)))
    ]
    torch.testing.assert_close(sum(parts), full)
    assert sum(parts).shape == ()
    for got, want in zip(torch.autograd.grad(sum(parts), leaves), torch.autograd.grad(full, leaves), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_index_of_any_integer_dtype(backend, dtype):
    tensors = inputs(3, 5, 4)
    want = prompt_value_logits(**tensors, backend=backend)
    got = prompt_value_logits(**{**tensors, "last_index": tensors["last_index"].to(dtype)}, backend=backend)
    assert torch.equal(got, want)
    got.sum().backward()


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_outcomes_may_be_boolean(backend):
    tensors, correct = inputs(3, 5, 4), torch.tensor([True, False, True], device=DEVICE)
    got, want = (prompt_value_loss(**tensors, outcomes=x, backend=backend) for x in (correct, correct.float()))
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_autocast_does_not_round_logits(backend):
    tensors = inputs(6, 9, 32)
    want = prompt_value_logits(**tensors, backend=backend)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = prompt_value_logits(**tensors, backend=backend)
        loss = prompt_value_loss(**tensors, outcomes=torch.ones(6, device=DEVICE), backend=backend)
    assert torch.equal(got, want)
    assert torch.equal(loss.logits, want)
    for x in loss:
        assert x.dtype == torch.float32


@pytest.mark.parametrize("frozen", [("hidden",), ("weight", "bias"), ("hidden", "weight")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_inputs_get_no_gradient(backend, frozen):
    tensors = inputs(3, 5, 4)
    for name in frozen:
        tensors[name].requires_grad_(False)
    check_loss(backend, tensors)
    prompt_value_loss(**tensors, outcomes=torch.ones(3, device=DEVICE), backend=backend).loss.backward()
    for name in ("hidden", "weight", "bias"):
        assert (tensors[name].grad is None) == (name in frozen)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_every_run(backend):
    if backend == "torch" and DEVICE == "cuda":
        pytest.skip("the torch backend adds up shared rows with index_add, which is atomic on CUDA")
    tensors, outcomes = inputs(70, 9, 130), torch.rand(70).to(DEVICE)

    def run():
        out = prompt_value_loss(**tensors, outcomes=outcomes, backend=backend)
        return *out, *torch.autograd.grad(out.loss, [tensors[name] for name in ("hidden", "weight", "bias")])

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_reference_passes_gradcheck():
    tensors, outcomes = inputs(4, 3, 5, torch.float64), torch.rand(4).to(DEVICE)
    index = tensors["last_index"]
    leaves = tuple(tensors[name] for name in ("hidden", "weight", "bias"))
    logits = lambda h, w, b: reference.prompt_value_logits(h, w, index, bias=b)
    loss = lambda h, w, b: reference.prompt_value_loss(h, w, index, outcomes, bias=b)[:2]
    assert torch.autograd.gradcheck(logits, leaves)
    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_checkpointing(backend, use_reentrant):
    hidden, weight, bias, index = inputs(3, 5, 4, padded=True).values()
    outcomes = torch.rand(3).to(DEVICE)
    loss = lambda *leaves: prompt_value_loss(*leaves[:2], index, outcomes, bias=leaves[2], backend=backend).loss
    leaves = hidden, weight, bias
    loss(*leaves).backward()
    want = [x.grad.clone() for x in leaves]
    for x in leaves:
        x.grad = None
    checkpoint(loss, *leaves, use_reentrant=use_reentrant).backward()
    assert all(torch.equal(x.grad, y) for x, y in zip(leaves, want, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_registration_passes_opcheck(backend):
    tensors = inputs(3, 5, 4, torch.bfloat16, padded=True)
    hidden, weight, bias, index = tensors.values()
    settings = {"backend": backend}
    torch.library.opcheck(op.prompt_value_logits.overload, (hidden, weight, bias, index), settings)
    arguments = (index, torch.rand(3).to(DEVICE), torch.tensor(3.0, device=DEVICE))
    torch.library.opcheck(op.prompt_value_loss.overload, (hidden, weight, bias, *arguments), settings)
    for gradient in (op._grad_hidden, op._grad_weight):
        torch.library.opcheck(gradient.overload, (randn(3), hidden.detach(), weight.detach(), index), settings)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_graph_breaks(backend):
    tensors, outcomes = inputs(3, 5, 4), torch.rand(3).to(DEVICE)
    leaves = [tensors[name] for name in ("hidden", "weight", "bias")]

    def run(hidden, weight, bias):
        out = prompt_value_loss(hidden, weight, tensors["last_index"], outcomes, bias=bias, backend=backend)
        return out.loss, out.advantages

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(*leaves)
    eager = run(*leaves)
    for x, y in zip(compiled, eager, strict=True):
        assert torch.equal(x, y)
    for x, y in zip(torch.autograd.grad(compiled[0], leaves), torch.autograd.grad(eager[0], leaves), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fake_tensors(backend):
    with FakeTensorMode():
        hidden = torch.empty(7, 8, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
        weight = torch.empty(1, 8, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
        index = torch.empty(3, dtype=torch.int64, device=DEVICE)
        out = prompt_value_loss(hidden, weight, index, torch.empty(3, device=DEVICE), backend=backend)
        assert [x.shape for x in out] == [(), (3,), (3,), (3,)]
        assert {x.dtype for x in out} == {torch.float32}
        out.loss.backward()
        for x in (hidden, weight):
            assert (x.grad.shape, x.grad.dtype) == (x.shape, torch.bfloat16)


GOOD = {
    "hidden": torch.zeros(4, 3),
    "weight": torch.zeros(3),
    "last_index": torch.tensor([0, 3]),
    "outcomes": torch.tensor([0.0, 1.0]),
}


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"hidden": [0.0]}, TypeError, "hidden must be a torch.Tensor, got list"),
        ({"hidden": torch.zeros(4, 3).int()}, TypeError, "hidden must be a floating-point tensor, got torch.int32"),
        ({"hidden": torch.zeros(3)}, ValueError, r"hidden must be \[N, H\] or \[B, T, H\].*got shape \(3,\)"),
        ({"hidden": torch.zeros(4, 0), "weight": torch.zeros(0)}, ValueError, r"hidden must be .*shape \(4, 0\)"),
        ({"weight": torch.zeros(4)}, ValueError, r"weight must be of shape \(3,\) or \(1, 3\), got shape \(4,\)"),
        ({"weight": torch.zeros(2, 3)}, ValueError, r"weight must be of shape .*got shape \(2, 3\)"),
        ({"weight": torch.zeros(3, device="meta")}, ValueError, "weight must be on cpu.*got meta"),
        ({"last_index": torch.zeros(2)}, TypeError, "last_index must be an integer tensor, got torch.float32"),
        ({"last_index": torch.tensor(1)}, ValueError, r"last_index must be .*got shape \(\)"),
        ({"last_index": torch.tensor([0, 4])}, ValueError, r"last_index must be in \[0, 4\), got 4"),
        ({"last_index": torch.tensor([-1, 0])}, ValueError, r"last_index must be in \[0, 4\), got -1"),
        ({"hidden": torch.zeros(3, 4, 3)}, ValueError, r"last_index must be of shape \[B\].*got shape \(2,\)"),
        ({"bias": torch.zeros(2)}, ValueError, r"bias must be a single element, got shape \(2,\)"),
        ({"bias": 0.0}, TypeError, "bias must be a torch.Tensor, got float"),
        ({"outcomes": [0.0, 1.0]}, TypeError, "outcomes must be a .*, got list"),
        ({"outcomes": torch.zeros(3)}, ValueError, r"outcomes must be of shape \(2,\).*got shape \(3,\)"),
        ({"outcomes": torch.tensor([0.0, 1.5])}, ValueError, r"outcomes must be in \[0, 1\].*got 1.5"),
        ({"outcomes": torch.tensor([-1.0, 1.0])}, ValueError, r"outcomes must be in \[0, 1\].*got -1.0"),
        ({"outcomes": torch.tensor([0.0, float("nan")])}, ValueError, r"outcomes must be in \[0, 1\].*got nan"),
        ({"normalizer": 0.0}, ValueError, "normalizer must be greater than 0.*got 0.0"),
        ({"normalizer": torch.tensor(-1.0)}, ValueError, "normalizer must be greater than 0.*got -1.0"),
        ({"normalizer": torch.ones(2)}, ValueError, r"normalizer must be a single number, got shape \(2,\)"),
        ({"backend": "cuda"}, ValueError, "backend must be one of reference, torch, triton.*got 'cuda'"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS_ON_CPU)
def test_errors_name_the_invalid_argument(backend, bad, error, message):
    with pytest.raises(error, match=message):
        prompt_value_loss(**{**GOOD, "backend": backend, **bad})


@pytest.mark.gpu
def test_values_are_validated_only_on_request(monkeypatch):
    """An index out of range gives NaN and accesses no memory out of bounds, forward or backward."""
    tensors = inputs(2, 5, 4)
    tensors["last_index"] = torch.tensor([1, 1 << 40], device=DEVICE)
    monkeypatch.delenv("SPPO_KERNELS_CHECK", raising=False)
    logits = prompt_value_logits(**tensors)
    logits.sum().backward()
    torch.cuda.synchronize()
    assert logits.isnan().tolist() == [False, True]
    monkeypatch.setenv("SPPO_KERNELS_CHECK", "1")
    with pytest.raises(ValueError, match="last_index must be in"):
        prompt_value_logits(**tensors)


@pytest.mark.gpu
def test_one_launch_and_no_host_sync():
    tensors, outcomes = inputs(64, 900, 256), torch.rand(64).to(DEVICE)
    prompt_value_loss(**tensors, outcomes=outcomes).loss.backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as prof:
            prompt_value_loss(**tensors, outcomes=outcomes)
        prompt_value_loss(**tensors, outcomes=outcomes).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    kernels = [e.name for e in prof.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert sum(name == "prompt_value_fwd_kernel" for name in kernels) == 1, kernels


@pytest.mark.gpu
def test_prompts_may_exceed_a_grid_axis():
    check_loss("triton", inputs(70_000, 90, 8))


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31():
    hidden = torch.zeros(1_100_000, 2048, dtype=torch.bfloat16, device=DEVICE)
    hidden[-1] = 1.0
    weight = torch.ones(2048, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    logits = prompt_value_logits(hidden.requires_grad_(), weight, torch.tensor([1_099_999], device=DEVICE))
    logits.sum().backward()
    assert logits.item() == 2048
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert torch.equal(hidden.grad[-1], torch.ones_like(weight))
