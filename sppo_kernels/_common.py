"""What every operation shares: which backend runs, and errors that name the argument, its value and the remedy."""

from __future__ import annotations

import numbers
import os
import re
import sys
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from typing import NoReturn

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

try:
    import triton

    # Read once, when Triton itself reads it: a kernel is compiled or interpreted from the moment it is decorated.
    INTERPRETED = bool(triton.knobs.runtime.interpret)
except ImportError:  # macOS, Windows: the torch backend serves
    triton = None
    INTERPRETED = False


def interpreter_fault(triton_version: str, numpy_version: str) -> str:
    """Why Triton's interpreter would fail, and the remedy; "" where it works.

    That of Triton 3.6 takes an array of one element for a number, which numpy refuses from 2.4 on.
    """
    release = lambda text: tuple(map(int, re.findall(r"\d+", text)[:2]))
    if release(triton_version) >= (3, 7) or release(numpy_version) < (2, 4):
        return ""
    return (
        f"the interpreter of Triton {triton_version} (TRITON_INTERPRET=1) fails on numpy 2.4 and newer, found numpy "
        f"{numpy_version}: pip install 'numpy<2.4', or take triton 3.7 or newer"
    )


_INTERPRETER_FAULT = interpreter_fault(triton.__version__, version("numpy")) if INTERPRETED else ""

BACKENDS = ("reference", "torch", "triton")

# Operations are registered under the package's own name, sppo_kernels. A copy that was imported under another name, as
# the kernels library does, has its own: torch would let it replace those of the installed package without a word.
NAMESPACE = __name__.rpartition(".")[0]
OPS = getattr(torch.ops, NAMESPACE)


def pick_backend(backend: str | None, tensor: Tensor) -> str:
    """The backend to run: as named, or triton on an accelerator that has it and torch elsewhere.

    Raises:
        ValueError: an unknown name; or triton for CPU tensors without its interpreter.
        ImportError: triton where it is not installed, or its interpreter with a numpy on which it fails.
    """
    accelerated = tensor.device.type in ("cuda", "xpu")
    if backend is None:
        return "triton" if accelerated and triton is not None else "torch"
    if backend not in BACKENDS:
        reject("backend", repr(backend), f"one of {', '.join(BACKENDS)}, or None to choose by device")
    if backend == "triton" and triton is None:
        raise ImportError("backend='triton' needs the package triton (pip install triton); use backend='torch'")
    if backend == "triton" and not accelerated and not INTERPRETED:
        raise ValueError(
            f"backend='triton' runs on CUDA, ROCm or XPU tensors, got one on {tensor.device}; use backend='torch', "
            "or set TRITON_INTERPRET=1 before Python starts to run the kernels in Triton's interpreter"
        )
    if backend == "triton" and INTERPRETED and _INTERPRETER_FAULT:
        raise ImportError(_INTERPRETER_FAULT)
    return backend


def reject(argument: str, got: object, want: str, error: type[Exception] = ValueError) -> NoReturn:
    """Raise the error that every wrong argument ends in."""
    raise error(f"{argument} must be {want}, got {got}")


def check_tensor(**tensors: Tensor | None) -> None:
    """Each given tensor is one, of real numbers."""
    for name, x in tensors.items():
        if x is not None and not isinstance(x, Tensor):
            reject(name, type(x).__name__, "a torch.Tensor", TypeError)
        if x is not None and x.is_complex():
            reject(name, x.dtype, "a tensor of real numbers", TypeError)
        if x is not None and _is_dtensor(x):
            want = (
                "a plain tensor: inside the forward of the FSDP2 unit that owns it a parameter is (accelerate makes "
                "lm_head a unit of its own: prepare a module around the model); of a tensor-parallel weight "
                "pass weight.to_local() with group=mesh.get_group() where the operation takes a group, of any other "
                "x.full_tensor()"
            )
            reject(name, f"a DTensor of shape {tuple(x.shape)}", want, TypeError)


def _is_dtensor(x: object) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # where there is one, it has been imported
    return module is not None and isinstance(x, module.DTensor)


def check_floating(**tensors: Tensor | None) -> None:
    """Each given tensor is a floating-point tensor."""
    check_tensor(**tensors)
    for name, x in tensors.items():
        if x is not None and not x.is_floating_point():
            reject(name, x.dtype, "a floating-point tensor", TypeError)


def check_integer(**tensors: Tensor | None) -> None:
    """Each given tensor is an integer tensor."""
    check_tensor(**tensors)
    for name, x in tensors.items():
        if x is not None and (x.is_floating_point() or x.dtype == torch.bool):
            reject(name, x.dtype, "an integer tensor", TypeError)


def check_shape(shape: torch.Size | tuple[int, ...], why: str, **tensors: Tensor | None) -> None:
    """Each given tensor has ``shape``; ``why`` says what that shape is."""
    for name, x in tensors.items():
        if x is not None and tuple(x.shape) != tuple(shape):
            reject(name, f"shape {tuple(x.shape)}", f"of shape {tuple(shape)} ({why})")


def check_device(device: torch.device, **tensors: Tensor | None) -> None:
    """Each given tensor is on ``device``."""
    for name, x in tensors.items():
        if x is not None and x.device != device:
            reject(name, x.device, f"on {device} like the first argument")


def check_choice(argument: str, value: object, choices: tuple[str, ...]) -> None:
    """``value`` is one of ``choices``."""
    if value not in choices:
        reject(argument, repr(value), "one of " + ", ".join(repr(c) for c in choices))


def check_number(argument: str, value: object) -> None:
    """``value`` is a number, numpy's too, not a string, a list or True."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        reject(argument, repr(value), "a number", TypeError)


def check_whole_number(argument: str, value: object, least: int) -> None:
    """``value`` is an int, at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        reject(argument, repr(value), "an int", TypeError)
    if not least <= value < 2**63:
        reject(argument, value, f"at least {least}" if value < least else "below 2**63")


def values_are_checked(x: Tensor) -> bool:
    """Whether to look at the values of ``x``: that costs a device sync, so off a CPU only under SPPO_KERNELS_CHECK=1.

    Called inside the registered operations, where tensors are real and nothing is being traced, and by the references,
    where a fake tensor has no values to look at.
    """
    if isinstance(x, FakeTensor):
        return False
    return x.device.type == "cpu" or os.environ.get("SPPO_KERNELS_CHECK") == "1"


def as_normalizer(normalizer: float | Tensor, device: torch.device) -> Tensor:
    """What a sum is divided by, as a 0-d tensor on ``device``."""
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
    """``normalizer`` is greater than 0. Reads its value."""
    if values_are_checked(normalizer) and not normalizer > 0:
        reject("normalizer", float(normalizer), "greater than 0 (the count of the whole update)")


def autocast_is_on(device: torch.device) -> bool:
    """Whether autocast is in force there; some devices (meta) know none."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Matrix products in the dtype of their factors: autocast must not round logits to half precision."""
    return torch.autocast(device.type, enabled=False) if autocast_is_on(device) else nullcontext()


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` whether autocast is on or not."""
    with without_autocast(a.device):
        return a @ b
