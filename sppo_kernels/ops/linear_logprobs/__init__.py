"""linear_logprobs: log-probabilities and entropies from hidden states, without ever holding all logits.

    logits = hidden weight^T + adapter + bias, then as in selective_logprobs

Only tokens with a loss are projected, in chunks. What backward needs of a chunk is cached or recomputed.

A pass is 2 N H V FLOPs: one forward, one for d hidden, one for d weight. ``backward="cache"`` takes three,
``"recompute"`` computes the logits again and takes four. ``"sparse"`` takes one, and three more for the tokens whose
distribution is too flat.

    arguments        validation                      cache           what is kept
    op               registered operations           sparse          selection of sparse logit gradients
    lm_head          forward and backward in chunks  weighted_rows   products with them
    matmul           the matrix products             auto_mode       what backward="auto" remembers
    projection       the fused projection            tokens          hidden states and results of tokens
    gradients        accumulation of the gradients   scaled_rows     rows times factors, around the products
    indexing         token indices, host waits       vocab_parallel  the output embedding split over ranks
    support          tokens that a sampler kept      entry_logits    single logits
"""

from __future__ import annotations

from typing import Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor

from ..._backend import matmul as matmul_without_autocast
from ..selective_logprobs import LogprobOutput
from ..selective_logprobs import reference as selective_reference
from . import op
from .arguments import BACKWARDS, Arguments
from .auto_mode import AutoBackward
from .output import Certificate, CertifiedLogprobOutput, ForwardOutput, reference_entries

__all__ = [
    "BACKWARDS",
    "AutoBackward",
    "Certificate",
    "CertifiedLogprobOutput",
    "linear_logprobs",
    "reference",
]


@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    backward: str | AutoBackward = "auto",
    logits_budget_bytes: int | None = None,
    chunk_bytes: int | None = None,
    mass_tolerance: float = 1e-4,
    max_entries: int = 512,
    projection: str = "auto",
    group: dist.ProcessGroup | None = None,
    support: tuple[Tensor, Tensor] | None = None,
    return_certificate: Literal[False] = False,
    backend: str | None = None,
) -> LogprobOutput: ...


