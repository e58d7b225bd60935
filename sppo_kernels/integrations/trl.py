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

GRPOTrainer's ``rollout_func`` may return the field ``sampling_support``, with the tokens that the sampler kept. All
log-probabilities and entropies of these completions are then computed over them: old, new and of the reference model.
TRL itself passes such a field only to reward functions; :class:`_SupportCarrier` describes its further path.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .._backend import BACKENDS
from .._validation import check_choice, reject
from ..ops.linear_logprobs import linear_logprobs
from ..ops.selective_logprobs import selective_logprobs
from ..ops.support_passes import Support
from ._compatibility import Package, example, method
from ._patching import Name, Patch, wrapping
from ._support import batch_support, completion_supports

PACKAGE = Package("trl", "1.16.0")
SUPPORT_FIELD = "sampling_support"
_REPLACED = {
    "_ChunkedLogProbFunction": "ctx hidden weight bias targets temperature chunk_size final_logit_softcapping "
    "logit_scale outputs",
    "_use_triton": "device",
    "_fused_logprob_entropy": "logits index temperature row_mask",  # absent without Triton (macOS, Windows)
    "_supports_trl_loss_kernel": "logits index row_mask",
}
_WRAPPED = {
    "_generate": "self prompts",
    "_generate_and_score_completions": "self inputs",
    "compute_loss": "self model inputs return_outputs num_items_in_batch",
    "_get_per_token_logps_and_entropies": "self model input_ids attention_mask logits_to_keep batch_size",
}
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
    projection: str = "auto",
    backend: str | None = None,
) -> ExitStack:
    """Make TRL's trainers use ``linear_logprobs`` and ``selective_logprobs``. Call it again to change a setting.

    All arguments are those of :func:`sppo_kernels.linear_logprobs`. ``backward="recompute"`` caches nothing for
    backward, as TRL does. Choose it also where the loss depends on the entropy.

    Returns:
        A context manager that restores the previous state on exit.

    Raises:
        ImportError: TRL is missing, or what is replaced has other parameters or other results.
        ValueError, TypeError: linear_logprobs rejects a setting.
    """
    PACKAGE.version()
    from trl.trainer import utils
    from trl.trainer.grpo_trainer import GRPOTrainer

    if backend is not None:
        check_choice("backend", backend, BACKENDS)
    project = partial(
        linear_logprobs,
        backward=backward,
        logits_budget_bytes=logits_budget_bytes,
        chunk_bytes=chunk_bytes,
        mass_tolerance=mass_tolerance,
        max_entries=max_entries,
        projection=projection,
    )
    one = torch.zeros(1, 1, dtype=torch.float32, device="cpu")
    project(one, one, torch.zeros(1, dtype=torch.long, device="cpu"))  # rejects an invalid setting now
    project = partial(project, backend=backend)
    _check_fit(utils, GRPOTrainer)
    carrier = _SupportCarrier()
    replacements: dict[Name, Any] = {
        (utils, "_ChunkedLogProbFunction"): SimpleNamespace(apply=partial(_chunked_logprobs, project, carrier)),
        (utils, "_use_triton"): lambda device: device.type in ("cpu", "cuda", "xpu"),
    }
    if hasattr(utils, "_fused_logprob_entropy"):
        replacements[utils, "_fused_logprob_entropy"] = partial(_logprobs_and_entropy, backend)
        replacements[utils, "_supports_trl_loss_kernel"] = _is_supported
    for name, wrapper in carrier.methods().items():
        replacements[GRPOTrainer, name] = wrapping(wrapper)(_patch.original(GRPOTrainer, name))
    return _patch.apply(replacements)


