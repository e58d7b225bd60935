"""Optimization of policy and critic by one optimizer: loss, parameter groups, gradient clipping."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sppo.algorithms import Algorithm
from sppo.config import SPPOConfig
from sppo.models.actor_critic import ActorCritic, ActorCriticOutput
from sppo.models.fsdp import full_tensor
from sppo.reporting.meter import Meter
from sppo.rollout.batching import MicroBatch
from sppo.rollout.records import Update
from sppo.rollout.support import share_outside
from sppo_kernels import PolicyLossOutput, policy_loss


def update_loss(
    model: nn.Module,
    batch: MicroBatch,
    *,
    update: Update,
    algorithm: Algorithm,
    args: SPPOConfig,
    meter: Meter | None = None,
) -> tuple[Tensor, ActorCriticOutput]:
    """Compute a micro-batch's share of an update's loss.

    Args:
        model: an :class:`ActorCritic`, possibly wrapped.
        batch: one of ``update.micro_batches``, on the model's device.
        update: the update that the micro-batch belongs to.
        algorithm: sets the arguments of the policy loss.
        args: settings of the run.
        meter: records the metrics of the loss, if given.

    Returns:
        The loss, 0-d: policy loss, less the entropy bonus, plus critic loss; and the output of the model.
    """
    output = model(
        batch,
        temperature=args.temperature,
        max_length=update.max_length,
        critic_normalizer=update.critic_normalizer,
        backward=args.logprobs_backward,
        projection=args.logprobs_projection,
        logits_budget_bytes=args.logits_budget_bytes,
        mass_tolerance=args.mass_tolerance,
    )
    policy = policy_loss(
        output.logprobs,
        batch.get("old_logprobs", output.logprobs.detach()),
        batch["advantages"],
        cu_seqlens=batch["response_cu_seqlens"],
        normalizer=update.policy_normalizer,
        ref_logprobs=batch.get("ref_logprobs"),
        **_rollout_correction(batch, args),
        **algorithm.loss_arguments(),
    )
    if meter is not None:
        _record_loss(meter, output, policy, batch, num_micro_batches=len(update.micro_batches), args=args)
    loss = policy.loss
    if args.entropy_coef:
        loss = loss - args.entropy_coef * output.entropy.sum() / update.num_tokens
    return loss if output.critic_loss is None else loss + output.critic_loss, output


def _rollout_correction(batch: MicroBatch, args: SPPOConfig) -> dict[str, Any]:
    """Return the loss arguments that correct for an engine whose log-probabilities differ from the trainer's."""
    if "rollout_logprobs" not in batch:
        return {}
    return {
        "rollout_logprobs": batch["rollout_logprobs"],
        "rollout_correction": None if args.rollout_correction == "none" else args.rollout_correction,
        "rollout_floor": args.rollout_floor,
        "rollout_cap": args.rollout_cap,
    }


def _record_loss(
    meter: Meter,
    output: ActorCriticOutput,
    policy: PolicyLossOutput,
    batch: MicroBatch,
    *,
    num_micro_batches: int,
    args: SPPOConfig,
) -> None:
    # The losses of an update's micro-batches add up to the update's loss; the meter averages.
    losses = {"policy_loss": policy.loss} | ({} if output.critic_loss is None else {"critic_loss": output.critic_loss})
    for name, loss in losses.items():
        meter.mean({name: loss * num_micro_batches}, weight=1 / num_micro_batches)
    num_tokens, num_sequences = output.logprobs.numel(), len(batch["response_cu_seqlens"]) - 1
    if num_tokens == 0:
        return
    unused = set() if "rollout_logprobs" in batch else {"rollout_kl", "rollout_weight_mean"}
    unused |= set() if args.beta else {"kl"}
    for name in policy.metrics.keys() - unused:
        if name == "rollout_weight_mean":
            over_tokens = not args.rollout_correction.startswith("sequence_")
        else:
            over_tokens = args.ratio_level == "token" or name in ("approx_kl", "kl", "rollout_kl")
        meter.mean({name: policy.metrics[name]}, weight=num_tokens if over_tokens else num_sequences)
    meter.mean({"entropy": output.entropy.mean()}, weight=num_tokens)
    if "support_ids" in batch:
        meter.mean({"support_outside": share_outside(batch)}, weight=num_tokens)


def parameter_groups(model: ActorCritic, args: SPPOConfig, decay_names: Collection[str]) -> list[dict[str, Any]]:
    """Return the optimizer's parameter groups: policy and critic, each with and without weight decay.

    Args:
        model: the module that is trained.
        args: settings with the learning rate and weight decay of each.
        decay_names: names of the parameters that weight decay applies to.

    Returns:
        Non-empty groups; ``part`` names the submodule that a group belongs to, ``"policy"`` or ``"critic"``.
    """
    groups: list[dict[str, Any]] = []
    for part, rate, weight_decay in (
        ("policy", args.learning_rate, args.weight_decay),
        ("critic", args.critic_learning_rate, args.critic_weight_decay),
    ):
        trained = {n: p for n, p in model.named_parameters() if n.startswith(f"{part}.") and p.requires_grad}
        for decays in (True, False):
            params = [p for name, p in trained.items() if (name in decay_names) == decays]
            groups.append({"params": params, "lr": rate, "weight_decay": weight_decay if decays else 0.0, "part": part})
    return [group for group in groups if group["params"]]


def freeze_by_rate(optimizer: Optimizer, learns: Callable[[], Mapping[str, bool]]) -> None:
    """Set the learning rate of what may not learn to 0 for the duration of each step.

    For DeepSpeed, which keeps the gradients, so that they cannot be removed before the step.

    Args:
        optimizer: made with :func:`parameter_groups`.
        learns: returns whether each part may learn in the current step.
    """

    def freeze(optimizer: Optimizer, *_: Any) -> None:
        may_learn = learns()
        for group in optimizer.param_groups:
            group["full_lr"], group["lr"] = group["lr"], group["lr"] * may_learn[group["part"]]

    def restore(optimizer: Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] = group.pop("full_lr")

    optimizer.register_step_pre_hook(freeze)
    optimizer.register_step_post_hook(restore)


def clip_gradients(
    model: ActorCritic, *, max_norms: Mapping[str, float], learns: Mapping[str, bool]
) -> tuple[dict[str, Tensor], bool]:
    """Clip the gradients of policy and critic separately.

    What may not learn gets no gradient, and neither part gets one if a norm is not finite: optimizers skip parameters
    without a gradient, including their momentum and weight decay.

    Args:
        model: after backward.
        max_norms: gradient norm that each part is clipped to.
        learns: whether each part may learn in this step.

    Returns:
        Norms before clipping, 0-d, of the parts that learn; and whether all of them are finite.
    """
    norms = {}
    for name, module in model.parts().items():
        if learns[name]:
            norms[name] = full_tensor(nn.utils.clip_grad_norm_(module.parameters(), max_norms[name]))
        else:
            module.zero_grad(set_to_none=True)
    finite = all(torch.isfinite(norm) for norm in norms.values())
    if not finite:
        model.zero_grad(set_to_none=True)
    return norms, finite


def loss_already_normalized(*_: Any, **__: Any) -> NoReturn:
    """Stand in for a loss function that Trainer never calls.

    If ``compute_loss_func`` is given, Trainer assumes that the loss is divided by the size of the whole update, and
    does not divide it by ``gradient_accumulation_steps``. SPPOTrainer overrides ``compute_loss`` and divides there.
    """
    raise RuntimeError("SPPOTrainer.compute_loss computes the loss; compute_loss_func must not be called")
