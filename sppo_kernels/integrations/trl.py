"""Integration with TRL's trainers: call ``patch()`` before training and ``unpatch()`` after, or ``with patch(): ...``.

    from sppo_kernels.integrations import trl as fused

    with fused.patch():
        GRPOTrainer(...).train()

TRL 1.16 computes log-probabilities in two ways. Both are in ``trl.trainer.utils``, which looks these names up on each
call:

- ``_ChunkedLogProbFunction`` computes them from hidden states, below ``add_fused_lm_head``: GRPO, RLOO, asynchronous
  GRPO. It recomputes every chunk of logits in backward, which takes four products with the LM head.
  ``linear_logprobs`` takes three, or little more than one where distributions are peaked, within a memory budget.
- ``_fused_logprob_entropy`` computes them from given logits: ``selective_log_softmax`` and related functions, which
  trainers in ``trl.experimental`` call. TRL's kernel for it supports only GPUs. Elsewhere TRL loops, in the precision
  of the logits.

Only unmasked tokens are projected, on a CPU too (``_use_triton`` decides that). An LM head whose dtype is not that of
the hidden states, or of autocast, is cast as a whole; TRL casts it chunk by chunk. These cases stay with TRL's own
function:

- outputs other than log-probabilities and entropies, such as top-1 accuracy and mean logits (SFT, KTO, and DPO except
  for its reference);
- float64;
- an LM head sharded by DeepSpeed's ZeRO-3, whose weight has to be gathered again for backward.
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
_IGNORED = -(2**63)  # never a token; -100 would hide an invalid index
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
    """Make TRL's trainers use ``linear_logprobs`` and ``selective_logprobs``. Call it again to change a setting.

    All arguments are those of :func:`sppo_kernels.linear_logprobs`. ``backward="recompute"`` caches nothing for
    backward, as TRL does. Choose it also where the loss depends on the entropy.

    Returns:
        A context manager that restores the previous state on exit.

    Raises:
        ImportError: TRL is missing, or its version is not supported.
        ValueError, TypeError: linear_logprobs rejects a setting.
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
    project(one, one, torch.zeros(1, dtype=torch.long, device="cpu"))  # rejects an invalid setting now
    project = partial(project, backend=backend)
    replacements: dict[Name, Any] = {
        (utils, "_ChunkedLogProbFunction"): SimpleNamespace(apply=partial(_chunked_logprobs, project)),
        (utils, "_use_triton"): lambda device: device.type in ("cpu", "cuda", "xpu"),
    }
    if hasattr(utils, "_fused_logprob_entropy"):  # absent without Triton (macOS, Windows)
        replacements[utils, "_fused_logprob_entropy"] = partial(_logprobs_and_entropy, backend)
        replacements[utils, "_supports_trl_loss_kernel"] = _is_supported
    return _patch.apply(replacements)


def unpatch() -> None:
    """Restore TRL's own functions, if they were replaced."""
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
    """Replace ``trl.kernels.ChunkedLogProbFunction.apply``.

    hidden [N, H], weight [V, H], bias [V], targets [N] -> log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1,
    each [N], or None if not among ``outputs``.
    """
    needs_other_outputs = not {"log_probs", "entropy"}.issuperset(outputs)
    if needs_other_outputs or logit_scale <= 0 or hasattr(weight, "ds_id") or hidden.dtype == torch.float64:
        from trl.kernels import ChunkedLogProbFunction

        _log.debug("using TRL's own function for outputs %s, logit scale %s", outputs, logit_scale)
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
    """Replace ``trl.kernels.selective_log_softmax_and_entropy``.

    logits [..., V], index and row_mask [...] -> log-probabilities and entropies, both [...].
    """
    labels = index if row_mask is None else index.long().masked_fill(row_mask == 0, _IGNORED)
    return selective_logprobs(logits, labels, temperature=temperature, ignore_index=_IGNORED, backend=backend)


def _is_supported(logits: Tensor, index: Tensor | None = None, row_mask: Tensor | None = None) -> bool:
    """Return whether selective_logprobs supports these arguments: one index per row, and a mask of the same shape."""
    return (
        logits.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and logits.shape[-1] > 0
        and all(x is None or x.shape == logits.shape[:-1] for x in (index, row_mask))
    )
