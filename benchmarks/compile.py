"""Registers, spills and shared memory of every Triton kernel, compiled ahead of time for GPUs that need not be there.

Nothing about a kernel's launch is written down here. The public functions run, forward and backward, on small CPU
tensors while Triton is told that a given GPU is present, and each launch is noted instead of made: constants, argument
types, alignment, warps and stages are those of the real call. Each distinct launch is then compiled for that GPU.

Registers are those of one thread (vector registers on AMD), spills the 32-bit registers it keeps in memory instead;
shared memory is in bytes a block, stack in bytes a thread. In a configuration, w8s3 means 8 warps and 3 stages.
The exit code is 1 when a kernel spills, does not compile, asks for more shared memory than a block may have, or is
launched by no case.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import sppo_kernels
from benchmarks import results
from sppo_kernels import _backend
from sppo_kernels.tuning import TUNABLES, Config, Tunable


class Target(NamedTuple):
    """A GPU to compile for, and the most shared memory that one block may have there, in bytes."""

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
    """One kernel as one case launches it on one target: all that Triton compiles by."""

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
        """Equal for launches that share one binary."""
        compiled_by = self.signature, self.constants, self.attributes, self.options
        return repr((self.module, self.kernel, self.target, *compiled_by))

    def configuration(self) -> str:
        """The case, warps and stages, and the block sizes."""
        sizes = [f"{name}={value}" for name, value in self.constants.items() if "BLOCK" in name]
        return " ".join([self.case, f"w{self.options['num_warps']}s{self.options['num_stages']}", *sizes])


@dataclass(frozen=True)
class Row:
    """What the compiler made of one launch; the units are those of the module's docstring."""

    launch: Launch
    registers: int = 0
    spills: int = 0
    shared: int = 0
    stack: int = 0
    error: str = ""

    def failure(self) -> str:
        """Why this row fails the report, or nothing."""
        limit = TARGETS[self.launch.target].shared_limit
        if self.error:
            return self.error
        if self.spills:
            return f"spills {self.spills} registers"
        if self.shared > limit:
            return f"needs {self.shared} bytes of shared memory, a block has {limit}"
        return ""


# Which launches there are


class _AbsentGPU:
    """As much of a Triton driver as a launch asks for before it is made."""

    def __init__(self, name: str) -> None:
        self.name = name

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.name].gpu

    def get_current_device(self) -> str:
        return self.name  # kernels keep their state by device, so each target is one

    def get_current_stream(self, device: str) -> int:
        return 0


def launches(cases: Iterable[Case], targets: Iterable[str]) -> list[Launch]:
    """Every distinct launch that the cases make, in their order."""
    cases = list(cases)
    found: dict[str, Launch] = {}
    for target in targets:
        triton.runtime.driver.set_active(_AbsentGPU(target))
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

    # The tensors are on the CPU, where the library otherwise insists on Triton's interpreter.
    with triton.knobs.runtime.scope(), mock.patch.object(_backend, "INTERPRETED", True):
        triton.knobs.runtime.jit_cache_hook = note
        case.call()
    return noted


def first_of_each_kernel(found: Iterable[Launch]) -> list[Launch]:
    """The first launch of each kernel on each target."""
    first: dict[tuple[str, str, str], Launch] = {}
    for launch in found:
        first.setdefault((launch.module, launch.kernel, launch.target), launch)
    return list(first.values())


