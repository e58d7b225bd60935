"""Programs that a multiprocessor of an NVIDIA GPU holds at once."""

from __future__ import annotations

from typing import NamedTuple

MAX_WARPS = 64  # per multiprocessor
MAX_PROGRAMS = 32
REGISTERS = 65_536
REGISTER_UNIT = 256  # a warp is given a multiple of this many registers
SUBCORES = 4  # each holds a quarter of the warps and of the registers
SHARED_UNIT = 128
SHARED_RESERVED = 1024  # bytes that the system takes of each program

# Bytes per multiprocessor. CUDA C++ Programming Guide, technical specifications per compute capability.
SHARED = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024}


class Occupancy(NamedTuple):
    """Programs per multiprocessor, and their share of the warps that it could hold."""

    programs: int
    share: float


def occupancy(target: str, *, registers: int, warps: int, shared: int) -> Occupancy:
    """Return the occupancy of a kernel on a target of SHARED.

    Args:
        target: such as "sm_90".
        registers: per thread.
        warps: per program.
        shared: bytes per program.
    """
    per_warp = _round_up(32 * max(registers, 1), REGISTER_UNIT)
    by_registers = REGISTERS // SUBCORES // per_warp * SUBCORES // warps
    by_shared = SHARED[target] // _round_up(shared + SHARED_RESERVED, SHARED_UNIT)
    programs = min(by_registers, by_shared, MAX_WARPS // warps, MAX_PROGRAMS)
    return Occupancy(programs, programs * warps / MAX_WARPS)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
