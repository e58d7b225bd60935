"""Base of the operations whose reference runs on all inputs at once, in float64 too."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import sppo_kernels
from benchmarks.harness.operations.base import Operation
from benchmarks.harness.problem import Implementation, Outputs, Problem
from sppo_kernels import reference


class WholeOperation(Operation):
    """An operation with one implementation and a reference of the same name."""

    @abstractmethod
    def call(self, library: ModuleType, *, options: dict[str, Any], **tensors: Tensor) -> Outputs:
        """Call the operation of ``sppo_kernels``, or of its reference, which takes no options."""

    def eager(self, **tensors: Tensor) -> Outputs:
        """Compute the outputs with plain PyTorch."""
        return self.call(reference, options={}, **tensors)

    def reference(self, problem: Problem, dtype: torch.dtype) -> Outputs:
        return problem.cast(dtype).results(self.eager)

    def implementations(self, backend: str | None) -> dict[str, Implementation]:
        return {"": partial(self.call, sppo_kernels, options={"backend": backend})}
