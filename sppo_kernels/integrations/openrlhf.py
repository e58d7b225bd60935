"""OpenRLHF's PPO on these operations: ``patch()`` before it trains, ``unpatch()`` after, or ``with patch(): ...``.

What OpenRLHF 0.11 looks up, and what stands there once patched:

- ``PolicyLoss``: ``SPPOPolicyLoss``, from ``policy_loss_class()``; the loss and its gradient in one launch.
- ``ValueLoss``: ``SPPOValueLoss``, binary cross-entropy of the value at the prompt's last token.
- ``RemoteExperienceMaker.get_advantages_and_returns`` (what ``--algo.advantage.estimator gae`` runs): SPPO's
  advantage, ``A = R - V(prompt)``, one number a response, arXiv 2604.08865. Only this estimator has a critic, and
  OpenRLHF whitens what it returns, which SPPO must not: ``compute_advantages_and_returns`` is told not to.
- ``log_probs_from_logits``, below ``openrlhf.models.Actor``: ``selective_logprobs``.

The trainers are Ray actors in processes of their own, where a patch of the driver's process does not reach;
``patch_when_imported`` is the hook that Ray runs in each worker. ``ray job submit`` takes its name::

    --runtime-env-json='{"worker_process_setup_hook": "sppo_kernels.integrations.openrlhf.patch_when_imported"}'

Tested against OpenRLHF 0.11.2 on a CPU: every replacement beside the original on the same tensors, and the hook in a
local Ray. A training run (Ray, DeepSpeed, vLLM and flash-attn on GPUs) has not been tested.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._validation import reject
from ..ops.policy_loss import policy_loss
from ..ops.selective_logprobs import selective_logprobs
from ._outcomes import outcomes
from ._patching import AfterImport, Patch, check_version

VERSION = "0.11.2"
POLICY_LOSS_TYPES = ("ppo", "gspo", "sppo_seq")
_TRAINERS = (
    "openrlhf.trainer.ray.ppo_actor",
    "openrlhf.trainer.ray.ppo_critic",
    "openrlhf.trainer.ppo_utils.experience_maker",
)
_waiting: list[AfterImport] = []
_patch = Patch("openrlhf")  # its trainers bind the losses once more, some of them after the patch


def patch(*, policy_loss_type: str | None = None) -> ExitStack:
    """Put SPPO's losses and advantage and ``selective_logprobs`` under OpenRLHF's trainers, in this process.

    Args:
        policy_loss_type: in place of ``--actor.policy_loss_type``, which lets only ``"ppo"`` and ``"gspo"`` through:
            ``"sppo_seq"``. None: as the command line says.

    Returns:
        A context manager that puts back on exit what it found.

    Raises:
        ImportError: OpenRLHF is missing, or of a version that this was not tested with.
        ValueError: an unknown ``policy_loss_type``.
    """
    check_version("openrlhf", VERSION)
    if policy_loss_type is not None:
        _check_type(policy_loss_type)
    from openrlhf import models
    from openrlhf.models import actor
    from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker

    loss: Callable[..., nn.Module] = policy_loss_class()
    if policy_loss_type is not None:
        loss = partial(_with_type, policy_loss_type)
    return _patch.apply(
        {
            (models, "PolicyLoss"): loss,
            (models, "ValueLoss"): SPPOValueLoss,
            (actor, "log_probs_from_logits"): log_probs_from_logits,
            (RemoteExperienceMaker, "get_advantages_and_returns"): get_advantages_and_returns,
            (RemoteExperienceMaker, "compute_advantages_and_returns"): _unwhitened(RemoteExperienceMaker),
        }
    )


def unpatch() -> None:
    """Give OpenRLHF its own back, and wait for no import any more; nothing where nothing was done."""
    _withdraw()
    _patch.restore()


def _withdraw() -> None:
    while _waiting:
        _waiting.pop().withdraw()


def patch_when_imported(*, policy_loss_type: str | None = None) -> None:
    """``patch()`` as soon as this process has imported one of OpenRLHF's PPO trainers: a hook for Ray's workers.

    Workers of the reference and the reward model import none and keep what they have.

    Not at once, because Ray runs the hook before it says which GPUs the worker has, and ``patch()`` imports OpenRLHF
    and with it DeepSpeed, which asks CUDA for its GPUs: the worker would see all of them from then on. And not in
    vLLM's workers, which OpenRLHF keeps free of DeepSpeed.
    """
    check_version("openrlhf", VERSION)
    if policy_loss_type is not None:
        _check_type(policy_loss_type)
    _withdraw()
    _waiting.append(AfterImport(_TRAINERS, partial(patch, policy_loss_type=policy_loss_type)))


# The losses


@cache
def policy_loss_class() -> type:
    """``SPPOPolicyLoss``, made when it is asked for because it subclasses OpenRLHF's."""
    from openrlhf.models.loss import PolicyLoss

    class SPPOPolicyLoss(PolicyLoss):
        """OpenRLHF 0.11's ``PolicyLoss``, same arguments and results, through :func:`sppo_kernels.policy_loss`.

        ``policy_loss_type``: ``"ppo"`` (the ratio of each token) and ``"gspo"`` (``exp(mean log-ratio)``, arXiv
        2507.18071) agree with OpenRLHF's in value and gradient, up to three differences: a log-ratio beyond +-20 keeps
        its gradient where OpenRLHF clamps it (bound the loss with ``dual_clip``), a batch without tokens gives 0 where
        OpenRLHF gives NaN, and what masked tokens hold never matters. ``"sppo_seq"`` is the exact ratio of the
        sequence, ``exp(sum of log-ratios)``, averaged over the sequences that have tokens; its ``clip_ratio`` is a
        fraction of sequences.

        Of the corrections for the rollout engine's log-probabilities, ``"ppo"`` with level token, mode clip and gating
        ratio without a lower bound is ``rollout_correction="token_truncate"``. All others run OpenRLHF's own forward;
        ``"sppo_seq"`` knows none.
        """

        def __init__(
            self,
            clip_eps_low: float = 0.2,
            clip_eps_high: float = 0.2,
            dual_clip: float | None = None,
            token_level_loss: bool = True,
            policy_loss_type: str = "ppo",
            is_correction_level: str = "off",
            is_correction_mode: str = "mask",
            is_correction_gating: str = "ratio",
            is_correction_threshold: Sequence[float] = (0.5, 5.0),
        ) -> None:
            super().__init__(
                clip_eps_low,
                clip_eps_high,
                dual_clip,
                token_level_loss,
                policy_loss_type,
                is_correction_level,
                is_correction_mode,
                is_correction_gating,
                is_correction_threshold,
            )
            _check_type(policy_loss_type)
            correction = (is_correction_level, is_correction_mode, is_correction_gating)
            self._corrected = is_correction_level != "off"
            self._truncated = correction == ("token", "clip", "ratio") and is_correction_threshold[0] <= 0
            if self._corrected and policy_loss_type == "sppo_seq":
                reject("is_correction_level", repr(is_correction_level), "'off' with policy_loss_type='sppo_seq'")

        def forward(
            self,
            log_probs: Tensor,
            old_log_probs: Tensor,
            advantages: Tensor,
            action_mask: Tensor | None = None,
            rollout_log_probs: Tensor | None = None,
            dp_size: int = 1,
            batch_num_tokens: float | None = None,
            global_batch_size: float | None = None,
        ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
            """log_probs, old_log_probs, advantages, action_mask, rollout_log_probs [B, T] -> loss, clip_ratio, ppo_kl,
            vllm_kl, is_filter_ratio, all 0-d, the last two None without a correction.
            """
            if self._corrected and not (self._truncated and self.policy_loss_type == "ppo"):
                return super().forward(
                    log_probs,
                    old_log_probs,
                    advantages,
                    action_mask,
                    rollout_log_probs,
                    dp_size,
                    batch_num_tokens,
                    global_batch_size,
                )
            if self.policy_loss_type == "gspo":
                # Where advantages differ inside a sequence, OpenRLHF pushes its tokens alike, by their mean, and
                # ratio_level="sequence_mean" each by its own: so the mean is taken here, with its gradient.
                log_probs = _mean_in_sequence(log_probs - old_log_probs, action_mask)
                old_log_probs = torch.zeros_like(log_probs)
            correction: dict[str, Any] = {}
            if self._corrected:
                correction = {
                    "rollout_logprobs": rollout_log_probs,
                    "rollout_correction": "token_truncate",
                    "rollout_cap": self.is_correction_threshold[1],
                }
            per_token = self.token_level_loss and self.policy_loss_type == "ppo"
            count = batch_num_tokens if per_token else global_batch_size
            loss, metrics = policy_loss(
                log_probs,
                old_log_probs,
                advantages,
                mask=action_mask,
                ratio_level="sequence_sum" if self.policy_loss_type == "sppo_seq" else "token",
                clip_low=self.clip_eps_low,
                clip_high=self.clip_eps_high,
                dual_clip=self.dual_clip,
                aggregation="token-mean" if per_token else "seq-mean-token-mean",
                normalizer=None if count is None else count / dp_size,
                **correction,
            )
            vllm_kl = is_filter_ratio = None
            if self._corrected and rollout_log_probs is not None:
                over = (old_log_probs - rollout_log_probs).exp() > self.is_correction_threshold[1]
                is_filter_ratio = _masked_mean(over.float(), action_mask)
                vllm_kl = metrics["rollout_kl"]
            return loss, metrics["clip_fraction"], metrics["approx_kl"], vllm_kl, is_filter_ratio

    return SPPOPolicyLoss


def _check_type(policy_loss_type: str) -> None:
    if policy_loss_type not in POLICY_LOSS_TYPES:
        reject("policy_loss_type", repr(policy_loss_type), "one of " + ", ".join(map(repr, POLICY_LOSS_TYPES)))


def _with_type(imposed: str, /, **settings: Any) -> nn.Module:
    """An SPPOPolicyLoss of this type, whatever type the trainer names among its keywords."""
    return policy_loss_class()(**{**settings, "policy_loss_type": imposed})


def _mean_in_sequence(x: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over each row's tokens, at each of them: [B, T] -> [B, T]; 0 in a row without tokens."""
    if mask is None:
        return x.mean(1, keepdim=True).expand_as(x)
    kept = torch.where(mask != 0, x, 0.0)
    return (kept.sum(1, keepdim=True) / (mask != 0).sum(1, keepdim=True).clamp(min=1)).expand_as(x)


def _masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    return x.mean() if mask is None else torch.where(mask != 0, x, 0.0).sum() / (mask != 0).sum().clamp(min=1)


class SPPOValueLoss(nn.Module):
    """OpenRLHF 0.11's ``ValueLoss``, same arguments: binary cross-entropy of the prompt's value with the outcome.

    The critic's value at the first response token is its head on the last prompt token, which has seen no more than
    the prompt: ``get_llm_for_sequence_regression`` drops the last position and masks the others. That value is a logit
    here, all others bear no loss. ``clip_eps`` and ``token_level_loss`` are accepted and mean nothing.
    """

    def __init__(self, clip_eps: float | None = None, token_level_loss: bool = True) -> None:
        super().__init__()

    def forward(
        self,
        values: Tensor,
        old_values: Tensor,
        returns: Tensor,
        action_mask: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> Tensor:
        """values, returns, action_mask [B, T], the outcome in ``returns`` -> 0-d, the mean over the sequences that
        have tokens, of which all updates and ranks together have ``global_batch_size``.
        """
        first, some = _first_token(values, action_mask)
        logit, outcome = values.gather(1, first).squeeze(1), returns.gather(1, first).squeeze(1)
        loss = F.binary_cross_entropy_with_logits(logit.float(), outcome.float(), some.float(), reduction="sum")
        return loss / (some.sum().clamp(min=1) if global_batch_size is None else global_batch_size / dp_size)


def _first_token(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of [B, T]: the index of each row's first token [B, 1], and whether it has one [B]. OpenRLHF's masks span the
    prompt too, so that the first token is seldom at index 0.
    """
    keep = torch.ones_like(x, dtype=torch.bool) if mask is None else mask != 0
    return keep.long().argmax(1, keepdim=True), keep.any(1)


# The advantage


@torch.no_grad()
def get_advantages_and_returns(
    self: Any, values: Tensor, rewards: Tensor, action_mask: Tensor, gamma: float, lambd: float
) -> tuple[Tensor, Tensor]:
    """OpenRLHF 0.11's ``RemoteExperienceMaker.get_advantages_and_returns``: values, rewards, action_mask [B, T] ->
    advantages, returns [B, T], 0 where the mask is.

    ``advantages = R - sigmoid(values at the first token)``, ``returns = R``, R the sum of the row's rewards. There is
    no discount: ``gamma`` and ``lambd`` mean nothing.

    Raises:
        ValueError: an outcome outside [0, 1], which no critic of SPPO's can predict.
    """
    remedy = "scale them, no KL penalty in them (--algo.kl.init_coef 0 or --algo.kl.use_loss), no length penalty"
    outcome = outcomes(rewards, action_mask, remedy)[:, None]
    mask = (action_mask != 0).float()
    first, _ = _first_token(values, action_mask)
    return (outcome - values.gather(1, first).float().sigmoid()) * mask, outcome * mask


@cache  # of the first call, before anything was replaced
def _unwhitened(maker: type) -> Callable[[Any, list[Any]], list[Any]]:
    """``maker.compute_advantages_and_returns`` without the whitening that follows upon the estimator "gae"."""
    original = maker.compute_advantages_and_returns  # type: ignore[attr-defined]

    def compute_advantages_and_returns(self: Any, experiences: list[Any]) -> list[Any]:
        # OpenRLHF chooses baseline and whitening by the name in the settings, the critic's branch by the name that the
        # maker was made with: for as long as this runs, the settings hold one that has neither baseline nor whitening.
        advantage = self.strategy.args.algo.advantage
        name = advantage.estimator
        if self.advantage_estimator == "gae":
            advantage.estimator = "sppo_seq"
        try:
            return original(self, experiences)
        finally:
            advantage.estimator = name

    return compute_advantages_and_returns


# The log-probabilities


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """OpenRLHF 0.11's function of this name: logits [..., V], labels [...] -> log-probabilities [...], float32. It
    leaves the logits as they are, where OpenRLHF's divides them by the temperature.
    """
    no_token = -(2**63)  # with -100 a wrong label would pass for an ignored one
    return selective_logprobs(logits, labels, temperature=temperature, ignore_index=no_token).logprobs
