"""What whole operations do at real sizes: launches, matrix products and other traffic, recorded without a GPU.

Operations run on fake tensors, which have sizes and no data, as on a CUDA device, and their launches are recorded
instead of made. How many sparse entries a token has depends on data: "sparse" is recorded with ENTRIES for each token.
Rows that kernels gather count as read from memory every time, though the L2 cache may hold them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sppo_kernels
from benchmarks.harness import library_seams
from benchmarks.harness.operations import OPERATIONS
from benchmarks.harness.problem import ProblemSize

CPU = torch.device("cpu")
SUPPORT = 20  # tokens that the sampler keeps, as with top_k=20
SUPPORTED = f"linear_logprobs, support of {SUPPORT}"
ENTRIES = 62  # assumed for each token in "sparse"; the suite sparse measures means of 40 to 130


@dataclass(frozen=True)
class RecordedLaunch:
    """A launch of a kernel: its grid and its arguments by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments."""
        return [x for x in self.arguments.values() if isinstance(x, Tensor)]

    @property
    def programs(self) -> int:
        """Programs of the grid."""
        return math.prod(self.grid)

    @property
    def elements(self) -> int:
        """Elements that are accessed of the argument of which the most are."""
        return max(self._accessed().values())

    @property
    def bytes(self) -> float:
        """Bytes of what is accessed of all tensor arguments. Kernels read or write each once, or as ACCESSED says."""
        again = READ_AND_WRITTEN.get(self.kernel.__name__, ()) if self.kernel else ()
        again = () if self.arguments.get("OUT_IS_ZERO") else again
        return sum(
            (2 if name in again else 1) * count * self.arguments[name].itemsize
            for name, count in self._accessed().items()
        )

    def _accessed(self) -> dict[str, int]:
        """Return how many elements of each tensor are accessed."""
        found = {name: x.numel() for name, x in self.arguments.items() if isinstance(x, Tensor)}
        parts = ACCESSED.get(self.kernel.__name__) if self.kernel else None
        return {**found, **{name: n for name, n in parts(self.arguments).items() if name in found}} if parts else found


def _of_scaled_rows(given: dict[str, Any]) -> dict[str, int]:
    """Each row of the factors has one of out, of x and of the weight, which the tensors may have more of."""
    index = next((given[name] for name in ("source_ptr", "target_ptr") if given[name] is not None), given["x_ptr"])
    return dict.fromkeys(("out_ptr", "x_ptr", "weight_ptr"), len(index) * given["H"])


def _of_weighted_rows(given: dict[str, Any]) -> dict[str, int]:
    """Each entry has a row; as many places as there can be have one of out. Sums of pieces are few."""
    rows = given["M"] * given["H"]
    return {"out_ptr": min(rows, given["out_ptr"].numel()), "rows_ptr": rows, "open_ptr": 0}


def _of_open_rows(given: dict[str, Any]) -> dict[str, int]:
    """Assume that no place lies in more than two pieces, so that each program adds up two rows at most."""
    pieces = -(-given["M"] // given["PIECE"])
    return {"out_ptr": pieces * given["H"], "place_ptr": 3 * pieces}


def _of_candidates(given: dict[str, Any]) -> dict[str, int]:
    """The maxima of all groups are read, and the logits of one group per candidate."""
    entries = len(given["label_ptr"]) * ENTRIES
    return {"x_ptr": entries * given["GROUP"], "group_ptr": 2 * entries, "candidate_ptr": entries}


def _of_selection(given: dict[str, Any]) -> dict[str, int]:
    """Column and logit of each candidate are read, of which most are entries."""
    return dict.fromkeys(("x_ptr", "candidate_ptr", "index_ptr", "value_ptr"), len(given["label_ptr"]) * ENTRIES)


def _of_entry_logits(given: dict[str, Any]) -> dict[str, int]:
    """Each entry reads a row of the weight. The hidden state of a token's entries is in the cache after the first."""
    rows = given["M"] * given["H"]
    return {"hidden_ptr": min(rows, given["hidden_ptr"].numel()), "weight_ptr": rows}


