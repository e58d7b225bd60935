"""Instructions of a compiled kernel: disassembly, control flow, and the path that most of its elements take.

The path is that of a whole block. Kernels branch between whole blocks and a masked last one, between rows with and
without a gradient, and around rare work, so of all paths through a region (an innermost loop, or the kernel) it is

1. the one that loads the most bytes without a predicate: masked accesses are predicated, and skipped rows load nothing,
2. of these, the one that stores the most bytes without a predicate, then loads the most bytes with one,
3. of these, the one of the fewest instructions.

Of what follows an atomic operation, with which the programs of a launch find out which is the last, it is the path of
the fewest instructions: that of all programs but the last, which adds up what the others have stored.

A kernel with several innermost loops is judged by the one whose path ranks first.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import triton

# Opcodes by what they keep busy, first match wins. Moves and reads of constants count as address arithmetic.
CLASSES = {
    "fp32": r"F(ADD|MUL|FMA|MNMX|SETP|SEL|SET|CHK|SWZADD)",
    "special": r"MUFU",
    "conversion": r"F2|I2F|H[A-Z]+2|FHADD|PRMT",
    "load": r"LDG|LD$",
    "store": r"STG|ST$|RED$|REDG|ATOM(G|$)",
    "shared": r"LDS|STS|ATOMS|SHFL|C?REDUX|U?VOTE|MATCH",
    "barrier": r"BAR|.*BAR$|CCTL|FENCE|SYNCS",
    "branch": r"BRA|BRX|EXIT|CALL|RET|BSSY|BSYNC|BREAK|WARPSYNC|YIELD|NANOSLEEP",
    "integer": r"U?(I|V[A-Z]|LEA|LOP|SHF|SEL|MOV|SGXT|BMSK|FLO|POPC|LDC|PLOP|P2)|CS2R|S2U?R|R2|LDC|BREV",
}
OTHER = "other"


class Instruction(NamedTuple):
    """An instruction, such as ``@!P0 LDG.E.128 R4, desc[UR4][R2.64]``."""

    guard: str  # "!P0"
    opcode: str  # "LDG.E.128"
    operands: str

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def kind(self) -> str:
        """The class of the instruction, a key of CLASSES or OTHER."""
        return next((kind for kind, pattern in CLASSES.items() if re.match(pattern, self.name)), OTHER)

    @property
    def width(self) -> int:
        """Bytes per thread of a global load or store; 0 of other instructions."""
        if self.kind not in ("load", "store"):
            return 0
        found = re.search(r"\.[US]?(8|16|64|128|256)\b", self.opcode)
        return int(found[1]) // 8 if found else 4

    @property
    def target(self) -> str:
        """The label that a branch names, or an empty string."""
        found = re.search(r"`\(([^)]+)\)", self.operands)
        return found[1] if found else ""

    @property
    def is_conditional(self) -> bool:
        """Whether a branch or exit depends on a predicate: before the opcode, or before the label."""
        return bool(self.guard) or re.match(r"!?U?P\d", self.operands) is not None


class HotPath(NamedTuple):
    """The instructions that a warp issues for one pass over its elements, and those that it issues once."""

    is_loop: bool
    instructions: tuple[Instruction, ...]
    outside: int  # instructions on the path through the kernel that are not in the loop

    def count(self) -> Counter[str]:
        """Count the instructions by class."""
        return Counter(instruction.kind for instruction in self.instructions)

    def widths(self, kind: str, guarded: bool) -> list[int]:
        """Return the bytes per thread of each load or store, either those with a predicate or those without."""
        return [each.width for each in self.instructions if each.kind == kind and bool(each.guard) == guarded]

    def moved(self, kind: str, guarded: bool) -> int:
        """Return the bytes that a thread loads or stores, either with a predicate or without."""
        return sum(self.widths(kind, guarded))

    def barriers(self) -> int:
        """Count the barriers of the program; a fence is none."""
        return sum(instruction.name == "BAR" for instruction in self.instructions)


Rank = tuple[int, int, int, int]
"""Of a path: bytes loaded and stored without a predicate, bytes loaded with one, instructions; the last negative."""


def disassemble(cubin: str | Path) -> str:
    """Return the listing of a cubin, with labels."""
    command = [triton.knobs.nvidia.nvdisasm.path, "-c", str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def hot_path(listing: str, in_loop: bool) -> HotPath:
    """Return the path of a whole block: through the first-ranked innermost loop, or through the kernel.

    Args:
        listing: of one kernel, by ``disassemble``.
        in_loop: whether the kernel's elements are loaded in a loop. Without one in the listing, the compiler has
            unrolled it, and the path is that through the kernel.

    Raises:
        ValueError: the listing has no instruction that is reached.
    """
    graph = ControlFlow(*_basic_blocks(_lines(listing)))
    through = graph.best_path(0, graph.exits, graph.reachable)
    if not through:
        raise ValueError(f"the listing must hold the code of a kernel, got {listing[:200]!r}")
    loops = graph.innermost_loops() if in_loop else []
    if not loops:
        return HotPath(False, graph.code(through), 0)
    paths = {header: graph.best_path(header, latches, body) for header, (body, latches) in loops.items()}
    hot = max(paths, key=lambda header: graph.rank(paths[header]))
    outside = graph.code(block for block in through if block not in loops[hot][0])
    return HotPath(True, graph.code(paths[hot]), len(outside))


def basic_blocks_of(listing: str) -> list[list[Instruction]]:
    """Return the instructions of a listing, by ``disassemble``, in blocks without branches into or out of them."""
    return _basic_blocks(_lines(listing))[0]


class ControlFlow:
    """Basic blocks of a kernel. The first is the entry."""

    def __init__(self, blocks: list[list[Instruction]], successors: list[list[int]]) -> None:
        self.blocks, self.successors = blocks, successors
        self.reachable = self._reach({0}, successors, within=range(len(blocks))) if blocks else set()
        atomic = {i for i in self.reachable if any(each.name.startswith("ATOM") for each in blocks[i])}
        self.after_atomic = self._reach(
            {after for i in atomic for after in successors[i]}, successors, within=self.reachable - atomic
        )
        self.exits = {i for i in self.reachable if blocks[i] and blocks[i][-1].name in ("EXIT", "RET")}

    def code(self, path: Iterable[int]) -> tuple[Instruction, ...]:
        """Return the instructions of a path."""
        return tuple(instruction for block in path for instruction in self.blocks[block])

    def rank(self, path: Iterable[int]) -> Rank:
        """Return what paths are compared by: the largest is that of a whole block."""
        code = HotPath(False, self.code(path), 0)
        plain, stored, guarded = code.moved("load", False), code.moved("store", False), code.moved("load", True)
        return plain, stored, guarded, -len(code.instructions)

    def best_path(self, start: int, ends: Collection[int], nodes: Collection[int]) -> list[int]:
        """Return the path of the highest rank from ``start`` to one of ``ends``, which takes each loop once."""
        best: dict[int, tuple[Rank, list[int]]] = {}
        for block in self._postorder(start, nodes):
            own = self.rank([block])
            if block in self.after_atomic:
                own = (0, 0, 0, own[-1])
            rest = [best[after] for after in self.successors[block] if after in best]
            rest += [((0, 0, 0, 0), [])] if block in ends else []
            if rest:
                rank, path = max(rest)
                plain, stored, guarded, negative = (mine + theirs for mine, theirs in zip(own, rank, strict=True))
                best[block] = (plain, stored, guarded, negative), [block, *path]
        return best[start][1] if start in best else []

    def innermost_loops(self) -> dict[int, tuple[set[int], set[int]]]:
        """Return the body and the latches of each loop that contains no other and follows no atomic, by its header.

        A loop has one header, which dominates the blocks that branch back to it, its latches.
        """
        dominators = self._dominators()
        latches: dict[int, set[int]] = {}
        for block in self.reachable:
            for after in self.successors[block]:
                if after in dominators[block]:
                    latches.setdefault(after, set()).add(block)
        before: list[list[int]] = [[] for _ in self.blocks]
        for block in self.reachable:
            for after in self.successors[block]:
                before[after].append(block)
        bodies = {
            header: self._reach(ends, before, within=self.reachable - {header}) | {header}
            for header, ends in latches.items()
        }
        return {
            header: (body, latches[header])
            for header, body in bodies.items()
            if header not in self.after_atomic and not any(other in body for other in bodies if other != header)
        }

    def _postorder(self, start: int, nodes: Collection[int]) -> Iterator[int]:
        """Yield blocks after their successors; edges back into a loop are not followed."""
        seen, stack = {start}, [(start, iter(self.successors[start]))]
        while stack:
            block, rest = stack[-1]
            after = next((each for each in rest if each in nodes and each not in seen), None)
            if after is None:
                stack.pop()
                yield block
            else:
                seen.add(after)
                stack.append((after, iter(self.successors[after])))

    def _dominators(self) -> dict[int, set[int]]:
        """Return for each block those that every path from the entry to it passes."""
        order = list(reversed(list(self._postorder(0, self.reachable))))
        found = {block: set(self.reachable) for block in order}
        found[0] = {0}
        changed = True
        while changed:
            changed = False
            for block in order[1:]:
                above = [found[each] for each in order if block in self.successors[each]]
                new = set.intersection(*above) | {block}
                changed |= new != found[block]
                found[block] = new
        return found

    @staticmethod
    def _reach(start: Iterable[int], edges: list[list[int]], within: Collection[int]) -> set[int]:
        """Return what can be reached from ``start``, itself included, by edges between the blocks of ``within``."""
        found, waiting = set(), [block for block in start if block in within]
        while waiting:
            block = waiting.pop()
            if block not in found:
                found.add(block)
                waiting += [after for after in edges[block] if after in within]
        return found


def _lines(listing: str) -> Iterator[str | Instruction]:
    """Yield the labels and instructions of a listing."""
    for line in listing.splitlines():
        if found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);", line):
            yield Instruction(found[1] or "", found[2], found[3].strip())
        elif found := re.match(r"([.$\w]+):\s*$", line):
            yield found[1]


def _basic_blocks(lines: Iterable[str | Instruction]) -> tuple[list[list[Instruction]], list[list[int]]]:
    """Split code after branches and before labels, and return the blocks and their successors."""
    blocks: list[list[Instruction]] = [[]]
    labels: dict[str, int] = {}
    for line in lines:
        if isinstance(line, str):
            if blocks[-1]:
                blocks.append([])
            labels[line] = len(blocks) - 1
        else:
            blocks[-1].append(line)
            if line.name in ("BRA", "BRX", "BSYNC", "EXIT", "RET"):
                blocks.append([])
    joins: dict[str, str] = {}  # where threads that diverged meet again, by barrier register
    successors: list[list[int]] = []
    for i, block in enumerate(blocks):
        for instruction in block:
            if instruction.name == "BSSY":
                joins[instruction.operands.partition(",")[0]] = instruction.target
        last = block[-1] if block else Instruction("", "NOP", "")
        after = [i + 1] if i + 1 < len(blocks) else []
        if last.name in ("BRA", "BSYNC"):
            label = last.target or joins.get(last.operands, "")
            after = [*(after if last.is_conditional else []), *([labels[label]] if label in labels else [])]
        elif last.name in ("EXIT", "RET", "BRX") and not last.is_conditional:
            after = []
        successors.append(after)
    return blocks, successors
