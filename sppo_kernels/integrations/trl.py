"""TRL's trainers on these operations: ``patch()`` before they train, ``unpatch()`` after, or ``with patch(): ...``.

    from sppo_kernels.integrations import trl as fused

    with fused.patch():
        GRPOTrainer(...).train()

TRL 1.16 takes log-probabilities in two ways, both in ``trl.trainer.utils``, which looks these names up on each call:

- ``_ChunkedLogProbFunction``, from hidden states, below ``add_fused_lm_head``: GRPO, RLOO, asynchronous GRPO. It makes
  every chunk of logits again in backward, four products with the head; ``linear_logprobs`` needs three, or little more
  than one where distributions are peaked, within the memory that you allow.
- ``_fused_logprob_entropy``, from logits that somebody made: ``selective_log_softmax`` and its kin, which trainers in
  ``trl.experimental`` call. TRL's kernel for it serves GPUs; elsewhere it loops, in the logits' own precision.

Only tokens that bear loss are projected, on a CPU too (``_use_triton`` decides that). A head of another dtype than the
hidden states, or than autocast's, is cast as a whole, where TRL casts it by chunks. What stays with TRL's own function:
what needs more than log-probabilities and entropies (SFT, KTO, DPO except for its reference: top-1 accuracy, mean
logits), float64, and a head that DeepSpeed's ZeRO-3 has split, whose weight has to be gathered again for backward.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .._backend import BACKENDS
from .._validation import check_choice
from ..ops.linear_logprobs import linear_logprobs
from ..ops.selective_logprobs import selective_logprobs
from ._patching import Name, Patch, check_version

VERSION = "1.16.0"
_IGNORED = -(2**63)  # no token; with -100 a wrong index would pass for an ignored one
_log = logging.getLogger(__name__)
_patch = Patch()


def patch(
    *,
    backward: str = "auto",
    logits_budget_bytes: int | None = None,
    chunk_bytes: int | None = None,
    mass_tolerance: float = 1e-4,
    max_entries: int = 512,
    backend: str | None = None,
) -> ExitStack:
    """Put ``linear_logprobs`` and ``selective_logprobs`` under TRL's trainers; call it again to change a setting.

    All arguments are those of :func:`sppo_kernels.linear_logprobs`. ``backward="recompute"`` keeps nothing for
    backward, as TRL does; name it too where the entropy bears loss.

    Returns:
        A context manager that puts back on exit what it found.

    Raises:
        ImportError: TRL is missing, or of a version that this was not tested with.
        ValueError, TypeError: a setting that linear_logprobs refuses.
    """
    check_version("trl", VERSION)
    from trl.trainer import utils

    if backend is not None:
        check_choice("backend", backend, BACKENDS)
    project = partial(
        linear_logprobs,
        backward=backward,
        logits_budget_bytes=logits_budget_bytes,
        chunk_bytes=chunk_bytes,
        mass_tolerance=mass_tolerance,
        max_entries=max_entries,
    )
    one = torch.zeros(1, 1, dtype=torch.float32, device="cpu")
    project(one, one, torch.zeros(1, dtype=torch.long, device="cpu"))  # a wrong setting is refused now
    project = partial(project, backend=backend)
    replacements: dict[Name, Any] = {
        (utils, "_ChunkedLogProbFunction"): SimpleNamespace(apply=partial(_chunked_logprobs, project)),
        (utils, "_use_triton"): lambda device: device.type in ("cpu", "cuda", "xpu"),
    }
    if hasattr(utils, "_fused_logprob_entropy"):  # not without Triton: macOS, Windows
        replacements[utils, "_fused_logprob_entropy"] = partial(_logprobs_and_entropy, backend)
        replacements[utils, "_supports_trl_loss_kernel"] = _is_supported
    return _patch.apply(replacements)


def unpatch() -> None:
    """Give TRL its own functions back; nothing where they are in place."""
    _patch.restore()


def _chunked_logprobs(
    project: partial[Any],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    chunk_size: int,
    final_logit_softcapping: float | None = None,
    logit_scale: float = 1.0,
    outputs: tuple[str, ...] = ("log_probs",),
) -> tuple[Tensor | None, ...]:
    """``trl.kernels.ChunkedLogProbFunction.apply``: hidden [N, H], weight [V, H], bias [V], targets [N] -> log_probs,
    entropy, log_sum_sq_probs, mean_logits, is_top1, each [N], or None if not among ``outputs``.
    """
    is_more = not {"log_probs", "entropy"}.issuperset(outputs)
    if is_more or logit_scale <= 0 or hasattr(weight, "ds_id") or hidden.dtype == torch.float64:
        from trl.kernels import ChunkedLogProbFunction

        _log.debug("TRL's own function for %s, logit scale %s", outputs, logit_scale)
        return ChunkedLogProbFunction.apply(
            hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs
        )
    # With scale a and cap s, TRL's  s tanh(a x / s) / tau  is  (s/a) tanh(x / (s/a)) / (tau/a).
    softcap = None if final_logit_softcapping is None else final_logit_softcapping / logit_scale
    logprobs, entropy = project(
        hidden, weight.to(hidden.dtype), targets, bias=bias, temperature=temperature / logit_scale, softcap=softcap
    )
    return logprobs, entropy if "entropy" in outputs else None, None, None, None


def _logprobs_and_entropy(
    backend: str | None, logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``trl.kernels.selective_log_softmax_and_entropy``: logits [..., V], index and row_mask [...] -> both [...]."""
    labels = index if row_mask is None else index.long().masked_fill(row_mask == 0, _IGNORED)
    return selective_logprobs(logits, labels, temperature=temperature, ignore_index=_IGNORED, backend=backend)


def _is_supported(logits: Tensor, index: Tensor | None = None, row_mask: Tensor | None = None) -> bool:
    """Whether selective_logprobs takes these: one index a row, and a mask like it. Else TRL goes its own way."""
    return (
        logits.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and logits.shape[-1] > 0
        and all(x is None or x.shape == logits.shape[:-1] for x in (index, row_mask))
    )
