"""The launches that the public functions make, intercepted on a machine without a GPU.

Triton is told that a given GPU is present, and each launch is recorded instead of made: constants, argument types,
alignment, warps and stages are those of the real call.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from benchmarks.harness import library_seams


class Target(NamedTuple):
    """A GPU to compile for, and its limit of shared memory per block in bytes."""

    gpu: GPUTarget
    shared_limit: int


# Limits: CUDA C++ Programming Guide, technical specifications per compute capability; AMD CDNA 3 and CDNA 4 ISA (LDS).
TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * 1024),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * 1024),
    "gfx950": Target(GPUTarget("hip", "gfx950", 64), 160 * 1024),
}


class Case(NamedTuple):
    """A call of one operation that launches kernels."""

    operation: str
    label: str
    call: Callable[[], object]


@dataclass(frozen=True)
class Launch:
    """A launch of a kernel by a case on a target: everything that the binary depends on."""

    operation: str
    case: str
    module: str
    kernel: str
    target: str
    signature: dict[str, Any]
    constants: dict[str, Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    def key(self) -> str:
        """Return a key that is equal for launches that share a binary."""
        compiled_by = self.signature, self.constants, self.attributes, self.options
        return repr((self.module, self.kernel, self.target, *compiled_by))

    def configuration(self) -> str:
        """Return the case, warps and stages, and the block sizes."""
        sizes = [f"{name}={value}" for name, value in self.constants.items() if "BLOCK" in name]
        return " ".join([self.case, f"w{self.options['num_warps']}s{self.options['num_stages']}", *sizes])


class AbsentGPU:
    """The part of a Triton driver that a launch uses before the kernel runs."""

    def __init__(self, name: str) -> None:
        self.name = name

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.name].gpu

    def get_current_device(self) -> str:
        return self.name  # kernels keep their state per device, so each target is one

    def get_current_stream(self, device: str) -> int:
        return 0


def launches(cases: Iterable[Case], targets: Iterable[str]) -> list[Launch]:
    """Record every distinct launch of the cases, in their order."""
    cases = list(cases)
    found: dict[str, Launch] = {}
    for target in targets:
        triton.runtime.driver.set_active(AbsentGPU(target))
        for case in cases:
            for launch in _launches_of(case, target):
                found.setdefault(launch.key(), launch)
    return list(found.values())


def _launches_of(case: Case, target: str) -> list[Launch]:
    noted: list[Launch] = []

    def note(*, fn: Any, compile: dict[str, Any], **_: object) -> bool:
        kernel = fn.jit_function
        names = {(i,): name for i, name in enumerate(kernel.arg_names)}
        options = json.loads(compile["specialization_data"])["options"]
        noted.append(
            Launch(
                operation=case.operation,
                case=case.label,
                module=kernel.module,
                kernel=kernel.__name__,
                target=target,
                signature=compile["signature"],
                constants={names[k]: v for k, v in compile["constants"].items()},
                attributes=compile["configs"][0],
                options={k: tuple(v) if isinstance(v, list) else v for k, v in options.items()},
            )
        )
        return True  # "already done": neither compiled nor launched

    with triton.knobs.runtime.scope(), library_seams.accept_cpu_tensors():
        triton.knobs.runtime.jit_cache_hook = note
        case.call()
    return noted


def first_of_each_kernel(found: Iterable[Launch]) -> list[Launch]:
    """Return the first launch of each kernel on each target."""
    first: dict[tuple[str, str, str], Launch] = {}
    for launch in found:
        first.setdefault((launch.module, launch.kernel, launch.target), launch)
    return list(first.values())


def uncovered(package: ModuleType, found: Iterable[Launch]) -> list[str]:
    """List the kernels of a package that no launch runs, directly or through a kernel that calls them."""
    modules = [importlib.import_module(m.name) for m in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    kernels = {
        value for module in modules for value in vars(module).values()
        if isinstance(value, JITFunction) and value.module == module.__name__
    }  # fmt: skip
    reached: set[JITFunction] = set()
    waiting = [kernel_of(launch) for launch in found]
    while waiting:
        kernel = waiting.pop()
        if kernel not in reached:
            reached.add(kernel)
            names = (kernel.fn.__globals__.get(name) for name in kernel.fn.__code__.co_names)
            waiting += [callee for callee in names if isinstance(callee, JITFunction)]
    return sorted(f"{kernel.module}.{kernel.__name__}" for kernel in kernels - reached)


def kernel_of(launch: Launch) -> JITFunction:
    return getattr(importlib.import_module(launch.module), launch.kernel)
