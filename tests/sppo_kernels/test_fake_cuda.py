"""The simulated CUDA device detects the errors that it checks for."""

import pytest
import torch

pytest.importorskip("triton")

from fake_cuda import DEVICE, FakeCUDA

from sppo_kernels._triton_utils import launch
from sppo_kernels.ops import whiten
from sppo_kernels.ops.linear_logprobs import indexing
from sppo_kernels.ops.row_passes.triton.backward import linear_logprobs_cache_kernel


@pytest.fixture
def cuda(monkeypatch):
    with FakeCUDA(monkeypatch).active() as cuda:
        yield cuda


def moments(cuda, **changed):
    """Arguments of a valid launch, except for those in ``changed``."""
    given = {"x_ptr": cuda.new(1000, 80), "mask_ptr": cuda.new(1000, 80, dtype=torch.bool)}
    return {**given, "partial_ptr": cuda.new(3, 40), "N": 80_000, "BLOCKS": 40, **changed}


def test_a_valid_launch_passes(cuda):
    launch(whiten.whiten_moments_kernel, (40,), **moments(cuda), BLOCK=2048, num_warps=4)
    assert len(cuda.launches.made) == 1


def test_a_launch_without_a_device_guard_is_detected(cuda):
    with pytest.raises(AssertionError, match="launched while cuda:0 is current"):
        whiten.whiten_moments_kernel[(40,)](**moments(cuda), BLOCK=2048)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda cuda: {"mask_ptr": torch.empty(80_000, device="cuda:0")}, "mask_ptr is on cuda:0"),
        (lambda cuda: {"partial_ptr": torch.empty(3, 40)}, "partial_ptr is on cpu"),
        (lambda cuda: {"partial_ptr": 80_000, "N": cuda.new(3, 40)}, "partial_ptr is 80000"),
        (lambda cuda: {"N": cuda.new()}, "N is FakeTensor"),
        (lambda cuda: {"N": 2**63}, "N is 9223372036854775808"),
        (lambda cuda: {"N": 40, "BLOCKS": 80_000}, "N is 40, not 80000"),
        (lambda cuda: {"x_ptr": cuda.new(1000, 81)[:, :80]}, r"x_ptr has strides \(81, 1\)"),
    ],
)
def test_wrong_launch_arguments_are_detected(cuda, changed, message):
    cuda.launches.sizes = {"N": 80_000} if "not 80000" in message else {}
    with pytest.raises(AssertionError, match=message):
        launch(whiten.whiten_moments_kernel, (40,), **moments(cuda, **changed(cuda)), BLOCK=2048)


@pytest.mark.parametrize("grid", [(0,), (2**31,), (1, 65536), (1, 1, 1, 1), (2.0,)])
def test_a_grid_out_of_bounds_is_detected(cuda, grid):
    with pytest.raises(AssertionError, match="whiten_moments_kernel"):
        launch(whiten.whiten_moments_kernel, grid, **moments(cuda), BLOCK=2048)


@pytest.mark.parametrize("settings", [{}, {"BLOCK": 2048, "WIDTH": 3}])
def test_missing_and_unknown_parameters_are_detected(cuda, settings):
    with pytest.raises(TypeError):
        launch(whiten.whiten_moments_kernel, (40,), **moments(cuda), **settings)


@pytest.mark.parametrize("settings", [{"BLOCK": 2000}, {"BLOCK": 2048, "num_warps": 3}])
def test_uncompilable_launch_settings_are_detected(cuda, settings):
    with pytest.raises(AssertionError):
        launch(whiten.whiten_moments_kernel, (40,), **moments(cuda), **settings)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"a": (torch.float32, 4, 6)}, "input dtypes must be the same"),
        ({"b": (torch.bfloat16, 5, 8)}, "cannot be multiplied"),
        ({"b": (torch.bfloat16, 6)}, "mat2 must be a matrix"),
        ({"out_dtype": torch.float16}, "out_dtype must be"),
        ({"out_dtype": None}, "out must be torch.bfloat16, got torch.float32"),
        ({"out": (torch.bfloat16, 4, 8)}, "out must be torch.float32"),
        ({"out": (torch.float32, 8, 4)}, "out must be"),
        ({"plus": (torch.float16, 4, 8)}, "self must be torch.float32 or torch.bfloat16"),
        ({"plus": (torch.float32, 1, 8)}, "self must be"),
        ({"a": (torch.bfloat16, 1, 6), "plus": (torch.float32, 1, 8), "out": (torch.float32, 1, 8)}, "Tunable GEMM"),
    ],
)
def test_matmuls_that_pytorch_rejects_are_detected(cuda, changed, message):
    given = {"a": (torch.bfloat16, 4, 6), "b": (torch.bfloat16, 6, 8), "out": (torch.float32, 4, 8)}
    given |= {"plus": given["out"], "out_dtype": torch.float32, **changed}
    a, b, out, plus = (cuda.new(*given[name][1:], dtype=given[name][0]) for name in ("a", "b", "out", "plus"))
    with pytest.raises(AssertionError, match=message):
        torch.addmm(plus, a, b, out_dtype=given["out_dtype"], out=out)


def test_slow_matmuls_are_detected(cuda):
    a, b = cuda.new(8, 12, dtype=torch.bfloat16), cuda.new(6, 8, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match=r"mat1 \(8, 6\) with strides \(12, 2\) is copied"):
        torch.mm(a[:, ::2], b)
    with pytest.raises(AssertionError, match="expected cuda:1, got cpu"):
        torch.mm(a[:, :6], torch.empty(6, 8, dtype=torch.bfloat16))


