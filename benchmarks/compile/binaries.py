"""Ahead-of-time compilation of recorded launches, and the resources that the binaries use."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import triton

from benchmarks.compile.launches import TARGETS, AbsentGPU, Launch, kernel_of
from benchmarks.compile.machine_code import HotPath, disassemble, hot_path
from benchmarks.compile.occupancy import occupancy
from benchmarks.compile.products import Product, is_product, product_of
from benchmarks.compile.tiles import Tile, tile_of


@dataclass(frozen=True)
class Hot:
    """The path that a kernel's elements take, in numbers per warp.

    Attributes:
        is_loop: whether it is a loop, or the kernel from its first instruction to its last.
        elements: of a program in one pass.
        counts: instructions of one pass, by class.
        outside: instructions of the kernel that are not on it.
        barriers: in one pass.
        load_width: bytes per thread of the widest load of a block; 0 without one.
        store_width: the same of stores.
    """

    is_loop: bool
    elements: int
    counts: dict[str, int]
    outside: int
    barriers: int
    load_width: int
    store_width: int

    @property
    def instructions(self) -> int:
        """Instructions of one pass."""
        return sum(self.counts.values())

    def per_element(self, warps: int) -> dict[str, float]:
        """Return the instructions of a thread per element that it handles, by class."""
        share = 32 * warps / self.elements if self.elements else 0.0
        return {kind: share * count for kind, count in self.counts.items()}

    @classmethod
    def of(cls, path: HotPath, tile: Tile, warps: int) -> Hot:
        """Return the numbers of a path over a tile."""
        return cls(
            is_loop=path.is_loop,
            elements=tile.elements * tile.unrolled(path, 32 * warps),
            counts=dict(path.count()),
            outside=path.outside,
            barriers=path.barriers(),
            load_width=max(tile.widths(path, "load"), default=0),
            store_width=max(tile.widths(path, "store"), default=0),
        )


@dataclass(frozen=True)
class Binary:
    """Resources of a compiled launch, in the units of the suite's docstring, or the compiler's error.

    Of a GPU that is not NVIDIA's, the last four fields are not known. Kernels that multiply matrices have ``product``
    in place of ``hot``.
    """

    launch: Launch
    registers: int = 0
    spills: int = 0
    shared: int = 0
    stack: int = 0
    scalars_in_lanes: int = 0
    error: str = ""
    programs_per_sm: int | None = None
    occupancy: float | None = None
    hot: Hot | None = None
    product: Product | None = None

    def instructions_per_element(self) -> float:
        """Return the instructions of a thread on the hot path, per element that it handles."""
        return sum(self.hot.per_element(self.launch.options["num_warps"]).values()) if self.hot else 0.0

    def failure(self) -> str:
        """Return why this binary fails the report, or an empty string."""
        limit = TARGETS[self.launch.target].shared_limit
        if self.error:
            return self.error
        if self.spills:
            return f"spills {self.spills} registers"
        if self.shared > limit:
            return f"needs {self.shared} bytes of shared memory, a block has {limit}"
        return ""


def compile_all(found: list[Launch]) -> list[Binary]:
    """Compile on all cores, with progress on stderr, and return binaries in the order of the launches."""
    rows: dict[int, Binary] = {}
    with ProcessPoolExecutor(min(len(found), os.cpu_count() or 1) or 1, mp_context=get_context("spawn")) as pool:
        place = {pool.submit(compile_one, launch): i for i, launch in enumerate(found)}
        for done in as_completed(place):
            i = place[done]
            crash = done.exception()  # the compiler took its process down
            rows[i] = Binary(found[i], error=f"{type(crash).__name__}: {crash}") if crash else done.result()
            _show_progress(len(rows), len(found))
    return [rows[i] for i in range(len(found))]


def compile_one(launch: Launch) -> Binary:
    """Compile one launch and read the resources of the binary."""
    triton.runtime.driver.set_active(AbsentGPU(launch.target))
    kernel = kernel_of(launch)
    source = triton.compiler.ASTSource(kernel, launch.signature, launch.constants, launch.attributes)
    try:
        binary = triton.compile(source, target=TARGETS[launch.target].gpu, options=launch.options)
        if "amdgcn" in binary.asm:
            return Binary(launch, shared=binary.metadata.shared, **parse_amdgcn(binary.asm["amdgcn"]))
        return _nvidia_binary(launch, binary)
    except Exception as error:  # any error of the compiler belongs in the report
        return Binary(launch, error=f"{type(error).__name__}: {error}")


def _nvidia_binary(launch: Launch, binary: Any) -> Binary:
    cubin = next(path for name, path in binary.metadata_group.items() if name.endswith(".cubin"))
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin]
    resources = parse_cuobjdump(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    shared, warps = binary.metadata.shared, launch.options["num_warps"]
    resident = occupancy(launch.target, registers=resources["registers"], warps=warps, shared=shared)
    listing, representation = disassemble(cubin), binary.asm["ttgir"]
    code: dict[str, Any]
    if is_product(representation):
        code = {"product": product_of(listing, representation, launch.constants, warps)}
    else:
        tile = tile_of(representation)
        code = {"hot": Hot.of(hot_path(listing, tile.in_loop), tile, warps)}
    return Binary(
        launch,
        shared=shared,
        **resources,
        programs_per_sm=resident.programs,
        occupancy=resident.share,
        **code,
    )


def parse_cuobjdump(text: str) -> dict[str, int]:
    """Parse ``cuobjdump --dump-resource-usage``. Triton has no arrays per thread, so the whole stack is spills."""
    use = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    stack = use["STACK"] + use["LOCAL"]
    return {"registers": use["REG"], "spills": -(-stack // 4), "stack": stack}


def parse_amdgcn(text: str) -> dict[str, int]:
    """Parse the metadata at the end of AMD assembly; vgpr_count includes the accumulation registers.

    The compiler counts a register as spilled also when another one holds it. Memory is used where there is a stack.
    """
    keys = "vgpr_count|sgpr_spill_count|private_segment_fixed_size"
    use = {name: int(value) for name, value in re.findall(rf"^\s*\.({keys}):\s+(\d+)", text, re.M)}
    return {
        "registers": use["vgpr_count"],
        "spills": -(-use["private_segment_fixed_size"] // 4),
        "stack": use["private_segment_fixed_size"],
        "scalars_in_lanes": use["sgpr_spill_count"],
    }


def _show_progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\rcompiled {done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True)
    elif done % 50 == 0 or done == total:
        print(f"compiled {done} of {total}", file=sys.stderr, flush=True)
