"""Profiles of calls: kernels, matrix products, wall time, and the sizes that bytes and FLOPs depend on."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

import sppo_kernels
from benchmarks.harness import library_seams, timing
from benchmarks.harness.operations import OPERATIONS
from benchmarks.harness.operations.sampling import equal_cu_seqlens
from benchmarks.harness.problem import Problem, ProblemSize

CALLS = 2  # profiled
LINEAR_POLICY_LOSS = "linear_policy_loss"


class Event(NamedTuple):
    """A kernel, copy or memset that the device ran."""

    name: str
    us: float


class Product(NamedTuple):
    """A matrix product [m, k] [k, n], and the kernels that it launched."""

    m: int
    k: int
    n: int
    kernels: tuple[Event, ...]

    @property
    def flops(self) -> int:
        """FLOPs of the product."""
        return 2 * self.m * self.k * self.n


class Sizes(NamedTuple):
    """What the bytes and FLOPs of a call depend on.

    Attributes:
        tokens: tokens with a loss.
        hidden: hidden size.
        vocab: vocabulary size.
        itemsize: bytes of an input element.
        cached: tokens whose probabilities are cached; those without a gradient count too.
        labels: different labels of these.
        recomputed: tokens whose logits backward computes again.
        entries: sparse entries of all tokens.
        columns: columns of the vocabulary in which these lie.
    """

    tokens: int
    hidden: int
    vocab: int
    itemsize: int
    cached: int = 0
    labels: int = 0
    recomputed: int = 0
    entries: int = 0
    columns: int = 0


class Profile(NamedTuple):
    """What the profiler recorded of some equal calls."""

    events: list[Event]
    products: list[Product]
    calls: int
    wall_ms: float  # of one call, without the profiler
    flops: float  # of one call, by FlopCounterMode


class Case(NamedTuple):
    """A call, and the kernels that it has to launch.

    Attributes:
        mode: of linear_logprobs, or "linear_policy_loss".
        size: of the inputs.
        kernels: names of kernels.
    """

    mode: str
    size: ProblemSize
    kernels: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the case in tables."""
        return f"{self.mode}, {self.size.tokens} x {self.size.hidden} x {self.size.vocab}"


def inputs(case: Case, device: torch.device, dtype: torch.dtype) -> Problem:
    """Make the inputs of a case."""
    name = "linear_logprobs + policy_loss" if case.mode == LINEAR_POLICY_LOSS else "linear_logprobs"
    torch.manual_seed(0)
    return OPERATIONS[name].inputs(case.size, device, dtype)


def step(case: Case, problem: Problem, backend: str | None) -> Callable[[], Tensor]:
    """Return a call of forward and backward, which returns the ``num_entries`` of its certificate."""
    tensors = problem.tensors
    hidden, weight, labels = (tensors[name] for name in ("hidden", "weight", "labels"))
    (upstream,) = problem.upstream.values()

    def logprobs() -> Tensor:
        out = sppo_kernels.linear_logprobs(
            hidden, weight, labels, backward=case.mode, return_certificate=True, backend=backend
        )
        torch.autograd.grad(out.logprobs, (hidden, weight), upstream)
        return out.certificate.num_entries

    def loss() -> Tensor:
        out = sppo_kernels.linear_policy_loss(
            hidden,
            weight,
            labels,
            tensors["old_logprobs"],
            tensors["advantages"],
            cu_seqlens=cu_seqlens,
            backward="cache",
            return_per_token=True,
            backend=backend,
        )
        torch.autograd.grad(out.loss, (hidden, weight), upstream)
        return out.certificate.num_entries

    if case.mode != LINEAR_POLICY_LOSS:
        return logprobs
    cu_seqlens = equal_cu_seqlens(len(labels), len(tensors["advantages"]), labels.device)
    return loss


def count(run: Callable[[], Tensor], problem: Problem) -> tuple[Sizes, float]:
    """Return sizes and FLOPs of a call, which is made once for that and warms up."""
    with FlopCounterMode(display=False) as counter, library_seams.counted_columns() as columns:
        num_entries = run()
    hidden, weight = problem.tensors["hidden"], problem.tensors["weight"]
    sizes = Sizes(
        tokens=int((num_entries != 0).sum()),
        hidden=hidden.shape[1],
        vocab=weight.shape[0],
        itemsize=hidden.itemsize,
        cached=int((num_entries == library_seams.CACHED).sum()),
        labels=len(problem.tensors["labels"][num_entries == library_seams.CACHED].unique()),
        recomputed=int((num_entries == library_seams.RECOMPUTED).sum()),
        entries=int(num_entries.clamp(min=0).sum()),
        columns=sum(columns),
    )
    return sizes, float(counter.get_total_flops())


def observe(run: Callable[[], object], device: torch.device, flops: float) -> Profile:
    """Time some calls without the profiler, and record some with it."""
    wall_ms = statistics.median(_wall_ms(run, device) for _ in range(3))
    on_gpu = device.type != "cpu"
    seen = profiled(run, device)
    return Profile(events_of(seen, on_gpu), products_of(seen, on_gpu), CALLS, wall_ms, flops)


def profiled(run: Callable[[], object], device: torch.device) -> list[Any]:
    """Return the profiler's events of some calls."""
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (device.type != "cpu")]
    with named_by_kernel(), profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(CALLS):
            run()
        timing.synchronize(device)
    return list(profiler.events())


def _wall_ms(run: Callable[[], object], device: torch.device) -> float:
    """Measure one call that finds the device idle."""
    timing.synchronize(device)
    if device.type == "cpu":
        start = time.perf_counter()
        run()
        return 1000 * (time.perf_counter() - start)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    timing.synchronize(device)
    return first.elapsed_time(last)


def events_of(seen: Iterable[Any], on_gpu: bool) -> list[Event]:
    """Return the device's work among a profiler's events; on a CPU what each operation does itself."""
    if on_gpu:
        on_device = (e for e in seen if e.device_type != DeviceType.CPU and not e.is_user_annotation)
        return [Event(e.name, e.time_range.elapsed_us()) for e in on_device]
    return [Event(e.name, e.self_cpu_time_total) for e in seen if e.self_cpu_time_total > 0]


def products_of(seen: Iterable[Any], on_gpu: bool) -> list[Product]:
    """Return the matrix products among a profiler's events; the first input of addmm is the summand."""
    products = []
    for e in seen:
        if e.device_type == DeviceType.CPU and e.name in ("aten::mm", "aten::addmm"):
            first = 1 if e.name == "aten::addmm" else 0
            (m, k), (_, n) = e.input_shapes[first : first + 2]
            kernels = [Event(kernel.name, kernel.duration) for kernel in e.kernels]
            products.append(Product(m, k, n, tuple(kernels if on_gpu else [Event(e.name, e.self_cpu_time_total)])))
    return products


@contextmanager
def named_by_kernel() -> Iterator[None]:
    """Name the running kernel in the profile when kernels run in Triton's interpreter."""
    if not library_seams.is_interpreted():
        yield
        return
    from triton.runtime import interpreter

    executor = interpreter.GridExecutor
    launch = executor.__call__

    def annotated(self: Any, *args: Any, **kwargs: Any) -> None:
        with record_function(self.fn.__name__):
            launch(self, *args, **kwargs)

    with mock.patch.object(executor, "__call__", annotated):
        yield
