"""Tests of linear_logprobs under autograd, autocast, checkpointing, torch.compile and fake tensors."""

import pytest
import torch
from against_float64 import (
    BACKENDS,
    DEVICE,
    randn,
)
from linear_logprobs_cases import IGNORED, MODES, check, each_mode, inputs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from sppo_kernels import linear_logprobs, reference
from sppo_kernels.ops.linear_logprobs import op
from sppo_kernels.ops.linear_logprobs.output import ForwardOutput

pytestmark = pytest.mark.filterwarnings("ignore:linear_logprobs cached")  # all tests differentiate both outputs


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_rounds_inputs_and_not_logits(backend, dtype):
    """Results equal those of inputs cast by the caller; gradients have the dtype of the original inputs."""
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


@each_mode
def test_backward_under_autocast(backend, backward):
    given = inputs(6, 16, 29)
    settings = {"backend": backend, "backward": backward}
    want = torch.autograd.grad(linear_logprobs(**given, **settings).logprobs.sum(), given["weight"])
    loss = linear_logprobs(**given, **settings).logprobs.sum()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = torch.autograd.grad(loss, given["weight"])
    assert torch.equal(got[0], want[0])


@each_mode
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


@each_mode
def test_outputs_used_twice_and_backward_twice(backend, backward):
    """Backward does not consume cached logit gradients: gradients of two losses on one output add up."""
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


def test_reference_passes_gradcheck():
    given = inputs(3, 4, 7, torch.float64, bias=True, ignored=1, rank=2)
    names = ("hidden", "weight", "bias", "u", "b")
    f = lambda h, w, bias, *adapter: tuple(
        reference.linear_logprobs(h, w, given["labels"], bias=bias, adapter=adapter, temperature=0.7, softcap=2.0)
    )
    assert torch.autograd.gradcheck(f, tuple(given[name] for name in names))


@pytest.mark.slow
@each_mode
@pytest.mark.parametrize("projection", ["vendor", "fused"])
def test_registration_passes_opcheck(backend, backward, projection):
    hidden, weight, labels, bias, u, b = inputs(4, 6, 11, bias=True, rank=2).values()
    tau = torch.ones(4, device=DEVICE)
    common = {"ignore_index": IGNORED, "backward": backward, "auto_key": "", "chunk_bytes": 1000, "group": ""}
    common |= {"backend": backend, "projection": projection}
    settings = {**common, "logits_budget_bytes": None, "mass_tolerance": 1e-4, "max_entries": 8}
    pairs = [hidden, u], [weight, b]
    # The opcheck tests of autograd and of dynamic shapes do not support a data-dependent output size.
    tests = ["test_schema", "test_faketensor"] + ["test_autograd_registration", "test_aot_dispatch_dynamic"] * (
        backward == "recompute"
    )
    torch.library.opcheck(
        op.linear_logprobs.overload,
        (*pairs, bias, labels, tau, None, None),
        {"softcap": 2.0, **settings},
        test_utils=tests,
    )
    pairs = tuple([x.detach() for x in pair] for pair in pairs)
    output = ForwardOutput(*op.linear_logprobs(*pairs, None, labels, tau, None, None, softcap=0.0, **settings))
    for needs in (
        [True, True, True, True, False],
        [True, False, False, True, False],
        [False, True, True, False, False],
    ):
        saved = output.entropy, output.row_stats, *output[5:]
        tensors = randn(4), randn(4), *pairs, None, labels, tau, None, None, *saved
        # Detached inputs, because the backward op has no derivative to check.
        torch.library.opcheck(
            op.linear_logprobs_backward.overload,
            tensors,
            {"needs": needs, "softcap": 0.0, **common},
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("backward", [*MODES, "auto"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_graph_breaks(backend, backward, compiler):
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


@pytest.mark.slow
@pytest.mark.parametrize("backward", [*MODES, "auto"])
def test_compiles_with_sizes_that_depend_on_values(backward):
    """Without fullgraph=True, torch.compile does not support them: it has to break the graph."""
    torch.compiler.reset()
    given = inputs(6, 8, 29, ignored=2)

    def loss(hidden, weight):
        return linear_logprobs(hidden, weight, given["labels"], backward=backward).logprobs.sum()

    compiled = torch.compile(loss)
    for _ in range(2):
        got, want = (f(given["hidden"], given["weight"]) for f in (compiled, loss))
        torch.testing.assert_close(got, want)
        leaves = given["hidden"], given["weight"]
        torch.testing.assert_close(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves))


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


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_meta_tensors(needs_gradient):
    hidden, weight = (torch.empty(n, 8, device="meta", requires_grad=needs_gradient) for n in (3, 5))
    out = linear_logprobs(hidden, weight, torch.empty(3, dtype=torch.int64, device="meta"))
    assert out.logprobs.shape == (3,)
    assert out.logprobs.device.type == "meta"


@pytest.mark.gpu
def test_tokens_may_exceed_a_grid_axis():
    check("triton", **inputs(70_000, 16, 9, torch.bfloat16))
