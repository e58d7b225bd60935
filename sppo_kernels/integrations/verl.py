"""Integration with verl: an advantage estimator, a policy loss, a critic loss, and fused log-probabilities.

verl 0.9 loads this module in each of its processes if both packages are installed (entry-point group
``verl.plugins``). Loading it changes no run, because everything it adds has names that the configuration must select::

    algorithm.adv_estimator=sppo_seq                          A = R - sigmoid(the critic at the last prompt token)
    critic.loss_agg_mode=sppo_seq                             binary cross-entropy there; requires the estimator above
    actor_rollout_ref.actor.policy_loss.loss_mode=sppo_seq    clipped and dual-clipped, in one launch
    actor_rollout_ref.model.use_fused_kernels=True            linear_logprobs instead of logits
    actor_rollout_ref.model.fused_kernel_options.impl_backend=sppo_kernels

``loss_mode`` may also be ``sppo_seq_mean``, whose ratio is the per-token geometric mean over the response (GSPO), or
``sppo_seq_sum``, whose ratio is that of the complete response. ``impl_backend`` may also be
``sppo_kernels_recompute``, which caches nothing for backward (with an entropy bonus, or if memory is scarce),
``sppo_kernels_cache`` or ``sppo_kernels_sparse``.

verl's critic reads prompt and response, of which SPPO uses one position. Causal attention lets that position see only
the prompt. The forward and backward over responses are a cost that this package's own trainer does not have.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.linear_logprobs import linear_logprobs
from ..ops.policy_loss import policy_loss
from ._compatibility import Package, example, method
from ._outcomes import outcomes
from ._patching import AfterImport, Patch, wrapping

PACKAGE = Package("verl", "0.9.1")
NAME = "sppo_seq"  # "sppo" usually means Self-Play Preference Optimization
FUSED_BACKENDS = {"sppo_kernels": "auto"} | {f"sppo_kernels_{mode}": mode for mode in ("recompute", "cache", "sparse")}
RATIO_LEVELS = {NAME: "token", f"{NAME}_mean": "sequence_mean", f"{NAME}_sum": "sequence_sum"}
_patch = Patch("verl")
_added: set[str] = set()
_waiting: list[AfterImport] = []
_unfit: dict[str, ImportError] = {}


def patch() -> ExitStack:
    """Add everything above to verl in this process, except what is already present.

    Returns:
        A context manager that removes it on exit, unless the plugin or another call had added it before.

    Raises:
        ImportError: verl is missing, or what is replaced has other parameters or other results.
    """
    PACKAGE.version()
    undo = ExitStack()
    if not (_added or _waiting):
        undo.callback(unpatch)
    for module in _PATCHED_MODULES:
        import_module(module)
        _add(module)
    PACKAGE.warn_if_untested()
    return undo


def patch_when_imported() -> None:
    """Add each part once verl has imported the module that it belongs to, as the plugin does.

    This way no process imports more of verl than it would without the plugin. A part that does not fit is left out, and
    the first use of a name that needs it raises the reason.

    Raises:
        ImportError: verl is missing.
    """
    PACKAGE.version()
    _waiting.extend(AfterImport([module], partial(_add_if_it_fits, module)) for module in _PATCHED_MODULES)


def unpatch() -> None:
    """Remove everything that was added, if anything was.

    Do not call it while a model that verl created with ``impl_backend=sppo_kernels`` is in use.
    """
    while _waiting:
        _waiting.pop().withdraw()
    _patch.restore()
    if _REGISTRIES in _added | _unfit.keys():
        core_algos = sys.modules[_REGISTRIES]
        core_algos.ADV_ESTIMATOR_REGISTRY.pop(NAME, None)
        for name in RATIO_LEVELS:
            core_algos.POLICY_LOSS_REGISTRY.pop(name, None)
    _added.clear()
    _unfit.clear()


def _add_if_it_fits(module_name: str) -> None:
    try:
        _add(module_name)
    except ImportError as error:
        _unfit[module_name] = error
        if module_name == _REGISTRIES:
            _register(sys.modules[module_name])  # they raise the reason


def _check_use() -> None:
    """Check that every part that verl has imported fits, when the configuration names one.

    Raises:
        ImportError: one does not.
    """
    for error in _unfit.values():
        raise error
    PACKAGE.warn_if_untested()


def _add(module_name: str) -> None:
    """Add the part that belongs to an imported module of verl."""
    if module_name in _added:
        return
    module = sys.modules[module_name]
    _check_fit(module)
    if module_name == _REGISTRIES:
        _register(module)
    else:
        name, replacement_for = _WRAPPED[module_name]
        _patch.apply({(module, name): replacement_for(getattr(module, name))})
    _added.add(module_name)


def _register(core_algos: Any) -> None:
    core_algos.register_adv_est(NAME)(_checked_advantages)
    for name, ratio_level in RATIO_LEVELS.items():
        core_algos.register_policy_loss(name)(partial(_checked_policy_loss, ratio_level))


def _checked_advantages(*args: Any, **kwargs: Any) -> Any:
    _check_use()
    return sppo_advantages(*args, **kwargs)


def _checked_policy_loss(*args: Any, **kwargs: Any) -> Any:
    _check_use()
    return sppo_policy_loss(*args, **kwargs)


def _check_fit(module: Any) -> None:
    """Check parameters and results of the part that belongs to a module of verl.

    Raises:
        ImportError: they are not those of the replacements.
    """
    path = module.__name__
    if path == _REGISTRIES:
        for name, parameters in (("register_adv_est", "name_or_enum"), ("register_policy_loss", "name")):
            PACKAGE.check_parameters(f"{path}.{name}", getattr(module, name, None), parameters, may_have_more=True)
        vanilla, name = getattr(module, "compute_policy_loss_vanilla", None), f"{path}.compute_policy_loss_vanilla"
        PACKAGE.check_parameters(name, vanilla, _POLICY_LOSS)
        ours = partial(sppo_policy_loss, "token")
        PACKAGE.check_results(name, partial(_example_losses, vanilla), partial(_example_losses, ours))
        return
    name, _ = _WRAPPED[path]
    original, more = getattr(module, name, None), name == "compute_advantage"
    if name != "FusedLinearForPPO":
        PACKAGE.check_parameters(f"{path}.{name}", original, _PARAMETERS[name], may_have_more=more)
        return
    for part, parameters in (
        ("__init__", "self chunk_size impl_backend"),
        ("forward", "self hidden_states vocab_weights input_ids temperature"),
    ):
        PACKAGE.check_parameters(f"{path}.{name}.{part}", method(original, part), parameters)
    replacement = _fused_linear_class(original)

    def results(cls: Any, backend: str) -> list[Tensor]:
        hidden, weight = example(rows=7, columns=5, grad=True), example(rows=11, columns=5, seed=1, grad=True)
        labels = torch.arange(7, device="cpu")
        logprobs, entropy = cls(impl_backend=backend)(hidden[None], weight, labels[None], temperature=0.7)
        loss = (logprobs * example(rows=1, columns=7, seed=2)).sum()
        return [logprobs.detach(), entropy.detach(), *torch.autograd.grad(loss, (hidden, weight))]

    PACKAGE.check_results(
        f"{path}.{name}",
        partial(results, original, "torch"),
        partial(results, replacement, "sppo_kernels_recompute"),
        may_need_gpu=True,  # with flash-attn it uses a kernel
    )


class _ExampleConfig(dict[str, Any]):
    """What verl's policy losses read of an ``ActorConfig``, whose module a process need not have imported."""

    clip_ratio = 0.2
    clip_ratio_low = 0.2
    clip_ratio_high = 0.3
    global_batch_info: ClassVar[dict[str, Any]] = {}


