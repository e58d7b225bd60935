"""Fake CUDA device, which checks the host code of the operations without a GPU.

Bodies of operations run on fake tensors of ``cuda:1``, which have no values. Launches are recorded and checked instead
of executed. Allocations, and operations in which the host waits for the device, are recorded. Products with
``out_dtype``, which PyTorch supports only on CUDA, are computed in float32 if their factors have values.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import KernelInterface

import sppo_kernels.ops
from sppo_kernels._registration import Operation
from sppo_kernels.ops.linear_logprobs import indexing
from sppo_kernels.ops.linear_logprobs.output import ForwardOutput

DEVICE = torch.device("cuda:1")
HALVES = (torch.float16, torch.bfloat16)
LAUNCH_OPTIONS = {"num_warps", "num_stages", "num_ctas", "maxnreg"}
aten = torch.ops.aten


def registered_operations() -> dict[str, Operation]:
    """Return the registered operations of this package by name."""
    names = [module.name for module in pkgutil.walk_packages(sppo_kernels.ops.__path__, "sppo_kernels.ops.")]
    found = [x for name in names for x in vars(importlib.import_module(name)).values()]
    return {op.name: op for op in found if isinstance(op, Operation)}


# Products


class Product(NamedTuple):
    """Recorded matrix product."""

    shape: tuple[int, int, int]
    dtype: torch.dtype
    out_dtype: torch.dtype
    added: bool


class Products:
    """Replacements of ``torch.mm`` and ``torch.addmm`` with ATen's checks on CUDA (aten/src/ATen/native/cuda/Blas.cpp).

    The checks are those of ``_mm_dtype_out_cuda``, ``_addmm_dtype_out_cuda`` and ``addmm_out_cuda_impl``, with
    TunableOp enabled. Two more check that ``prepare_matrix_for_cublas`` copies no matrix, which would be slow, and that
    autocast is off.
    """

    def __init__(self, monkeypatch) -> None:
        self.made: list[Product] = []
        self._mm, self._addmm = torch.mm, torch.addmm
        monkeypatch.setattr(torch, "mm", self.mm)
        monkeypatch.setattr(torch, "addmm", self.addmm)

    def mm(self, a: Tensor, b: Tensor, *, out_dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        self._check(None, a, b, out_dtype, out)
        if isinstance(a, FakeTensor):
            return a.new_empty(len(a), b.shape[1], dtype=out_dtype or a.dtype) if out is None else out
        if out_dtype is None:
            return self._mm(a, b, out=out)
        product = self._mm(a.float(), b.float()).to(out_dtype)
        return product if out is None else out.copy_(product)

    def addmm(
        self,
        addend: Tensor,
        a: Tensor,
        b: Tensor,
        *,
        out_dtype: torch.dtype | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        self._check(addend, a, b, out_dtype, out)
        if isinstance(a, FakeTensor):
            return a.new_empty(len(a), b.shape[1], dtype=out_dtype or a.dtype) if out is None else out
        if out_dtype is None:
            return self._addmm(addend, a, b, out=out)
        total = (addend.float() + self._mm(a.float(), b.float())).to(out_dtype)
        return total if out is None else out.copy_(total)

    def _check(
        self, addend: Tensor | None, a: Tensor, b: Tensor, out_dtype: torch.dtype | None, out: Tensor | None
    ) -> None:
        assert a.dim() == 2, f"mat1 must be a matrix, got {a.dim()}-D"
        assert b.dim() == 2, f"mat2 must be a matrix, got {b.dim()}-D"
        assert a.shape[1] == b.shape[0], f"{tuple(a.shape)} and {tuple(b.shape)} cannot be multiplied"
        assert a.dtype == b.dtype, f"input dtypes must be the same, got {a.dtype} and {b.dtype}"
        shape, out_dtype = (len(a), b.shape[1]), out_dtype or a.dtype
        assert out_dtype == a.dtype or (out_dtype == torch.float32 and a.dtype in HALVES), (
            f"out_dtype must be that of the inputs, or float32 for float16 and bfloat16: {out_dtype} for {a.dtype}"
        )
        if out is not None:
            assert out.dtype == out_dtype, f"out must be {out_dtype}, got {out.dtype}"
            assert tuple(out.shape) == shape, f"out must be {shape}, got {tuple(out.shape)}"
        if addend is not None:
            assert addend.dtype in (out_dtype, a.dtype), f"self must be {out_dtype} or {a.dtype}, got {addend.dtype}"
            assert tuple(addend.shape) == shape, f"self must be {shape}, got {tuple(addend.shape)}"
            is_unsupported = out_dtype != a.dtype and _runs_in_cublas_lt(addend, b)
            assert not is_unsupported, "Tunable GEMM is not supported for float output with reduced float input"
        for x in (addend, b, out):
            assert x is None or x.device == a.device, f"expected {a.device}, got {x.device}"
        for name, x in (("mat1", a), ("mat2", b), ("self", addend), ("out", out)):
            assert x is None or _needs_no_copy(x), f"{name} {tuple(x.shape)} with strides {x.stride()} is copied"
        assert not torch.is_autocast_enabled(a.device.type), "autocast is on"
        self.made.append(Product((*a.shape, b.shape[1]), a.dtype, out_dtype, addend is not None))


def _needs_no_copy(x: Tensor) -> bool:
    (rows, columns), (down, across) = x.shape, x.stride()
    is_row_major = across == 1 and down >= max(1, columns)
    is_column_major = down == 1 and across >= max(1, rows)
    return is_row_major or is_column_major or x.is_contiguous() or x.t().is_contiguous()


def _runs_in_cublas_lt(addend: Tensor, b: Tensor) -> bool:
    """Return what ``isInputCompliesAddmmCudaLt`` does, which takes a single row for a bias."""
    return (
        addend.is_contiguous() and addend.squeeze().dim() == 1 and addend.shape[-1] == b.shape[1] and min(b.shape) > 1
    )


# Launches


class Launch(NamedTuple):
    """Recorded launch of a kernel."""

    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    @property
    def rows(self) -> int:
        """Return the number of rows of a kernel that runs PARTS programs per row."""
        return self.grid[0] // self.arguments["PARTS"]


class Launches:
    """Replacement of every launch that checks it (see ``_launch``) and records it."""

    def __init__(self, monkeypatch) -> None:
        self.made: list[Launch] = []
        self.sizes: dict[str, object] = {}  # expected values of parameters, or functions of all, by name or kernel.name
        self._current = torch.device("cuda:0")
        monkeypatch.setattr(torch.cuda, "device", self._guard)
        monkeypatch.setattr(KernelInterface, "__getitem__", lambda kernel, grid: partial(self._launch, kernel, grid))

    @contextmanager
    def _guard(self, device: torch.device) -> Iterator[None]:
        previous, self._current = self._current, torch.device(device)
        try:
            yield
        finally:
            self._current = previous

    def _launch(self, kernel: Any, grid: tuple[int, ...], **settings: Any) -> None:
        """Check the current device, the limits of the grid and the parameters, then record the launch.

        Each parameter must be given once and have the type that its name implies: tensors are called ``..._ptr``. The
        strides of a tensor that is not contiguous must be among the integer arguments. Each row must have PARTS
        programs, whose ranges of PART columns, all but the last in whole blocks, must cover it once.
        """
        name = kernel.fn.__name__
        assert self._current == DEVICE, f"{name}: launched while {self._current} is current"
        assert 1 <= len(grid) <= 3, name
        assert all(isinstance(x, int) for x in grid), f"{name}: grid {grid}"
        for size, limit in zip(grid, (2**31 - 1, 65535, 65535), strict=False):
            assert 1 <= size <= limit, f"{name}: grid {grid}"
        arguments = {key: value for key, value in settings.items() if key not in LAUNCH_OPTIONS}
        warps = settings.get("num_warps", 4)
        assert warps in (1, 2, 4, 8, 16, 32), f"{name}: num_warps {warps}"
        signature = inspect.signature(kernel.fn)
        bound = signature.bind(**arguments).arguments  # TypeError: a parameter is missing or unknown
        assert list(bound) == list(kernel.arg_names), name
        integers = [x for x in bound.values() if isinstance(x, int)]
        for key, x in bound.items():
            if "constexpr" in str(signature.parameters[key].annotation):
                assert isinstance(x, (bool, int, float, str)), f"{name}: {key} is {x!r}"
                assert not key.startswith("BLOCK") or x & (x - 1) == 0 < x, f"{name}: {key} is {x}"
            elif key.endswith("_ptr"):
                assert x is None or isinstance(x, Tensor), f"{name}: {key} is {x!r}"
            else:
                assert x is None or (isinstance(x, (int, float)) and not isinstance(x, bool)), f"{name}: {key} is {x!r}"
            if isinstance(x, int):
                assert -(2**63) <= x < 2**63, f"{name}: {key} is {x}"
            if isinstance(x, Tensor):
                assert x.device == DEVICE, f"{name}: {key} is on {x.device}"
                strides = [s for s, size in zip(x.stride(), x.shape, strict=True) if size > 1 and s != 1]
                passed = x.is_contiguous() or all(s in integers for s in strides)
                assert passed, f"{name}: {key} has strides {x.stride()}, the integer arguments are {integers}"
            expected = self.sizes.get(f"{name}.{key}", self.sizes.get(key, x))
            expected = expected(bound) if callable(expected) else expected
            assert x is expected or x == expected, f"{name}: {key} is {x}, not {expected}"
        if "PARTS" in bound:
            parts, part, columns, block = (bound[key] for key in ("PARTS", "PART", "V", "BLOCK"))
            assert grid[0] % parts == 0, f"{name}: grid {grid}, {parts} parts"
            assert part % block == 0, f"{name}: parts of {part} columns, blocks of {block}"
            assert (parts - 1) * part < columns <= parts * part, f"{name}: {parts} parts of {part} of {columns} columns"
        self.made.append(Launch(name, grid, dict(bound)))

    def names(self) -> set[str]:
        return {launch.kernel for launch in self.made}

    def of(self, kernel: str) -> list[Launch]:
        return [launch for launch in self.made if launch.kernel == kernel]


# Tensors without values


def without_context(monkeypatch) -> None:
    """Keep a fake tensor from creating a real one on its device first, which a machine with a GPU may lack."""
    monkeypatch.setattr(fake_tensor, "init_gpu_context", lambda device: None)


class HostReads(TorchFunctionMode):
    """Results of operations in which the host reads values from the device.

    By default all elements of a mask are set and all elements of a tensor are distinct. The mode also implements
    ``data_ptr``, and indexing, ``contiguous`` and ``~``, for which a PyTorch built without CUDA lacks the device guard.

    Attributes:
        counts: number of set elements of successive masks.
        numbers: successive results of ``float`` and elements of ``tolist``.
        waits: names of the operations in which the host waited for the device: those that read from it, and copies
            from or to pageable memory. Others that PyTorch makes wait fail on fake tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: deque[int] = deque()
        self.numbers: deque[float] = deque()
        self.waits: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        read = _READS.get(name)
        if read is not None and isinstance(args[0], FakeTensor):
            return read(self, *args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if name in _COPIES and isinstance(result, Tensor):
            # Without a tensor among them, the arguments are numbers in the memory of the host.
            sources = {x.device for x in args if isinstance(x, Tensor)} if name in _COPIES_OF_TENSORS else set()
            if DEVICE in {result.device, *sources} and sources != {result.device}:
                self.waits.append(name)
        return result

    def _nonzero(self, mask: Tensor, *, as_tuple: bool = False):
        self.waits.append("nonzero")
        count = self.counts.popleft() if self.counts else mask.numel()
        if as_tuple:
            return tuple(mask.new_empty(count, dtype=torch.int64) for _ in mask.shape)
        return mask.new_empty(count, mask.dim(), dtype=torch.int64)

    def _unique_consecutive(self, x: Tensor, *, return_counts: bool, **_: Any):
        assert return_counts
        self.waits.append("unique_consecutive")
        return x.new_empty(len(x)), x.new_empty(len(x), dtype=torch.int64)

    def _repeat_interleave(self, x: Tensor, repeats: Tensor):
        assert repeats.shape == x.shape
        self.waits.append("repeat_interleave")
        return x.new_empty(2 * len(x))

    def _bool(self, x: Tensor) -> bool:
        assert x.numel() == 1
        self.waits.append("bool")
        return True

    def _number(self, x: Tensor) -> float:
        assert x.numel() == 1
        self.waits.append("number")
        return self.numbers.popleft()

    def tolist(self, x: Tensor) -> list[float]:
        """Replace ``FakeTensor.tolist``, which modes do not see."""
        assert x.dim() == 1
        self.waits.append("tolist")
        return [self.numbers.popleft() for _ in range(len(x))]

    def _data_ptr(self, x: Tensor) -> int:
        """Return an address as of memory from PyTorch's allocator, which begins at multiples of 512 bytes."""
        return (1 << 20) + x.storage_offset() * x.itemsize

    def _contiguous(self, x: Tensor) -> Tensor:
        return x if x.is_contiguous() else aten.clone(x, memory_format=torch.contiguous_format)

    def _getitem(self, x: Tensor, key: Any) -> Tensor:
        x, indices = self._view(x, key)
        return aten.index(x, indices) if indices else x

    def _setitem(self, x: Tensor, key: Any, value: Any) -> None:
        x, indices = self._view(x, key)
        if not isinstance(value, Tensor):
            value = torch.full((), value, dtype=x.dtype, device=x.device)
        assert value.device == x.device
        if indices:
            assert value.dtype == x.dtype, f"index put requires the same dtype, got {x.dtype} and {value.dtype}"
            aten.index_put_(x, indices, value)
        else:
            aten.copy_(x, value)

    def _view(self, x: Tensor, key: Any) -> tuple[Tensor, list[Tensor | None]]:
        """Apply slices, integers, None and ``...`` to ``x``. Return the view and the tensors that index it."""
        dim, indices = 0, {}
        keys = key if isinstance(key, tuple) else (key,)
        for k in keys:
            if k is ...:
                dim = x.dim() - sum(following is not None for following in keys[keys.index(...) + 1 :])
            elif k is None:
                x, dim = aten.unsqueeze(x, dim), dim + 1
            elif isinstance(k, slice):
                x, dim = aten.slice(x, dim, k.start, k.stop, k.step or 1), dim + 1
            elif isinstance(k, Tensor):
                assert k.device == x.device, f"{x.device} indexed on {k.device}"
                indices[dim] = self._nonzero(k).squeeze(-1) if k.dtype == torch.bool else k
                dim += 1
            elif isinstance(k, int):
                x = aten.select(x, dim, k)
            else:
                raise NotImplementedError(f"index {k!r}")
        return x, [indices.get(d) for d in range(max(indices, default=-1) + 1)]


_READS: dict[str, Callable[..., Any]] = {
    "nonzero": HostReads._nonzero,
    "unique_consecutive": HostReads._unique_consecutive,
    "repeat_interleave": HostReads._repeat_interleave,
    "__bool__": HostReads._bool,
    "__float__": HostReads._number,
    "item": HostReads._number,
    "data_ptr": HostReads._data_ptr,
    "contiguous": HostReads._contiguous,
    "__invert__": lambda self, x: aten.bitwise_not(x),
    "__getitem__": HostReads._getitem,
    "__setitem__": HostReads._setitem,
}
_COPIES_OF_TENSORS = {"to", "cpu", "cuda"}
_COPIES = {"tensor", "as_tensor", "new_tensor"} | _COPIES_OF_TENSORS


class Allocations(TorchFunctionMode):
    """Record of what functions allocate on the device: dtype and bytes of the new memory of each result."""

    def __init__(self) -> None:
        super().__init__()
        self.made: set[tuple[torch.dtype, int]] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, FakeTensor)}
        for x in tree_leaves(result):
            if isinstance(x, FakeTensor) and x.device == DEVICE and x.untyped_storage()._cdata not in given:
                self.made.add((x.dtype, x.untyped_storage().nbytes()))
        return result

    def largest(self, dtype: torch.dtype) -> int:
        """Return the bytes of the largest tensor of ``dtype``."""
        return max((size for made, size in self.made if made == dtype), default=0)


