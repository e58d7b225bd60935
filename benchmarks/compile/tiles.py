"""Elements of one pass over a kernel's path, from the loads in Triton's intermediate representation.

A kernel's elements are what its largest loads cover: ``tt.load`` of ``tensor<2048x!tt.ptr<bf16>>`` reads 2,048 elements
of one input. The region that loads most bytes in one pass is the kernel's path: the body of a loop, or the code outside
of loops. Loads of one line of source, which ``tl.static_range`` repeats, cover different elements of one input; those
of other lines read other inputs. Where some loads of a region have no mask, those with one are of the last block.

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
    r"tt\.(load|store) ([^:{]*?)\s*(?:\w+ = \w+\s*)*(?:\{[^}]*\}\s*)?: tensor<([\dx]+)x!tt\.ptr<\w*?(\d+)>"
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
    accesses: tuple[Access, ...]

    @property
    def whole(self) -> tuple[Access, ...]:
        """The accesses of a whole block: those without a mask, unless all have one."""
        return tuple(access for access in self.accesses if not access.is_masked) or self.accesses

    @property
    def elements(self) -> int:
        """Elements of the input of which the most are read."""
        by_line: Counter[str] = Counter()
        for access in self.whole:
            by_line[access.line] += access.elements
        return max(by_line.values(), default=0)

    def unrolled(self, path: HotPath, threads: int) -> int:
        """Return how often the compiler unrolled the loop of ``path``, in a program of so many threads.

        A compiler that replaced the branch between whole and masked blocks by predicates left both in the path.
        """
        kind = "load" if any(access.is_load for access in self.accesses) else "store"
        plain = path.moved(kind, guarded=False)
        expected = _bytes_per_thread(self.whole if plain else self.accesses, threads)
        moved = plain or path.moved(kind, guarded=True)
        return max(1, moved // expected) if path.is_loop and expected else 1


def _bytes_per_thread(accesses: tuple[Access, ...], threads: int) -> int:
    return sum(max(1, access.elements // threads) * access.itemsize for access in accesses)


def tile_of(representation: str) -> Tile:
    """Return the tile of a kernel, given its TTGIR; without elements if it accesses no blocks."""
    regions: dict[int, list[Access]] = {}
    stack, loops = [0], 0
    for text in representation.splitlines():
        code = text.partition(" loc(")[0].strip()
        if code.startswith("}"):
            stack = stack[:-1] or [0]
        if found := _ACCESS.search(text):
            kind, operands, shape, bits = found.groups()
            elements = math.prod(map(int, shape.split("x")))
            is_masked = operands.count(",") > (kind == "store")  # after the pointer, and the value to store
            line = _LINE.search(text)
            access = Access(kind == "load", is_masked, elements, max(1, int(bits) // 8), line[1] if line else "")
            regions.setdefault(stack[-1], []).append(access)
        if code.endswith("{"):
            loops += 1
            stack.append(loops if re.search(r"scf\.(for|while)|\} do \{", code) else stack[-1])
    tiles = {region: Tile(region != 0, _loads_or_stores(accesses)) for region, accesses in regions.items()}
    volume = lambda tile: sum(access.elements * access.itemsize * access.is_load for access in tile.whole)
    return max(tiles.values(), key=volume, default=Tile(False, ()))


def _loads_or_stores(accesses: list[Access]) -> tuple[Access, ...]:
    return tuple(access for access in accesses if access.is_load) or tuple(accesses)
