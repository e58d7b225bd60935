"""The simulated CUDA device detects the errors that it checks for."""

import pytest
import torch

pytest.importorskip("triton")

from fake_cuda import FakeCUDA

from sppo_kernels._triton_utils import launch
from sppo_kernels.ops import whiten


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