# Dimensions of the results of linear_logprobs whose sizes depend on values.
_DYNAMIC = {"cached_probs": 0, "cached_factors": 1, "sparse_index": 0, "sparse_value": 0, "tokens": 0}


class FakeCUDA:
    """Fake CUDA device on which bodies of operations run.

    Attributes:
        launches, products: the recorded kernel launches and matrix products.
        reads: the values that the host reads.
        allocations: the memory that is allocated.
        kinds: for successive backward passes, how many tokens are recomputed, cached and sparse; the others have no
            gradient. By default all are of the one kind that is possible, or recomputed.
        free: free bytes that ``torch.cuda.mem_get_info`` reports.
    """

    def __init__(self, monkeypatch) -> None:
        self.launches, self.products, self.reads = Launches(monkeypatch), Products(monkeypatch), HostReads()
        self.allocations = Allocations()
        self.kinds: deque[tuple[int, int, int]] = deque()
        self.free = 1 << 30
        self._library_partition = indexing.partition
        monkeypatch.setattr(indexing, "partition", self._partition)
        monkeypatch.setattr(FakeTensor, "tolist", lambda x: self.reads.tolist(x))
        for name, value in (("mem_get_info", lambda: (self.free, 80 << 30)), ("memory_reserved", lambda: 0),
                            ("memory_allocated", lambda: 0)):  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, partial(self._memory, value))
        monkeypatch.setattr(torch.library, "get_ctx", self._no_symbolic_sizes)
        without_context(monkeypatch)

    def _no_symbolic_sizes(self) -> None:
        raise RuntimeError("the fake device has no symbolic sizes")

    def _partition(self, selected: Tensor, kind: Tensor | int, number: int) -> list[Tensor]:
        """Run the library's function, which reads ``kinds``."""
        everything = [0] * number
        everything[kind if isinstance(kind, int) else 0] = len(selected)
        sizes = self.kinds.popleft() if self.kinds else everything
        assert len(sizes) == number
        assert sum(sizes) <= len(selected)
        if isinstance(kind, int):
            self.reads.counts.appendleft(sizes[kind])
        else:
            self.reads.numbers.extendleft(reversed(sizes))
        parts = self._library_partition(selected, kind, number)
        assert [len(part) for part in parts] == list(sizes)
        return parts

    def _memory(self, value: Callable[[], Any], device: torch.device) -> Any:
        assert torch.device(device) == DEVICE
        return value()

    @contextmanager
    def active(self) -> Iterator[FakeCUDA]:
        with ExitStack() as stack:
            stack.enter_context(FakeTensorMode())
            stack.enter_context(self.reads)
            stack.enter_context(self.allocations)
            yield self

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=DEVICE)

    def run(self, op: Operation, **arguments: Any) -> Any:
        """Run the body of ``op`` and check device, shapes, dtypes and strides against its fake implementation."""
        results = op.function(**arguments)
        fake_results = op.fake(**arguments)
        for i, (got, expected) in enumerate(zip(tree_leaves(results), tree_leaves(fake_results), strict=True)):
            assert got.device == DEVICE, f"{op.name}, result {i}: on {got.device}"
            assert got.dtype == expected.dtype, f"{op.name}, result {i}: {got.dtype}, not {expected.dtype}"
            assert got.is_contiguous() == expected.is_contiguous(), f"{op.name}, result {i}: strides {got.stride()}"
            # How many rows are cached or sparse, and have a loss, depends on values; the fake has one per token.
            dim = _DYNAMIC.get(ForwardOutput._fields[i]) if op.name == "linear_logprobs" else None
            sizes = list(expected.shape)
            if dim is not None:
                assert got.shape[dim] <= sizes[dim], f"{op.name}, result {i}: {tuple(got.shape)}"
                sizes[dim] = got.shape[dim]
            assert list(got.shape) == sizes, f"{op.name}, result {i}: {tuple(got.shape)}"
        assert not self.kinds, "not all numbers of tokens were read"
        assert not self.reads.counts, "not all counts were read"
        assert not self.reads.numbers, "not all numbers were read"
        return results
