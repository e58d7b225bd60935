"""Integration with OpenRLHF's PPO: call ``patch()`` before training, ``unpatch()`` after, or ``with patch(): ...``.

What is replaced in OpenRLHF 0.11:

- ``PolicyLoss`` by ``SPPOPolicyLoss`` of ``policy_loss_class()``: the loss and its gradient in one launch.
- ``ValueLoss`` by ``SPPOValueLoss``: binary cross-entropy of the value at the prompt's last token.
- ``RemoteExperienceMaker.get_advantages_and_returns``, which ``--algo.advantage.estimator gae`` runs, by SPPO's
  advantage ``A = R - V(prompt)``, one per response (arXiv 2604.08865). OpenRLHF has a critic only with this estimator.
- ``RemoteExperienceMaker.compute_advantages_and_returns`` by a version that does not whiten. OpenRLHF whitens the
  advantages of this estimator, and SPPO must not.
- ``log_probs_from_logits``, below ``openrlhf.models.Actor``, by ``selective_logprobs``.

The trainers are Ray actors in separate processes, which a patch in the driver's process does not reach.
``patch_when_imported`` is a hook that Ray runs in each worker; ``ray job submit`` takes its name::

    --runtime-env-json='{"worker_process_setup_hook": "sppo_kernels.integrations.openrlhf.patch_when_imported"}'

Tested against OpenRLHF 0.11.2 on a CPU: every replacement is compared with the original on the same tensors, and the
hook runs in a local Ray. A training run (Ray, DeepSpeed, vLLM and flash-attn on GPUs) has not been tested.
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
from ._compatibility import Package, example, method
from ._outcomes import outcomes
from ._patching import AfterImport, Patch

PACKAGE = Package("openrlhf", "0.11.2")
POLICY_LOSS_TYPES = ("ppo", "gspo", "sppo_seq")
_TRAINERS = (
    "openrlhf.trainer.ray.ppo_actor",
    "openrlhf.trainer.ray.ppo_critic",
    "openrlhf.trainer.ppo_utils.experience_maker",
)
_waiting: list[AfterImport] = []
_patch = Patch("openrlhf")  # its trainer modules import the losses by name, some after the patch


def patch(*, policy_loss_type: str | None = None) -> ExitStack:
    """Make OpenRLHF's trainers in this process use SPPO's losses and advantage and ``selective_logprobs``.

    Args:
        policy_loss_type: overrides ``--actor.policy_loss_type``, which accepts only ``"ppo"`` and ``"gspo"``, not
            ``"sppo_seq"``. None: use the type of the command line.

    Returns:
        A context manager that restores the previous state on exit.

    Raises:
        ImportError: OpenRLHF is missing, or what is replaced has other parameters or other results.
        ValueError: ``policy_loss_type`` is unknown.
    """
    PACKAGE.version()
    if policy_loss_type is not None:
        _check_type(policy_loss_type)
    from openrlhf import models
    from openrlhf.models import actor
    from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker

    _check_fit(models, actor, RemoteExperienceMaker)
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


def _check_fit(models: Any, actor: Any, maker: Any) -> None:
    """Check parameters and results of what is replaced, and warn of a version that is not tested.

    Raises:
        ImportError: they are not those of the replacements.
    """
    policy, value = (_patch.original(models, name) for name in ("PolicyLoss", "ValueLoss"))
    logprobs = _patch.original(actor, "log_probs_from_logits")
    counts = "dp_size batch_num_tokens global_batch_size"
    correction = " ".join(f"is_correction_{name}" for name in ("level", "mode", "gating", "threshold"))
    tensors = "self log_probs old_log_probs advantages action_mask rollout_log_probs"
    for name, function, parameters in (
        (
            "openrlhf.models.PolicyLoss",
            method(policy, "__init__"),
            f"self clip_eps_low clip_eps_high dual_clip token_level_loss policy_loss_type {correction}",
        ),
        ("openrlhf.models.PolicyLoss.forward", method(policy, "forward"), f"{tensors} {counts}"),
        ("openrlhf.models.ValueLoss", method(value, "__init__"), "self clip_eps token_level_loss"),
        (
            "openrlhf.models.ValueLoss.forward",
            method(value, "forward"),
            f"self values old_values returns action_mask {counts}",
        ),
        ("openrlhf.models.actor.log_probs_from_logits", logprobs, "logits labels temperature"),
        *(
            (f"{_TRAINERS[2]}.RemoteExperienceMaker.{name}", _patch.original(maker, name), parameters)
            for name, parameters in (
                ("get_advantages_and_returns", "self values rewards action_mask gamma lambd"),
                ("compute_advantages_and_returns", "self experiences"),
            )
        ),
    ):
        PACKAGE.check_parameters(name, function, parameters)

    def losses(cls: Callable[..., nn.Module]) -> list[Tensor]:
        new, old = example(rows=3, columns=5, grad=True), example(rows=3, columns=5, seed=1)
        mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1], [1, 0, 0, 0, 0]], device="cpu")
        loss = cls(clip_eps_low=0.2, clip_eps_high=0.3)(new, old, example(rows=3, columns=5, seed=2), mask)[0]
        return [loss.detach(), *torch.autograd.grad(loss, new)]

    logits, labels = example(rows=7, columns=11), torch.arange(7, device="cpu")
    PACKAGE.check_results("openrlhf.models.PolicyLoss", partial(losses, policy), partial(losses, policy_loss_class()))
    PACKAGE.check_results(
        "openrlhf.models.actor.log_probs_from_logits",
        lambda: [logprobs(logits.clone(), labels, temperature=0.7)],
        lambda: [log_probs_from_logits(logits, labels, temperature=0.7)],
        may_need_gpu=True,  # with flash-attn it is a kernel
    )
    PACKAGE.warn_if_untested()


def unpatch() -> None:
    """Restore OpenRLHF's own functions and remove pending import hooks, if there are any."""
    _withdraw()
    _patch.restore()