def _example_losses(function: Any) -> list[Tensor]:
    new, old = example(rows=3, columns=5, grad=True), example(rows=3, columns=5, seed=1)
    mask = torch.tensor([[1.0, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]], device="cpu")
    advantages = example(rows=3, columns=5, seed=2)
    loss, _ = function(old, new, advantages, mask, "token-mean", _ExampleConfig(clip_ratio_c=3.0), None)
    return [loss.detach(), *torch.autograd.grad(loss, new)]


# Configuration: on the driver, before anything is started


def _need_critic(original: Any, config: Any) -> bool:
    """Enable the critic for SPPO and check the names: wraps ``verl.trainer.ppo.utils.need_critic``.

    verl calls that function with the complete configuration.

    Raises:
        ValueError: two names in the configuration are incompatible.
    """
    from omegaconf import OmegaConf

    estimator = OmegaConf.select(config, "algorithm.adv_estimator")
    critic_loss = OmegaConf.select(config, "critic.loss_agg_mode")
    if (estimator == NAME) != (critic_loss == NAME):
        raise ValueError(
            f"algorithm.adv_estimator and critic.loss_agg_mode must both be {NAME} or neither (the estimator reads the "
            f"critic's value as a logit, which only this loss trains), got {estimator} and {critic_loss}"
        )
    loss_mode = OmegaConf.select(config, "actor_rollout_ref.actor.policy_loss.loss_mode")
    if loss_mode in RATIO_LEVELS:
        _check_aggregation(RATIO_LEVELS[loss_mode], config.actor_rollout_ref.actor.loss_agg_mode)
    return True if estimator == NAME and config.critic.enable is None else original(config)


