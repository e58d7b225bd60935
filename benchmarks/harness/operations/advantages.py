"""Advantages and their normalization; none of them has gradients."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.operations import sampling
from benchmarks.harness.operations.whole import WholeOperation
from benchmarks.harness.problem import MinimalCost, Outputs, Problem, ProblemSize

GROUP_SIZE = 8


class GAE(WholeOperation):
    """Generalized advantage estimation over padded responses."""

    def inputs(self, size: ProblemSize, device: torch.device, dtype: torch.dtype) -> Problem:
        shape = sampling.padded_shape(size)
        rewards, values = (torch.randn(shape, device=device) for _ in range(2))
        return Problem({"rewards": rewards, "values": values, "mask": sampling.prefix_mask(shape, device)})

    def call(self, library: ModuleType, *, options: dict[str, Any], **tensors: Tensor) -> Outputs:
        advantages, returns = library.gae(**tensors, gamma=0.99, lam=0.95, **options)
        return {"advantages": advantages, "returns": returns}

    def minimal_cost(self, size: ProblemSize, dtype: torch.dtype) -> MinimalCost:
        """Count every place, as if nothing were masked."""
        return MinimalCost(forward_bytes=(4 + 4 + 1 + 4 + 4) * math.prod(sampling.padded_shape(size)))


class Whiten(WholeOperation):
    """Normalization of padded responses to mean 0 and variance 1."""

    def inputs(self, size: ProblemSize, device: torch.device, dtype: torch.dtype) -> Problem:
        shape = sampling.padded_shape(size)
        return Problem({"x": torch.randn(shape, device=device), "mask": sampling.prefix_mask(shape, device)})

    def call(self, library: ModuleType, *, options: dict[str, Any], **tensors: Tensor) -> Outputs:
        return {"x": library.whiten(**tensors, **options)}

    def minimal_cost(self, size: ProblemSize, dtype: torch.dtype) -> MinimalCost:
        """Count two reads, since mean and variance come before the first result, as if nothing were masked."""
        return MinimalCost(forward_bytes=(2 * (4 + 1) + 4) * math.prod(sampling.padded_shape(size)))


class GroupAdvantages(WholeOperation):
    """Advantages relative to a group, for as many responses as a training step has."""

    def inputs(self, size: ProblemSize, device: torch.device, dtype: torch.dtype) -> Problem:
        rewards = torch.rand(self._num_responses(size), device=device)
        return Problem({"rewards": rewards, "group_ids": torch.arange(len(rewards), device=device) // GROUP_SIZE})

    @staticmethod
    def _num_responses(size: ProblemSize) -> int:
        return max(GROUP_SIZE, size.tokens // sampling.RESPONSE_LENGTH * GROUP_SIZE)

    def call(self, library: ModuleType, *, options: dict[str, Any], **tensors: Tensor) -> Outputs:
        return {"advantages": library.group_advantages(**tensors, **options)}

    def minimal_cost(self, size: ProblemSize, dtype: torch.dtype) -> MinimalCost:
        return MinimalCost(forward_bytes=(4 + 8 + 4) * self._num_responses(size))
