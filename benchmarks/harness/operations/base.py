"""What each operation provides to the suites."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from benchmarks.harness.problem import Implementation, MinimalCost, Outputs, Problem, ProblemSize


class Operation(ABC):
    """An operation of the library as the suites measure it."""

    @abstractmethod
    def inputs(self, size: ProblemSize, device: torch.device, dtype: torch.dtype) -> Problem:
        """Make random inputs."""

    @abstractmethod
    def reference(self, problem: Problem, dtype: torch.dtype) -> Outputs:
        """Compute outputs and gradients with plain PyTorch in a dtype.

        In float64 they are the truth; in the dtype of the inputs they show which error is acceptable.
        """

    @abstractmethod
    def implementations(self, backend: str | None) -> dict[str, Implementation]:
        """Return this library's implementations on a backend, by mode; "" is the only one."""

    @abstractmethod
    def minimal_cost(self, size: ProblemSize, dtype: torch.dtype) -> MinimalCost:
        """Return the least work that forward and backward take."""