def uncovered(package: ModuleType, found: Iterable[Launch]) -> list[str]:
    """Kernels of a package that no launch runs, be it through a kernel that calls them."""
    modules = [importlib.import_module(m.name) for m in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    kernels = {
        value for module in modules for value in vars(module).values()
        if isinstance(value, JITFunction) and value.module == module.__name__
    }  # fmt: skip
    reached: set[JITFunction] = set()
    waiting = [_kernel(launch) for launch in found]
    while waiting:
        kernel = waiting.pop()
        if kernel not in reached:
            reached.add(kernel)
            names = (kernel.fn.__globals__.get(name) for name in kernel.fn.__code__.co_names)
            waiting += [callee for callee in names if isinstance(callee, JITFunction)]
    return sorted(f"{kernel.module}.{kernel.__name__}" for kernel in kernels - reached)


def _kernel(launch: Launch) -> JITFunction:
    return getattr(importlib.import_module(launch.module), launch.kernel)


# What the compiler makes of them


def compile_all(found: list[Launch]) -> list[Row]:
    """Compile on all cores, with progress on stderr; rows come back in the order of the launches."""
    rows: dict[int, Row] = {}
    with ProcessPoolExecutor(min(len(found), os.cpu_count() or 1) or 1, mp_context=get_context("spawn")) as pool:
        place = {pool.submit(compile_one, launch): i for i, launch in enumerate(found)}
        for done in as_completed(place):
            i = place[done]
            crash = done.exception()  # the compiler took its process down
            rows[i] = Row(found[i], error=f"{type(crash).__name__}: {crash}") if crash else done.result()
            _show_progress(len(rows), len(found))
    return [rows[i] for i in range(len(found))]


def compile_one(launch: Launch) -> Row:
    """Compile one launch and read what the binary uses."""
    triton.runtime.driver.set_active(_AbsentGPU(launch.target))
    kernel = _kernel(launch)
    source = triton.compiler.ASTSource(kernel, launch.signature, launch.constants, launch.attributes)
    try:
        binary = triton.compile(source, target=TARGETS[launch.target].gpu, options=launch.options)
        read: Callable[[Any], dict[str, Any]] = _amd_resources if "amdgcn" in binary.asm else _nvidia_resources
        return Row(launch, shared=binary.metadata.shared, **read(binary))
    except Exception as error:  # whatever the compiler raises belongs in the report
        return Row(launch, error=f"{type(error).__name__}: {error}")


def _nvidia_resources(binary: Any) -> dict[str, int]:
    cubin = next(path for name, path in binary.metadata_group.items() if name.endswith(".cubin"))
    cuobjdump = triton.knobs.nvidia.cuobjdump.path
    command = [cuobjdump, "--dump-resource-usage", cubin]
    return parse_cuobjdump(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def parse_cuobjdump(text: str) -> dict[str, int]:
    """Resources from ``cuobjdump --dump-resource-usage``. Triton has no arrays in a thread: all stack is spill."""
    use = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    stack = use["STACK"] + use["LOCAL"]
    return {"registers": use["REG"], "spills": -(-stack // 4), "stack": stack}


def _amd_resources(binary: Any) -> dict[str, int]:
    return parse_amdgcn(binary.asm["amdgcn"])


def parse_amdgcn(text: str) -> dict[str, int]:
    """Resources from the metadata at the end of AMD assembly; vgpr_count has the accumulation registers in it."""
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


# The report


def table(rows: list[Row], width: int = 120) -> str:
    """A line a row; what repeats from the line above is left out."""
    numbers = "{:>7} {:>9} {:>6} {:>7} {:>6}"
    heads = numbers.format("target", "registers", "spills", "shared", "stack")
    operation = max([9, *(len(row.launch.operation) for row in rows)])
    kernel = max([6, *(len(row.launch.kernel) for row in rows)])
    space = width - len(heads) - operation - kernel - 3
    lines = [f"{'operation':{operation}} {'kernel':{kernel}} {'configuration':{space}} {heads}", "-" * width]
    above: tuple[str, ...] = ()
    for row in rows:
        launch = row.launch
        head = (launch.operation, launch.kernel, textwrap.shorten(launch.configuration(), space, placeholder=" ..."))
        shown = head if head != above else ("", "", "")
        above = head
        figures = numbers.format(launch.target, row.registers, row.spills, row.shared, row.stack)
        mark = figures if not row.error else f"{launch.target:>7} failed"
        lines.append(f"{shown[0]:{operation}} {shown[1]:{kernel}} {shown[2]:{space}} {mark}".rstrip())
    return "\n".join(lines)


def report(cases: Iterable[Case], package: ModuleType, targets: list[str], quick: bool, out: Path) -> int:
    """Compile, print and write the report; 0 where nothing is wrong with it, otherwise 1."""
    found = launches(cases, targets)
    missing = uncovered(package, found)
    chosen = first_of_each_kernel(found) if quick else found
    rank = {key: i for i, key in enumerate(dict.fromkeys(map(_place, chosen)))}
    rows = compile_all(sorted(chosen, key=lambda launch: rank[_place(launch)]))
    failures = [
        *(f"{launch.operation} {launch.kernel} {launch.configuration()} {launch.target}: {row.failure()}"
          for row in rows if row.failure() for launch in [row.launch]),
        *(f"{kernel}: no case launches it" for kernel in missing),
    ]  # fmt: skip
    print(table(rows))
    path = out / f"compile-triton-{triton.__version__}.json"
    lines = [_as_json(row) for row in rows]
    results.write(path, "compile", chart(lines), quick=quick, targets=targets, failures=failures, rows=lines)
    return results.conclude(f"\n{len(rows)} compiled", failures, path)


def _place(launch: Launch) -> tuple[str, str, str]:
    """Rows that differ in the target alone stand together."""
    return launch.operation, launch.kernel, launch.case


def _as_json(row: Row) -> dict[str, Any]:
    fields = asdict(row)
    launch = fields.pop("launch")
    options = launch.pop("options")
    aligned = [i for (i,), hints in launch.pop("attributes").items() if hints]
    warps_and_stages = {name: options[name] for name in ("num_warps", "num_stages")}
    return {**launch, **warps_and_stages, "aligned_arguments": aligned, **fields}


def chart(rows: list[dict[str, Any]]) -> results.Chart:
    """The most registers that a kernel takes on any target, against those that a thread of NVIDIA's may have."""
    most: dict[str, float] = {}
    for row in rows:
        name = f"{row['module'].rpartition('.')[2]}.{row['kernel']}: {row['target']}"
        most[name] = max(most.get(name, 0), row["registers"])
    return results.Chart("registers a thread", sorted(most.items()), limit=255)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=list(TARGETS), help="GPUs to compile for (all)")
    parser.add_argument("--quick", action="store_true", help="one configuration of each kernel instead of all of them")
    results.add_out(parser)


def run(args: argparse.Namespace) -> int:
    """Entry of the suite."""
    if triton.knobs.runtime.interpret:
        print("TRITON_INTERPRET is set, so kernels are interpreted and not compiled: unset it", file=sys.stderr)
        return 2
    return report(all_cases(), sppo_kernels, args.arch, args.quick, args.out)


# The cases. The first that launches a kernel is what --quick compiles: the usual dtype with everything switched on.

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
VOCABULARIES = (151_936, 50_257, 97)  # a multiple of 16 (Qwen), odd (GPT-2), smaller than a block
HIDDEN_SIZES = (1536, 97)


def all_cases() -> Iterator[Case]:
    """Every operation over the dtypes, sizes and settings that change what is compiled."""
    yield from _selective_logprobs_cases()
    yield from _linear_logprobs_cases()
    yield from _policy_loss_cases()
    yield from _prompt_value_cases()
    yield from _advantage_cases()
    yield from _candidate_cases()


def _selective_logprobs_cases() -> Iterator[Case]:
    def call(dtype: torch.dtype, vocab: int, softcap: float | None, shape: tuple[int, ...], temperature: Any) -> None:
        logits = torch.zeros(*shape, vocab, dtype=dtype, requires_grad=True)
        labels = torch.zeros(shape, dtype=torch.int64)
        _backward(
            *sppo_kernels.selective_logprobs(logits, labels, temperature=temperature, softcap=softcap, backend="triton")
        )

    for (name, dtype), vocab, softcap in product(DTYPES.items(), VOCABULARIES, (30.0, None)):
        label = f"{name} V={vocab}{' softcap' if softcap else ''}"
        yield Case("selective_logprobs", label, functools.partial(call, dtype, vocab, softcap, (16,), 1.0))
    for label, shape, temperature in (
        ("one row", (1,), 1.0),
        ("[B, T, V]", (2, 8), 1.0),
        ("temperature a row", (16,), torch.ones(16)),
    ):
        one = functools.partial(call, torch.bfloat16, VOCABULARIES[0], None, shape, temperature)
        yield Case("selective_logprobs", f"bf16 V={VOCABULARIES[0]} {label}", one)


def _linear_logprobs_cases() -> Iterator[Case]:
    def call(dtype: torch.dtype, vocab: int, softcap: float | None, backward: str) -> None:
        hidden, weight = (torch.zeros(n, 64, dtype=dtype, requires_grad=True) for n in (16, vocab))
        labels = torch.zeros(16, dtype=torch.int64)
        settings = {"softcap": softcap, "backward": backward, "backend": "triton"}
        out = sppo_kernels.linear_logprobs(hidden, weight, labels, **settings)
        out.logprobs.sum().backward(retain_graph=True)
        out.entropy.sum().backward()

    for (name, dtype), vocab, softcap, backward in product(
        DTYPES.items(), VOCABULARIES, (30.0, None), ("recompute", "cache", "sparse")
    ):
        label = f"{name} V={vocab}{' softcap' if softcap else ''} {backward}"
        yield Case("linear_logprobs", label, functools.partial(call, dtype, vocab, softcap, backward))


def _policy_loss_cases() -> Iterator[Case]:
    levels = ("token", "sequence_mean", "sequence_sum")
    corrections = ("token_truncate", "sequence_truncate", "sequence_mask")
    aggregations = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum")

    def call(dtype: torch.dtype, tokens: int, everything: bool, **settings: Any) -> None:
        x = lambda: torch.zeros(tokens, dtype=dtype)
        per_sequence = torch.zeros(2)
        cu_seqlens = torch.tensor([0, tokens // 2, tokens], dtype=torch.int32)
        if everything:
            settings = {
                "mask": torch.ones(tokens, dtype=torch.bool), "dual_clip": 3.0, "normalizer": 7.0, "kl_coef": 0.1,
                "ref_logprobs": x(), "rollout_logprobs": x(), **settings,
            }  # fmt: skip
        advantages = x() if everything else per_sequence
        loss, _ = sppo_kernels.policy_loss(
            x().requires_grad_(), x(), advantages, cu_seqlens=cu_seqlens, backend="triton", **settings
        )
        _backward(loss)

    def case(label: str, dtype: str = "fp32", tokens: int = 40_000, everything: bool = False, **settings: Any) -> Case:
        return Case("policy_loss", label, functools.partial(call, DTYPES[dtype], tokens, everything, **settings))

    for level, correction in product(levels, corrections):
        yield case(f"all {level} {correction}", everything=True, ratio_level=level, rollout_correction=correction)
    for level, aggregation in product(levels, aggregations):
        yield case(f"{level} {aggregation}", ratio_level=level, aggregation=aggregation)
    for estimator in ("k1", "k2"):
        yield case(f"all {estimator}", everything=True, kl_estimator=estimator)
    for dtype in ("bf16", "fp16"):
        yield case(f"all {dtype}", dtype, everything=True)
    yield case("one token", tokens=1)


def _prompt_value_cases() -> Iterator[Case]:
    def call(function: Callable[..., Any], dtype: torch.dtype, size: int, lead: tuple[int, ...], bias: bool) -> None:
        hidden = torch.zeros(*lead, size, dtype=dtype, requires_grad=True)
        weight = torch.zeros(1, size, dtype=dtype, requires_grad=True)
        head = torch.zeros(1, dtype=dtype, requires_grad=True) if bias else None
        given: tuple[Tensor, ...] = (hidden, weight, torch.zeros(lead[0], dtype=torch.int64))
        if function is sppo_kernels.prompt_value_loss:
            given += (torch.zeros(lead[0]),)
        result = function(*given, bias=head, backend="triton")
        _backward(result if isinstance(result, Tensor) else result.loss)

    functions: tuple[Any, ...] = (sppo_kernels.prompt_value_loss, sppo_kernels.prompt_value_logits)
    for function, (name, dtype), size, lead, bias in product(
        functions, DTYPES.items(), HIDDEN_SIZES, ((16,), (2, 8)), (True, False)
    ):
        label = f"{name} H={size} {'packed' if len(lead) == 1 else 'padded'}{' bias' if bias else ''}"
        yield Case(function.__name__, label, functools.partial(call, function, dtype, size, lead, bias))


def _advantage_cases() -> Iterator[Case]:
    for length in (40_000, 97, 1):
        x = torch.zeros(2, length)
        mask = x == 0
        yield Case("gae", f"T={length}", functools.partial(sppo_kernels.gae, x, x, mask, backend="triton"))
        yield Case("whiten", f"T={length}", functools.partial(sppo_kernels.whiten, x, mask, backend="triton"))
    for estimator, size in product(("grpo", "dr_grpo", "rloo"), (512, 1)):
        given = torch.zeros(size), torch.zeros(size, dtype=torch.int64)
        call = functools.partial(sppo_kernels.group_advantages, *given, estimator=estimator, backend="triton")
        yield Case("group_advantages", f"{estimator} B={size}", call)


def _candidate_cases() -> Iterator[Case]:
    """Each operation's fullest case again with every configuration that its kernels may be tuned to."""
    rows = lambda case: case.operation == "selective_logprobs" and case.label.endswith("V=151936 softcap")
    linear = lambda case, mode: case.operation == "linear_logprobs" and case.label.endswith(f"V=151936 softcap {mode}")
    fullest = {
        "selective_logprobs.forward": rows,
        "selective_logprobs.backward": rows,
        "linear_logprobs.keep": lambda case: linear(case, "cache"),
        "policy_loss": lambda case: case.operation == "policy_loss" and case.label.startswith("all "),
    }
    cases = [*_selective_logprobs_cases(), *_linear_logprobs_cases(), *_policy_loss_cases()]

    def call(tunable: Tunable, config: Config, case: Case) -> None:
        with tunable.using(config):
            case.call()

    for name, tunable in TUNABLES.items():
        for config, case in product(tunable.candidates[1:], filter(fullest[name], cases)):
            label = f"{case.label} tuned {config.block}/{config.num_warps}"
            yield Case(case.operation, label, functools.partial(call, tunable, config, case))


def _backward(*outputs: Tensor) -> None:
    torch.stack([x.float().sum() for x in outputs]).sum().backward()
