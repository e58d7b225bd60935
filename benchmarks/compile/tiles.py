"""Elements of one pass over a kernel's path, from the loads in Triton's intermediate representation.

A kernel's elements are what its largest loads cover: ``tt.load`` of ``tensor<2048x!tt.ptr<bf16>>`` reads 2,048 elements
of one input. The region that loads most elements in one pass is the kernel's path: the body of a loop, or the code
outside of loops. Loads of one line of source, which ``tl.static_range`` repeats, cover different elements of one input.
Those of other lines read other inputs. Where some loads of a region have no mask, those with one are of the last block.

Triton's representation (TTGIR) precedes LLVM and ptxas, which may unroll the loop. A loop of the machine code that
loads u times the bytes of the representation's is unrolled u times, and covers u times the elements.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import NamedTuple

from benchmarks.compile.machine_code import HotPath

_ACCESS = re.compile(
    r"tt\.(load|store) ([^:{]*?)\s*(?:\w+ = \w+\s*)*(?:\{[^}]*\}\s*)?: (?:tensor<([\dx]+)x)?!tt\.ptr<\w*?(\d+)>"
)
_LINE = re.compile(r"loc\((#\w+)\)\s*$")


class Access(NamedTuple):
    """A load or store of a block of elements."""

    is_load: bool
    is_masked: bool
    elements: int
    itemsize: int
    line: str  # of the source


class Tile(NamedTuple):
    """What one pass over the path of a kernel loads, or stores if the kernel only stores."""

    in_loop: bool
    accesses: tuple[Access, ...] = ()
    scalars: tuple[Access, ...] = ()  # all threads access the same element

    @property
    def whole(self) -> tuple[Access, ...]:
        """The loads of a whole block, or the stores if there are none: those without a mask, unless all have one."""
        loads = [access for access in self.accesses if access.is_load] or self.accesses
        return tuple(access for access in loads if not access.is_masked) or tuple(loads)

    @property
    def elements(self) -> int:
        """Elements of the input of which the most are read."""
        by_line: Counter[str] = Counter()
        for access in self.whole:
            by_line[access.line] += access.elements
        return max(by_line.values(), default=0)

    def widths(self, path: HotPath, kind: str) -> list[int]:
        """Return the bytes per thread of each access of blocks on ``path``: those without a predicate, if there are.

        Args:
            path: of the machine code.
            kind: "load" or "store".
        """
        plain = Counter(path.widths(kind, guarded=False))
        plain -= Counter(access.itemsize for access in self.scalars if access.is_load == (kind == "load"))
        return list(plain.elements()) or path.widths(kind, guarded=True)

    def unrolled(self, path: HotPath, threads: int) -> int:
        """Return how often the compiler unrolled the loop of ``path``, in a program of so many threads.

        A compiler that replaced the branch between whole and masked blocks by predicates left both in the path.
        """
        if not path.is_loop or not self.accesses:
            return 1
        kind = "load" if self.whole[0].is_load else "store"
        moved = self.widths(path, kind)
        is_plain = moved != path.widths(kind, guarded=True)
        expected = self.whole if is_plain else [each for each in self.accesses if each.is_load == (kind == "load")]
        return max(1, sum(moved) // sum(max(1, each.elements // threads) * each.itemsize for each in expected))


def tile_of(representation: str) -> Tile:
    """Return the tile of a kernel, given its TTGIR; without elements if it accesses no blocks."""
    blocks: dict[int, list[Access]] = {}
    scalars: dict[int, list[Access]] = {}
    stack, loops = [0], 0
    for text in representation.splitlines():
        code = text.partition(" loc(")[0].strip()
        if "tt.atomic" in code:  # what follows is the work of the last program
            break
        if code.startswith("}"):
            stack = stack[:-1] or [0]
        if found := _ACCESS.search(text):
            kind, operands, shape, bits = found.groups()
            elements = math.prod(map(int, shape.split("x"))) if shape else 1
            is_masked = operands.count(",") > (kind == "store")  # after the pointer, and the value to store
            line = _LINE.search(text)
            access = Access(kind == "load", is_masked, elements, max(1, int(bits) // 8), line[1] if line else "")
            (blocks if shape else scalars).setdefault(stack[-1], []).append(access)
        if code.endswith("{"):
            loops += 1
            stack.append(loops if re.search(r"scf\.(for|while)|\} do \{", code) else stack[-1])
    tiles = [Tile(i != 0, tuple(found), tuple(scalars.get(i, ()))) for i, found in blocks.items()]
    # A loop reads blocks that the code after it reads only a part of, under a mask, beside a few other numbers.
    return max(tiles, key=lambda tile: (tile.elements, tile.in_loop, _loaded_bytes(tile)), default=Tile(False))


def _loaded_bytes(tile: Tile) -> int:
    return sum(access.elements * access.itemsize * access.is_load for access in tile.whole)
