"""Ahead-of-time compilation of recorded launches, and the resources that the binaries use."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import triton

from benchmarks.compile.launches import TARGETS, AbsentGPU, Launch, kernel_of


@dataclass(frozen=True)
class Binary:
    """Resources of a compiled launch, in the units of the suite's docstring, or the compiler's error."""

    launch: Launch
    registers: int = 0
    spills: int = 0
    shared: int = 0
    stack: int = 0
    error: str = ""

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
        read: Callable[[Any], dict[str, Any]] = _amd_resources if "amdgcn" in binary.asm else _nvidia_resources
        return Binary(launch, shared=binary.metadata.shared, **read(binary))
    except Exception as error:  # any error of the compiler belongs in the report
        return Binary(launch, error=f"{type(error).__name__}: {error}")


def _nvidia_resources(binary: Any) -> dict[str, int]:
    cubin = next(path for name, path in binary.metadata_group.items() if name.endswith(".cubin"))
    cuobjdump = triton.knobs.nvidia.cuobjdump.path
    command = [cuobjdump, "--dump-resource-usage", cubin]
    return parse_cuobjdump(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def parse_cuobjdump(text: str) -> dict[str, int]:
    """Parse ``cuobjdump --dump-resource-usage``. Triton has no arrays per thread, so the whole stack is spills."""
    use = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    stack = use["STACK"] + use["LOCAL"]
    return {"registers": use["REG"], "spills": -(-stack // 4), "stack": stack}


def _amd_resources(binary: Any) -> dict[str, int]:
    return parse_amdgcn(binary.asm["amdgcn"])


def parse_amdgcn(text: str) -> dict[str, int]:
    """Parse the metadata at the end of AMD assembly; vgpr_count includes the accumulation registers."""
    keys = "vgpr_count|vgpr_spill_count|sgpr_spill_count|private_segment_fixed_size"
    use = {name: int(value) for name, value in re.findall(rf"^\s*\.({keys}):\s+(\d+)", text, re.M)}
    return {
        "registers": use["vgpr_count"],
        "spills": use["vgpr_spill_count"] + use["sgpr_spill_count"],
        "stack": use["private_segment_fixed_size"],
    }


def _show_progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\rcompiled {done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True)
    elif done % 50 == 0 or done == total:
        print(f"compiled {done} of {total}", file=sys.stderr, flush=True)
