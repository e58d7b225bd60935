"""Stand-ins for a CUDA device: what the host does for one is checked where there is none.

Bodies of operations run on fake tensors of ``cuda:1``, which have no values; launches are noted and checked, not made.
Products with ``out_dtype``, which PyTorch has for CUDA alone, are made in float32 where their factors have values.
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

DEVICE = torch.device("cuda:1")
HALVES = (torch.float16, torch.bfloat16)
LAUNCH_OPTIONS = {"num_warps", "num_stages", "num_ctas", "maxnreg"}
aten = torch.ops.aten


def registered_operations() -> dict[str, torch.library.CustomOpDef]:
    """All that this package registers, by name."""
    names = [module.name for module in pkgutil.walk_packages(sppo_kernels.ops.__path__, "sppo_kernels.ops.")]
    found = [x for name in names for x in vars(importlib.import_module(name)).values()]
    return {op._name: op for op in found if isinstance(op, torch.library.CustomOpDef)}


# Products


class Product(NamedTuple):
    """A matrix product that was asked for."""

    shape: tuple[int, int, int]
    dtype: torch.dtype
    out_dtype: torch.dtype
    added: bool


class Products:
    """``torch.mm`` and ``torch.addmm``, with the checks that ATen makes on CUDA (aten/src/ATen/native/cuda/Blas.cpp).

    Those of ``_mm_dtype_out_cuda``, ``_addmm_dtype_out_cuda`` and ``addmm_out_cuda_impl``, with TunableOp enabled; and,
    as it would be slow, that ``prepare_matrix_for_cublas`` copies none of the matrices, and that autocast is off.
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
        plus: Tensor,
        a: Tensor,
        b: Tensor,
        *,
        out_dtype: torch.dtype | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        self._check(plus, a, b, out_dtype, out)
        if isinstance(a, FakeTensor):
            return a.new_empty(len(a), b.shape[1], dtype=out_dtype or a.dtype) if out is None else out
        if out_dtype is None:
            return self._addmm(plus, a, b, out=out)
        total = (plus.float() + self._mm(a.float(), b.float())).to(out_dtype)
        return total if out is None else out.copy_(total)

    def _check(
        self, plus: Tensor | None, a: Tensor, b: Tensor, out_dtype: torch.dtype | None, out: Tensor | None
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
        if plus is not None:
            assert plus.dtype in (out_dtype, a.dtype), f"self must be {out_dtype} or {a.dtype}, got {plus.dtype}"
            assert tuple(plus.shape) == shape, f"self must be {shape}, got {tuple(plus.shape)}"
            refused = out_dtype != a.dtype and _goes_to_cublas_lt(plus, b)
            assert not refused, "Tunable GEMM is not supported for float output with reduced float input"
        for x in (plus, b, out):
            assert x is None or x.device == a.device, f"expected {a.device}, got {x.device}"
        for name, x in (("mat1", a), ("mat2", b), ("self", plus), ("out", out)):
            assert x is None or _needs_no_copy(x), f"{name} {tuple(x.shape)} with strides {x.stride()} is copied"
        assert not torch.is_autocast_enabled(a.device.type), "autocast is on"
        self.made.append(Product((*a.shape, b.shape[1]), a.dtype, out_dtype, plus is not None))


def _needs_no_copy(x: Tensor) -> bool:
    (rows, columns), (down, across) = x.shape, x.stride()
    lies_row_by_row = across == 1 and down >= max(1, columns)
    lies_column_by_column = down == 1 and across >= max(1, rows)
    return lies_row_by_row or lies_column_by_column or x.is_contiguous() or x.t().is_contiguous()


def _goes_to_cublas_lt(plus: Tensor, b: Tensor) -> bool:
    """As ``isInputCompliesAddmmCudaLt`` has it: one row is taken for a bias."""
    return plus.is_contiguous() and plus.squeeze().dim() == 1 and plus.shape[-1] == b.shape[1] and min(b.shape) > 1


# Launches


class Launch(NamedTuple):
    """A kernel that was launched."""

    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]


class Launches:
    """Takes the place of every launch, and checks it: see ``_launch``."""

    def __init__(self, monkeypatch) -> None:
        self.made: list[Launch] = []
        self.sizes: dict[str, object] = {}  # what parameters of these names must be
        self._current = torch.device("cuda:0")
        monkeypatch.setattr(torch.cuda, "device", self._guard)
        monkeypatch.setattr(KernelInterface, "__getitem__", lambda kernel, grid: partial(self._launch, kernel, grid))

    @contextmanager
    def _guard(self, device: torch.device) -> Iterator[None]:
        before, self._current = self._current, torch.device(device)
        try:
            yield
        finally:
            self._current = before

    def _launch(self, kernel: Any, grid: tuple[int, ...], **settings: Any) -> None:
        """On the device of its tensors, within the limits of a grid, with each parameter given once, and as its name
        says: tensors are called ``..._ptr``, and lie as the strides say that are given beside them."""
        name = kernel.fn.__name__
        assert self._current == DEVICE, f"{name}: launched while {self._current} is current"
        assert 1 <= len(grid) <= 3, name
        assert all(isinstance(x, int) for x in grid), f"{name}: grid {grid}"
        for size, limit in zip(grid, (2**31 - 1, 65535, 65535), strict=False):
            assert 1 <= size <= limit, f"{name}: grid {grid}"
        given = {key: value for key, value in settings.items() if key not in LAUNCH_OPTIONS}
        warps = settings.get("num_warps", 4)
        assert warps in (1, 2, 4, 8, 16, 32), f"{name}: num_warps {warps}"
        signature = inspect.signature(kernel.fn)
        bound = signature.bind(**given).arguments  # TypeError: one missing or unknown
        assert list(bound) == list(kernel.arg_names), name
        numbers = [x for x in bound.values() if isinstance(x, int)]
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
                known = x.is_contiguous() or all(s in numbers for s in strides)
                assert known, f"{name}: {key} has strides {x.stride()}, told are {numbers}"
            if key in self.sizes:
                assert x == self.sizes[key], f"{name}: {key} is {x}, not {self.sizes[key]}"
        self.made.append(Launch(name, grid, dict(bound)))

    def names(self) -> set[str]:
        return {launch.kernel for launch in self.made}

    def of(self, kernel: str) -> list[Launch]:
        return [launch for launch in self.made if launch.kernel == kernel]