@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    backward: str | AutoBackward = "auto",
    logits_budget_bytes: int | None = None,
    chunk_bytes: int | None = None,
    mass_tolerance: float = 1e-4,
    max_entries: int = 512,
    projection: str = "auto",
    group: dist.ProcessGroup | None = None,
    support: tuple[Tensor, Tensor] | None = None,
    return_certificate: Literal[True],
    backend: str | None = None,
) -> CertifiedLogprobOutput: ...


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    backward: str | AutoBackward = "auto",
    logits_budget_bytes: int | None = None,
    chunk_bytes: int | None = None,
    mass_tolerance: float = 1e-4,
    max_entries: int = 512,
    projection: str = "auto",
    group: dist.ProcessGroup | None = None,
    support: tuple[Tensor, Tensor] | None = None,
    return_certificate: bool = False,
    backend: str | None = None,
) -> LogprobOutput | CertifiedLogprobOutput:
    """Compute the log-probability of each label and the entropy of each token from hidden states.

    Under autocast, ``hidden``, ``weight``, ``bias`` and ``adapter`` are cast as ``torch.nn.functional.linear`` would
    cast them. What each call chose is in its certificate, and logged at level DEBUG by loggers below ``sppo_kernels``.

    Args:
        hidden: ``[..., H]``, float16, bfloat16 or float32: the last hidden states of the positions that predict
            ``labels`` (a causal model's position before each of them; nothing is shifted here).
        weight: ``[V, H]``, the dtype of ``hidden``; with ``group`` the rows of this rank.
        labels: ``[...]``, integers in ``[0, V)`` or ``ignore_index``.
        bias: ``[V]`` or None.
        adapter: ``(u, B)``, ``[..., r]`` and ``[V, r]`` of the dtype of ``hidden``: adds ``u B^T`` to the logits
            without a merged weight. LoRA (arXiv 2106.09685) on the head is ``(scaling * dropout(hidden) @ A^T, B)``;
            the gradient of ``A`` comes through ``u``.
        temperature: divides the logits; a float greater than 0, or a tensor ``[...]`` with one per token (not
            differentiated).
        softcap: ``s`` in ``s * tanh(logits / s)``, applied before the temperature; None for no cap.
        ignore_index: marks a token without a loss: it is not projected, its results and gradients are exactly 0.
        backward: how the gradient is computed.

            - ``"recompute"`` computes each chunk of logits again in backward.
            - ``"cache"`` keeps probabilities, ``V`` elements per token in the dtype of ``hidden``, and saves a quarter
              of the work.
            - ``"sparse"`` keeps only the few largest entries of it, and saves nearly all of backward's work for tokens
              whose distribution is peaked (the others are recomputed).
            - ``"auto"``, or an :class:`AutoBackward`, is ``"cache"`` for as many tokens as the budget allows, and
              ``"sparse"`` once earlier calls had peaked distributions (with a vocabulary of at least
              ``8 * max_entries``).

            A token whose entropy has a gradient is always recomputed, with a warning where that makes the cache
            useless. Nothing is kept where nothing requires a gradient.
        logits_budget_bytes: memory for these probabilities in ``"cache"`` and ``"auto"``; the tokens beyond it are
            recomputed. None for all of it in ``"cache"``; in ``"auto"`` for a quarter of the free device memory, 1 GiB
            on a CPU. A token takes ``V`` elements, rounded up to a multiple of 64. The last bits of gradients depend on
            how many tokens are kept. Sparse entries, at most ``8 * max_entries`` bytes per token, do not count.
        chunk_bytes: memory for one block of tokens, at least 256 tokens; None for 2 GiB on an accelerator, 256 MiB on a
            CPU. The last bits of results depend on it.
        mass_tolerance: the probability that a token's sparse entries may leave out, in (0, 1). The gradient of the loss
            with respect to a token's logits is then off by at most ``|c| mass_tolerance / temperature``, summed over
            the vocabulary, with ``c`` the upstream gradient. What was left out is in the certificate.
        max_entries: the most sparse entries per token, 1 to 1024, of 8 bytes; a token that needs more is recomputed.
        projection: how logits are computed. The last bits of results depend on it.

            - ``"vendor"``: by the vendor's matrix product, a chunk of float32 logits at a time, and a pass over them.
            - ``"fused"``: by a product that finishes each tile of logits in registers, so that none is stored. A
              token's results then have the same bits in every batch. The PyTorch backend does likewise in the cache of
              a CPU.
            - ``"auto"``: ``"fused"`` where ``python -m benchmarks tune`` measured it to be faster for an output
              embedding of this shape (see :mod:`sppo_kernels.tuning`), else ``"vendor"``, as always with ``group``.

        group: the process group over which ``weight``, ``bias`` and ``adapter[1]`` are split by rows, in the order of
            the ranks, at least one row each. ``hidden``, ``labels``, ``adapter[0]``, what requires a gradient, every
            setting, and the use of the results must be the same on each rank. Otherwise gradients are silently wrong,
            or ranks crash or wait forever. Results and gradients of ``hidden`` are then the same on each rank.
        support: ``(token_ids, offsets)``, integers ``[M]`` and ``[N + 1]``, for N labels: the sampler kept
            ``token_ids[offsets[t] : offsets[t + 1]]`` for token t, by top-k, top-p or min-p. Log-probability and
            entropy are then those of the renormalized distribution over these tokens, the label among them, and only
            their logits are computed. ``backward`` has no effect on such tokens. A label that is alone gives exactly 0
            and no gradient, whatever its logit is. An empty range stands for the complete vocabulary.
            ``sppo_kernels.Support.of`` makes it from what vLLM returns.
        return_certificate: return :class:`CertifiedLogprobOutput`, with the certificate as a third result.
        backend: ``"reference"``, ``"torch"``, ``"triton"``, or None for triton on an accelerator and torch elsewhere.

    Returns:
        ``LogprobOutput(logprobs, entropy)``: both ``[...]``, float32, differentiable in ``hidden``, ``weight``,
        ``bias`` and both of ``adapter``. With ``return_certificate`` a third field is a :class:`Certificate`.

    Raises:
        ValueError: a shape, device or bound is wrong, or a label is outside ``[0, V)`` (checked on a CPU, and elsewhere
            under ``SPPO_KERNELS_CHECK=1``; unchecked, such a token is NaN), or a support does not have its label, or
            has a token twice or outside ``[0, V)`` (checked likewise; unchecked, without the label a token is NaN).
        TypeError: a tensor has the wrong kind (a DTensor, say), or ``hidden`` and ``weight`` differ in dtype.
    """
    arguments = Arguments.validate(
        hidden=hidden,
        weight=weight,
        labels=labels,
        bias=bias,
        adapter=adapter,
        temperature=temperature,
        softcap=softcap,
        ignore_index=ignore_index,
        backward=backward,
        logits_budget_bytes=logits_budget_bytes,
        chunk_bytes=chunk_bytes,
        mass_tolerance=mass_tolerance,
        max_entries=max_entries,
        projection=projection,
        group=group,
        support=support,
        backend=backend,
    )
    if arguments.backend == "reference":
        logprobs, entropy = reference(
            arguments.hiddens[0],
            arguments.weights[0],
            arguments.labels,
            bias=arguments.bias,
            adapter=arguments.adapter,
            temperature=temperature.reshape(-1) if isinstance(temperature, Tensor) else temperature,
            softcap=softcap,
            ignore_index=ignore_index,
            support=arguments.support,
        )
        num_entries = reference_entries(arguments.labels != ignore_index, arguments.support)
        dropped_mass = torch.zeros(num_entries.shape, device=num_entries.device)
    else:
        output = ForwardOutput(*op.linear_logprobs(**arguments._asdict()))
        logprobs, entropy = output.logprobs, output.entropy
        dropped_mass, num_entries = output.dropped_mass.detach(), output.num_entries
    logprobs, entropy = logprobs.view(labels.shape), entropy.view(labels.shape)
    if not return_certificate:
        return LogprobOutput(logprobs, entropy)
    certificate = Certificate(dropped_mass.view(labels.shape), num_entries.view(labels.shape))
    return CertifiedLogprobOutput(logprobs, entropy, certificate)


def reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    support: tuple[Tensor, Tensor] | None = None,
) -> LogprobOutput:
    """Definition of ``linear_logprobs``: all logits at once, in float32, or float64 for float64 inputs."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    keep = (labels != ignore_index).unsqueeze(-1)  # the contents of an ignored token must not reach a gradient
    logits = matmul_without_autocast(torch.where(keep, hidden, 0.0).to(dtype), weight.to(dtype).t())
    if adapter is not None:
        logits = logits + matmul_without_autocast(
            torch.where(keep, adapter[0], 0.0).to(dtype), adapter[1].to(dtype).t()
        )
    if bias is not None:
        logits = logits + bias.to(dtype)
    return selective_reference(
        logits, labels, temperature=temperature, softcap=softcap, ignore_index=ignore_index, support=support
    )