def _withdraw() -> None:
    while _waiting:
        _waiting.pop().withdraw()


def patch_when_imported(*, policy_loss_type: str | None = None) -> None:
    """Call ``patch()`` once this process has imported one of OpenRLHF's PPO trainers: a hook for Ray's workers.

    Workers of the reference and the reward model import no trainer and are not patched.

    Patching has to wait because Ray runs the hook before it sets the worker's GPUs. ``patch()`` imports OpenRLHF and
    with it DeepSpeed, which queries CUDA's devices, and the worker would see all GPUs from then on. Waiting also keeps
    DeepSpeed out of vLLM's workers, where OpenRLHF does not import it.

    Raises:
        ImportError: OpenRLHF is missing.
        ValueError: ``policy_loss_type`` is unknown.
    """
    PACKAGE.version()
    if policy_loss_type is not None:
        _check_type(policy_loss_type)
    _withdraw()
    _waiting.append(AfterImport(_TRAINERS, partial(patch, policy_loss_type=policy_loss_type)))


# Losses


@cache
def policy_loss_class() -> type:
    """Return ``SPPOPolicyLoss``, which is defined on the first call because it subclasses OpenRLHF's class."""
    from openrlhf.models.loss import PolicyLoss

    class SPPOPolicyLoss(PolicyLoss):
        """OpenRLHF 0.11's ``PolicyLoss``, same arguments and results, through :func:`sppo_kernels.policy_loss`.

        With ``policy_loss_type`` ``"ppo"`` (the ratio of each token) and ``"gspo"`` (``exp(mean log-ratio)``, arXiv
        2507.18071) it agrees with OpenRLHF's in value and gradient, up to three differences:

        - A log-ratio beyond +-20 keeps its gradient, where OpenRLHF clamps it. Bound the loss with ``dual_clip``.
        - A batch without tokens gives 0, where OpenRLHF gives NaN.
        - The values of masked tokens never matter.

        ``"sppo_seq"`` is the exact ratio of the sequence, ``exp(sum of log-ratios)``. Its loss is averaged over the
        sequences that have tokens, and its ``clip_ratio`` is a fraction of sequences.

        Of the corrections for the rollout engine's log-probabilities, ``"ppo"`` with level token, mode clip and gating
        ratio without a lower bound runs ``rollout_correction="token_truncate"``. All others run OpenRLHF's own forward.
        ``"sppo_seq"`` supports none.
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
            """Return the loss, clip_ratio, ppo_kl, vllm_kl and is_filter_ratio, all 0-d.

            log_probs, old_log_probs, advantages, action_mask and rollout_log_probs are [B, T]. Without a correction
            the last two results are None.
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
                # Where advantages differ inside a sequence, OpenRLHF gives all its tokens the gradient of the mean, and
                # ratio_level="sequence_mean" gives each its own. So the mean is computed here, with its gradient.
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
    """Create an SPPOPolicyLoss of the imposed type, whatever ``policy_loss_type`` the trainer passes."""
    return policy_loss_class()(**{**settings, "policy_loss_type": imposed})


