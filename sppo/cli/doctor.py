"""``sppo doctor``: report installed packages, what a run would use, and what is missing.

torch and transformers are imported only inside the checks. A check that fails is reported and does not raise, so the
command works in a broken environment.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, NamedTuple

TESTED_PYTHON = ((3, 11), (3, 13))
"""Oldest and newest Python version that is tested."""


class Package(NamedTuple):
    """A distribution, its oldest supported version (``"0"`` for any), and its purpose."""

    name: str
    min_version: str
    purpose: str


REQUIRED = (
    Package("torch", "2.10", "everything"),
    Package("transformers", "5.17", "models and training"),
    Package("accelerate", "1.10", "devices and processes"),
    Package("datasets", "4.0", "prompts"),
    Package("pyyaml", "6.0", "recipes"),
    Package("matplotlib", "3.9", "plots"),
)
OPTIONAL = (
    Package("triton", "3.6", "the fused kernels on a GPU"),
    Package("math-verify", "0.9", "the reward math"),
    Package("reasoning-gym", "0.1.25", "the tasks and the reward reasoning_gym"),
    Package("peft", "0.18", "adapters"),
    Package("bitsandbytes", "0.50", "quantized base models"),
    Package("vllm", "0.20", "rollouts with vLLM"),
    Package("flash-attn", "2.8", "faster attention on a GPU"),
    Package("deepspeed", "0", "sharded training with DeepSpeed"),
    Package("tensorboard", "0", "report_to=tensorboard"),
    Package("trackio", "0", "report_to=trackio"),
    Package("wandb", "0", "report_to=wandb"),
    Package("rich", "0", "tables on the console"),
)


class Finding(NamedTuple):
    """One line of the report; ``severity`` is None, ``"warning"``, or ``"error"`` if training cannot run."""

    name: str
    text: str
    severity: str | None = None


def diagnose() -> int:
    """Print the report.

    Returns:
        The exit code: 0 if training can run, else 1.
    """
    findings: list[Finding] = []
    sections: Sequence[tuple[str, Callable[[], Iterable[Finding]]]] = (
        ("Installed", check_packages),
        ("A run would use", check_environment),
        ("Test", check_kernels),
    )
    for title, check in sections:
        print(f"{title}:")
        for finding in check():
            findings.append(finding)
            mark = {"error": "ERROR: ", "warning": "warning: "}.get(finding.severity or "", "")
            print(f"  {finding.name:<14} {mark}{finding.text}", flush=True)
        print()
    errors = [finding for finding in findings if finding.severity == "error"]
    if errors:
        print(f"Training cannot run: see {', '.join(finding.name for finding in errors)} above.")
    else:
        print("Training can run. Quick start: sppo train quickstart")
    return 1 if errors else 0


def check_packages() -> Iterable[Finding]:
    """Compare the versions of Python and of installed packages with the supported ones, without importing them."""
    running = sys.version_info[:2]
    oldest, newest = (".".join(map(str, limit)) for limit in TESTED_PYTHON)
    if running < TESTED_PYTHON[0]:
        yield Finding("python", f"{platform.python_version()}, older than {oldest}: install a newer one", "error")
    elif running > TESTED_PYTHON[1]:
        yield Finding("python", f"{platform.python_version()}, newer than {newest}, the newest tested", "warning")
    else:
        yield Finding("python", platform.python_version())
    for package in REQUIRED:
        yield _check_package(package, required=True)
    for package in OPTIONAL:
        yield _check_package(package, required=False)


def _check_package(package: Package, *, required: bool) -> Finding:
    name, min_version, purpose = package
    upgrade = f"pip install '{name}>={min_version}'" if min_version != "0" else f"pip install {name}"
    try:
        installed = version(name)
    except PackageNotFoundError:
        return Finding(name, f"missing, for {purpose}: {upgrade}", "error" if required else None)
    if _version_tuple(installed) < _version_tuple(min_version):
        return Finding(name, f"{installed}, older than {min_version}: {upgrade}", "error" if required else "warning")
    return Finding(name, installed)


def _version_tuple(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:3])


def check_environment() -> Iterable[Finding]:
    """Report device, precision, kernels, attention, rollout engine and processes of a run on this machine."""
    try:
        import torch

        device = _device(torch)
    except Exception as error:
        yield Finding("device", f"torch does not work: {_first_line(error)}", "error")
        return
    yield _guarded("device", lambda: _describe(torch, device))
    yield _guarded("precision", lambda: _precision(torch, device))
    yield _guarded("kernels", lambda: _kernels(torch, device))
    yield _guarded("attention", lambda: _attention(torch, device))
    yield _guarded("rollouts", _rollouts)
    yield _guarded("processes", lambda: _processes(torch, device))


def _guarded(name: str, check: Callable[[], str]) -> Finding:
    """Run a check that may fail, and report the error if it does."""
    try:
        return Finding(name, check())
    except Exception as error:
        return Finding(name, f"{type(error).__name__}: {_first_line(error)}", "error")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _device(torch: Any) -> Any:
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _describe(torch: Any, device: Any) -> str:
    if device.type == "cpu":
        return f"cpu, {os.cpu_count()} cores, threads: {torch.get_num_threads()}; no accelerator found"
    if device.type not in ("cuda", "xpu"):
        return device.type
    module = getattr(torch, device.type)
    platform_name = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    cards = [module.get_device_properties(i) for i in range(module.device_count())]
    return f"{platform_name if device.type == 'cuda' else 'XPU'}: " + ", ".join(
        f"{card.name} {card.total_memory / 2**30:.0f} GiB" for card in cards
    )


def _precision(torch: Any, device: Any) -> str:
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "float32; this GPU has no bfloat16"
    return "float32; bf16=True computes in bfloat16" + (", which is slow on a CPU" if device.type == "cpu" else "")


def _kernels(torch: Any, device: Any) -> str:
    from sppo_kernels._backend import INTERPRETED, pick_backend

    backend = pick_backend(None, torch.empty(0, device=device))
    interpreted = ", but TRITON_INTERPRET=1 is set: Triton interprets its kernels, which is meant for tests"
    return f"backend {backend}{interpreted if INTERPRETED and backend == 'triton' else ''}"


def _attention(torch: Any, device: Any) -> str:
    from sppo.models import packed_attention as attention

    if device.type != "cuda":
        return "scaled_dot_product_attention, one call per length"
    if name := attention.flash_attention(torch.cuda.get_device_capability()):
        return f"{name} in bfloat16, else scaled_dot_product_attention"
    if attention._torch_varlen():
        return "torch's variable-length attention in bfloat16, else scaled_dot_product_attention"
    return "scaled_dot_product_attention, one call per length; flash-attn is faster: pip install flash-attn"


def _rollouts() -> str:
    others = "continuous, vllm" if find_spec("vllm") else "continuous"
    return f"hf: transformers' generate(); rollout_engine= also takes {others}"


def _processes(torch: Any, device: Any) -> str:
    count = torch.accelerator.device_count() if device.type != "cpu" else 1
    if count < 2:
        return "one"
    launch = f"accelerate launch --multi_gpu --num_processes {count} -m sppo.cli train RECIPE"
    return f"one, on one of {count} devices; to use all: {launch}"


def check_kernels() -> Iterable[Finding]:
    """Compare values and gradients of the operations on the device with the float64 reference."""
    yield _guarded("fused kernels", _compare_with_reference)


def _compare_with_reference() -> str:
    import torch

    from sppo_kernels._self_test import TOLERANCE, errors

    largest, count = 0.0, 0
    for name, error in errors(_device(torch)):
        if isinstance(error, Exception):
            raise error
        if not error < TOLERANCE:
            raise ValueError(f"{name} is off by {error:.1e}; report it with the lines above")
        largest, count = max(largest, error), count + 1
    return f"{count} operations are correct to {largest:.0e} of the largest value"
