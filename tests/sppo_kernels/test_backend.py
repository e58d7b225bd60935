"""Backend selection and its errors."""

import pytest
import torch

from sppo_kernels import _backend, whiten


@pytest.mark.parametrize(
    ("triton", "numpy", "works"),
    [("3.6.0", "2.4.0", False), ("3.6.0", "2.10.1", False), ("3.6.0", "2.3.5", True), ("3.7.0", "2.5.2", True)],
)
def test_incompatible_interpreter_and_numpy_are_reported(triton, numpy, works, monkeypatch):
    fault = _backend.interpreter_fault(triton, numpy)
    assert (fault == "") == works
    if works:
        return
    monkeypatch.setattr(_backend, "INTERPRETED", True)
    monkeypatch.setattr(_backend, "_INTERPRETER_FAULT", fault)
    with pytest.raises(ImportError, match=r"Triton 3\.6\.0 .* found numpy 2.* pip install 'numpy<2\.4'"):
        whiten(torch.zeros(3), torch.ones(3), backend="triton")