def _check_fit(utils: Any, trainer: Any) -> None:
    """Check parameters and results of what is replaced, and warn of a version that is not tested.

    Raises:
        ImportError: they are not those of the replacements.
    """
    for name, parameters in _WRAPPED.items():
        full_name = f"trl.trainer.grpo_trainer.GRPOTrainer.{name}"
        PACKAGE.check_parameters(full_name, _patch.original(trainer, name), parameters, may_have_more=True)
    functions = {name: _patch.original(utils, name) for name in _REPLACED}
    chunked = functions["_ChunkedLogProbFunction"]
    functions["_ChunkedLogProbFunction"] = method(chunked, "forward")
    has_triton = functions["_fused_logprob_entropy"] is not None
    for name, parameters in _REPLACED.items():
        if has_triton or name in ("_ChunkedLogProbFunction", "_use_triton"):
            PACKAGE.check_parameters(f"trl.trainer.utils.{name}", functions[name], parameters)
    labels = torch.arange(7, device="cpu")
    settings = (0.7, 4, 3.0, 2.0, ("log_probs", "entropy"))

    def results(function: Callable[..., Any]) -> list[Tensor]:
        hidden, weight = example(rows=7, columns=5, grad=True), example(rows=11, columns=5, seed=1, grad=True)
        bias = example(rows=1, columns=11, seed=2)[0].requires_grad_()
        logprobs, entropy, *_ = function(hidden, weight, bias, labels, *settings)
        grads = torch.autograd.grad((logprobs * example(rows=1, columns=7, seed=3)[0]).sum(), (hidden, weight, bias))
        return [logprobs.detach(), entropy.detach(), *grads]

    replacement = partial(_chunked_logprobs, partial(linear_logprobs, backward="recompute"), _SupportCarrier())
    name = "trl.trainer.utils._ChunkedLogProbFunction"
    PACKAGE.check_results(name, lambda: results(chunked.apply), lambda: results(replacement))
    if has_triton:
        logits = example(rows=7, columns=11)
        PACKAGE.check_results(
            "trl.trainer.utils.selective_log_softmax",
            lambda: [utils.selective_log_softmax(logits, labels, 0.7)],
            lambda: [_logprobs_and_entropy(None, logits, labels, 0.7)[0]],
        )
    PACKAGE.warn_if_untested()


def unpatch() -> None:
    """Restore TRL's own functions, if they were replaced."""
    _patch.restore()


