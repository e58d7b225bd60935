"""Policy and critic in one module, so that one optimizer, one checkpoint and one wrapper suffice for both."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sppo.config import SPPOConfig
from sppo.models.critic_io import build_critic
from sppo.models.critics import Critic, PromptCritic, TokenCritic, value_head
from sppo.models.lm_head import lm_head
from sppo.models.lora import add_adapter, continue_adapter, has_adapter
from sppo.models.packed_attention import PACKED_ATTENTION, Packed, pack, packed_hidden, use_attention
from sppo.models.policy_io import ensure_fp32_weights
from sppo.models.probe import ProbeCritic
from sppo.models.quantization import check_quantized, has_outliers, keep_layout
from sppo_kernels import linear_logprobs


class ActorCriticOutput(NamedTuple):
    """``logprobs`` and ``entropy`` ``[R]`` of the response tokens, in nats; ``critic_loss`` 0-d or None."""

    logprobs: Tensor
    entropy: Tensor
    critic_loss: Tensor | None


class ActorCritic(nn.Module):
    """A causal language model and its critic, whose ``forward`` runs both on one packed micro-batch.

    Dropout is switched off in both, so that a ratio differs from 1 only because the weights changed.

    Args:
        policy: model of ``AutoModelForCausalLM``.
        critic: its critic, or None.
    """

    _keys_to_ignore_on_save = None

    def __init__(self, policy: PreTrainedModel, critic: Critic | None = None) -> None:
        super().__init__()
        self.policy = policy
        self.critic = critic
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            for name, value in vars(module).items():  # arguments of functional.dropout
                if "dropout" in name and isinstance(value, float):
                    setattr(module, name, 0.0)

    def forward(
        self,
        batch: dict[str, Tensor],
        *,
        temperature: float,
        max_length: int,
        critic_normalizer: float,
        **logprob_settings: Any,
    ) -> ActorCriticOutput:
        """Compute log-probabilities of the responses, and the critic's loss.

        Args:
            batch: a micro-batch of :mod:`sppo.rollout.batching`.
            temperature: sampling temperature.
            max_length: number of tokens of the longest packed sequence, or more.
            critic_normalizer: divisor of the critic's summed loss.
            logprob_settings: settings of :func:`logprobs_of_states`.
        """
        states = policy_states(self.policy, batch, max_length)
        logprobs, entropy = logprobs_of_states(self.policy, states, batch, temperature=temperature, **logprob_settings)
        loss = None
        if self.critic is not None and self.critic_kind != "probe":
            loss = self.critic.loss(batch, max_length, critic_normalizer)
        return ActorCriticOutput(logprobs, entropy, loss)

    @property
    def critic_kind(self) -> str | None:
        """``"prompt"``, ``"probe"``, ``"token"``, or None without a critic."""
        if self.critic is None:
            return None
        kinds = {ProbeCritic: "probe", TokenCritic: "token"}
        return kinds.get(type(self.critic), "prompt")

    def parts(self) -> dict[str, nn.Module]:
        """Return the submodules with parameters by name: the policy, and the critic if there is one."""
        return dict(self.named_children())

    def models(self) -> dict[str, PreTrainedModel]:
        """Return the models with a backbone by the name of the trainer's argument: ``"model"``, ``"critic"``."""
        if self.critic is None or self.critic_kind == "probe":
            return {"model": self.policy}
        return {"model": self.policy, "critic": self.critic.model}

    def activation_checkpointing_enable(self, **settings: Any) -> None:
        """Enable activation checkpointing in both models; called for ``TrainingArguments.gradient_checkpointing``."""
        for model in self.models().values():
            if hasattr(model, "activation_checkpointing_enable"):
                model.activation_checkpointing_enable(**settings)
            else:  # transformers before it was renamed
                model.gradient_checkpointing_enable(settings.get("gradient_checkpointing_kwargs"))

    gradient_checkpointing_enable = activation_checkpointing_enable

    @property
    def _no_split_modules(self) -> list[str]:
        """Classes of the layers that accelerate shards separately."""
        known = {name for model in self.models().values() for name in model._no_split_modules or ()}
        return sorted(known & {type(module).__name__ for module in self.modules()})

    @torch.no_grad()
    def check_packing(self) -> None:
        """Compare packed forwards with the models' own, on two short sequences.

        Raises:
            ValueError: they differ. Either the model has layers other than causal attention that transformers can
                replace, or it computes something between hidden states and logits that ``linear_logprobs`` does not.
        """
        training = self.training
        self.eval()
        try:
            self._compare_packed_with_own()
        except (TypeError, AttributeError) as error:  # its layers do not get or take the sequences' boundaries
            raise ValueError(
                f"{type(self.policy).__name__} or its critic does not support packed sequences ({error}); this "
                "architecture cannot be trained here yet"
            ) from error
        finally:
            self.train(training)

    def _compare_packed_with_own(self) -> None:
        sequences = [[1, 2, 3, 4, 5], [3, 2, 1]]
        packed = Packed(*(x.to(self.policy.device) for x in pack(sequences)))
        rows = [packed.input_ids[:, :5], packed.input_ids[:, 5:]]
        other_first = torch.cat([rows[0].flip(1), rows[1]], 1)
        for name, model in self.models().items():
            own = torch.cat([model.base_model(input_ids=row, use_cache=False).last_hidden_state[0] for row in rows])
            with use_attention(model, PACKED_ATTENTION):
                ours = packed_hidden(model, packed, 5)
                beside_others = packed_hidden(model, packed._replace(input_ids=other_first), 5)
            _check_close(f"{name}={type(model).__name__}: attention over packed sequences", ours, own)
            tolerance = 1e-4 if ours.dtype == torch.float32 else 0.01
            if has_outliers(model):  # an evaluated one; it could not be trained
                tolerance = 0.05
            _check_apart(f"{name}={type(model).__name__}", ours[5:], beside_others[5:], tolerance)
        batch = packed._asdict() | {
            "response_index": torch.tensor([0, 1, 2, 3, 5, 6], device=self.policy.device),
            "response_ids": packed.input_ids[0, [1, 2, 3, 4, 6, 7]],
        }
        with use_attention(self.policy, PACKED_ATTENTION):
            ours, _ = policy_logprobs(self.policy, batch, temperature=1.0, max_length=5)
        logits = torch.cat([self.policy(input_ids=row, use_cache=False).logits[0, :-1] for row in rows]).float()
        own = logits.log_softmax(-1).gather(1, batch["response_ids"][:, None])[:, 0]
        _check_close(f"model={type(self.policy).__name__}: log-probabilities", ours - ours.mean(), own - own.mean())


