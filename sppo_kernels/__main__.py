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
    backend = pick_backend("triton" if INTERPRETED else None, torch.empty(0, device=device))
    triton_version = triton.__version__ if triton else "not installed"
    print(f"sppo_kernels {__version__}, Python {platform.python_version()}")
    print(f"torch {torch.__version__}, triton {triton_version}{', interpreted' if INTERPRETED else ''}")
    print(f"device {_name(device)}, backend {backend}")
    print("\nvalues and gradients, largest error against the float64 reference:")
    start, wrong = time.perf_counter(), []
    try:
        for name, error in errors(device, backend):
            good = error < TOLERANCE
            wrong += [] if good else [name]
            print(f"  {name:<20} {error:.0e}{'' if good else '  WRONG'}", flush=True)
    except Exception as error:
        print(f"  {type(error).__name__}: {error}")
        wrong.append("an operation that raised an error")
    seconds = time.perf_counter() - start
    print(f"\n{'failed: ' + ', '.join(wrong) if wrong else 'all correct'} ({seconds:.0f} s)")
    return 1 if wrong else 0


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


if __name__ == "__main__":
    sys.exit(main())
