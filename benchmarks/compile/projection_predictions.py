"""Predicted times on an H100 of linear_logprobs with the vendor's product, and with the fused projection.

All times are predictions of a model; none is measured.

    vendor    products at the vendor's rate, then row passes as predictions.py predicts them
    fused     the main loop at the vendor's rate times an assumed efficiency, then the work on the tile, then what else
              is launched

A multiprocessor holds one program, so that nothing overlaps the work on a tile: each of the instructions outside of the
main loop takes an issue slot, elements x instructions / (4 schedulers x 32 lanes) cycles per tile. Where probabilities
are cached, the time to write 2 bytes per logit is added. How efficient Triton's main loop is decides the comparison and
is not known without a GPU: 0.9 is assumed, and 1.0 and 0.8 are shown beside it.

Not counted are the host, waits for it, and the launches of PyTorch's small operations, most of them on one number per
token. Their numbers are listed, the vendor's first. The fused projection has a hundred or more of them: if each took 2
microseconds of the device, they would take a quarter of a millisecond.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

from benchmarks.compile.binaries import Binary
from benchmarks.compile.calls import Call, RecordedLaunch, linear_logprobs_call
from benchmarks.compile.predictions import compiled, work_of
from benchmarks.compile.time_model import GPU, H100, SCHEDULERS, SPECIAL_CYCLES, predict
from benchmarks.harness import library_seams, results
from benchmarks.harness.cases import LM_SHAPES
from benchmarks.harness.problem import ProblemSize
from benchmarks.harness.results import Row

TOKENS = 8192
ASSUMED = 0.9  # rate of the main loop, over that of the vendor's product
EFFICIENCIES = (1.0, ASSUMED, 0.8)
LANES = 32
# What is computed, and how it is called.
PARTS = {
    "forward": {"mode": "recompute", "gradients": False},
    "forward and backward": {"mode": "cache", "gradients": True},
}


class FusedTime(NamedTuple):
    """Seconds of a launch of the projection's kernel, all predicted."""

    main: float  # at the vendor's rate
    finishing: float
    writing: float

    def total(self, efficiency: float, gpu: GPU) -> float:
        """Return the seconds with a main loop of this efficiency."""
        return gpu.launch + self.main / efficiency + self.finishing + self.writing


