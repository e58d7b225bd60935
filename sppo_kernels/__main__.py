"""``python -m sppo_kernels``: versions, device and backend, and a self-test of each operation in seconds."""

from __future__ import annotations

import platform
import sys
import time

import torch

from . import __version__
from ._backend import INTERPRETED, pick_backend, triton
from ._self_test import TOLERANCE, errors


def main() -> int:
    """Print the report.

    Returns:
        The exit code: 1 if an operation fails or is off by more than the tolerance, else 0.
    """
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    triton_version = triton.__version__ if triton else "not installed"
    print(f"sppo_kernels {__version__}, Python {platform.python_version()}")
    print(f"torch {torch.__version__}, triton {triton_version}{', interpreted' if INTERPRETED else ''}")
    try:
        backend = pick_backend("triton" if INTERPRETED else None, torch.empty(0, device=device))
    except ImportError as error:
        print(f"device {_name(device)}\n\nfailed: {error}")
        return 1
    print(f"device {_name(device)}, backend {backend}")
    print("\nvalues and gradients, largest error against the float64 reference:")
    start, wrong = time.perf_counter(), []
    for name, result in errors(device, backend):
        if isinstance(result, Exception):
            text = f"{type(result).__name__}: {result}"
        else:
            text = f"{result:.0e}{'' if result < TOLERANCE else '  WRONG'}"
        if isinstance(result, Exception) or not result < TOLERANCE:
            wrong.append(name)
        print(f"  {name:<20} {text}", flush=True)
    seconds = time.perf_counter() - start
    print(f"\n{'failed: ' + ', '.join(wrong) if wrong else 'all correct'} ({seconds:.0f} s)")
    return 1 if wrong else 0


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


if __name__ == "__main__":
    sys.exit(main())