def _mean_in_sequence(x: Tensor, mask: Tensor | None) -> Tensor:
    """Average over each row's tokens and expand: [B, T] -> [B, T]; 0 in a row without tokens."""
    if mask is None:
        return x.mean(1, keepdim=True).expand_as(x)
    unmasked = torch.where(mask != 0, x, 0.0)
    return (unmasked.sum(1, keepdim=True) / (mask != 0).sum(1, keepdim=True).clamp(min=1)).expand_as(x)


def _masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    return x.mean() if mask is None else torch.where(mask != 0, x, 0.0).sum() / (mask != 0).sum().clamp(min=1)


class SPPOValueLoss(nn.Module):
    """Binary cross-entropy of the prompt's value with the outcome, in place of OpenRLHF 0.11's ``ValueLoss``.

    The critic's value at the first response token is its value head on the last prompt token, which depends only on
    the prompt: ``get_llm_for_sequence_regression`` drops the last position and masks the others. That value is treated
    as a logit. All other values have no loss. ``clip_eps`` and ``token_level_loss`` are accepted and ignored.
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
        """Average the loss over the sequences that have tokens: values, returns and action_mask [B, T] -> 0-d.

        ``returns`` holds the outcome. ``global_batch_size`` counts the sequences of all updates and ranks.
        """
        first, has_tokens = _first_token(values, action_mask)
        logit, outcome = values.gather(1, first).squeeze(1), returns.gather(1, first).squeeze(1)
        loss = F.binary_cross_entropy_with_logits(logit.float(), outcome.float(), has_tokens.float(), reduction="sum")
        return loss / (has_tokens.sum().clamp(min=1) if global_batch_size is None else global_batch_size / dp_size)


def _first_token(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the index of each row's first token [B, 1], and whether the row has one [B].

    OpenRLHF's masks span the prompt too, so that the first token is seldom at index 0.
    """
    is_token = torch.ones_like(x, dtype=torch.bool) if mask is None else mask != 0
    return is_token.long().argmax(1, keepdim=True), is_token.any(1)


# Advantages


@torch.no_grad()
def get_advantages_and_returns(
    self: Any, values: Tensor, rewards: Tensor, action_mask: Tensor, gamma: float, lambd: float
) -> tuple[Tensor, Tensor]:
    """Compute SPPO's advantages, in place of OpenRLHF 0.11's ``RemoteExperienceMaker.get_advantages_and_returns``.

    values, rewards, action_mask [B, T] -> advantages, returns [B, T], 0 where masked, with
    ``advantages = R - sigmoid(values at the first token)`` and ``returns = R``, where R is the sum of the row's
    rewards. There is no discount: ``gamma`` and ``lambd`` are ignored.

    Raises:
        ValueError: an outcome is outside [0, 1], so that SPPO's critic cannot predict it.
    """
    remedy = "scale them, and add no KL penalty (--algo.kl.init_coef 0 or --algo.kl.use_loss) and no length penalty"
    outcome = outcomes(rewards, action_mask, remedy)[:, None]
    mask = (action_mask != 0).float()
    first, _ = _first_token(values, action_mask)
    return (outcome - values.gather(1, first).float().sigmoid()) * mask, outcome * mask


@cache  # the first call, before anything is replaced, finds the original
def _unwhitened(maker: type) -> Callable[[Any, list[Any]], list[Any]]:
    """Return ``maker.compute_advantages_and_returns`` without the whitening after the estimator "gae"."""
    original = maker.compute_advantages_and_returns  # type: ignore[attr-defined]

    def compute_advantages_and_returns(self: Any, experiences: list[Any]) -> list[Any]:
        # OpenRLHF chooses baseline and whitening by the name in the settings, and the critic's branch by the name that
        # the maker was constructed with. During the call, the settings hold a name without baseline and whitening.
        advantage = self.strategy.args.algo.advantage
        name = advantage.estimator
        if self.advantage_estimator == "gae":
            advantage.estimator = "sppo_seq"
        try:
            return original(self, experiences)
        finally:
            advantage.estimator = name

    return compute_advantages_and_returns


# Log-probabilities


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Replace OpenRLHF 0.11's function of this name: logits [..., V], labels [...] -> log-probabilities [...], float32.

    It does not modify the logits; OpenRLHF's function divides them by the temperature.
    """
    no_token = -(2**63)  # -100 would hide an invalid label
    return selective_logprobs(logits, labels, temperature=temperature, ignore_index=no_token).logprobs
