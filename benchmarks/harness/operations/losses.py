"""Losses of policy and critic."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.operations import sampling
from benchmarks.harness.operations.whole import WholeOperation
from benchmarks.harness.problem import MinimalCost, Outputs, Problem, ProblemSize

PROMPT_LENGTH = 256  # tokens


class PolicyLoss(WholeOperation):
    """The clipped policy loss of packed responses of very different lengths."""

    def __init__(self, ratio_level: str) -> None:
        self.ratio_level = ratio_level

    @staticmethod
    def num_responses(tokens: int) -> int:
        """Return the number of packed responses."""
        return max(4, tokens // sampling.RESPONSE_LENGTH)

    def inputs(self, size: ProblemSize, device: torch.device, dtype: torch.dtype) -> Problem:
        """Draw log-probabilities, which are float32 for every dtype of the model."""
        n, sequences = size.tokens, self.num_responses(size.tokens)
        cuts = torch.randint(n + 1, (sequences - 1,), device=device, dtype=torch.int32).sort().values
        old = torch.randn(n, device=device).abs().neg()
        logprobs = old + 0.2 * torch.randn(n, device=device)
        tensors = {
            "logprobs": logprobs.requires_grad_(),
            "old_logprobs": old,
            "advantages": torch.randn(sequences, device=device),
            "cu_seqlens": torch.cat([cuts.new_zeros(1), cuts, cuts.new_full((1,), n)]),
        }
        return Problem(tensors, ("logprobs",), {"loss": torch.ones((), device=device)})

    def call(self, library: ModuleType, *, options: dict[str, Any], **tensors: Tensor) -> Outputs:
        return {"loss": library.policy_loss(**tensors, ratio_level=self.ratio_level, **options).loss}

    def minimal_cost(self, size: ProblemSize, dtype: torch.dtype) -> MinimalCost:
        """Count two float32 inputs and the gradient."""
        return MinimalCost(forward_bytes=8.0 * size.tokens, backward_bytes=4.0 * size.tokens)


class PromptValueLoss(WholeOperation):
    """The binary cross-entropy of a value head on the last tokens of packed prompts."""

    def inputs(self, size: ProblemSize, device: torch.device, dtype: torch.dtype) -> Problem:
        prompts = self._num_prompts(size)
        hidden = torch.randn(size.tokens, size.hidden, device=device, dtype=dtype)
        weight = torch.randn(1, size.hidden, device=device, dtype=dtype).mul_(size.hidden**-0.5)
        tensors = {
            "hidden": hidden.requires_grad_(),
            "weight": weight.requires_grad_(),
            "last_index": (torch.arange(1, prompts + 1, device=device) * (size.tokens // prompts)) - 1,
            "outcomes": torch.randint(2, (prompts,), device=device).float(),
        }
        return Problem(tensors, ("hidden", "weight"), {"loss": torch.ones((), device=device)})

    @staticmethod
    def _num_prompts(size: ProblemSize) -> int:
        return max(1, size.tokens // PROMPT_LENGTH)

    def call(self, library: ModuleType, *, options: dict[str, Any], **tensors: Tensor) -> Outputs:
        out = library.prompt_value_loss(**tensors, **options)
        return {name: x for name, x in out._asdict().items() if isinstance(x, Tensor)}

    def minimal_cost(self, size: ProblemSize, dtype: torch.dtype) -> MinimalCost:
        """Count the last token of each prompt, and the gradient of all hidden states, most of it zeros."""
        read = self._num_prompts(size) * size.hidden * dtype.itemsize
        return MinimalCost(forward_bytes=read, backward_bytes=read + size.tokens * size.hidden * dtype.itemsize)
