"""Registered operations: dispatch, derivatives with lists of tensors, and torch.compile."""

import contextlib

import pytest
import torch
from torch import Tensor

from sppo_kernels._backend import NAMESPACE
from sppo_kernels._registration import operation


@pytest.fixture
def scaled():
    """An operation with a list among its inputs and its outputs: y_i = factor x_i b, and the sum of all y."""

    @operation("test_scaled")
    def scaled(xs: list[Tensor], a: Tensor | None, b: Tensor, *, factor: float) -> tuple[list[Tensor], Tensor]:
        ys = [factor * x * b for x in xs]
        return ys, torch.stack([y.sum() for y in ys]).sum()

    @scaled.register_fake
    def _(xs, a, b, *, factor):
        return [torch.empty_like(x) for x in xs], b.new_empty(())

    def setup_context(ctx, inputs, settings, output):
        xs, a, b = inputs
        assert a is None
        assert len(output[0]) == len(xs)
        ctx.factor, ctx.n = settings["factor"], len(xs)
        ctx.save_for_backward(*xs, b)

    def backward(ctx, *grads):
        *xs, b = ctx.saved_tensors
        ctx.factor_of = [grad + grads[-1] for grad in grads[:-1]]
        assert len(grads) == ctx.n + 1
        needs_xs, needs_a, needs_b = ctx.needs
        assert not needs_a
        grad_xs = [ctx.factor * b * g if needed else None for g, needed in zip(ctx.factor_of, needs_xs, strict=True)]
        grad_b = sum((ctx.factor * x * g).sum() for x, g in zip(xs, ctx.factor_of, strict=True)) if needs_b else None
        return grad_xs, None, grad_b

    scaled.register_autograd(backward, setup_context)
    return scaled


def formula(xs, b):
    ys = [3.0 * x * b for x in xs]
    return ys, torch.stack([y.sum() for y in ys]).sum()


@pytest.mark.parametrize("frozen", [None, 0, 1, 2])
def test_lists_of_tensors_have_gradients(scaled, frozen):
    xs, b = [torch.randn(2, requires_grad=True), torch.randn(3, requires_grad=True)], torch.tensor(2.0).requires_grad_()
    leaves = [x for i, x in enumerate((*xs, b)) if i != frozen]
    if frozen is not None:
        (*xs, b)[frozen].requires_grad_(False)
    ys, total = scaled(xs, None, b, factor=3.0)
    expected_ys, expected_total = formula(xs, b)
    assert all(torch.equal(y, z) for y, z in zip(ys, expected_ys, strict=True))
    assert torch.equal(total, expected_total)
    got = torch.autograd.grad(2 * total + ys[0].square().sum(), leaves)
    expected = torch.autograd.grad(2 * expected_total + expected_ys[0].square().sum(), leaves)
    torch.testing.assert_close(got, expected)


def test_a_graph_names_the_operation(scaled):
    _, total = scaled([torch.ones(2, requires_grad=True)], None, torch.tensor(2.0), factor=3.0)
    assert type(total.grad_fn).__name__ == "test_scaledBackward"


def test_without_gradients_there_is_no_graph(scaled):
    xs, b = [torch.ones(2, requires_grad=True)], torch.tensor(2.0)
    with torch.no_grad():
        ys, total = scaled(xs, None, b, factor=3.0)
    assert not ys[0].requires_grad
    assert not total.requires_grad
    ys, _ = scaled([xs[0].detach()], None, b, factor=3.0)
    assert not ys[0].requires_grad


def test_compiles_whole_and_passes_opcheck(scaled):
    xs, b = [torch.randn(2, requires_grad=True), torch.randn(3, requires_grad=True)], torch.tensor(2.0).requires_grad_()
    torch.library.opcheck(scaled.overload, (xs, None, b), {"factor": 3.0})

    def loss(x, y, b):
        ys, total = scaled([x, y], None, b, factor=3.0)
        return ys[0].square().sum() + total

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*xs, b), (*xs, b))
    torch.testing.assert_close(got, torch.autograd.grad(loss(*xs, b), (*xs, b)))


def test_an_operation_without_derivative_says_so():
    @operation("test_opaque")
    def opaque(x: Tensor) -> Tensor:
        return x.clone()

    y = opaque(torch.ones(2, requires_grad=True))
    with pytest.raises(RuntimeError, match="test_opaque has no derivative"):
        y.sum().backward()


def test_the_body_is_not_compiled_where_the_caller_is_not():
    """A graph break in a block makes torch.compile run the whole caller in Python, and compile what that calls."""
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    @operation("test_body")
    def body(x: Tensor) -> Tensor:
        return x + 1

    @torch.compile(backend=backend)
    def caller(x):
        with contextlib.suppress(ValueError):
            torch._dynamo.graph_break()
            return body.overload(x)

    assert torch.equal(caller(torch.zeros(2)), torch.ones(2))
    assert not graphs


def test_a_name_can_be_registered_again():
    def register(step):
        @operation("test_again")
        def again(x: Tensor) -> Tensor:
            return x + step

        return again

    for step in (1.0, 2.0):
        register(step)
        assert getattr(torch.ops, NAMESPACE).test_again(torch.zeros(())) == step
