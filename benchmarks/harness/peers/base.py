"""What all peers share: how they are built, why one cannot be, and the form of their outputs."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from benchmarks.harness.problem import Implementation, Outputs

PeerFactory = Callable[[torch.device], Implementation]


class Unavailable(Exception):
    """Raised by a peer or its factory where it cannot run; the message is the reason."""


def explain(error: Exception) -> str:
    """Return in one line why something was not measured."""
    if isinstance(error, Unavailable):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def needs_gpu(device: torch.device) -> None:
    """Raise ``Unavailable`` on a CPU."""
    if device.type == "cpu":
        raise Unavailable("needs a GPU")


def needs_package(distribution: str, module: str) -> None:
    """Raise ``Unavailable`` without a package whose module has another name than what pip installs."""
    if find_spec(module) is None:
        raise Unavailable(f"{distribution} is not installed")


def cuda_capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of an NVIDIA GPU, and (0, 0) for any other device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0, 0
    return torch.cuda.get_device_capability(device)


def on_any_device(implementation: Implementation) -> PeerFactory:
    """Return a factory of an implementation that is the same on every device."""
    return lambda device: implementation


def outputs_of_nll(nll: Tensor, reduction: str) -> Outputs:
    """Name a mean negative log-likelihood, or turn those of single tokens into log-probabilities."""
    return {"loss": nll} if reduction == "mean" else {"logprobs": -nll}


def scatter(values: Tensor, keep: Tensor) -> Tensor:
    """Return the values of the tokens that ``keep`` selects, and zeros for the others."""
    return values.new_zeros(keep.shape).masked_scatter(keep, values)
