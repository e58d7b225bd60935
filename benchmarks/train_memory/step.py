"""A training step by the trainer's own code, with a kind for each of its allocations."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel, Qwen2Config

from benchmarks.harness.allocations import Allocations
from benchmarks.train_memory.cases import Case
from sppo.algorithms import algorithm_class
from sppo.config import SPPOConfig
from sppo.models import critics as critic
from sppo.models.actor_critic import ActorCritic, policy_logprobs
from sppo.models.critics import PromptCritic, TokenCritic, set_head
from sppo.models.packed_attention import PACKED_ATTENTION, Packed, use_attention
from sppo.rollout import Sample
from sppo.rollout.batching import MicroBatch
from sppo.rollout.records import Update
from sppo.trainer import SPPOTrainer

OWNERS = ("policy", "critic")
KINDS = ("parameters", "gradients", "optimizer", "copies", "activations", "logits")
_PARAMETERS = [(owner, "parameters") for owner in OWNERS]


class StepAllocations(Allocations):
    """Allocations whose kind is a pair from OWNERS and KINDS; casts of parameters are copies to compute with."""

    def __init__(self) -> None:
        super().__init__()
        self.kind = "policy", "activations"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        call = functools.partial(super().__torch_dispatch__, func, types, args, kwargs)
        if func is torch.ops.aten._to_copy.default and self.kind_of(args[0]) in _PARAMETERS:
            with self.making_of_same("copies"):
                return call()
        return call()

    def making_of_same(self, what: str) -> AbstractContextManager[None]:
        """Give what is allocated inside this kind and the current owner."""
        return self.making((self.kind[0], what))


def build(case: Case, models: dict[str, Qwen2Config], cliprange: float) -> ActorCritic:
    """Build policy and critic in float32, as the trainer has them before they are sharded."""
    critic_model = None
    if case.critic is not None:
        config = copy.deepcopy(models[case.critic])
        config.num_labels = 1
        classifier = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        set_head(classifier, torch.zeros(1))
        by_token = algorithm_class(case.algorithm).critic == "token"
        critic_model = TokenCritic(classifier, cliprange) if by_token else PromptCritic(classifier)
    model = ActorCritic(AutoModelForCausalLM.from_config(models[case.policy], dtype=torch.float32), critic_model)
    model.gradient_checkpointing_enable()
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)  # type: ignore[method-assign]  # as accelerate does
    return model.train()


class Step:
    """Updates of policy and critic by the trainer's own methods, without its data loading.

    Args:
        allocations: the active mode.
        model: the models that learn.
        args: settings.
        samples: a rollout of this process.
        batch: the micro-batch of its first sample.
    """

    def __init__(
        self,
        allocations: StepAllocations,
        model: ActorCritic,
        args: SPPOConfig,
        samples: Sequence[Sample],
        batch: MicroBatch,
    ) -> None:
        self.allocations, self.model, self.args, self.samples, self.batch = allocations, model, args, samples, batch
        self.length = len(samples[0].prompt_ids) + len(samples[0].response_ids)
        self.parts = {"policy": model.policy} | ({"critic": model.critic} if model.critic is not None else {})
        for owner, part in self.parts.items():
            allocations.name((owner, "parameters"), [*part.parameters(), *part.buffers()])
        self.trainer = self._trainer()
        self.optimizer = self.trainer.create_optimizer()
        for group in self.optimizer.param_groups:
            group["foreach"] = True  # PyTorch's choice on CUDA

    def _trainer(self) -> SPPOTrainer:
        algorithm = algorithm_class(self.args.algorithm)(self.args)
        trainer = SPPOTrainer.__new__(SPPOTrainer)
        update = Update([self.batch], self.length, 1.0, 1.0, 1.0, policy_learns=True, critic_learns=True)
        trainer.args, trainer.algorithm, trainer.model, trainer.optimizer = self.args, algorithm, self.model, None
        trainer.accelerator = SimpleNamespace(unwrap_model=lambda model: model)
        trainer.rollouts = SimpleNamespace(update=update)
        trainer.is_deepspeed_enabled = False
        trainer.meter = None  # metrics are a few numbers
        return trainer

    def values(self) -> None:
        """Compute the critic's values of the rollout.

        All chunks take the same memory, so one runs through the model, and the others allocate what that one left.
        """
        read = critic.packed_hidden
        first: list[Tensor] = []

        def states(model: PreTrainedModel, packed: Packed, length: int) -> Tensor:
            if not first:
                first.append(read(model, packed, length))
                return first[0]
            return first[0].new_empty(packed.input_ids.shape[1], first[0].shape[1])

        with mock.patch.object(critic, "packed_hidden", states), self.allocations.making(("critic", "activations")):
            self.model.critic.values(self.samples)

    def old_logprobs(self) -> None:
        """Compute the old log-probabilities of a micro-batch."""
        with use_attention(self.model, PACKED_ATTENTION):
            policy_logprobs(self.model.policy, self.batch, temperature=self.args.temperature, max_length=self.length)

    def update(self) -> None:
        """Run the last micro-batch of an update, with the gradients of those before it, and the optimizer's step."""
        self._leave_gradients()
        with use_attention(self.model, PACKED_ATTENTION):
            loss = self.trainer.compute_loss(self.model, self.batch)
            with self.allocations.making(
                (list(self.parts)[-1], "activations")
            ):  # the last forward is the first backward
                loss.backward()
        self._move()

    def start(self) -> None:
        """Create the optimizer's state, and let DTensor see each operation once.

        For a new operation DTensor allocates unsharded tensors without data to infer shapes, which must not count.
        """
        self._leave_gradients()
        self._move()

    def _leave_gradients(self) -> None:
        for owner, part in self.parts.items():
            with self.allocations.making((owner, "gradients")):
                for p in part.parameters():
                    p.grad = torch.zeros_like(p)

    def _move(self) -> None:
        for part in self.parts.values():
            nn.utils.clip_grad_norm_(part.parameters(), self.args.max_grad_norm)
        with self.allocations.making_of_same("optimizer"):
            self.optimizer.step()
        for owner, part in self.parts.items():
            states = [
                self.optimizer.state[p][moment] for p in part.parameters() for moment in ("exp_avg", "exp_avg_sq")
            ]
            self.allocations.name((owner, "optimizer"), states)
        self.optimizer.zero_grad()
