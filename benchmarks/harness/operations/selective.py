"""Log-probabilities from given logits."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import sppo_kernels
from benchmarks.harness.operations import eager, sampling
from benchmarks.harness.operations.base import Operation
from benchmarks.harness.operations.linear import BLOCK
from benchmarks.harness.problem import Implementation, MinimalCost, Outputs, Problem, ProblemSize


class SelectiveLogprobs(Operation):
    """Log-probabilities and entropies of given tokens from logits ``[tokens, vocab]``."""

    def inputs(self, size: ProblemSize, device: torch.device, dtype: torch.dtype) -> Problem:
        labels = sampling.labels(size, device)
        logits = torch.randn(size.tokens, size.vocab, device=device, dtype=dtype)
        index = labels.clamp(min=0)[:, None]
        logits.scatter_add_(1, index, sampling.margins(size, device)[:, None].to(dtype))
        tensors = {"logits": logits.requires_grad_(), "labels": labels}
        return Problem(tensors, ("logits",), {"logprobs": sampling.token_gradient(size, device)})

    def reference(self, problem: Problem, dtype: torch.dtype) -> Outputs:
        found: dict[str, list[Tensor]] = {}
        for rows in torch.arange(len(problem.tensors["labels"])).split(BLOCK):
            logits = problem.tensors["logits"].detach()[rows].to(dtype).requires_grad_()
            tensors = {"logits": logits, "labels": problem.tensors["labels"][rows]}
            block = Problem(tensors, ("logits",), {"logprobs": problem.upstream["logprobs"][rows]})
            for name, x in block.results(eager.selective_logprobs).items():
                found.setdefault(name, []).append(x)
        return {name: torch.cat(parts) for name, parts in found.items()}

    def implementations(self, backend: str | None) -> dict[str, Implementation]:
        return {"": partial(self._call, backend)}

    @staticmethod
    def _call(backend: str | None, *, logits: Tensor, labels: Tensor) -> Outputs:
        out = sppo_kernels.selective_logprobs(logits, labels, backend=backend)
        return {"logprobs": out.logprobs, "entropy": out.entropy}

    def minimal_cost(self, size: ProblemSize, dtype: torch.dtype) -> MinimalCost:
        """Count the rows with a loss forward, those with a gradient backward, and all rows written."""
        row, tokens = size.vocab * dtype.itemsize, size.tokens * (1 - size.ignored)
        backward = row * (tokens * (1 - size.clipped) + size.tokens)
        return MinimalCost(
            forward_bytes=tokens * row + 16 * size.tokens,
            backward_bytes=backward + 16 * size.tokens,
        )
