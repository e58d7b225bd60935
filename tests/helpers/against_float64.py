"""Device, random tensors and the comparison with float64 that the tests of the operations share."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from hypothesis import Phase, settings
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["torch", "triton"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HALVES = [torch.float16, torch.bfloat16]

# Few examples, since each runs kernels in an interpreter where there is no GPU; the same ones every time; and no search
# for the smallest failure, which would take minutes there.
ragged_shapes = settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])

# Rounding to half precision costs half an eps, and the reference pays it too; one eps more is what Triton's interpreter
# needs, which drops the low bits of a float32 when it stores bfloat16 where a GPU rounds to nearest. The reference's
# float32 arithmetic may happen to be exact, so there a few eps are given besides.
FLOOR = {torch.float32: 4.0, torch.float16: 1.0, torch.bfloat16: 1.0}


def randn(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, grad: bool = False) -> Tensor:
    """Draw normal numbers on DEVICE from the CPU's generator, so that every device gets the same."""
    return (scale * torch.randn(shape)).to(device=DEVICE, dtype=dtype).requires_grad_(grad)


def randint(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Draw integers in [low, high) on DEVICE from the CPU's generator."""
    return torch.randint(low, high, shape, dtype=dtype).to(DEVICE)


def assert_close_to_float64(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    backend: str,
    tensors: dict[str, Tensor | None],
    *,
    upstream: Collection[str] | None = None,
    slack: float = 2.0,
    floor: dict[torch.dtype, float] = FLOOR,
    term: float = 0.0,
    **arguments: Any,
) -> None:
    """Check that errors against float64 are at most ``slack`` times those of the eager reference in the same dtype.

    ``floor`` is added in eps of a result's dtype times its largest magnitude.

    Args:
        op, reference: public function and its definition, called with ``tensors`` and ``arguments``.
        backend: the backend of ``op`` under test.
        tensors: arguments that are tensors; those that require a gradient get theirs compared.
        term: size of the terms that the outputs, and gradients of a single number, are sums of, where they may cancel:
            then neither the result nor what the reference happens to make of it says how exact it can be.
        upstream: names of the outputs that a random gradient flows into; None: every differentiable one.
    """
    double = {k: x.double() if x is not None and x.is_floating_point() else x for k, x in tensors.items()}
    weights: dict[str, Tensor] = {}
    exact = _values_and_gradients(reference, double, arguments, upstream, weights)
    eager = _values_and_gradients(reference, tensors, arguments, upstream, weights)
    ours = _values_and_gradients(op, tensors, {**arguments, "backend": backend}, upstream, weights)
    gradients = {f"d {k}" for k in tensors}
    assert ours.keys() == exact.keys()
    for name, want in exact.items():
        got = ours[name]
        assert got.shape == want.shape, name
        magnitude = torch.where(want.isfinite(), want.abs(), 0.0).amax().item() if want.numel() else 0.0
        if name not in gradients or want.numel() == 1:
            magnitude = max(magnitude, term)
        allowed = slack * _largest_error(eager[name], want) + floor[got.dtype] * torch.finfo(got.dtype).eps * magnitude
        error = _largest_error(got, want)
        assert error <= allowed, f"{name}: error {float(error):.3g}, allowed {float(allowed):.3g}"


def outputs_by_name(output: Any) -> dict[str, Tensor]:
    """The tensors of a result: one tensor, a (named) tuple of them, a dict of metrics in it."""
    if isinstance(output, Tensor):
        return {"value": output}
    names = getattr(output, "_fields", range(len(output)))
    flat: dict[str, Tensor] = {}
    for name, x in zip(names, output, strict=True):
        flat.update(x if isinstance(x, dict) else {str(name): x})
    return flat


def _values_and_gradients(op, tensors, arguments, upstream, weights) -> dict[str, Tensor]:
    """Outputs by name, and "d <name>" for each input that requires a gradient."""
    # detach() keeps strides and storage offset: an odd layout is often what is under test.
    given = {k: None if x is None else x.detach().requires_grad_(x.requires_grad) for k, x in tensors.items()}
    outputs = outputs_by_name(op(**given, **arguments))
    leaves = {k: x for k, x in given.items() if x is not None and x.requires_grad}
    results = {name: x.detach() for name, x in outputs.items()}
    if leaves:
        flows = {k: x for k, x in outputs.items() if x.requires_grad and (upstream is None or k in upstream)}
        for name, x in flows.items():
            weights.setdefault(name, randn(*x.shape))
        grads = torch.autograd.grad(
            list(flows.values()), list(leaves.values()), [weights[k].to(x.dtype) for k, x in flows.items()]
        )
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
            assert grad.dtype == leaf.dtype, f"d {name}"
            results[f"d {name}"] = grad
    return results


def _largest_error(got: Tensor, want: Tensor) -> Tensor:
    """NaN where either is NaN, which no bound allows; equal infinities are no error."""
    got = got.double()
    return torch.where(got == want, 0.0, (got - want).abs()).amax() if want.numel() else want.new_zeros(())