def policy_states(policy: PreTrainedModel, batch: dict[str, Tensor], max_length: int) -> Tensor:
    """Compute the last hidden states ``[N, H]`` of the packed sequences of a micro-batch.

    Args:
        policy: the policy, with packed attention in use.
        batch: a micro-batch of :mod:`sppo.rollout.batching`.
        max_length: number of tokens of the longest packed sequence, or more.
    """
    packed = Packed(batch["input_ids"], batch["position_ids"], batch["cu_seqlens"])
    return packed_hidden(policy, packed, max_length)


def policy_logprobs(
    policy: PreTrainedModel, batch: dict[str, Tensor], *, temperature: float, max_length: int, **settings: Any
) -> tuple[Tensor, Tensor]:
    """Compute the log-probability and entropy ``[R]`` of each response token; see :func:`logprobs_of_states`."""
    states = policy_states(policy, batch, max_length)
    return logprobs_of_states(policy, states, batch, temperature=temperature, **settings)


def logprobs_of_states(
    policy: PreTrainedModel,
    states: Tensor,
    batch: dict[str, Tensor],
    *,
    temperature: float,
    backward: str = "cache",
    projection: str = "vendor",
    logits_budget_bytes: int | None = None,
    mass_tolerance: float = 1e-4,
) -> tuple[Tensor, Tensor]:
    """Compute the log-probability and entropy ``[R]`` of each response token.

    Only the positions that predict a response token are projected to the vocabulary, and of the vocabulary only the
    tokens that the sampler kept, if the batch has them (``support_ids`` and ``support_offsets``). The scale and the
    softcap of the model's logits are applied. ``backward``, ``projection``, ``logits_budget_bytes`` and
    ``mass_tolerance`` are arguments of ``linear_logprobs``. Avoid ``"auto"`` in reproducible runs: its choice depends
    on earlier calls and settings of the process.

    Args:
        policy: the policy.
        states: its hidden states ``[N, H]``, of :func:`policy_states`.
        batch: a micro-batch of :mod:`sppo.rollout.batching`.
        temperature: sampling temperature.
        backward: see above.
        projection: see above.
        logits_budget_bytes: see above.
        mass_tolerance: see above.
    """
    head = lm_head(policy)
    return linear_logprobs(
        states[batch["response_index"]],
        head.weight,
        batch["response_ids"],
        bias=head.bias,
        **head.as_logprob_settings(temperature),
        support=(batch["support_ids"], batch["support_offsets"]) if "support_ids" in batch else None,
        backward=backward,
        projection=projection,
        logits_budget_bytes=logits_budget_bytes,
        mass_tolerance=mass_tolerance,
    )


