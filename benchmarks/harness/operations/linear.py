"""Operations that start from hidden states: a product with the output embedding, a row pass, then a loss or none.

The reference runs a block of tokens at a time, because float64 logits of all tokens would not fit into memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional

import sppo_kernels
from benchmarks.harness.operations import eager, sampling
from benchmarks.harness.operations.base import Operation
from benchmarks.harness.problem import IGNORE_INDEX, Implementation, MinimalCost, Outputs, Problem, ProblemSize
from sppo_kernels import reference

BLOCK = 512  # tokens whose logits exist in float64 at once: 0.6 GB at a vocabulary of 152k
SUPPORT = 20  # tokens that the sampler keeps, as with top_k=20
MODES = ("cache", "recompute", "sparse", "auto")


class LinearLogprobs(Operation):
    """Log-probabilities and entropies of given tokens."""

    def inputs(self, size: ProblemSize, device: torch.device, dtype: torch.dtype) -> Problem:
        tensors = self._hidden_weight_labels(size, device, dtype)
        return Problem(tensors, ("hidden", "weight"), {"logprobs": sampling.token_gradient(size, device)})

    @staticmethod
    def _hidden_weight_labels(size: ProblemSize, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Draw hidden states and weight whose logits are noise, with the label's above it."""
        weight = torch.randn(size.vocab, size.hidden, device=device, dtype=dtype).mul_(size.hidden**-0.5)
        labels = sampling.labels(size, device)
        hidden = sampling.noise_std(size) * torch.randn(size.tokens, size.hidden, device=device)
        hidden += sampling.margins(size, device)[:, None] * weight[labels.clamp(min=0)].float()
        return {"hidden": hidden.to(dtype).requires_grad_(), "weight": weight.requires_grad_(), "labels": labels}

    def finish(self, library: ModuleType, *, logprobs: Tensor, entropy: Tensor, **_: Tensor) -> Outputs:
        """Compute the outputs from log-probabilities, entropies and the other tensors of the problem.

        ``library`` is ``sppo_kernels`` or its reference, for subclasses that call another operation.
        """
        return {"logprobs": logprobs, "entropy": entropy}

    def reference(self, problem: Problem, dtype: torch.dtype) -> Outputs:
        tensors = problem.tensors
        logprobs, entropy = map(torch.cat, zip(*logprob_blocks(tensors, dtype), strict=True))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        other = {name: x for name, x in tensors.items() if name not in ("hidden", "weight")}
        other = {name: x.to(wide) if x.is_floating_point() else x for name, x in other.items()}
        other |= {"logprobs": logprobs.requires_grad_(), "entropy": entropy}
        outputs = Problem(other, ("logprobs",), problem.upstream).results(partial(self.finish, reference))
        coefficients = outputs.pop("d logprobs").to(wide)
        weight = tensors["weight"].detach().to(dtype).requires_grad_()
        d_hidden, d_weight = [], torch.zeros_like(weight, dtype=wide)
        for rows in torch.arange(len(logprobs), device=logprobs.device).split(BLOCK):
            hidden = tensors["hidden"].detach()[rows].to(dtype).requires_grad_()
            logp = eager.linear_logprobs(hidden, weight, tensors["labels"][rows])["logprobs"]
            of_block = torch.autograd.grad(logp, (hidden, weight), coefficients[rows])
            d_hidden.append(of_block[0])
            d_weight += of_block[1]
        return {**outputs, "d hidden": torch.cat(d_hidden), "d weight": d_weight.to(dtype)}

    def implementations(self, backend: str | None) -> dict[str, Implementation]:
        return {mode: partial(self._call, mode, backend) for mode in MODES}

    def _call(
        self, mode: str, backend: str | None, *, hidden: Tensor, weight: Tensor, labels: Tensor, **other: Tensor
    ) -> Outputs:
        out = sppo_kernels.linear_logprobs(hidden, weight, labels, backward=mode, backend=backend)
        return self.finish(sppo_kernels, logprobs=out.logprobs, entropy=out.entropy, labels=labels, **other)

    def minimal_cost(self, size: ProblemSize, dtype: torch.dtype) -> MinimalCost:
        """Count one product forward and two backward, of the tokens that need them."""
        product = 2.0 * size.tokens * (1 - size.ignored) * size.hidden * size.vocab
        return MinimalCost(forward_flops=product, backward_flops=2 * product * (1 - size.clipped))


