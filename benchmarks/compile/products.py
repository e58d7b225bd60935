"""Instructions of kernels that multiply matrices: what a tile costs beside its product.

A program multiplies in a main loop, and finishes the tile of results after it. The blocks of code with instructions for
matrices are the main loop; what else a kernel has is executed about once per tile: the places of operands, and the work
on the results. Its instructions are counted per element of the tile that a thread has. The hot path of machine_code.py,
which is that of the loads, says nothing about such kernels.

Code that only some tiles execute counts as well, such as what is done where a label lies in the tile.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.compile.machine_code import Instruction, basic_blocks_of
from benchmarks.compile.projection_cases import MODES, PLAIN, label_of
from benchmarks.harness import library_seams

if TYPE_CHECKING:
    from benchmarks.compile.launches import Launch

MATRIX = ("UTCHMMA", "HGMMA", "HMMA")  # of Blackwell, of Hopper, and of all before
COPIES = ("UTMALDG", "UTMASTG", "LDGSTS")  # by the TMA unit, from and to memory; by threads, without registers
# What fast products are made of, by target: the instructions for matrices, the copies of tiles into shared memory, and
# that of results to memory; those of tensor descriptors.
FAST = {
    "sm_80": ("HMMA", "LDGSTS", ""),
    "sm_90": ("HGMMA", "UTMALDG", "UTMASTG"),
    "sm_100": ("UTCHMMA", "UTMALDG", "UTMASTG"),
}
TARGET = "sm_90"

# Instructions outside of the main loop per element on TARGET, with its default tile and every supported version of
# Triton. The goal of "sparse" is 16 too. Its bits take more, and its tiles have half the tokens.
BUDGETS = {
    (library_seams.PROJECTION_KERNEL, label_of("bf16", PLAIN, mode)): 24.0 if mode == "sparse" else 16.0
    for mode in MODES
}
_DOT = re.compile(r"\btt\.dot\b|warp_group_dot\b|tc_gen5_mma\b")  # in the representation of a kernel
_LAYOUT = re.compile(r"^#mma\d* = #ttg\.nvidia_mma<\{(.*)\}>$", re.MULTILINE)


@dataclass(frozen=True)
class Product:
    """Machine code of a kernel that multiplies matrices, in instructions per warp.

    Attributes:
        main: instructions of the blocks with instructions for matrices.
        outside: of all other blocks.
        elements: of a tile of results, per thread.
        special: instructions among ``outside`` of the special function unit.
        found: how many instructions of MATRIX and COPIES there are, by name.
        layout: how the threads share the results, "" where these are in a memory of their own. Kernels whose tiles
            have as many columns and this in common add a row in the same order.
    """

    main: int
    outside: int
    elements: float
    special: int
    found: dict[str, int]
    layout: str = ""

    @property
    def per_element(self) -> float:
        """Instructions of a thread outside of the main loop, per element that it has."""
        return self.outside / self.elements


def is_product(representation: str) -> bool:
    """Tell whether a kernel multiplies matrices, given its TTGIR."""
    return _DOT.search(representation) is not None


def product_of(listing: str, representation: str, constants: dict[str, Any], warps: int) -> Product | None:
    """Return the numbers of a kernel, disassembled and as TTGIR; None if it has no instructions for matrices."""
    blocks = basic_blocks_of(listing)
    is_main = [any(instruction.name in MATRIX for instruction in block) for block in blocks]
    if not any(is_main):
        return None
    outside = [instruction for block, main in zip(blocks, is_main, strict=True) if not main for instruction in block]
    names = Counter(instruction.name for block in blocks for instruction in block)
    return Product(
        main=sum(len(block) for block, main in zip(blocks, is_main, strict=True) if main),
        outside=len(outside),
        elements=tile_elements(constants) / (32 * warps),
        special=sum(map(_is_special, outside)),
        found={name: names[name] for name in (*MATRIX, *COPIES) if names[name]},
        layout="; ".join(sorted(set(_LAYOUT.findall(representation)))),
    )


def tile_elements(constants: dict[str, Any]) -> int:
    """Return the elements of a tile of results."""
    return constants["BLOCK_N"] * constants["BLOCK_V"]


def _is_special(instruction: Instruction) -> bool:
    return instruction.kind == "special"


def missing(binary: Any) -> list[str]:
    """List the instructions that fast products of half-precision factors have, and this ``Binary`` has not."""
    launch = binary.launch
    names = FAST.get(launch.target)
    is_half = any("bf16" in str(kind) or "fp16" in str(kind) for kind in launch.signature.values())
    if launch.kernel != library_seams.PROJECTION_KERNEL or names is None or binary.error or not is_half:
        return []
    matrix, load, store = names
    constants = launch.constants
    wanted = [
        matrix,
        load if constants["DESCRIPTORS"] or (launch.target == "sm_80" and _is_aligned(launch)) else "",
        store if constants["OUT_DESCRIPTOR"] else "",
    ]
    found = binary.product.found if binary.product else {}
    return [name for name in wanted if name and name not in found]


def _is_aligned(launch: Launch) -> bool:
    """Return whether the rows of both factors are known to begin at multiples of 16 bytes."""
    aligned = {i for (i,), hints in launch.attributes.items() if hints}
    place = list(launch.signature).index
    return {place(name) for name in ("hidden", "weight", "stride_hidden", "stride_weight")} <= aligned


def failures(binaries: Iterable[Any]) -> Iterator[str]:
    """Yield a message for each binary that lacks instructions of fast products or exceeds its budget."""
    for binary in binaries:
        launch = binary.launch
        where = f"{launch.kernel}, {launch.case}, {launch.target}"
        if lacks := missing(binary):
            yield f"{where}: the code has no {', '.join(lacks)}"
        limit = BUDGETS.get((launch.kernel, launch.case))
        if limit is None or launch.target != TARGET or binary.product is None:
            continue
        if binary.product.per_element > limit:
            per_element = f"{binary.product.per_element:.4g} instructions per element outside of the main loop"
            yield f"{where}: {per_element}, the budget is at most {limit:g}"