def _check_close(what: str, ours: Tensor, own: Tensor, tolerance: float = 0.05) -> None:
    ours, own = ours.float(), own.float()
    if not (ours - own).norm() <= tolerance * own.norm():
        raise ValueError(
            f"{what} differ from the model's own forward by {(ours - own).norm() / own.norm():.2g}, more than "
            f"{tolerance}; this architecture cannot be trained here yet"
        )


def _check_apart(what: str, ours: Tensor, beside_others: Tensor, tolerance: float) -> None:
    """Check that a packed sequence does not read its neighbour, as convolutions and recurrent layers do.

    Such a leak may be smaller than the difference that rounding makes between packed and other forwards.
    """
    change = (ours.float() - beside_others.float()).norm() / ours.float().norm()
    if not change <= tolerance:
        raise ValueError(
            f"{what}: hidden states of a packed sequence change by {change:.2g} with the sequence before it, so it has "
            "layers that read across the boundary (convolutions, Mamba); this architecture cannot be trained here yet"
        )


def build_actor_critic(
    policy: PreTrainedModel,
    critic: PreTrainedModel | str | Path | None,
    *,
    kind: str | None,
    tokenizer: PreTrainedTokenizerBase,
    peft_config: Any,
    args: SPPOConfig,
    trains: bool = True,
) -> ActorCritic:
    """Build the module that is trained, and set which of its parameters learn.

    With a ``peft_config``, or an adapter in the policy, only adapters and the critic's head learn; otherwise all
    weights learn, in the precision that learning needs.

    Args:
        policy: the policy.
        critic: see :func:`build_critic`; or ``"probe"`` in place of a prompt critic.
        kind: ``"prompt"``, ``"token"``, ``"probe"``, or None for no critic.
        tokenizer: tokenizer of both.
        peft_config: a ``peft.LoraConfig`` or None.
        args: settings of the run.
        trains: False if the policy is only evaluated.

    Raises:
        ValueError: the critic does not fit, or quantized weights cannot be trained so.
    """
    learns_adapter = peft_config is not None or has_adapter(policy)
    keep_layout(policy)
    if trains:
        check_quantized("model", policy, has_adapter=learns_adapter, args=args)
    if kind == "prompt" and critic == "probe":
        kind, critic = "probe", None
    if kind == "probe" and critic is not None:
        raise ValueError("this algorithm's critic reads the policy's own hidden states; leave critic= out")
    classifier = build_critic(critic, policy, tokenizer, kind) if kind in ("prompt", "token") else None
    if classifier is not None:
        keep_layout(classifier)
        check_quantized("critic", classifier, has_adapter=learns_adapter and args.critic_adapter, args=args)
    if peft_config is not None:
        add_adapter(policy, peft_config)
    elif has_adapter(policy):
        continue_adapter(policy)
    else:
        policy = ensure_fp32_weights(policy, args)
    if classifier is None:
        return ActorCritic(policy, ProbeCritic(policy) if kind == "probe" else None)
    if has_adapter(policy) and args.critic_adapter:
        config: Any = copy.copy(peft_config or policy.peft_config["default"])
        config.task_type = "SEQ_CLS"  # tells PEFT which layer is the head
        add_adapter(classifier, config, also=[value_head(classifier)])
    else:
        classifier = ensure_fp32_weights(classifier, args)
    return ActorCritic(
        policy, PromptCritic(classifier) if kind == "prompt" else TokenCritic(classifier, args.cliprange_value)
    )