def fused_time(binary: Binary, recorded: RecordedLaunch, gpu: GPU = H100) -> FusedTime:
    """Predict the time of a launch of the projection's kernel.

    Raises:
        ValueError: the code is not that of ``gpu``, or has no instructions for matrices.
    """
    code, given = binary.product, recorded.arguments
    if code is None or binary.launch.target != gpu.target:
        launch = binary.launch
        raise ValueError(f"binary must be a product for {gpu.target}, got {launch.kernel} for {launch.target}")
    rows, columns = given["BLOCK_N"], given["BLOCK_V"]
    tiles = -(-given["N"] // rows) * -(-given["V"] // columns)
    depth = given["H"] + (given["R"] if given["adapter_hidden"] is not None else 0)
    cycles = max(code.outside, code.special * SPECIAL_CYCLES) / code.elements / (SCHEDULERS * LANES)
    logits = given["N"] * given["V"]
    return FusedTime(
        main=2.0 * logits * depth / gpu.product_rate,
        finishing=-(-tiles // gpu.multiprocessors) * rows * columns * cycles / gpu.clock,
        writing=0.0 if given["out"] is None else logits * _itemsize(given["out"]) / gpu.bandwidth,
    )


def _itemsize(out: Any) -> int:
    return getattr(out, "base", out).itemsize  # of a tensor descriptor, or of a tensor


def predicted_projections(gpu: GPU = H100) -> list[Row]:
    """Predict forward, and forward and backward, for each head."""
    todo = list(product(LM_SHAPES, PARTS))
    sizes = {head: ProblemSize(TOKENS, *LM_SHAPES[head]) for head in LM_SHAPES}
    calls = [
        linear_logprobs_call(sizes[head], projection=projection, **PARTS[part])
        for head, part in todo
        for projection in ("vendor", "fused")
    ]
    binaries = compiled(calls, gpu)
    pairs = list(zip(calls, binaries, strict=True))
    return [
        row(head, part, sizes[head], vendor, fused, gpu)
        for (head, part), vendor, fused in zip(todo, pairs[::2], pairs[1::2], strict=True)
    ]


def row(
    head: str,
    part: str,
    size: ProblemSize,
    vendor: tuple[Call, list[Binary]],
    fused: tuple[Call, list[Binary]],
    gpu: GPU,
) -> Row:
    """Return the times in ms of both projections."""
    vendor_total = _apart_from_projection(*vendor, gpu)
    rest = _apart_from_projection(*fused, gpu)
    launches = [
        (fused_time(binary, recorded, gpu), binary)
        for recorded, binary in zip(fused[0].launches, fused[1], strict=True)
        if _is_projection(recorded)
    ]
    per_element = [binary.product.per_element for _, binary in launches if binary.product]
    return {
        "head": head,
        "part": part,
        **{name: getattr(size, name) for name in ("tokens", "hidden", "vocab")},
        "vendor": 1000 * vendor_total,
        "vendor_products": 1000 * vendor[0].flops / gpu.product_rate,
        **{
            _key(efficiency): 1000 * (rest + sum(time.total(efficiency, gpu) for time, _ in launches))
            for efficiency in EFFICIENCIES
        },
        "fused_finishing": 1000 * sum(time.finishing for time, _ in launches),
        "fused_writing": 1000 * sum(time.writing for time, _ in launches),
        "instructions_per_element": max(per_element),
        "vendor_small_operations": vendor[0].other_operations,
        "fused_small_operations": fused[0].other_operations,
    }


def _key(efficiency: float) -> str:
    return f"fused_at_{efficiency}"


def _is_projection(recorded: RecordedLaunch) -> bool:
    return recorded.kernel.__name__ == library_seams.PROJECTION_KERNEL


def _apart_from_projection(call: Call, binaries: list[Binary], gpu: GPU) -> float:
    """Return the seconds of all but the projection's kernel: the vendor's products, other kernels, other traffic."""
    kernels = sum(
        predict(binary, work_of(recorded, binary), gpu).seconds
        for recorded, binary in zip(call.launches, binaries, strict=True)
        if not _is_projection(recorded)
    )
    return call.flops / gpu.product_rate + call.other_bytes / gpu.bandwidth + kernels


COLUMNS: results.Columns = {
    "head": lambda row: row["head"],
    "H": lambda row: row["hidden"],
    "V": lambda row: row["vocab"],
    "part": lambda row: row["part"],
    "vendor": lambda row: row["vendor"],
    "of it products": lambda row: row["vendor_products"],
    **{
        f"fused, {efficiency:.1f}": lambda row, efficiency=efficiency: row[_key(efficiency)]
        for efficiency in EFFICIENCIES
    },
    "of it on tiles": lambda row: row["fused_finishing"],
    "writing": lambda row: row["fused_writing"],
    "small operations": lambda row: f"{row['vendor_small_operations']}, {row['fused_small_operations']}",
}
BREAK_EVEN_COLUMNS: results.Columns = {
    "fused is predicted to be faster": lambda row: row["part"],
    **{
        f"main loop at {efficiency:.1f}": lambda row, efficiency=efficiency: row[_key(efficiency)]
        for efficiency in EFFICIENCIES
    },
}


def break_even(rows: Sequence[Row]) -> list[Row]:
    """Return for each part and efficiency below which hidden size the fused projection is predicted to be faster.

    Differences are taken to be linear in the hidden size, between the smallest and the largest head of the vocabulary
    that most heads have.
    """
    vocabularies = [row["vocab"] for row in rows]
    common = max(vocabularies, key=vocabularies.count, default=0)
    found = []
    for part in PARTS:
        heads = sorted(
            (row for row in rows if row["part"] == part and row["vocab"] == common), key=lambda row: row["hidden"]
        )
        if len(heads) > 1:
            ends = heads[0], heads[-1]
            found.append({"part": part, **{_key(each): _below(*ends, _key(each)) for each in EFFICIENCIES}})
    return found


def _below(small: Row, large: Row, key: str) -> str:
    """Return where the difference is zero on the line through two heads, in words."""
    gains = [row["vendor"] - row[key] for row in (small, large)]
    slope = (gains[1] - gains[0]) / (large["hidden"] - small["hidden"])
    zero = small["hidden"] - gains[0] / slope if slope else float("inf")
    limit = 4 * large["hidden"]  # beyond, the line says nothing
    if min(gains) > 0 and not large["hidden"] <= zero <= limit:
        return "at every H"
    if max(gains) < 0 and not 0 < zero < small["hidden"]:
        return "at no H"
    return f"{'below' if slope < 0 else 'above'} H = {round(zero, -1):,.0f}"


def tables(rows: Sequence[Row]) -> str:
    """Format the predictions, in a terminal's width, and the hidden sizes of equal times."""
    shown = {name: COLUMNS[name] for name in COLUMNS if name not in ("V", "writing", "small operations")}
    return (
        f"predicted ms on {H100.name} of linear_logprobs, {TOKENS:,} tokens, by assumed efficiency of the main loop\n\n"
        f"{results.table(rows, shown)}\n\n{results.table(break_even(rows), BREAK_EVEN_COLUMNS)}"
    )


def tile_name(row: Row) -> str:
    """Return the tile of a compiled row of the projection's kernel, as in ``sppo_kernels.tuning``."""
    sizes = [row["constants"][name] for name in ("BLOCK_N", "BLOCK_V", "BLOCK_K")]
    return "/".join(map(str, [*sizes, row["num_warps"], row["num_stages"]]))