def _check_aggregation(ratio_level: str, loss_agg_mode: str) -> None:
    if ratio_level != "token" and loss_agg_mode != "seq-mean-token-mean":
        raise ValueError(
            "actor_rollout_ref.actor.loss_agg_mode must be seq-mean-token-mean with a ratio of complete responses, "
            f"got {loss_agg_mode}"
        )


# Advantages: on the driver, once per update


def sppo_advantages(
    token_level_rewards: Tensor, response_mask: Tensor, values: Tensor | None = None, **_: Any
) -> tuple[Tensor, Tensor]:
    """Compute ``A = R - V(prompt)``, equal for all tokens of a response and not whitened (SPPO, arXiv 2604.08865).

    Args:
        token_level_rewards: ``[B, T]``; the outcome ``R`` is their sum over the response, in [0, 1].
        response_mask: ``[B, T]``, 1 where a token belongs to the response.
        values: ``[B, T]``, from verl's critic. The logit of success is at the first position, which corresponds to the
            last token of the prompt.

    Returns:
        advantages ``[B, T]``, and returns ``[B, T]``: the outcome, the critic's target. Both are 0 where masked.

    Raises:
        ValueError: values are missing, or an outcome is outside [0, 1].
    """
    if values is None:
        raise ValueError(f"adv_estimator={NAME} needs the critic's values: critic.enable must not be False")
    outcome = outcomes(
        token_level_rewards, response_mask, "change the reward, and set algorithm.use_kl_in_reward=False"
    )
    mask = response_mask.float()
    advantages = outcome - torch.sigmoid(values[:, 0].float())
    return advantages[:, None] * mask, outcome[:, None] * mask


def _compute_advantage(original: Any, data: Any, adv_estimator: str, *args: Any, **kwargs: Any) -> Any:
    """Run SPPO's estimator with the critic's values: wraps ``verl.trainer.ppo.ray_trainer.compute_advantage``.

    verl passes values only to its own GAE.
    """
    if adv_estimator != NAME:
        return original(data, adv_estimator, *args, **kwargs)
    _check_use()
    batch = data.batch
    batch["advantages"], batch["returns"] = sppo_advantages(
        batch["token_level_rewards"], batch["response_mask"], batch.get("values", None)
    )
    return data


# Policy loss: on each actor


