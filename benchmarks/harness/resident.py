"""Peak resident memory of this process, on Linux: the measure where PyTorch does not count allocations."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def measurable() -> bool:
    """Return whether the kernel keeps a peak of resident memory that can be reset."""
    return os.access(_CLEAR, os.W_OK) and "VmHWM:" in _STATUS.read_text()


class ResidentPeak:
    """The most memory that was resident beyond what was there at the start.

    What malloc keeps of freed memory counts as resident until the next start. Garbage in cycles counts as there at the
    start, and makes room when it is collected: collect it before.
    """

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Count from what is resident now."""
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory is then not resident
        self.reset()
        self._before = _resident("VmRSS")

    def reset(self) -> None:
        """Forget the peak so far, and keep counting from the same start."""
        _CLEAR.write_text("5")

    def read(self) -> int:
        """Return the peak since the last reset, in bytes."""
        return _resident("VmHWM") - self._before


def _resident(field: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))
