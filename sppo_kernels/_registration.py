"""Operations that are registered with PyTorch's dispatcher: torch.compile treats each as one node of its graph.

``torch.library.custom_op`` is more general, and takes more of the host's time in each call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ._backend import NAMESPACE, OPS

_LIBRARIES: dict[str, torch.library.Library] = vars(OPS).setdefault("_libraries", {})
"""Registrations last as long as these objects. They belong to torch, which outlives this module when it is imported or
reloaded again: a name that is registered again replaces its predecessor."""

Lengths = tuple[int | None, ...]
"""The length of each value that is a list of tensors, None for a single tensor."""


def operation(name: str) -> Callable[[Callable[..., Any]], Operation]:
    """Decorate a function to register it as ``name``, and make it an ``Operation``."""
    return partial(Operation, name)


class Operation:
    """A registered operation, which neither changes nor returns its inputs. Calling it goes through the dispatcher.

    Its function takes tensors, optional tensors and lists of tensors by position, and settings by keyword. It has
    annotations and no defaults. It returns a tensor, or several tensors and lists of tensors.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        """Register ``function`` as ``name`` in the namespace of the package."""
        schema = torch.library.infer_schema(function, mutates_args=())
        _LIBRARIES.pop(name, None)
        _LIBRARIES[name] = library = torch.library.Library(NAMESPACE, "FRAGMENT")
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        self.name, self.function = name, function
        self.fake: Callable[..., Any] | None = None
        self.overload: torch._ops.OpOverload = getattr(OPS, name).default
        library.impl(name, _uncompiled(function), "CompositeExplicitAutograd")
        library.impl(name, _uncompiled(self._with_autograd), "Autograd")
        self._derivative = _derivative(self, None, None)

    def __call__(self, *inputs: Any, **arguments: Any) -> Any:
        return self.overload(*inputs, **arguments)

    def register_fake(self, function: Callable[..., Any]) -> None:
        """Register the function for tensors without values."""
        self.fake = function
        torch.library.register_fake(f"{NAMESPACE}::{self.name}", function, lib=_LIBRARIES[self.name])

    def register_autograd(self, backward: Callable[..., Sequence[Any]], setup_context: Callable[..., None]) -> None:
        """Register the derivative. Without one, backward raises RuntimeError.

        Args:
            backward: called as ``backward(ctx, *grad_outputs)``; returns the gradients of the inputs, a list for a
                list. ``ctx.needs`` tells which are needed, in the same structure.
            setup_context: called as ``setup_context(ctx, inputs, settings, output)`` after forward.
        """
        self._derivative = _derivative(self, backward, setup_context)

    def below_autograd(self, inputs: Iterable[Any], settings: dict[str, Any]) -> Any:
        """Call the operation without following it for gradients."""
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload(*inputs, **settings)

    def _with_autograd(self, *inputs: Any, **settings: Any) -> Any:
        flat = _flatten(inputs)
        if not torch.is_grad_enabled() or not any(x is not None and x.requires_grad for x in flat):
            return self.below_autograd(inputs, settings)
        call = _Call(settings, _lengths(inputs))
        output = self._derivative.apply(call, *flat)
        return output if call.output_lengths is None else tuple(_group(output, call.output_lengths))


class _Call:
    """What belongs to one call besides its tensors."""

    def __init__(self, settings: dict[str, Any], lengths: Lengths) -> None:
        self.settings, self.lengths = settings, lengths
        self.output_lengths: Lengths | None = None  # None for a single tensor


def _derivative(
    operation: Operation, backward: Callable[..., Sequence[Any]] | None, setup_context: Callable[..., None] | None
) -> type[torch.autograd.Function]:
    """Make the autograd function of an operation, which takes and returns the tensors of lists one by one."""

    def forward(ctx, call: _Call, *flat):
        inputs = _group(flat, call.lengths)
        output = operation.below_autograd(inputs, call.settings)
        ctx.lengths = call.lengths
        if setup_context is not None:
            setup_context(ctx, inputs, call.settings, output)
        if isinstance(output, Tensor):
            return output
        call.output_lengths = _lengths(output)
        return tuple(_flatten(output))

    def backward_of_flat(ctx, *grad_outputs):
        if backward is None:
            raise RuntimeError(f"{operation.name} has no derivative")
        ctx.needs = _group(ctx.needs_input_grad[1:], ctx.lengths)
        grads = backward(ctx, *grad_outputs)
        return None, *_flatten([grads] if isinstance(grads, Tensor) else grads)

    # Profiles and error messages show the name of the class.
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward_of_flat)}
    return type(operation.name, (torch.autograd.Function,), methods)


def _uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep torch.compile from compiling the frames of a function where it runs the caller in eager mode."""
    return torch._disable_dynamo(lambda *inputs, **settings: function(*inputs, **settings))


def _lengths(values: Iterable[Any]) -> Lengths:
    return tuple(len(x) if isinstance(x, (list, tuple)) else None for x in values)


def _flatten(values: Iterable[Any]) -> list[Any]:
    return list(chain.from_iterable(x if isinstance(x, (list, tuple)) else (x,) for x in values))


def _group(flat: Iterable[Any], lengths: Lengths) -> list[Any]:
    """Undo ``_flatten``."""
    rest = iter(flat)
    return [next(rest) if n is None else [next(rest) for _ in range(n)] for n in lengths]