def sppo_policy_loss(
    ratio_level: str,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Compute :func:`sppo_kernels.policy_loss` with the signature of verl's policy losses.

    With the token ratio it is verl's ``vanilla`` loss including the dual clip ``clip_ratio_c``, except that the
    log-ratio is not clamped to 20. The clamp would remove the gradient of a token with a negative advantage whose
    probability must fall. With ``sequence_mean`` it is verl's ``gspo``, dual-clipped.

    Args:
        ratio_level: of :func:`sppo_kernels.policy_loss`.
        old_log_prob, log_prob, advantages, response_mask: ``[B, T]``.
        loss_agg_mode: any of verl's five. A ratio of complete responses requires ``seq-mean-token-mean``.
        config: verl's ``ActorConfig``.
        rollout_is_weights: ``[B, T]``, nonnegative.

    Returns:
        The loss, 0-d, and verl's three metrics. Clip fractions count tokens, or responses with a ratio of complete
        responses; those of weight 0 count as not clipped.

    Raises:
        ValueError: ``loss_agg_mode`` does not fit the ratio, or a data-parallel group lacks the global counts.
    """
    _check_aggregation(ratio_level, loss_agg_mode)
    if rollout_is_weights is not None:
        advantages = advantages * rollout_is_weights  # nonnegative, so no sign and no clip side changes
    aggregation, normalizer = _aggregation(loss_agg_mode, response_mask, **config.global_batch_info)
    loss, metrics = policy_loss(
        log_prob,
        old_log_prob,
        advantages,
        mask=response_mask,
        ratio_level=ratio_level,
        clip_low=config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low,
        clip_high=config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high,
        dual_clip=config.get("clip_ratio_c", 3.0),
        aggregation=aggregation,
        normalizer=normalizer,
    )
    names = ("clip_fraction", "approx_kl", "dual_clip_fraction")
    values = torch.stack([metrics[name] for name in names]).tolist()
    return loss, dict(zip(("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"), values, strict=True))


def _aggregation(
    mode: str,
    mask: Tensor,
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
    loss_scale_factor: float | None = None,
) -> tuple[str, float | Tensor | None]:
    """Translate ``verl.trainer.ppo.core_algos.agg_loss`` to the aggregation and normalizer of policy_loss.

    verl averages gradients over ``dp_size`` ranks, so each rank's share of the global loss is multiplied by
    ``dp_size``.
    """
    if mode == "token-sum":
        return "token-mean", 1 / dp_size
    name = "batch_num_tokens" if mode == "token-mean" else "global_batch_size"
    count = batch_num_tokens if mode == "token-mean" else global_batch_size
    _check_count(name, count, dp_size)
    if mode != "seq-mean-token-sum-norm":
        return mode, None if count is None else count / dp_size
    sequences = mask.bool().any(-1).sum().clamp(min=1) if count is None else count / dp_size
    return "seq-mean-token-sum", sequences * (mask.shape[-1] if loss_scale_factor is None else loss_scale_factor)


def _check_count(name: str, count: float | None, dp_size: int) -> None:
    if count is None and dp_size > 1:
        raise ValueError(f"{name} must be given with dp_size = {dp_size}, got None")


# Critic loss: on each critic


def _value_loss(original: Any, config: Any, model_output: Any, data: Any, dp_group: Any = None) -> Any:
    """Choose SPPO's loss if ``critic.loss_agg_mode`` names it: wraps ``verl.workers.utils.losses.value_loss``."""
    return (sppo_value_loss if config.loss_agg_mode == NAME else original)(config, model_output, data, dp_group)


def sppo_value_loss(config: Any, model_output: Any, data: Any, dp_group: Any = None) -> tuple[Tensor, dict[str, Any]]:
    """Compute the mean binary cross-entropy of the outcome with the signature of verl's critic losses.

    The logit is the value at the last token of the prompt. A response without tokens has no loss.

    Args:
        config: verl's ``CriticConfig``.
        model_output: ``values``, the logits, nested ``[B, prompt + response]`` or packed.
        data: verl's ``TensorDict``, with ``returns`` and ``response_mask`` ``[B, T]`` and the other keys of its losses.

    Returns:
        The loss, 0-d, divided by the global batch size if verl provides it, and verl's three metrics.

    Raises:
        ValueError: a data-parallel group lacks the global batch size.
    """
    from verl.utils.metric import AggregationType, Metric
    from verl.workers.utils.padding import no_padding_2_padding

    logits = no_padding_2_padding(model_output["values"], data)[:, 0].float()
    count, dp_size = data["global_batch_size"], data["dp_size"]
    _check_count("global_batch_size", count, dp_size)
    padded = data.select("returns", "response_mask").to_padded_tensor()
    has_tokens = padded["response_mask"].bool().any(-1)
    outcome = padded["returns"].amax(-1).to(logits)  # it is at each token of the response, 0 elsewhere
    each = F.binary_cross_entropy_with_logits(logits, outcome, reduction="none").where(has_tokens, 0.0)
    loss = each.sum() / (has_tokens.sum().clamp(min=1) if count is None else count) * dp_size
    kind = AggregationType.MEAN if count is None and dp_size == 1 else AggregationType.SUM
    values = torch.sigmoid(logits.detach()).where(has_tokens, 0.0)
    return loss, {
        "critic/vf_loss": Metric(value=loss, aggregation=kind),
        "critic/vf_clipfrac": 0.0,
        "critic/vpred_mean": (values.sum() / has_tokens.sum().clamp(min=1)).item(),
    }


# Log-probabilities under the actor


def _patch_forward(
    original: Any, model: Any, use_fused_kernels: bool = False, fused_kernels_backend: str | None = None
) -> None:
    """Accept FUSED_BACKENDS: wraps ``verl.models.transformers.monkey_patch.patch_forward_with_backends``.

    verl's forward for its backend "torch" computes the hidden states and passes them, with the LM head, to
    FusedLinearForPPO.
    """
    is_added = use_fused_kernels and fused_kernels_backend in FUSED_BACKENDS
    original(model, use_fused_kernels, "torch" if is_added else fused_kernels_backend)
    if is_added:
        model._verl_fused_kernels_backend = fused_kernels_backend
        print(f"Using {fused_kernels_backend} instead for the log-probabilities of {type(model).__name__}")


def _fused_linear_class(original: Any) -> type:
    """Return ``verl.utils.experimental.torch_functional.FusedLinearForPPO`` extended by FUSED_BACKENDS."""

    class FusedLinearForPPO(original):
        def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
            super().__init__(chunk_size, "torch" if impl_backend in FUSED_BACKENDS else impl_backend)
            self.impl_backend = impl_backend

        def forward(
            self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
        ) -> tuple[Tensor, Tensor]:
            """hidden_states [..., H], vocab_weights [V, H], input_ids [...] -> log-probabilities, entropies [...]."""
            if self.impl_backend not in FUSED_BACKENDS:
                return super().forward(hidden_states, vocab_weights, input_ids, temperature)
            backward = FUSED_BACKENDS[self.impl_backend]
            logprobs, entropy = linear_logprobs(
                hidden_states, vocab_weights, input_ids, temperature=temperature, backward=backward
            )
            return logprobs, entropy

    FusedLinearForPPO.__module__, FusedLinearForPPO.__qualname__ = original.__module__, original.__qualname__
    return FusedLinearForPPO


_REGISTRIES = "verl.trainer.ppo.core_algos"
_WRAPPED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "verl.trainer.ppo.utils": ("need_critic", wrapping(_need_critic)),
    "verl.trainer.ppo.ray_trainer": ("compute_advantage", wrapping(_compute_advantage)),
    "verl.workers.utils.losses": ("value_loss", wrapping(_value_loss)),
    "verl.models.transformers.monkey_patch": ("patch_forward_with_backends", wrapping(_patch_forward)),
    "verl.utils.experimental.torch_functional": ("FusedLinearForPPO", _fused_linear_class),
}
_PARAMETERS = {
    "need_critic": "config",
    "compute_advantage": "data adv_estimator",
    "value_loss": "config model_output data dp_group",
    "patch_forward_with_backends": "model use_fused_kernels fused_kernels_backend",
}
_POLICY_LOSS = "old_log_prob log_prob advantages response_mask loss_agg_mode config rollout_is_weights"
_PATCHED_MODULES = (_REGISTRIES, *_WRAPPED)
