"""Argument checks whose errors name the argument, its value and the remedy."""

from __future__ import annotations

import numbers
import os
import sys
from typing import NoReturn

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def reject(argument: str, got: object, want: str, error: type[Exception] = ValueError) -> NoReturn:
    """Raise ``error``: ``argument`` must be ``want``, got ``got``."""
    raise error(f"{argument} must be {want}, got {got}")


def check_tensor(**tensors: Tensor | None) -> None:
    """Check that each given argument is a plain tensor of real numbers."""
    for name, x in tensors.items():
        if x is not None and not isinstance(x, Tensor):
            reject(name, type(x).__name__, "a torch.Tensor", TypeError)
        if x is not None and x.is_complex():
            reject(name, x.dtype, "a tensor of real numbers", TypeError)
        if x is not None and _is_dtensor(x):
            want = (
                "a plain tensor: a parameter is one in the forward of the FSDP2 unit that owns it (accelerate makes "
                "lm_head a unit of its own: prepare a module around the model); for a tensor-parallel weight "
                "pass weight.to_local() with group=mesh.get_group() where the operation takes a group, otherwise "
                "x.full_tensor()"
            )
            reject(name, f"a DTensor of shape {tuple(x.shape)}", want, TypeError)


def _is_dtensor(x: object) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # already imported if a DTensor exists
    return module is not None and isinstance(x, module.DTensor)


def check_floating(**tensors: Tensor | None) -> None:
    """Check that each given tensor is floating-point."""
    check_tensor(**tensors)
    for name, x in tensors.items():
        if x is not None and not x.is_floating_point():
            reject(name, x.dtype, "a floating-point tensor", TypeError)


def check_integer(**tensors: Tensor | None) -> None:
    """Check that each given tensor has an integer dtype."""
    check_tensor(**tensors)
    for name, x in tensors.items():
        if x is not None and (x.is_floating_point() or x.dtype == torch.bool):
            reject(name, x.dtype, "an integer tensor", TypeError)


def check_shape(shape: torch.Size | tuple[int, ...], why: str, **tensors: Tensor | None) -> None:
    """Check that each given tensor has ``shape``; ``why`` describes that shape in the error."""
    for name, x in tensors.items():
        if x is not None and tuple(x.shape) != tuple(shape):
            reject(name, f"shape {tuple(x.shape)}", f"of shape {tuple(shape)} ({why})")


def check_device(device: torch.device, **tensors: Tensor | None) -> None:
    """Check that each given tensor is on ``device``."""
    for name, x in tensors.items():
        if x is not None and x.device != device:
            reject(name, x.device, f"on {device} like the first argument")


def check_choice(argument: str, value: object, choices: tuple[str, ...]) -> None:
    """Check that ``value`` is one of ``choices``."""
    if value not in choices:
        reject(argument, repr(value), "one of " + ", ".join(repr(c) for c in choices))


def check_number(argument: str, value: object) -> None:
    """Check that ``value`` is a real number (numpy's included), not a string, a list or a bool."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        reject(argument, repr(value), "a number", TypeError)


def check_int(argument: str, value: object, least: int) -> None:
    """Check that ``value`` is an int of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        reject(argument, repr(value), "an int", TypeError)
    if not least <= value < 2**63:
        reject(argument, value, f"at least {least}" if value < least else "below 2**63")


def values_are_checked(x: Tensor) -> bool:
    """Return whether to read the values of ``x`` in order to check them.

    Reading costs a device sync, so off a CPU it is done only under SPPO_KERNELS_CHECK=1. Called inside the registered
    operations, where tensors are real and nothing is traced, and by the references, where a fake tensor has no values.
    """
    if isinstance(x, FakeTensor):
        return False
    return x.device.type == "cpu" or os.environ.get("SPPO_KERNELS_CHECK") == "1"


def as_normalizer(normalizer: float | Tensor, device: torch.device) -> Tensor:
    """Return the divisor of a loss as a 0-d tensor on ``device``."""
    if not isinstance(normalizer, Tensor):
        if not normalizer > 0:
            reject("normalizer", normalizer, "greater than 0 (the count of the whole update)")
        return torch.full((), normalizer, dtype=torch.float32, device=device)
    check_tensor(normalizer=normalizer)
    if normalizer.numel() != 1:
        reject("normalizer", f"shape {tuple(normalizer.shape)}", "a single number")
    check_device(device, normalizer=normalizer)
    return normalizer.detach().reshape(())


def check_normalizer_value(normalizer: Tensor) -> None:
    """Check that ``normalizer`` is greater than 0. Reads its value."""
    if values_are_checked(normalizer) and not normalizer > 0:
        reject("normalizer", float(normalizer), "greater than 0 (the count of the whole update)")