# Tensors without values


def without_context(monkeypatch) -> None:
    """Where there is a GPU, a fake tensor begins with a real one on its device, which need not be there."""
    monkeypatch.setattr(fake_tensor, "init_gpu_context", lambda device: None)


class Answers(TorchFunctionMode):
    """What the host reads from the device: as many as a mask is long, a piece for each, unless a test says otherwise.

    And indexing, ``contiguous`` and ``~``, where PyTorch asks for CUDA's device guard: built without CUDA it has none.

    Attributes:
        counts: how many are set in one mask after the other.
        numbers: that are read, by ``float`` or one after the other by ``tolist``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: deque[int] = deque()
        self.numbers: deque[float] = deque()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        answer = _ANSWERS.get(getattr(func, "__name__", ""))
        if answer is not None and isinstance(args[0], FakeTensor):
            return answer(self, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _nonzero(self, mask: Tensor, *, as_tuple: bool = False):
        count = self.counts.popleft() if self.counts else mask.numel()
        if as_tuple:
            return tuple(mask.new_empty(count, dtype=torch.int64) for _ in mask.shape)
        return mask.new_empty(count, mask.dim(), dtype=torch.int64)

    def _unique_consecutive(self, x: Tensor, *, return_counts: bool, **_: Any):
        assert return_counts
        return x.new_empty(len(x)), x.new_empty(len(x), dtype=torch.int64)

    def _repeat_interleave(self, x: Tensor, repeats: Tensor):
        assert repeats.shape == x.shape
        return x.new_empty(2 * len(x))

    def _bool(self, x: Tensor) -> bool:
        assert x.numel() == 1
        return True

    def _number(self, x: Tensor) -> float:
        assert x.numel() == 1
        return self.numbers.popleft()

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
        """What slices, numbers and None leave of ``x``, and the tensors that index that."""
        dim, indices = 0, {}
        for k in key if isinstance(key, tuple) else (key,):
            if k is None:
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


_ANSWERS: dict[str, Callable[..., Any]] = {
    "nonzero": Answers._nonzero,
    "unique_consecutive": Answers._unique_consecutive,
    "repeat_interleave": Answers._repeat_interleave,
    "__bool__": Answers._bool,
    "__float__": Answers._number,
    "item": Answers._number,
    "contiguous": Answers._contiguous,
    "__invert__": lambda self, x: aten.bitwise_not(x),
    "__getitem__": Answers._getitem,
    "__setitem__": Answers._setitem,
}


class FakeCUDA:
    """A CUDA device without memory, on which bodies of operations run.

    Attributes:
        launches, products: what was asked of it.
        answers: what it says when the host looks at values.
        free: bytes, of ``torch.cuda.mem_get_info``.
    """

    def __init__(self, monkeypatch) -> None:
        self.launches, self.products, self.answers = Launches(monkeypatch), Products(monkeypatch), Answers()
        self.free = 1 << 30
        for name, value in (("mem_get_info", lambda: (self.free, 80 << 30)), ("memory_reserved", lambda: 0),
                            ("memory_allocated", lambda: 0)):  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, partial(self._memory, value))
        monkeypatch.setattr(torch.library, "get_ctx", self._no_symbolic_sizes)
        without_context(monkeypatch)

    def _no_symbolic_sizes(self) -> None:
        raise RuntimeError("there are none here")

    def _memory(self, value: Callable[[], Any], device: torch.device) -> Any:
        assert torch.device(device) == DEVICE
        return value()

    @contextmanager
    def active(self) -> Iterator[FakeCUDA]:
        with ExitStack() as stack:
            stack.enter_context(FakeTensorMode())
            stack.enter_context(self.answers)
            yield self

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=DEVICE)

    def run(self, op: torch.library.CustomOpDef, **arguments: Any) -> Any:
        """Run the body of ``op`` and check device, shapes, dtypes and strides against its fake implementation."""
        results = op._init_fn(**arguments)
        told = op._abstract_fn(**arguments)
        for i, (got, want) in enumerate(zip(tree_leaves(results), tree_leaves(told), strict=True)):
            assert got.device == DEVICE, f"{op._name}, result {i}: on {got.device}"
            assert got.dtype == want.dtype, f"{op._name}, result {i}: {got.dtype}, not {want.dtype}"
            assert got.is_contiguous() == want.is_contiguous(), f"{op._name}, result {i}: strides {got.stride()}"
            # How many rows are kept is known when it has run; until then as many as there are tokens.
            first = 1 if op._name == "linear_logprobs" and i in (5, 6, 7) else 0
            assert got.shape[first:] == want.shape[first:], f"{op._name}, result {i}: {tuple(got.shape)}"
        assert not self.answers.counts, "answers are left"
        assert not self.answers.numbers, "answers are left"
        return results
