"""Kernels are launched on the device of their tensors, whatever the current device is."""

from __future__ import annotations

import ast
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import sppo_kernels

pytest.importorskip("triton")

from fake_cuda import without_context

from sppo_kernels._triton_utils import launch

PACKAGE = Path(sppo_kernels.__file__).parent


class Recorder:
    """Fake kernel that records which device is current at each launch."""

    def __init__(self, monkeypatch):
        self.current, self.launches = torch.device("cuda:0"), []
        monkeypatch.setattr(torch.cuda, "device", self._guard)

    @contextmanager
    def _guard(self, device):
        previous, self.current = self.current, device
        yield
        self.current = previous

    def __getitem__(self, grid):
        return lambda **arguments: self.launches.append((self.current, grid, arguments))


def test_launch_makes_the_device_of_the_tensors_current(monkeypatch):
    kernel = Recorder(monkeypatch)
    without_context(monkeypatch)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(4, device="cuda:1")
    launch(kernel, (3,), mask_ptr=None, x_ptr=x, N=7, BLOCK=8)
    arguments = {"mask_ptr": None, "x_ptr": x, "N": 7, "BLOCK": 8}
    assert kernel.launches == [(torch.device("cuda:1"), (3,), arguments)]
    assert kernel.current == torch.device("cuda:0")


def test_launch_on_a_cpu_works_without_a_guard(monkeypatch):
    kernel = Recorder(monkeypatch)
    launch(kernel, (1,), x_ptr=torch.zeros(2))
    assert len(kernel.launches) == 1


def test_every_kernel_is_launched_with_the_guard():
    """Only ``launch`` contains ``kernel[grid](...)``."""
    launches = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Subscript)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id.endswith("kernel")
    ]
    assert [place.partition(":")[0] for place in launches] == ["_triton_utils.py"]
