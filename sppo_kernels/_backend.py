"""Backend selection, the namespace of the registered operations, and matrix products outside of autocast."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version

import torch
from torch import Tensor

from ._validation import reject

try:
    import triton

    # Read once, when Triton itself reads it: a kernel is compiled or interpreted from the moment it is decorated.
    INTERPRETED = bool(triton.knobs.runtime.interpret)
except ImportError:  # macOS, Windows: only the torch backend is available
    triton = None
    INTERPRETED = False

HAS_TRITON = triton is not None
BACKENDS = ("reference", "torch", "triton")

# Operations are registered under the package's own name, sppo_kernels. A copy that was imported under another name, as
# the kernels library does, has its own: torch would otherwise replace those of the installed package silently.
NAMESPACE = __name__.rpartition(".")[0].replace(".", "_")
OPS = getattr(torch.ops, NAMESPACE)


def interpreter_fault(triton_version: str, numpy_version: str) -> str:
    """Return why Triton's interpreter would fail and the remedy, or "" where it works.

    The interpreter of Triton 3.6 uses an array of one element as a number, which numpy rejects from 2.4 on.
    """

    def release(text: str) -> tuple[int, ...]:
        return tuple(map(int, re.findall(r"\d+", text)[:2]))

    if release(triton_version) >= (3, 7) or release(numpy_version) < (2, 4):
        return ""
    return (
        f"the interpreter of Triton {triton_version} (TRITON_INTERPRET=1) fails on numpy 2.4 and newer, found numpy "
        f"{numpy_version}: pip install 'numpy<2.4', or use triton 3.7 or newer"
    )


_INTERPRETER_FAULT = interpreter_fault(triton.__version__, version("numpy")) if INTERPRETED else ""


def pick_backend(backend: str | None, tensor: Tensor) -> str:
    """Return the backend to run: the named one, or by default triton on an accelerator and torch elsewhere.

    Raises:
        ValueError: an unknown name, or triton for CPU tensors without its interpreter.
        ImportError: triton is not installed, or its interpreter does not work with the installed numpy.
    """
    accelerated = tensor.device.type in ("cuda", "xpu")
    if backend is None:
        return "triton" if accelerated and HAS_TRITON else "torch"
    if backend not in BACKENDS:
        reject("backend", repr(backend), f"one of {', '.join(BACKENDS)}, or None to choose by device")
    if backend == "triton" and not HAS_TRITON:
        raise ImportError("backend='triton' needs the package triton (pip install triton); use backend='torch'")
    if backend == "triton" and not accelerated and not INTERPRETED:
        raise ValueError(
            f"backend='triton' runs on CUDA, ROCm or XPU tensors, got one on {tensor.device}; use backend='torch', "
            "or set TRITON_INTERPRET=1 before Python starts to run the kernels in Triton's interpreter"
        )
    if backend == "triton" and INTERPRETED and _INTERPRETER_FAULT:
        raise ImportError(_INTERPRETER_FAULT)
    return backend


def autocast_is_on(device: torch.device) -> bool:
    """Return whether autocast is enabled for ``device``; meta tensors, which have no values, do not support it.

    ``torch.amp.is_autocast_available`` would break the graph of torch.compile on torch 2.11.
    """
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Disable autocast, so that matrix products do not round logits to half precision."""
    return torch.autocast(device.type, enabled=False) if autocast_is_on(device) else nullcontext()


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Multiply ``a @ b`` in the dtype of the factors, whether autocast is enabled or not."""
    with without_autocast(a.device):
        return a @ b