def cached_rows(cuda, **changed):
    """Arguments of a valid launch with several programs per row, except for those in ``changed``."""
    probs, factors = cuda.new(10, 5000), cuda.new(2, 10)
    given = {"x_ptr": probs, "label_ptr": cuda.new(10, dtype=torch.int64), "tau_ptr": cuda.new(10), "stat_ptr": factors}
    given |= {"prob_ptr": probs, "factor_ptr": factors, "stride_t": 5000, "stride_v": 1, "stride_prob": 5000}
    given |= {"stride_factor": 10, "stride_tau": 1, "stride_stat": 10, "V": 5000, "softcap": 0.0, "HAS_SOFTCAP": False}
    return {**given, "PARTS": 2, "PART": 4096, "BLOCK": 2048, **changed}


@pytest.mark.parametrize(
    ("grid", "changed", "message"),
    [
        (21, {}, r"grid \(21,\), 2 parts"),
        (20, {"PART": 4000}, "parts of 4000 columns, blocks of 2048"),
        (20, {"PART": 2048}, "2 parts of 2048 of 5000 columns"),
        (30, {"PARTS": 3}, "3 parts of 4096 of 5000 columns"),
    ],
)
def test_programs_that_do_not_cover_a_row_once_are_detected(cuda, grid, changed, message):
    launch(linear_logprobs_cache_kernel, (20,), **cached_rows(cuda))
    assert cuda.launches.made[0].rows == 10
    with pytest.raises(AssertionError, match=message):
        launch(linear_logprobs_cache_kernel, (grid,), **cached_rows(cuda, **changed))


WAITS = {
    "nonzero": lambda x, mask: mask.nonzero(),
    "mask": lambda x, mask: x[mask],
    "set by mask": lambda x, mask: x.__setitem__(mask, 1.0),
    "bool": lambda x, mask: bool(mask.any()),
    "float": lambda x, mask: float(x.sum()),
    "item": lambda x, mask: x.sum().item(),
    "tolist": lambda x, mask: x[:2].tolist(),
    "to CPU": lambda x, mask: x.cpu(),
    "to": lambda x, mask: x.to("cpu"),
    "from a list": lambda x, mask: torch.tensor([1, 2], device=DEVICE),
    "from CPU": lambda x, mask: torch.zeros(3).to(DEVICE),
    "unique_consecutive": lambda x, mask: x.unique_consecutive(return_counts=True),
    "repeat_interleave": lambda x, mask: torch.repeat_interleave(x, x.long()),
}


@pytest.mark.parametrize("call", WAITS.values(), ids=WAITS)
def test_waits_for_the_device_are_recorded(cuda, call):
    x = cuda.new(8)
    mask = x > 0
    cuda.reads.numbers.extend([1.0, 2.0])
    assert not cuda.reads.waits
    call(x, mask)
    assert len(cuda.reads.waits) == 1


@pytest.mark.parametrize("call", [lambda x: torch.bincount(x), lambda x: x.unique(), lambda x: int(x[0])])
def test_other_waits_fail(cuda, call):
    with pytest.raises(RuntimeError):
        call(cuda.new(8, dtype=torch.int64))


def test_what_stays_on_the_device_is_no_wait(cuda):
    x = cuda.new(8)
    order = x.argsort(stable=True)
    y = x[order].to(torch.bfloat16).to(DEVICE)
    y[order] = x.bfloat16()
    y[..., 2:5] = torch.where(x > 0, x, 1.0)[:3]
    torch.searchsorted(x, torch.arange(3, device=DEVICE))
    torch.zeros(2).to("cpu")
    assert cuda.reads.waits == []


def test_partition_reads_the_numbers_that_a_test_gives(cuda):
    selected, kind = cuda.new(10, dtype=torch.bool), cuda.new(10, dtype=torch.int64)
    cuda.kinds.extend([(2, 0, 5), (0, 4, 0)])
    assert [len(indices) for indices in indexing.partition(selected, kind, 3)] == [2, 0, 5]
    assert [len(indices) for indices in indexing.partition(selected, 1, 3)] == [0, 4, 0]
    assert [len(indices) for indices in indexing.partition(selected, kind, 3)] == [10, 0, 0]
    assert [len(indices) for indices in indexing.partition(selected, 1, 3)] == [0, 10, 0]
    assert cuda.reads.waits == ["tolist", "nonzero"] * 2


def test_only_new_memory_is_an_allocation(cuda):
    x = cuda.new(100, 8)
    assert cuda.allocations.largest(torch.float32) == 3200
    cuda.allocations.made.clear()
    x[10:].mul_(2.0).view(-1)
    assert cuda.allocations.made == set()
    x[:10].bfloat16()
    assert cuda.allocations.made == {(torch.bfloat16, 160)}
    torch.mm(x.t(), x)
    assert cuda.allocations.largest(torch.float32) == 256
    assert cuda.allocations.largest(torch.float16) == 0


def test_ellipsis_indexes_the_last_dimensions(cuda):
    x = cuda.new(5, 6, 7)
    assert x[..., 2:].shape == (5, 6, 5)
    assert x[1, ..., None].shape == (6, 7, 1)
    assert x[..., 1:3, :].shape == (5, 2, 7)
