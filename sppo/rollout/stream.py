"""The stream of rollouts: an iterable of packed micro-batches that the trainer reads.

    prompts -> rollout engine -> rewards -> critic values -> advantages -> packed micro-batches

A rollout is generated when its first micro-batch is requested, so the sampling policy is the one just updated.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel
from transformers.utils import logging

from sppo.algorithms import Algorithm, RolloutBatch
from sppo.config import SPPOConfig
from sppo.models.actor_critic import ActorCritic, policy_logprobs
from sppo.models.critics import calibration
from sppo.models.lora import adapter_as, adapter_off
from sppo.models.packed_attention import PACKED_ATTENTION, use_attention
from sppo.reporting.meter import Gather, Meter
from sppo.rewards import Reward
from sppo.rewards.samples import score_samples
from sppo.rollout.batching import MicroBatch, UpdateSize, length, make_micro_batches
from sppo.rollout.engine import RolloutEngine, Sample, rollout_seed
from sppo.rollout.prompts import Prompts, prompt_hash
from sppo.rollout.support import SupportStats, support_metrics, take_supports

logger = logging.get_logger(__name__)

ContextFactory = Callable[[], AbstractContextManager[Any]]


@dataclass
class Update:
    """The micro-batches of one optimizer step, and what they have in common.

    Attributes:
        micro_batches: their number is a multiple of ``gradient_accumulation_steps``; the Trainer counts
            ``micro_batches[i::gradient_accumulation_steps]`` as one.
        max_length: number of tokens of their longest sequence.
        policy_normalizer, critic_normalizer: divisors of their summed losses; this process's share.
        policy_learns, critic_learns: whether the step may change the policy and the critic.
    """

    micro_batches: list[MicroBatch]
    max_length: int
    policy_normalizer: float
    critic_normalizer: float
    policy_learns: bool
    critic_learns: bool


@dataclass
class Progress:
    """State of a run other than its weights, as needed to resume it.

    Attributes:
        updates: optimizer steps begun; together with the settings it determines which prompts come next.
        outcomes, successes: number and sum of the rewards so far.
        generated_tokens: number of tokens of all completions so far, on all processes.
    """

    updates: int = 0
    outcomes: int = 0
    successes: float = 0.0
    generated_tokens: int = 0

    @property
    def mean_reward(self) -> float:
        """Mean reward of all rollouts so far; 0 before the first."""
        return self.successes / self.outcomes if self.outcomes else 0.0


@dataclass(frozen=True)
class ProcessContext:
    """This process among those of a run, and the contexts that its forwards run in.

    Attributes:
        rank, world_size: number of this process and of processes.
        gather: concatenates lists over processes.
        autocast: makes the precision context of forwards.
        gathered_weights: makes a context in which this process holds all weights, so that it can run a model by itself.
    """

    rank: int = 0
    world_size: int = 1
    gather: Gather = list
    autocast: ContextFactory = nullcontext
    gathered_weights: ContextFactory = nullcontext


@dataclass(frozen=True)
class CompletionStats:
    """Facts about a completion that the metrics of all processes are computed from; ``reward`` is None if it failed."""

    num_tokens: int
    truncated: bool
    reward: float | None
    support: SupportStats | None


@dataclass(frozen=True)
class SampleFacts:
    """Facts about a usable sample that the advantages of all processes are computed from.

    The policy does not learn from a masked one.
    """

    reward: float
    group: int
    prompt_hash: str
    num_tokens: int
    is_masked: bool
    value: Tensor | None
    greedy_reward: float | None

    @classmethod
    def of(cls, sample: Sample, *, is_masked: bool) -> SampleFacts:
        """Collect the facts of a scored sample."""
        assert sample.reward is not None
        return cls(
            reward=sample.reward,
            group=sample.group,
            prompt_hash=prompt_hash(sample.prompt_ids),
            num_tokens=len(sample.response_ids),
            is_masked=is_masked,
            value=sample.value,
            greedy_reward=sample.greedy_reward,
        )


class RolloutStream(IterableDataset):
    """Yields one epoch of rollouts as lists of micro-batches; iterating again continues after the last update.

    Args:
        prompts: order of the prompts.
        engine: samples completions.
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
    """

    def __init__(
        self,
        *,
        prompts: Prompts,
        engine: RolloutEngine,
        reward_funcs: Sequence[Reward],
        model: ActorCritic,
        algorithm: Algorithm,
        args: SPPOConfig,
        meter: Meter,
        reference: PreTrainedModel | None = None,
        reference_adapter: Mapping[str, Tensor] | None = None,
        process: ProcessContext | None = None,
        trainer_state: Callable[[], Any] = lambda: None,
    ) -> None:
        self.prompts = prompts
        self.engine = engine
        self.reward_funcs = reward_funcs
        self.model = model
        self.algorithm = algorithm
        self.args = args
        self.meter = meter
        self.reference = reference
        self.reference_adapter = reference_adapter
        self.process = process or ProcessContext()
        self.trainer_state = trainer_state
        assert args.num_generations is not None
        self.prompts_per_rollout = args.rollout_size // args.num_generations
        rollouts = math.ceil(len(prompts.dataset) / (self.prompts_per_rollout * self.process.world_size))
        self.updates_per_epoch = rollouts * args.updates_per_rollout
        self.samples: list[Sample] = []
        self.initial_algorithm_state = copy.deepcopy(algorithm.state)
        self.restart(Progress(), [])

    def restart(self, progress: Progress, updates: list[Update], algorithm_state: dict[str, Any] | None = None) -> None:
        """Continue from another position in the run.

        Args:
            progress: the position.
            updates: those of the current rollout, if the position is in the middle of one.
            algorithm_state: what the algorithm remembers; None for its initial state.
        """
        self.progress = progress
        self.updates = updates
        state = self.initial_algorithm_state if algorithm_state is None else algorithm_state
        self.algorithm.state = copy.deepcopy(state)

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

    @property
    def vocab_size(self) -> int:
        """Number of tokens in the policy's vocabulary."""
        return self.model.policy.config.get_text_config().vocab_size

    def _collect(self, rollout: int) -> list[Update]:
        with torch.no_grad(), self.process.autocast():
            with self.process.gathered_weights():
                self.samples = self._generate(rollout)
            usable = [s for s in self.samples if self._is_usable(s)]
            with self.meter.phase("advantages"):
                expected_reward = self._update_reward_stats(usable)
            with self.process.gathered_weights():
                self._predict_values(usable)
                with self.meter.phase("advantages"):
                    policy_learns = self._compute_advantages(usable, expected_reward)
                with self.meter.phase("packing"):
                    return self._build_updates(usable, policy_learns=policy_learns)

    def _generate(self, rollout: int) -> list[Sample]:
        """Sample completions of the rollout's prompts and score them."""
        num_prompts, per_prompt = self.prompts_per_rollout, self.args.num_generations
        assert per_prompt is not None
        first = (rollout * self.process.world_size + self.process.rank) * num_prompts
        prompts = self.prompts.take(first, num_prompts)
        rows = [row for row in prompts for _ in range(per_prompt)]
        samples = self._sample_and_score(rows, rollout, self.args.temperature)
        greedy: list[Sample] = []
        if self.algorithm.needs_greedy_baseline:
            greedy = self._sample_and_score(prompts, rollout, temperature=0.0)
        for i, sample in enumerate(samples):
            sample.group = first + i // per_prompt
            if greedy:
                sample.greedy_reward = greedy[i // per_prompt].reward
        generated = sum(self.process.gather([len(s.response_ids) for s in [*samples, *greedy]]))
        self.meter.sum("generated_tokens", generated)
        self.progress.generated_tokens += generated
        self._record_completions(samples, rollout)
        return samples

    def _sample_and_score(self, rows: list[dict[str, Any]], rollout: int, temperature: float) -> list[Sample]:
        """Sample a completion of each row's prompt and set its reward."""
        with self.meter.phase("rollout"):
            samples = self.engine.generate(
                [row["prompt"] for row in rows],
                seed=rollout_seed(self.args.seed, rollout, self.process.rank),
                temperature=temperature,
                batch_size=self.args.rollout_batch_size or len(rows),
            )
            if temperature > 0:
                take_supports(samples, type(self.engine).__name__, self.args, self.vocab_size)
        with self.meter.phase("reward"):
            means = score_samples(
                samples,
                rows,
                self.reward_funcs,
                self.args,
                as_probability=self.algorithm.critic == "prompt",
                trainer_state=self.trainer_state(),
            )
            if temperature > 0:
                self.meter.mean(means)
        return samples

    def _record_completions(self, samples: list[Sample], rollout: int) -> None:
        """Record the metrics of a rollout's completions, on all processes."""
        stats = self.process.gather(
            [
                CompletionStats(
                    num_tokens=len(s.response_ids),
                    truncated=s.truncated,
                    reward=s.reward if self._is_scored(s) else None,
                    support=SupportStats.of(s, self.vocab_size),
                )
                for s in samples
            ]
        )
        rewards = [each.reward for each in stats if each.reward is not None]
        self.meter.mean({"response_length": _mean([each.num_tokens for each in stats])})
        self.meter.mean({"truncated": _mean([each.truncated for each in stats])})
        self.meter.mean(support_metrics([each.support for each in stats]))
        self.meter.sum("rejected_rewards", len(stats) - len(rewards))
        if rewards:
            success = _mean([reward >= 1 for reward in rewards])
            self.meter.mean({"reward": _mean(rewards), "success_rate": success})
        else:
            logger.warning(
                f"none of the {len(stats)} completions of rollout {rollout} could be scored: its updates change "
                "nothing; see the reward failures above"
            )

    def _is_usable(self, sample: Sample) -> bool:
        """Tell whether a sample counts: it is scored, and not masked if a critic would learn from its tokens."""
        return self._is_scored(sample) and not (self.algorithm.critic == "token" and self._is_masked(sample))

    def _is_masked(self, sample: Sample) -> bool:
        """Tell whether the policy must not learn from a sample."""
        return sample.truncated and self.args.mask_truncated_completions

    def _is_scored(self, sample: Sample) -> bool:
        """Tell whether a sample has the rewards that the algorithm needs."""
        has_baseline = sample.greedy_reward is not None or not self.algorithm.needs_greedy_baseline
        return sample.reward is not None and has_baseline

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

    def _compute_advantages(self, samples: list[Sample], expected_reward: float) -> bool:
        """Set advantages, and returns for a token critic.

        Returns:
            Whether the policy has anything to learn from them.
        """
        facts = self.process.gather([SampleFacts.of(s, is_masked=self._is_masked(s)) for s in samples])
        if not facts:
            return False
        batch = _rollout_batch(facts, expected_reward)
        advantages = self._checked_advantages(batch)
        returns = self.algorithm.returns(batch) if self.algorithm.critic == "token" else None
        start = sum(self.process.gather([len(samples)])[: self.process.rank])
        for i, sample in enumerate(samples, start):
            n = len(sample.response_ids)
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
        args, critic, world_size = self.args, self.algorithm.critic, self.process.world_size
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
                critic_normalizer=max(1, total.num_tokens if critic == "token" else total.num_outcomes) / world_size,
                policy_learns=policy_learns and total.num_sequences > 0,
                critic_learns=total.num_outcomes > 0,
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


def _rollout_batch(facts: Sequence[SampleFacts], mean_reward: float) -> RolloutBatch:
    """Collate the samples of all processes for the algorithm."""
    values = [each.value for each in facts if each.value is not None]
    greedy_rewards = [each.greedy_reward for each in facts if each.greedy_reward is not None]
    return RolloutBatch(
        rewards=torch.tensor([each.reward for each in facts], dtype=torch.float32),
        group_ids=torch.tensor([each.group for each in facts]),
        prompts=[each.prompt_hash for each in facts],
        lengths=torch.tensor([each.num_tokens for each in facts]),
        mean_reward=mean_reward,
        values=_stack(values) if values else None,
        greedy_rewards=torch.tensor(greedy_rewards, dtype=torch.float32) if greedy_rewards else None,
    )


def _stack(values: list[Tensor]) -> Tensor:
    """Stack a prompt critic's values to ``[B]``, or a token critic's to ``[B, T]``, padded with 0."""
    return torch.stack(values) if values[0].ndim == 0 else pad_sequence(values, batch_first=True)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