class _SupportCarrier:
    """Path of the supports from GRPOTrainer's rollout function to the log-probabilities of the same completions.

    The methods wrap those of GRPOTrainer. ``generate`` reads the field. ``generate_and_score`` puts it into the batch,
    which TRL shuffles, splits and buffers, and ``compute_loss`` takes it out again. ``score`` knows which completions
    each forward of the model has and which of their tokens are scored, and ``_chunked_logprobs`` runs once per forward.
    """

    def __init__(self) -> None:
        self._supports: list[Support] | None = None  # one per sample that is being scored
        self._calls: Iterator[Support] | None = None  # one per forward of these samples
        self._is_generating = False
        self._has_warned = False

    def methods(self) -> dict[str, Callable[..., Any]]:
        """Return the methods by the names of those that they wrap."""
        return {
            "_generate": self.generate,
            "_generate_and_score_completions": self.generate_and_score,
            "compute_loss": self.compute_loss,
            "_get_per_token_logps_and_entropies": self.score,
        }

    def next_call(self) -> Support | None:
        """Return the support of the tokens of the next forward, None where the rollout had no supports."""
        return None if self._calls is None else next(self._calls)

    @contextmanager
    def _set(self, **state: Any) -> Iterator[None]:
        before = {name: getattr(self, name) for name in state}
        vars(self).update(state)
        try:
            yield
        finally:
            vars(self).update(before)

    def generate(self, original: Any, trainer: Any, prompts: Any) -> Any:
        results = original(trainer, prompts)
        _, completions, _, _, _, extra_fields, _, _ = results
        values = extra_fields.get(SUPPORT_FIELD)
        if values is None:
            self._warn_of_truncation(trainer.args)
        else:
            if not self._is_generating:
                got = f"returned to a {type(trainer).__name__}, which overrides _generate_and_score_completions"
                reject(SUPPORT_FIELD, got, "left out of the fields of a rollout_func of such a trainer")
            vocab = trainer.model.config.get_text_config().vocab_size
            self._supports = completion_supports(SUPPORT_FIELD, values, completions, vocab)
        return results

    def _warn_of_truncation(self, args: Any) -> None:
        """Warn once of a truncated distribution that is scored over the whole vocabulary."""
        truncation = {"top_p": args.top_p, "top_k": args.top_k, "min_p": args.min_p}
        is_truncated = args.top_p < 1 or (args.top_k or 0) > 0 or bool(args.min_p)
        if self._has_warned or not is_truncated:
            return
        self._has_warned = True
        _log.warning(
            "%s, but the rollout returned no %s: log-probabilities are over the whole vocabulary, which is another "
            "distribution than the one that was sampled; return the field from rollout_func (docs/guides/trl.md)",
            ", ".join(f"{name}={value}" for name, value in truncation.items()),
            SUPPORT_FIELD,
        )

    def generate_and_score(self, original: Any, trainer: Any, inputs: Any) -> dict[str, Any]:
        with self._set(_supports=None, _is_generating=True):
            batch = original(trainer, inputs)
            return batch if self._supports is None else batch | {SUPPORT_FIELD: self._supports}

    def compute_loss(self, original: Any, trainer: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with self._set(_supports=inputs.get(SUPPORT_FIELD)):
            return original(trainer, model, inputs, *args, **kwargs)

    def score(
        self,
        original: Any,
        trainer: Any,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        inputs = (model, input_ids, attention_mask, logits_to_keep, batch_size, *args)
        supports = self._supports
        if supports is None:
            return original(trainer, *inputs, **kwargs)
        if len(supports) != len(input_ids):
            reject(SUPPORT_FIELD, f"{len(supports)} supports", f"one per sample of the batch, {len(input_ids)}")
        rows = batch_size or len(supports)
        mask = attention_mask[:, -logits_to_keep:].bool().cpu()
        calls = (batch_support(supports[i : i + rows], mask[i : i + rows]) for i in range(0, len(supports), rows))
        with self._set(_calls=calls):
            results = original(trainer, *inputs, **kwargs)
        if next(calls, None) is not None:
            reject(
                SUPPORT_FIELD,
                "ignored by a function that this patch does not replace",
                f"used with TRL {PACKAGE.tested}",
            )
        return results


def _chunked_logprobs(
    project: partial[Any],
    carrier: _SupportCarrier,
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
    support = carrier.next_call()
    needs_other_outputs = not {"log_probs", "entropy"}.issuperset(outputs)
    if needs_other_outputs or logit_scale <= 0 or hasattr(weight, "ds_id") or hidden.dtype == torch.float64:
        from trl.kernels import ChunkedLogProbFunction

        if support is not None:
            got = f"{hidden.dtype}, logit scale {logit_scale}, outputs {outputs}"
            got += ", an LM head sharded by ZeRO-3" if hasattr(weight, "ds_id") else ""
            want = "used with a gathered LM head, below float64, a scale above 0, only log_probs and entropy"
            reject(SUPPORT_FIELD, got, want)
        _log.debug("using TRL's own function for outputs %s, logit scale %s", outputs, logit_scale)
        return ChunkedLogProbFunction.apply(
            hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs
        )
    # With scale a and cap s, TRL's  s tanh(a x / s) / tau  is  (s/a) tanh(x / (s/a)) / (tau/a).
    softcap = None if final_logit_softcapping is None else final_logit_softcapping / logit_scale
    if support is not None:
        support = Support(*(x.to(targets.device, non_blocking=True) for x in support))
    logprobs, entropy = project(
        hidden,
        weight.to(hidden.dtype),
        targets,
        bias=bias,
        temperature=temperature / logit_scale,
        softcap=softcap,
        support=support,
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