def _of_support_backward(given: dict[str, Any]) -> dict[str, int]:
    """Each entry reads its logit and its token's numbers, which count once per token."""
    return dict.fromkeys(("x_ptr", "id_ptr"), given["E"])


# What kernels access of their tensors, if it is not all: elements by the name of the argument.
ACCESSED: dict[str, Callable[[dict[str, Any]], dict[str, int]]] = {
    "linear_logprobs_scaled_rows_kernel": _of_scaled_rows,
    "linear_logprobs_weighted_rows_kernel": _of_weighted_rows,
    "linear_logprobs_open_rows_kernel": _of_open_rows,
    "linear_logprobs_candidates_kernel": _of_candidates,
    "linear_logprobs_select_kernel": _of_selection,
    "linear_logprobs_entry_logits_kernel": _of_entry_logits,
    "support_bwd_kernel": _of_support_backward,
}
# Sums that are read, and written again, unless they begin at zero.
READ_AND_WRITTEN = dict.fromkeys(
    ("linear_logprobs_weighted_rows_kernel", "linear_logprobs_open_rows_kernel"), ("out_ptr",)
)


@dataclass
class Call:
    """All that a call does: its launches, the FLOPs of its products, and other operations with the bytes they move."""

    launches: list[RecordedLaunch] = field(default_factory=list)
    flops: float = 0.0
    other_bytes: float = 0.0
    other_operations: int = 0


