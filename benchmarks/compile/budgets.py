"""What a launch on sm_90 may cost at most, with every supported version of Triton.

A budget is a little above what the code of a kernel costs today, so that a change that makes it slower fails. Lower it
when a kernel becomes faster. Raise it only with the reason in the commit. Instructions are those of a thread per
element on the path of a whole block (see machine_code.py); barriers are those of one pass.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

from benchmarks.compile.binaries import Binary

TARGET = "sm_90"


class Budget(NamedTuple):
    """The most instructions per element, registers and barriers, the least occupancy and width of loads in bytes."""

    instructions: float
    registers: int
    barriers: int
    occupancy: float
    load_width: int


# By kernel and case of cases.py. The logits of linear_logprobs, its modes' names below, are float32. The elements of
# the candidates' kernel are words of two maxima.
BUDGETS = {
    ("selective_logprobs_fwd_kernel", "bf16 V=151936"): Budget(12.0, 40, 0, 0.75, 16),
    ("selective_logprobs_fwd_kernel", "bf16 V=151936 recompute"): Budget(12.0, 40, 0, 0.75, 16),
    ("selective_logprobs_fwd_kernel", "bf16 V=50257"): Budget(13.5, 40, 0, 0.75, 2),
    ("selective_logprobs_fwd_kernel", "bf16 V=151936 cache"): Budget(14.0, 40, 0, 0.75, 16),
    ("selective_logprobs_fwd_kernel", "bf16 V=151936 sparse"): Budget(14.5, 40, 0, 0.75, 16),
    ("selective_logprobs_bwd_kernel", "bf16 V=151936"): Budget(10.0, 32, 0, 1.0, 16),
    ("selective_logprobs_bwd_kernel", "bf16 V=151936 recompute"): Budget(10.0, 32, 0, 1.0, 16),
    ("linear_logprobs_cache_kernel", "bf16 V=151936 cache group"): Budget(5.0, 32, 0, 1.0, 16),
    ("linear_logprobs_candidates_kernel", "bf16 V=151936 sparse"): Budget(8.5, 64, 5, 0.5, 8),
    ("linear_logprobs_entry_logits_kernel", "bf16 H=4096 support"): Budget(6.0, 88, 0, 0.31, 16),
    ("support_fwd_kernel", "bf16 H=4096 support"): Budget(27.0, 120, 0, 0.25, 8),
    ("support_bwd_kernel", "bf16 H=4096 support"): Budget(90.0, 96, 0, 0.31, 8),
    ("policy_loss_sums_kernel", "sequence_mean token-mean"): Budget(16.0, 32, 2, 1.0, 16),
    ("policy_loss_fwd_bwd_kernel", "token token-mean"): Budget(99.0, 80, 23, 0.37, 4),
    ("policy_loss_fwd_bwd_kernel", "sequence_mean token-mean"): Budget(71.0, 56, 14, 0.56, 4),
}


def budget_of(binary: Binary) -> Budget | None:
    """Return the budget of a compiled launch; None without one."""
    launch = binary.launch
    return BUDGETS.get((launch.kernel, launch.case)) if launch.target == TARGET else None


def exceeded(binaries: Iterable[Binary]) -> Iterator[str]:
    """Yield a message for each number of a binary that exceeds its budget."""
    for binary in binaries:
        budget = budget_of(binary)
        if budget is None or binary.hot is None or binary.occupancy is None:
            continue
        numbers = (
            ("instructions per element", binary.instructions_per_element(), budget.instructions, 1),
            ("registers", binary.registers, budget.registers, 1),
            ("barriers per pass", binary.hot.barriers, budget.barriers, 1),
            ("occupancy", binary.occupancy, budget.occupancy, -1),
            ("bytes per load", binary.hot.load_width, budget.load_width, -1),
        )
        for name, measured, limit, sign in numbers:
            if sign * measured > sign * limit:
                bound = "at most" if sign > 0 else "at least"
                where = f"{binary.launch.kernel}, {binary.launch.case}, {TARGET}"
                yield f"{where}: {measured:.4g} {name}, the budget is {bound} {limit:g}"


def without_launch(binaries: Iterable[Binary], limited: Collection[tuple[str, str]] | None = None) -> list[str]:
    """List the kernels and cases of ``limited`` (BUDGETS), which have budgets, of which no binary was compiled."""
    limited = BUDGETS if limited is None else limited
    launched = {(binary.launch.kernel, binary.launch.case) for binary in binaries if binary.launch.target == TARGET}
    return [
        f"{kernel}, {case}: has a budget and no launch" for kernel, case in limited if (kernel, case) not in launched
    ]
