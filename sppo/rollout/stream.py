"""The stream of rollouts: an iterable of packed micro-batches that the trainer reads.

    prompts -> rollout engine -> rewards -> critic values -> advantages -> packed micro-batches

A rollout is generated when its first micro-batch is requested, so the sampling policy is the one just updated.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel

from sppo.algorithms import Algorithm, RolloutBatch
from sppo.config import SPPOConfig
from sppo.models.actor_critic import ActorCritic, policy_logprobs
from sppo.models.critics import PromptCritic, calibration
from sppo.models.lora import adapter_as, adapter_off
from sppo.models.packed_attention import PACKED_ATTENTION, use_attention
from sppo.reporting.meter import Meter
from sppo.rewards import Reward
from sppo.rollout.batching import MicroBatch, UpdateSize, length, make_micro_batches
from sppo.rollout.drift import measure_drifts
from sppo.rollout.engine import Sample
from sppo.rollout.episodes import Episodes
from sppo.rollout.prompts import Prompts
from sppo.rollout.records import ProcessContext, Progress, SampleFacts, Update, rollout_batch
from sppo.rollout.sampling import RolloutSampler, has_rewards


class RolloutStream(IterableDataset):
    """Yields one epoch of rollouts as lists of micro-batches; iterating again continues after the last update.

    Args:
        prompts: order of the prompts.
        episodes: samples completions.
        reward_funcs: resolved rewards.
        model: the policy and critic that are trained.
        algorithm: computes advantages.
        args: settings of the run.
        meter: collects the metrics of each rollout.
        reference: frozen initial policy if ``beta`` is above 0. If it is the trained policy itself, that has an
            adapter, and the reference is the policy with ``reference_adapter``.
        reference_adapter: initial weights of the adapter, by name; None for the policy with its adapter off.
        process: this process among those of the run.
        trainer_state: returns the trainer's state, for rewards that take it.
        vocab_size: number of tokens in the policy's vocabulary.
    """

    def __init__(
        self,
        *,
        prompts: Prompts,
        episodes: Episodes,
        reward_funcs: Sequence[Reward],
        model: ActorCritic,
        algorithm: Algorithm,
        args: SPPOConfig,
        meter: Meter,
        reference: PreTrainedModel | None = None,
        reference_adapter: Mapping[str, Tensor] | None = None,
        process: ProcessContext | None = None,
        trainer_state: Callable[[], Any] = lambda: None,
        vocab_size: int = 0,
    ) -> None:
        self.model = model
        self.algorithm = algorithm
        self.args = args
        self.meter = meter
        self.reference = reference
        self.reference_adapter = reference_adapter
        self.process = process or ProcessContext()
        self.sampler = RolloutSampler(
            prompts=prompts,
            episodes=episodes,
            reward_funcs=reward_funcs,
            algorithm=algorithm,
            args=args,
            meter=meter,
            process=self.process,
            vocab_size=vocab_size,
            trainer_state=trainer_state,
            prompt_values=self._prompt_values,
        )
        rollouts = math.ceil(len(prompts.dataset) / (self.sampler.num_prompts * self.process.world_size))
        self.updates_per_epoch = rollouts * args.updates_per_rollout
        self.samples: list[Sample] = []
        self.initial_algorithm_state = copy.deepcopy(algorithm.state)
        self.restart(Progress(), [])

    def restart(
        self,
        progress: Progress,
        updates: list[Update],
        algorithm_state: dict[str, Any] | None = None,
        critic_memory: dict[str, Tensor] | None = None,
    ) -> None:
        """Continue from another position in the run.

        Args:
            progress: the position.
            updates: those of the current rollout, if the position is in the middle of one.
            algorithm_state: what the algorithm remembers; None for its initial state.
            critic_memory: what the critic remembers; None for nothing.
        """
        self.progress = progress
        self.updates = updates
        state = self.initial_algorithm_state if algorithm_state is None else algorithm_state
        self.algorithm.state = copy.deepcopy(state)
        if self.model.critic is not None:
            self.model.critic.restore(critic_memory or {})

    def __len__(self) -> int:
        return self.updates_per_epoch * self.args.gradient_accumulation_steps

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        every = self.args.gradient_accumulation_steps
        while True:
            rollout, step = divmod(self.progress.updates, self.args.updates_per_rollout)
            if step == 0:
                self.updates = self._collect(rollout)
            self.update = self.updates[step % len(self.updates)]
            self.progress.updates += 1
            for i in range(every):
                yield self.update.micro_batches[i::every]
            if self.progress.updates % self.updates_per_epoch == 0:
                return

    @property
    def learns(self) -> dict[str, bool]:
        """Whether the current update may change each part of the model."""
        warmed_up = self.progress.updates > self.args.critic_warmup_steps
        return {"policy": self.update.policy_learns and warmed_up, "critic": self.update.critic_learns}

    def _collect(self, rollout: int) -> list[Update]:
        with torch.no_grad(), self.process.autocast():
            with self.process.gathered_weights():
                self.samples = self.sampler.sample(rollout, self.progress)
            usable = [s for s in self.samples if self._is_usable(s)]
            with self.meter.phase("advantages"):
                expected_reward = self._update_reward_stats(usable)
            with self.process.gathered_weights():
                self._predict_values(usable)
                if self.algorithm.tracks_drift:
                    with self.meter.phase("log-probabilities"):
                        measure_drifts(usable, self.algorithm, self.model.policy, self.args)
                with self.meter.phase("advantages"):
                    policy_learns = self._compute_advantages(usable, expected_reward)
                with self.meter.phase("packing"):
                    updates = self._build_updates(usable, policy_learns=policy_learns)
            if self.model.critic is not None:  # with its weights sharded again, if they are
                with self.meter.phase("critic"):
                    self.model.critic.observe(usable, self.process.gather)
            return updates

    def _is_usable(self, sample: Sample) -> bool:
        """Tell whether a sample counts: it is scored, and not masked if a critic would learn from its tokens."""
        learns_from_tokens = self.algorithm.critic == "token"
        return has_rewards(sample, self.algorithm) and not (learns_from_tokens and self._is_masked(sample))

    def _is_masked(self, sample: Sample) -> bool:
        """Tell whether the policy must not learn from a sample."""
        return sample.truncated and self.args.mask_truncated_completions

    def _update_reward_stats(self, samples: list[Sample]) -> float:
        """Add the rewards to the running mean, and initialize an untrained critic with the first ones.

        Returns:
            The reward to expect: the mean of the earlier rollouts, or of this one if it is the first.
        """
        critic, progress = self.model.critic, self.progress
        rewards = self.process.gather([s.reward for s in samples])
        before, first = progress.mean_reward, progress.outcomes == 0
        progress.outcomes += len(rewards)
        progress.successes += sum(rewards)
        if critic is not None and first and rewards:  # also on a process without samples: replicas stay equal
            critic.set_prior(progress.successes, progress.outcomes)
        return progress.mean_reward if first else before

    def _predict_values(self, samples: list[Sample]) -> None:
        if (critic := self.model.critic) is not None:
            with self.meter.phase("critic"):
                for sample, value in zip(samples, critic.values(samples), strict=True):
                    sample.value = value

    def _prompt_values(self, rows: Sequence[dict[str, Any]]) -> list[float]:
        """Predict the reward of each row's prompt by the prompt critic."""
        assert isinstance(self.model.critic, PromptCritic)
        return self.model.critic.prompt_values([self.sampler.prompts.encode(row) for row in rows])

    def _compute_advantages(self, samples: list[Sample], expected_reward: float) -> bool:
        """Set advantages, and returns for a token critic.

        Returns:
            Whether the policy has anything to learn from them.
        """
        facts = self.process.gather([SampleFacts.of(s, is_masked=self._is_masked(s)) for s in samples])
        if not facts:
            return False
        batch = rollout_batch(facts, expected_reward)
        advantages = self._checked_advantages(batch)
        returns = self.algorithm.returns(batch) if self.algorithm.critic == "token" else None
        start = sum(self.process.gather([len(samples)])[: self.process.rank])
        for i, sample in enumerate(samples, start):
            n = sample.num_policy_tokens
            sample.advantage = advantages[i, :n] if advantages.ndim == 2 else advantages[i]
            sample.returns = returns[i, :n] if returns is not None else None
        self._record_advantages(batch, advantages)
        return bool(advantages[[not each.is_masked for each in facts]].any())

    def _checked_advantages(self, batch: RolloutBatch) -> Tensor:
        """Compute and validate advantages.

        Returns:
            ``[B]`` or ``[B, T]``; zeros if all rewards are equal. Equal rewards do not tell which response is better,
            and an algorithm whose critic has not caught up would push all of them in the same direction.
        """
        count = len(batch.rewards)
        advantages = self.algorithm.advantages(batch)
        if advantages.shape[:1] != (count,) or advantages.ndim > 2 or not advantages.isfinite().all():
            raise ValueError(
                f"{type(self.algorithm).__name__}.advantages must return finite numbers, [B] or [B, T] with "
                f"B = {count}, got shape {tuple(advantages.shape)}: {advantages}"
            )
        return advantages if len(batch.rewards.unique()) > 1 else torch.zeros_like(advantages)

    def _record_advantages(self, batch: RolloutBatch, advantages: Tensor) -> None:
        if advantages.ndim == 2:
            advantages = advantages[torch.arange(advantages.shape[1]) < batch.lengths[:, None]]
        self.meter.mean({"advantage": advantages.mean(), "advantage_std": advantages.std(correction=0)})
        if batch.values is not None:
            prompt_values = batch.values if batch.values.ndim == 1 else batch.values[:, 0]
            self.meter.mean({"value": prompt_values.mean()})
            self.meter.mean(calibration(prompt_values, batch.rewards, batch.mean_reward)._asdict())

    def _build_updates(self, samples: list[Sample], *, policy_learns: bool) -> list[Update]:
        """Distribute samples over updates in the order they were drawn, and over micro-batches by tokens."""
        args, critic, world_size = self.args, self.model.critic_kind, self.process.world_size
        assert args.steps_per_generation is not None
        count = args.steps_per_generation // args.gradient_accumulation_steps
        shares = [samples[i * len(samples) // count : (i + 1) * len(samples) // count] for i in range(count)]
        learned = [[s for s in share if not self._is_masked(s)] for share in shares]
        per_step, limit = args.gradient_accumulation_steps, args.max_tokens_per_micro_batch
        sizes = [
            UpdateSize.of(part, num_outcomes=len(share), multiple_of=per_step, max_tokens=limit)
            for part, share in zip(learned, shares, strict=True)
        ]
        updates = []
        for i, per_process in enumerate(zip(*self.process.gather([sizes]), strict=True)):
            total = UpdateSize.combine(per_process)
            update = Update(
                micro_batches=make_micro_batches(learned[i], total.num_micro_batches, critic, shares[i]),
                max_length=max([1, *(length(s) for s in learned[i])]),
                # The gradient is averaged over processes, so each divides by its share of the total.
                policy_normalizer=self._policy_normalizer(total) / world_size,
                critic_normalizer=max(1, total.num_units(critic)) / world_size,
                num_tokens=max(1, total.num_tokens) / world_size,
                policy_learns=policy_learns and total.num_sequences > 0,
                critic_learns=total.num_units(critic) > 0,
            )
            self._add_logprobs(update)
            updates.append(update)
        return updates

    def _policy_normalizer(self, total: UpdateSize) -> float:
        normalizer = self.algorithm.normalizer(total.num_sequences, total.num_tokens) if total.num_sequences else 1
        if not 0 < normalizer < math.inf:
            raise ValueError(
                f"{type(self.algorithm).__name__}.normalizer must return a number greater than 0, got {normalizer} for "
                f"{total.num_sequences} sequences of {total.num_tokens} tokens"
            )
        return normalizer

    def _add_logprobs(self, update: Update) -> None:
        """Add log-probabilities under the reference, and under the sampling policy if later updates differ from it."""
        needed: dict[str, tuple[PreTrainedModel, AbstractContextManager[Any]]] = {}
        policy = self.model.policy
        if self.args.updates_per_rollout > 1:
            needed["old_logprobs"] = (policy, nullcontext())
        if self.reference is policy:
            initial = self.reference_adapter
            needed["ref_logprobs"] = (policy, adapter_off(policy) if initial is None else adapter_as(policy, initial))
        elif self.reference is not None:
            needed["ref_logprobs"] = (self.reference, nullcontext())
        for name, (model, weights) in needed.items():
            with self.meter.phase("log-probabilities"), use_attention(model, PACKED_ATTENTION), weights:
                for batch in update.micro_batches:
                    on_device = {key: value.to(model.device) for key, value in batch.items()}
                    logprobs, _ = policy_logprobs(
                        model,
                        on_device,
                        temperature=self.args.temperature,
                        max_length=update.max_length,
                        projection=self.args.logprobs_projection,
                    )
                    batch[name] = logprobs.cpu()
