"""Sizes, inputs and minimal costs of a measured call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

Outputs = dict[str, Tensor]
Implementation = Callable[..., Outputs]
"""Takes the tensors of a problem by name and returns its outputs by name; it may omit outputs without a gradient."""

IGNORE_INDEX = -100


class ProblemSize(NamedTuple):
    """Sizes and kind of inputs.

    Attributes:
        tokens: rows of hidden states or logits.
        hidden: hidden size.
        vocab: vocabulary size; 0 for operations without a vocabulary.
        ignored: share of tokens whose label is ``IGNORE_INDEX``.
        clipped: share of tokens whose gradient is 0.
        logits: "peaked", most of the mass on the label and the rest noise; "uniform", only noise; "sharp", all mass on
            a few tokens.
    """

    tokens: int
    hidden: int
    vocab: int
    ignored: float = 0.0
    clipped: float = 0.0
    logits: str = "peaked"


class MinimalCost(NamedTuple):
    """The least work of forward and backward: FLOPs of matrix products, bytes read and written."""

    forward_flops: float = 0.0
    backward_flops: float = 0.0
    forward_bytes: float = 0.0
    backward_bytes: float = 0.0


@dataclass
class Problem:
    """Inputs of an operation.

    Attributes:
        tensors: arguments by name.
        leaves: names of the arguments that get gradients.
        upstream: gradients of the outputs by name.
    """

    tensors: dict[str, Tensor]
    leaves: tuple[str, ...] = ()
    upstream: dict[str, Tensor] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first tensor, which is the largest one."""
        return next(iter(self.tensors.values())).dtype

    def forward(self, implementation: Implementation) -> Outputs:
        """Compute the outputs."""
        return implementation(**self.tensors)

    def backward(self, outputs: Outputs) -> tuple[Tensor, ...]:
        """Compute the gradients of the leaves."""
        return torch.autograd.grad(
            [outputs[name] for name in self.upstream],
            [self.tensors[name] for name in self.leaves],
            [upstream.to(outputs[name].dtype) for name, upstream in self.upstream.items()],
        )

    def step(self, implementation: Implementation) -> dict[str, Callable[[], object]]:
        """Return forward and, if there are leaves, backward, as calls to be made in turn."""
        if not self.leaves:
            return {"forward": lambda: self.forward(implementation)}
        alive: list[Outputs] = []
        return {
            "forward": lambda: alive.append(self.forward(implementation)),
            "backward": lambda: self.backward(alive.pop()),
        }

    def results(self, implementation: Implementation) -> Outputs:
        """Compute the outputs, and the gradient of each leaf as ``"d <name>"``."""
        outputs = self.forward(implementation)
        grads = self.backward(outputs) if self.leaves else ()
        by_name = {f"d {name}": grad for name, grad in zip(self.leaves, grads, strict=True)}
        return {**{name: x.detach() for name, x in outputs.items()}, **by_name}

    def cast(self, dtype: torch.dtype) -> Problem:
        """Return the problem with every floating-point tensor in another dtype."""
        tensors = {
            name: x.detach().to(dtype).requires_grad_(x.requires_grad) if x.is_floating_point() else x
            for name, x in self.tensors.items()
        }
        return Problem(tensors, self.leaves, self.upstream)
