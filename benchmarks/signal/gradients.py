"""Gradients of single responses: of the sum of their tokens' log-probabilities, weighted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from transformers import PreTrainedModel


class Sketch(NamedTuple):
    """A random projection that preserves inner products on average: each coordinate is added to one of ``size`` sums.

    Signs are random (count sketch; Charikar, Chen, Farach-Colton 2002). The relative error of a squared norm is about
    ``sqrt(2 / size)``.
    """

    buckets: Tensor
    signs: Tensor
    size: int

    @classmethod
    def new(cls, coordinates: int, size: int) -> Sketch:
        """Draw a projection from ``coordinates`` to ``size`` dimensions, the same each time."""
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, (coordinates,), generator=generator).float() * 2 - 1
        return cls(torch.randint(size, (coordinates,), generator=generator), signs, size)

    def project(self, vectors: Tensor) -> Tensor:
        """Project float32 ``[B, coordinates]`` to ``[B, size]``."""
        out = vectors.new_zeros(len(vectors), self.size)
        return out.index_add_(1, self.buckets, vectors * self.signs)


class ResponseGradients:
    """Computes gradients with respect to some parameters of a policy, one vector per response.

    Args:
        policy: the policy; its attention must be "eager" or "sdpa".
        names: of the parameters; None for all.
        temperature: sampling temperature.
        sketch_size: dimensions of a random projection; None for exact gradients.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        *,
        names: list[str] | None = None,
        temperature: float = 1.0,
        sketch_size: int | None = None,
    ) -> None:
        self._policy, self._temperature = policy.eval(), temperature
        every = {name: parameter.detach() for name, parameter in policy.named_parameters()}
        self._chosen = {name: value for name, value in every.items() if names is None or name in names}
        self._others = {name: value for name, value in every.items() if name not in self._chosen}
        count = sum(value.numel() for value in self._chosen.values())
        self._sketch = None if sketch_size is None else Sketch.new(count, sketch_size)
        self.size = sketch_size or count

    def logprobs(self, tokens: Tensor, prompt_length: int) -> Tensor:
        """Compute the log-probabilities ``[B, T]`` of what follows the first ``prompt_length`` tokens."""
        with torch.no_grad():
            return torch.stack([self._logprobs(self._chosen, row, prompt_length) for row in tokens])

    def __call__(self, tokens: Tensor, prompt_length: int, weights: Tensor) -> Tensor:
        """Compute the gradients of ``sum_t weights[b, t] log pi(token t)``.

        Args:
            tokens: int64 ``[B, L]``, all with a prompt of the same length.
            prompt_length: number of tokens of the prompt.
            weights: float32 ``[B, L - prompt_length]``; 0 for padding.

        Returns:
            float32 ``[B, P]``.
        """

        def objective(parameters: Mapping[str, Tensor], row: Tensor, weight: Tensor) -> Tensor:
            return (self._logprobs(parameters, row, prompt_length) * weight).sum()

        gradients = vmap(grad(objective), in_dims=(None, 0, 0))(self._chosen, tokens, weights)
        flat = torch.cat([gradients[name].flatten(1) for name in self._chosen], 1)
        return flat if self._sketch is None else self._sketch.project(flat)

    def _logprobs(self, parameters: Mapping[str, Tensor], row: Tensor, prompt_length: int) -> Tensor:
        arguments = {"use_cache": False, "logits_to_keep": len(row) - prompt_length + 1}
        # Tied weights are named once among the parameters, and follow.
        output = functional_call(self._policy, {**self._others, **parameters}, (row[None],), arguments)
        logits = output.logits[0, :-1].float() / self._temperature
        return logits.log_softmax(-1).gather(1, row[prompt_length:, None])[:, 0]
