"""Devices, backends and the comparison with float64 that the tests of the operations share."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from hypothesis import Phase, settings
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["torch", "triton"]
BACKENDS_ON_CPU = ["reference", "torch", *(["triton"] if DEVICE == "cpu" else [])]  # compiled kernels run on a GPU only
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# Few and fixed examples, because without a GPU each runs kernels in an interpreter. Shrinking a failure would take
# minutes there, so it is off.
ragged_shapes = settings(
    max_examples=min(12 if DEVICE == "cuda" else 6, settings().max_examples),
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
)

# Rounding to half precision costs half an eps, in the reference too. The additional eps is for Triton's interpreter,
# which drops the low bits of a float32 when it stores bfloat16, where a GPU rounds to nearest. The reference's float32
# arithmetic may happen to be exact, so float32 has a floor of a few eps.
FLOOR = {torch.float32: 4.0, torch.float16: 1.0, torch.bfloat16: 1.0}


def randn(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, grad: bool = False) -> Tensor:
    """Normal numbers on DEVICE, drawn on the CPU so that every device gets the same values."""
    return (scale * torch.randn(shape)).to(device=DEVICE, dtype=dtype).requires_grad_(grad)


def randint(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Integers in [low, high) on DEVICE, drawn on the CPU."""
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

    Each bound is raised by ``floor`` times the eps of the result's dtype times its largest magnitude.

    Args:
        op, reference: public function and its reference, called with ``tensors`` and ``arguments``.
        backend: the backend of ``op`` under test.
        tensors: arguments that are tensors; gradients are compared for those that require one.
        term: magnitude of the terms whose sum is an output or the gradient of a single number. If the terms cancel,
            neither the result nor the error of the reference bounds the achievable accuracy.
        upstream: names of the outputs that get a random upstream gradient; None: every differentiable one.
    """
    double = {k: x.double() if x is not None and x.is_floating_point() else x for k, x in tensors.items()}
    weights: dict[str, Tensor] = {}
    exact = _values_and_gradients(reference, double, arguments, upstream, weights)
    eager = _values_and_gradients(reference, tensors, arguments, upstream, weights)
    results = _values_and_gradients(op, tensors, {**arguments, "backend": backend}, upstream, weights)
    gradients = {f"d {k}" for k in tensors}
    assert results.keys() == exact.keys()
    for name, want in exact.items():
        got = results[name]
        assert got.shape == want.shape, name
        magnitude = torch.where(want.isfinite(), want.abs(), 0.0).amax().item() if want.numel() else 0.0
        if name not in gradients or want.numel() == 1:
            magnitude = max(magnitude, term)
        allowed = slack * _largest_error(eager[name], want) + floor[got.dtype] * torch.finfo(got.dtype).eps * magnitude
        error = _largest_error(got, want)
        assert error <= allowed, f"{name}: error {float(error):.3g}, allowed {float(allowed):.3g}"


def outputs_by_name(output: Any) -> dict[str, Tensor]:
    """Return the tensors of a result by name: a tensor, or a (named) tuple that may contain a dict of metrics."""
    if isinstance(output, Tensor):
        return {"value": output}
    names = getattr(output, "_fields", range(len(output)))
    flat: dict[str, Tensor] = {}
    for name, x in zip(names, output, strict=True):
        flat.update(x if isinstance(x, dict) else {str(name): x})
    return flat


def _values_and_gradients(op, tensors, arguments, upstream, weights) -> dict[str, Tensor]:
    """Return outputs by name, and "d <name>" for each input that requires a gradient."""
    # detach() keeps strides and storage offset, because the layout is often under test.
    given = {k: None if x is None else x.detach().requires_grad_(x.requires_grad) for k, x in tensors.items()}
    outputs = outputs_by_name(op(**given, **arguments))
    leaves = {k: x for k, x in given.items() if x is not None and x.requires_grad}
    results = {name: x.detach() for name, x in outputs.items()}
    if leaves:
        differentiated = {k: x for k, x in outputs.items() if x.requires_grad and (upstream is None or k in upstream)}
        for name, x in differentiated.items():
            weights.setdefault(name, randn(*x.shape))
        grads = torch.autograd.grad(
            list(differentiated.values()),
            list(leaves.values()),
            [weights[k].to(x.dtype) for k, x in differentiated.items()],
        )
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
            assert grad.dtype == leaf.dtype, f"d {name}"
            results[f"d {name}"] = grad
    return results


def _largest_error(got: Tensor, want: Tensor) -> Tensor:
    """Return the largest absolute error: NaN, which fails every bound, if there is a NaN; 0 for equal infinities."""
    got = got.double()
    return torch.where(got == want, 0.0, (got - want).abs()).amax() if want.numel() else want.new_zeros(())
