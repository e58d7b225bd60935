"""Predicted times of whole operations on an H100: their products, kernels, and other traffic.

Products take their FLOPs at the product rate, and PyTorch's elementwise operations their bytes at the copy bandwidth.
Each launch of a kernel takes what time_model.py predicts for its machine code. The host, waits for it, and rounding of
products to whole tiles are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any, NamedTuple

from torch import Tensor
from triton.runtime.jit import MockTensor

from benchmarks.compile.binaries import Binary, compile_all
from benchmarks.compile.calls import RECORDERS, Call, RecordedLaunch
from benchmarks.compile.launches import Case, Launch, launches
from benchmarks.compile.time_model import GPU, H100, Prediction, Work, predict
from benchmarks.harness import results
from benchmarks.harness.cases import BASE, LM_SHAPES, MILLION
from benchmarks.harness.problem import ProblemSize
from benchmarks.harness.results import Row

SIZES = (BASE, ProblemSize(16_384, *LM_SHAPES["1.5B"]), ProblemSize(4096, *LM_SHAPES["0.5B"]))
RESPONSES = ProblemSize(MILLION, LM_SHAPES["1.5B"][0], 0)


class PredictedCall(NamedTuple):
    """An operation at a size, what it does, and its launches with their predicted times."""

    operation: str
    size: ProblemSize
    call: Call
    kernels: list[tuple[str, Prediction]]

    def row(self, gpu: GPU) -> Row:
        """Return the times in ms, and the total over that of the products, if there are any."""
        products, other = self.call.flops / gpu.product_rate, self.call.other_bytes / gpu.bandwidth
        total = products + other + sum(prediction.seconds for _, prediction in self.kernels)
        return {
            "operation": self.operation,
            "size": " x ".join(str(n) for n in self.size[:3] if n),
            "products": 1000 * products,
            "kernels": 1000 * sum(prediction.seconds for _, prediction in self.kernels),
            "other": 1000 * other,
            "total": 1000 * total,
            "over_products": total / products if products else None,
        }

    def kernel_rows(self) -> list[Row]:
        """Return a row for each kernel: its launches, ms of all of them, and the bound of the first."""
        first = self.row(H100)
        return [
            {
                **{name: first[name] for name in ("operation", "size")},
                "kernel": kernel,
                "launches": len(found),
                "ms": 1000 * sum(each.seconds for each in found),
                "bound": found[0].bound,
                **{name: 1000 * sum(getattr(each, name) for each in found) for name in _BOUNDS},
                "waves": found[0].waves,
            }
            for kernel in dict.fromkeys(name for name, _ in self.kernels)
            for found in [[prediction for name, prediction in self.kernels if name == kernel]]
        ]


_BOUNDS = ("memory", "issue", "special", "latency")


def predicted_calls(gpu: GPU = H100) -> list[PredictedCall]:
    """Record every operation at its sizes, compile what it launches, and predict its time."""
    todo = [
        (name, size)
        for name, size in product(RECORDERS, (*SIZES, RESPONSES))
        if name.startswith("policy_loss") == (size == RESPONSES)
    ]
    calls = [RECORDERS[name](size) for name, size in todo]
    return [
        PredictedCall(
            name,
            size,
            call,
            [
                (each.kernel.__name__, predict(binary, work_of(each, binary), gpu))
                for each, binary in zip(call.launches, binaries, strict=True)
            ],
        )
        for (name, size), call, binaries in zip(todo, calls, compiled(calls, gpu), strict=True)
    ]


def compiled(calls: Iterable[Call], gpu: GPU) -> list[list[Binary]]:
    """Return the binary of each launch of each call. Launches of the same code share one."""
    found = [[_launch(each, gpu.target) for each in call.launches] for call in calls]
    distinct = {launch.key(): launch for launches in found for launch in launches}
    binaries = dict(zip(distinct, compile_all(list(distinct.values())), strict=True))
    return [[binaries[launch.key()] for launch in launches] for launches in found]


def _launch(recorded: RecordedLaunch, target: str) -> Launch:
    """Return what is compiled for a recorded launch. Tensors begin at multiples of 16 bytes, as allocated ones do."""
    arguments: dict[str, Any] = {
        name: MockTensor(value.dtype) if isinstance(value, Tensor) else value
        for name, value in recorded.arguments.items()
    }
    case = Case("", "", lambda: recorded.kernel[recorded.grid](**arguments))
    (launch,) = launches([case], [target])
    return launch


def work_of(recorded: RecordedLaunch, binary: Binary) -> Work:
    """Return the work of a launch: each program takes the same share of the elements."""
    elements = binary.hot.elements if binary.hot else 0
    if not elements:
        raise ValueError(f"{binary.launch.kernel} must access blocks of elements, got none on its hot path")
    passes = math.ceil(recorded.elements / recorded.programs / elements)
    return Work(recorded.programs, passes, recorded.bytes)


KERNEL_COLUMNS: results.Columns = {
    "operation": lambda row: row["operation"],
    "size": lambda row: row["size"],
    "kernel": lambda row: row["kernel"].removesuffix("_kernel"),
    "launches": lambda row: row["launches"],
    "ms": lambda row: row["ms"],
    "bound": lambda row: row["bound"],
    "memory": lambda row: row["memory"],
    "issue": lambda row: row["issue"],
}
CALL_COLUMNS: results.Columns = {
    "operation": lambda row: row["operation"],
    "size": lambda row: row["size"],
    **{name: lambda row, name=name: row[name] for name in ("products", "kernels", "other", "total")},
    "over products": lambda row: row["over_products"],
}


def tables(calls: Iterable[Row], kernels: Sequence[Row]) -> str:
    """Format the predicted times of calls and of their kernels."""
    return (
        f"predicted ms on {H100.name}\n\n{results.table(kernels, KERNEL_COLUMNS)}\n\n"
        f"{results.table(calls, CALL_COLUMNS)}"
    )