class _Operations(TorchDispatchMode):
    """Adds the products and the elementwise traffic of PyTorch's operations to a call."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in library_seams.OPERATION_BODIES:
            with self:
                return library_seams.OPERATION_BODIES[func](*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if name in ("mm", "addmm"):
            a, b = [x for x in args if isinstance(x, Tensor)][-2:]
            self.call.flops += 2.0 * a.shape[0] * a.shape[1] * b.shape[1]
            if kwargs.get("out") is not None:  # exists only for CUDA, and writes in place
                return kwargs["out"]
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        casts = name == "to" and made[0].dtype != given[0].dtype  # else it returns what it was given
        if func.namespace == "aten" and (casts or not func.is_view) and "empty" not in name:
            self.call.other_bytes += _traffic(name, given, made)
            self.call.other_operations += 1
        return out


def _traffic(name: str, given: list[Tensor], made: list[Tensor]) -> int:
    """Return the bytes that an elementwise operation reads and writes."""
    if name in ("index", "index_put_", "index_select"):  # only the selected rows
        return 2 * _bytes(made if name != "index_put_" else given[-1:])
    if name == "copy_":
        return _bytes(given)
    if name.startswith(("new_", "zeros", "zero_", "ones", "full", "fill", "arange", "scalar_tensor")):
        return _bytes(made)
    return _bytes(given) + _bytes(made)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.itemsize for x in tensors)


@contextmanager
def recorded(selection: library_seams.Selection = library_seams.NOTHING_SELECTED) -> Iterator[Call]:
    """Record what happens inside this context. ``selection`` is that of ``on_cuda_without_kernels``."""
    call = Call()

    def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        call.launches.append(RecordedLaunch(kernel, grid, arguments))

    with library_seams.on_cuda_without_kernels(selection, launch), _Operations(call):
        yield call


def linear_logprobs_call(size: ProblemSize, mode: str, *, projection: str = "vendor", gradients: bool = True) -> Call:
    """Record linear_logprobs, and its backward pass if there are ``gradients``."""
    with FakeTensorMode():
        hidden, weight, labels = _linear_inputs(size, gradients)
        selection = library_seams.selection_by_tokens(
            size.tokens,
            cached=size.tokens if mode == "cache" else 0,
            entries=ENTRIES if mode == "sparse" else 0,
        )
        with recorded(selection) as call:
            out = library_seams.linear_logprobs(
                hidden,
                weight,
                labels,
                backward=mode,
                logits_budget_bytes=None,
                chunk_bytes=library_seams.ACCELERATOR_CHUNK_BYTES,
                projection=projection,
            )
            if gradients:
                torch.autograd.grad(out.logprobs, (hidden, weight), torch.empty(size.tokens))
    return call


def _linear_logprobs_of_supports(size: ProblemSize) -> Call:
    with FakeTensorMode():
        hidden, weight, labels = _linear_inputs(size)
        ids = torch.empty(size.tokens * SUPPORT, dtype=torch.int32)
        offsets = torch.empty(size.tokens + 1, dtype=torch.int64)
        with recorded(library_seams.selection_by_supports(size.tokens, SUPPORT)) as call:
            out = library_seams.linear_logprobs(
                hidden,
                weight,
                labels,
                backward="recompute",
                logits_budget_bytes=None,
                chunk_bytes=library_seams.ACCELERATOR_CHUNK_BYTES,
                support=(ids, offsets),
            )
            torch.autograd.grad(out.logprobs, (hidden, weight), torch.empty(size.tokens))
    return call


def _linear_policy_loss(size: ProblemSize) -> Call:
    chunk_bytes = library_seams.ACCELERATOR_CHUNK_BYTES
    with FakeTensorMode():
        hidden, weight, labels = _linear_inputs(size)
        old_logprobs, advantages = (torch.empty(size.tokens) for _ in range(2))
        block = library_seams.block_size(hidden, weight, labels, chunk_bytes)
        with recorded(library_seams.selection_by_blocks(size.tokens, block)) as call:
            library_seams.linear_policy_loss(
                hidden,
                weight,
                labels,
                old_logprobs=old_logprobs,
                advantages=advantages,
                cu_seqlens=torch.empty(9, dtype=torch.int32),
                chunk_bytes=chunk_bytes,
            )
    return call


def _linear_inputs(size: ProblemSize, gradients: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.empty(size.tokens, size.hidden, dtype=torch.bfloat16, requires_grad=gradients)
    weight = torch.empty(size.vocab, size.hidden, dtype=torch.bfloat16, requires_grad=gradients)
    return hidden, weight, torch.empty(size.tokens, dtype=torch.int64)


def _selective_logprobs(size: ProblemSize) -> Call:
    with FakeTensorMode():
        logits = torch.empty(size.tokens, size.vocab, dtype=torch.bfloat16, requires_grad=True)
        labels = torch.empty(size.tokens, dtype=torch.int64)
        with recorded() as call:
            out = sppo_kernels.selective_logprobs(logits, labels, backend="triton")
            torch.autograd.grad(out.logprobs, logits, torch.empty(size.tokens))
    return call


def _whole(name: str) -> Callable[[ProblemSize], Call]:
    """Return a recorder of an operation that needs the values of its inputs, such as the lengths of responses."""

    def record(size: ProblemSize) -> Call:
        torch.manual_seed(0)
        problem = OPERATIONS[name].inputs(size, CPU, torch.float32)
        with recorded() as call:
            problem.results(OPERATIONS[name].implementations("triton")[""])
        return call

    return record


RECORDERS: dict[str, Callable[[ProblemSize], Call]] = {
    "selective_logprobs": _selective_logprobs,
    "linear_logprobs, cache": lambda size: linear_logprobs_call(size, "cache"),
    "linear_logprobs, recompute": lambda size: linear_logprobs_call(size, "recompute"),
    "linear_logprobs, sparse": lambda size: linear_logprobs_call(size, "sparse"),
    SUPPORTED: _linear_logprobs_of_supports,
    "linear_policy_loss": _linear_policy_loss,
    "policy_loss, token": _whole("policy_loss, token"),
    "policy_loss, sequence_mean": _whole("policy_loss, sequence_mean"),
}
