"""A lower bound on the time of a kernel on an H100, from its machine code and the bytes that it moves.

A multiprocessor (SM) executes programs at the slowest of three rates:

    memory    bytes / (copy bandwidth / SMs)
    issue     warp instructions / (4 schedulers x clock)
    special   warp instructions of the special function unit x 8 cycles / (4 x clock): 4 lanes per scheduler

A program alone takes its ``latency``: for each pass over the hot path one load from memory, then its instructions, by
the warps that share a scheduler in turn.

Programs run in waves of as many as all SMs hold. A wave takes as long as one SM takes for its share of the wave, or as
the latency of one program, whichever is longer; a last wave with fewer programs per SM takes less by the former. The
kernel takes all waves, plus the time to launch it. What bounds it is the largest of memory, issue and special, each
over all programs, and of latency, over all waves.

Stalls at barriers, conflicts and dependent instructions are not part of the model, so real kernels take longer. Loads
are assumed to be in flight together within a pass, and not across passes.
"""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.compile.binaries import Binary

SCHEDULERS = 4  # per SM, one warp instruction per cycle each
SPECIAL_CYCLES = 8  # of a scheduler's special function unit, per warp instruction


class GPU(NamedTuple):
    """What the model knows of a GPU, in seconds, bytes and FLOPs."""

    name: str
    target: str
    multiprocessors: int
    clock: float
    bandwidth: float  # of a copy
    product_rate: float  # of bfloat16 products by the vendor's library
    load_latency: float  # under load
    launch: float  # of a kernel, until the first of its programs runs


# Clock: boost at the 700 W limit under load. Bandwidth and product rate are what copies and cuBLAS usually reach.
H100 = GPU(
    name="H100 SXM",
    target="sm_90",
    multiprocessors=132,
    clock=1.755e9,
    bandwidth=2.85e12,
    product_rate=720e12,
    load_latency=0.6e-6,
    launch=3e-6,
)


class Work(NamedTuple):
    """What one launch has to do.

    Attributes:
        programs: in the grid.
        passes: over the hot path, of a program on average.
        bytes: read and written by all programs.
    """

    programs: int
    passes: float
    bytes: float


class Prediction(NamedTuple):
    """Seconds of a launch, and of each bound."""

    seconds: float
    memory: float
    issue: float
    special: float
    latency: float
    waves: float

    @property
    def bound(self) -> str:
        """The largest of the bounds."""
        return max(("memory", "issue", "special", "latency"), key=lambda name: getattr(self, name))


def predict(binary: Binary, work: Work, gpu: GPU = H100) -> Prediction:
    """Predict the time of a launch of a compiled kernel.

    Raises:
        ValueError: the kernel was not compiled for ``gpu``, or does not fit on it.
    """
    if binary.hot is None or not binary.programs_per_sm or binary.launch.target != gpu.target:
        raise ValueError(f"binary must be code that fits on {gpu.target}, got {binary.launch.kernel} for "
                         f"{binary.launch.target} with {binary.programs_per_sm} programs per SM")  # fmt: skip
    hot, warps = binary.hot, binary.launch.options["num_warps"]
    instructions = hot.outside + work.passes * hot.instructions
    special = work.passes * hot.counts.get("special", 0)
    each = {  # seconds of one SM for one program
        "memory": work.bytes / work.programs / (gpu.bandwidth / gpu.multiprocessors),
        "issue": warps * instructions / (SCHEDULERS * gpu.clock),
        "special": warps * special * SPECIAL_CYCLES / (SCHEDULERS * gpu.clock),
    }
    alone = _latency(binary, work.passes, gpu)
    resident = gpu.multiprocessors * binary.programs_per_sm
    full, rest = divmod(work.programs, resident)
    share = max(each.values())
    seconds = full * max(binary.programs_per_sm * share, alone)
    seconds += max(-(-rest // gpu.multiprocessors) * share, alone) if rest else 0.0
    waves = work.programs / resident
    per_sm = work.programs / gpu.multiprocessors
    return Prediction(
        seconds=gpu.launch + seconds,
        **{name: per_sm * value for name, value in each.items()},
        latency=(full + bool(rest)) * alone,
        waves=waves,
    )


def _latency(binary: Binary, passes: float, gpu: GPU) -> float:
    """Return the seconds of a program that runs alone on its SM."""
    assert binary.hot is not None
    turns = -(-binary.launch.options["num_warps"] // SCHEDULERS)
    one_pass = gpu.load_latency + turns * binary.hot.instructions / gpu.clock
    return passes * one_pass + turns * binary.hot.outside / gpu.clock