class LinearProjection(LinearLogprobs):
    """Log-probabilities by the vendor's product and row passes, and by the fused projection, with a cache of all."""

    def implementations(self, backend: str | None) -> dict[str, Implementation]:
        return {projection: partial(self._of_projection, projection, backend) for projection in ("vendor", "fused")}

    @staticmethod
    def _of_projection(
        projection: str, backend: str | None, *, hidden: Tensor, weight: Tensor, labels: Tensor
    ) -> Outputs:
        out = sppo_kernels.linear_logprobs(
            hidden,
            weight,
            labels,
            backward="cache",
            logits_budget_bytes=None,
            projection=projection,
            backend=backend,
        )
        return {"logprobs": out.logprobs, "entropy": out.entropy}


class LinearSupport(LinearLogprobs):
    """Log-probabilities over a sampler's support of SUPPORT tokens each: the label and others at random."""

    def inputs(self, size: ProblemSize, device: torch.device, dtype: torch.dtype) -> Problem:
        problem = super().inputs(size, device, dtype)
        labels, count = problem.tensors["labels"], min(SUPPORT, size.vocab)
        # Distances of 1 to V - 1 from the label, all different: a start and equal steps.
        step = (size.vocab - 1) // (count - 1)
        start = torch.randint(1, size.vocab - step * (count - 2), (size.tokens, 1), device=device)
        others = labels.clamp(min=0)[:, None] + start + step * torch.arange(count - 1, device=device)
        ids = torch.cat([labels.clamp(min=0)[:, None], others % size.vocab], 1)
        problem.tensors |= {
            "token_ids": ids.flatten().int(),
            "offsets": count * torch.arange(size.tokens + 1, device=device),
        }
        return problem

    def reference(self, problem: Problem, dtype: torch.dtype) -> Outputs:
        given = problem.tensors
        weight = given["weight"].detach().to(dtype).requires_grad_()
        logprobs, d_hidden = [], []
        d_weight = torch.zeros_like(weight, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        for rows in torch.arange(len(given["labels"]), device=weight.device).split(BLOCK):
            first, last = int(rows[0]), int(rows[-1]) + 1
            hidden = given["hidden"].detach()[first:last].to(dtype).requires_grad_()
            offsets = given["offsets"][first : last + 1]
            ids = given["token_ids"][int(offsets[0]) : int(offsets[-1])]
            found = eager.masked_logprobs(hidden, weight, given["labels"][first:last], ids, offsets - offsets[0])
            upstream = problem.upstream["logprobs"][first:last].to(found["logprobs"].dtype)
            of_block = torch.autograd.grad(found["logprobs"], (hidden, weight), upstream)
            logprobs.append(found["logprobs"].detach())
            d_hidden.append(of_block[0])
            d_weight += of_block[1]
        grads = {"d hidden": torch.cat(d_hidden), "d weight": d_weight.to(dtype)}
        return {"logprobs": torch.cat(logprobs), **grads}

    def implementations(self, backend: str | None) -> dict[str, Implementation]:
        return {"support": partial(self._of_support, backend), "from logits": partial(self._from_logits, backend)}

    @staticmethod
    def _of_support(
        backend: str | None, hidden: Tensor, weight: Tensor, labels: Tensor, token_ids: Tensor, offsets: Tensor
    ) -> Outputs:
        out = sppo_kernels.linear_logprobs(hidden, weight, labels, support=(token_ids, offsets), backend=backend)
        return {"logprobs": out.logprobs}

    @staticmethod
    def _from_logits(
        backend: str | None, hidden: Tensor, weight: Tensor, labels: Tensor, token_ids: Tensor, offsets: Tensor
    ) -> Outputs:
        """Compute all logits, and read those of the supports."""
        logits = functional.linear(hidden, weight)
        out = sppo_kernels.selective_logprobs(logits, labels, support=(token_ids, offsets), backend=backend)
        return {"logprobs": out.logprobs}

    def minimal_cost(self, size: ProblemSize, dtype: torch.dtype) -> MinimalCost:
        """Read distinct rows of the weight and the hidden states, in backward again; write all of both gradients."""
        tokens, row = size.tokens * (1 - size.ignored), size.hidden * dtype.itemsize
        read = (min(tokens * SUPPORT, size.vocab) + tokens) * row
        written = (size.tokens + size.vocab) * row
        return MinimalCost(forward_bytes=read, backward_bytes=(1 - size.clipped) * read + written)


class LinearNLL(LinearLogprobs):
    """Mean negative log-likelihood over the tokens with a loss, as in supervised fine-tuning."""

    def inputs(self, size: ProblemSize, device: torch.device, dtype: torch.dtype) -> Problem:
        tensors = self._hidden_weight_labels(size, device, dtype)
        return Problem(tensors, ("hidden", "weight"), {"loss": torch.ones((), device=device)})

    def finish(self, library: ModuleType, *, logprobs: Tensor, labels: Tensor, **_: Tensor) -> Outputs:  # type: ignore[override]
        return {"loss": -logprobs.sum() / (labels != IGNORE_INDEX).sum()}


class LinearPolicyLoss(LinearLogprobs):
    """The clipped token-level policy loss: log-probabilities and loss, or both in one call."""

    def inputs(self, size: ProblemSize, device: torch.device, dtype: torch.dtype) -> Problem:
        """Draw responses of equal length, ``[B, T]`` flattened, so that peers without packing can take part."""
        tensors = self._hidden_weight_labels(size, device, dtype)
        # Ratios well inside and well outside of the clip range: at its edge any rounding would flip a gradient.
        gaps = torch.tensor([-0.5, -0.08, 0.08, 0.5], device=device)[torch.randint(4, (size.tokens,), device=device)]
        exact = torch.cat([logprobs for logprobs, _ in logprob_blocks(tensors, torch.float32)])
        sequences = max(1, size.tokens // min(sampling.RESPONSE_LENGTH, size.tokens // 4))
        tensors["old_logprobs"] = exact + gaps
        tensors["advantages"] = torch.randn(sequences, device=device)
        return Problem(tensors, ("hidden", "weight"), {"loss": torch.ones((), device=device)})

    def finish(  # type: ignore[override]
        self,
        library: ModuleType,
        *,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        labels: Tensor,
        **_: Tensor,
    ) -> Outputs:
        shape = len(advantages), -1
        mask = (labels != IGNORE_INDEX).view(shape)
        out = library.policy_loss(logprobs.view(shape), old_logprobs.view(shape), advantages, mask=mask)
        return {"loss": out.loss}

    def implementations(self, backend: str | None) -> dict[str, Implementation]:
        return {
            **super().implementations(backend),
            "one call": partial(self._call_fused, "cache", backend),
            "one call, sparse": partial(self._call_fused, "sparse", backend),
        }

    @staticmethod
    def _call_fused(
        mode: str,
        backend: str | None,
        *,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
    ) -> Outputs:
        out = sppo_kernels.linear_policy_loss(
            hidden,
            weight,
            labels,
            old_logprobs,
            advantages,
            cu_seqlens=sampling.equal_cu_seqlens(len(labels), len(advantages), labels.device),
            backward=mode,
            backend=backend,
        )
        return {"loss": out.loss}


def logprob_blocks(tensors: dict[str, Tensor], dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield log-probabilities and entropies, a block of tokens at a time."""
    weight = tensors["weight"].detach().to(dtype)
    with torch.no_grad():
        for hidden, labels in zip(tensors["hidden"].split(BLOCK), tensors["labels"].split(BLOCK), strict=True):
            out = eager.selective_logprobs(functional.linear(hidden.to(dtype), weight), labels)
            yield out["logprobs"], out["entropy"]
