"""Experience: the iterable of packed micro-batches that the trainer reads.

    prompts -> rollout engine -> rewards -> critic values -> advantages -> packed micro-batches

A rollout is made at the moment its first micro-batch is asked for, so the policy that samples is the one just updated.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel
from transformers.utils import logging

from sppo.algorithms import Algorithm, Outcomes
from sppo.config import SPPOConfig
from sppo.models.actor_critic import ActorCritic, policy_logprobs
from sppo.models.critics import calibration
from sppo.models.lora import adapter_off
from sppo.models.packed_attention import NAME, use_attention
from sppo.reporting.meter import Gather, Meter
from sppo.rewards import Reward
from sppo.rewards.samples import score_samples
from sppo.rollout import RolloutEngine, Sample, rollout_seed
from sppo.rollout.batching import MicroBatch, deal, length, parts_needed
from sppo.rollout.prompts import Prompts

logger = logging.get_logger(__name__)


@dataclass
class Update:
    """The micro-batches of one optimizer step and what they have in common.

    Attributes:
        micro_batches: a multiple of ``gradient_accumulation_steps``; the Trainer takes every so many-th as one.
        max_length: tokens of their longest sequence.
        policy_normalizer, critic_normalizer: what their summed losses are divided by; a process's share.
        policy_learns, critic_learns: whether the step may move them.
    """

    micro_batches: list[MicroBatch]
    max_length: int
    policy_normalizer: float
    critic_normalizer: float
    policy_learns: bool
    critic_learns: bool


@dataclass
class Progress:
    """Where a run is, apart from weights; all that resuming needs of it.

    Attributes:
        updates: optimizer steps begun; with the settings it says which prompts come next.
        outcomes, successes: number and sum of the rewards so far.
        generated_tokens: of all completions so far, on all processes.
        agreement, agreement_squares, cosines: sum of the cosines between successive gradients of the policy, of
            their squares, and how many; trusted: whether they have agreed (:mod:`sppo.agreement`).
    """

    updates: int = 0
    outcomes: int = 0
    successes: float = 0.0
    generated_tokens: int = 0
    agreement: float = 0.0
    agreement_squares: float = 0.0
    cosines: int = 0
    trusted: bool = False

    @property
    def mean_reward(self) -> float:
        """Of all rollouts so far; 0 before the first."""
        return self.successes / self.outcomes if self.outcomes else 0.0


class ExperienceStream(IterableDataset):
    """Yields one epoch of experience, each time a list of micro-batches; iterated again it goes on where it stopped.

    Args:
        prompts: where prompts come from.
        engine: makes completions.
        reward_funcs: resolved rewards.
        model: policy and critic, the ones being trained.
        algorithm: makes advantages.
        args: the run's settings.
        meter: takes the metrics of each rollout.
        gather: concatenates lists over processes.
        rank, world: this process among how many.
        reference: frozen initial policy, where ``beta`` asks for one; a policy with an adapter is its own without it.
        autocast: makes the precision context of the forwards.
        whole: makes the context in which each process has all weights, for forwards that it makes by itself.
    """

    def __init__(
        self,
        prompts: Prompts,
        engine: RolloutEngine,
        reward_funcs: Sequence[Reward],
        model: ActorCritic,
        algorithm: Algorithm,
        args: SPPOConfig,
        meter: Meter,
        *,
        gather: Gather,
        rank: int = 0,
        world: int = 1,
        reference: PreTrainedModel | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        whole: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.prompts, self.engine, self.reward_funcs = prompts, engine, reward_funcs
        self.model, self.algorithm, self.reference = model, algorithm, reference
        self.args, self.meter, self.gather, self.autocast, self.whole = args, meter, gather, autocast, whole
        self.rank, self.world = rank, world
        assert args.num_generations is not None
        self.prompts_per_rollout = args.rollout_size // args.num_generations
        rollouts = math.ceil(len(prompts.dataset) / (self.prompts_per_rollout * world))
        self.updates_per_epoch = rollouts * args.updates_per_rollout
        self.samples: list[Sample] = []
        self.first_state = copy.deepcopy(algorithm.state)
        self.restart(Progress(), [])

    def restart(self, progress: Progress, updates: list[Update], of_algorithm: dict[str, Any] | None = None) -> None:
        """Go on from a place, with the updates of the rollout it is in the middle of, and the algorithm's state."""
        self.progress = progress
        self.updates = updates
        self.algorithm.state = copy.deepcopy(self.first_state) if of_algorithm is None else of_algorithm

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
    def policy_learns(self) -> bool:
        """Whether the current update may move the policy."""
        return self.update.policy_learns and self.progress.updates > self.args.critic_warmup_steps

    @property
    def is_fresh(self) -> bool:
        """Whether the current update is the first one on its samples."""
        return (self.progress.updates - 1) % self.args.updates_per_rollout < len(self.updates)

    def _collect(self, rollout: int) -> list[Update]:
        with torch.no_grad(), self.autocast():
            with self.whole():
                self.samples = self._generate(rollout)
            kept = [s for s in self.samples if self._usable(s)]
            with self.meter.phase("critic"):
                expected = self._take_in(kept)
                with self.whole():
                    policy_learns = self._judge(kept, expected)
                    return self._cut(kept, policy_learns)

    def _generate(self, rollout: int) -> list[Sample]:
        """Completions with their rewards."""
        count, each = self.prompts_per_rollout, self.args.num_generations
        assert each is not None
        first = (rollout * self.world + self.rank) * count
        prompts = self.prompts.take(first, count)
        rows = [row for row in prompts for _ in range(each)]
        samples = self._answer(rows, rollout, self.args.temperature)
        greedy = self._answer(prompts, rollout, 0.0) if self.algorithm.needs_greedy else []
        for i, sample in enumerate(samples):
            sample.group = first + i // each
            if greedy:
                sample.greedy_reward = greedy[i // each].reward
        facts = self.gather(
            [(len(s.response_ids), s.truncated, s.reward if self._is_graded(s) else None) for s in samples]
        )
        rewards = [reward for *_, reward in facts if reward is not None]
        self.meter.mean(
            {
                "response_length": _mean([n for n, *_ in facts]),
                "truncated": _mean([truncated for _, truncated, _ in facts]),
            }
        )
        if rewards:
            success = _mean([reward >= 1 for reward in rewards])
            self.meter.mean({"reward": _mean(rewards), "success_rate": success})
        else:
            logger.warning(
                f"no reward was had for any of the {len(facts)} completions of rollout {rollout}: nothing is learned "
                "from it; the failures above say why"
            )
        generated = sum(self.gather([len(s.response_ids) for s in [*samples, *greedy]]))
        self.meter.sum("generated_tokens", generated)
        self.meter.sum("rejected_rewards", len(facts) - len(rewards))
        self.progress.generated_tokens += generated
        return samples

    def _answer(self, rows: list[dict[str, Any]], rollout: int, temperature: float) -> list[Sample]:
        """A completion of each row's prompt, with its reward."""
        with self.meter.phase("rollout"):
            samples = self.engine.generate(
                [row["prompt"] for row in rows],
                seed=rollout_seed(self.args.seed, rollout, self.rank),
                temperature=temperature,
                batch_size=self.args.rollout_batch_size or len(rows),
            )
        with self.meter.phase("reward"):
            means = score_samples(samples, rows, self.reward_funcs, self.args, self.algorithm.critic == "prompt")
            if temperature > 0:
                self.meter.mean(means)
        return samples

    def _usable(self, sample: Sample) -> bool:
        """Whether a sample counts: it has what the algorithm goes by, and is not to be masked."""
        return self._is_graded(sample) and not (sample.truncated and self.args.mask_truncated_completions)

    def _is_graded(self, sample: Sample) -> bool:
        return sample.reward is not None and (sample.greedy_reward is not None or not self.algorithm.needs_greedy)

    def _take_in(self, samples: list[Sample]) -> float:
        """Count the rewards; the mean reward to expect: of the rollouts before, at first of this one."""
        judge, progress = self.model.judge, self.progress
        rewards = self.gather([s.reward for s in samples])
        before, first = progress.mean_reward, progress.outcomes == 0
        progress.outcomes += len(rewards)
        progress.successes += sum(rewards)
        if judge is not None and first and rewards:  # whether this process has samples or not: replicas stay alike
            judge.set_prior(progress.successes, progress.outcomes)
        return progress.mean_reward if first else before

    def _judge(self, samples: list[Sample], expected: float) -> bool:
        """Values and advantages; False where they leave nothing for the policy to learn."""
        if (judge := self.model.judge) is not None:
            for sample, value in zip(samples, judge.values(samples), strict=True):
                sample.value = value
        everyone = self.gather(
            [
                (s.reward, s.group, prompt_name(s.prompt_ids), len(s.response_ids), s.value, s.greedy_reward)
                for s in samples
            ]
        )
        if not everyone:
            return False
        outcomes = _outcomes(everyone, expected)
        advantages = self._advantages(outcomes)
        start = sum(self.gather([len(samples)])[: self.rank])
        returns = self.algorithm.returns(outcomes) if self.algorithm.critic == "token" else None
        for i, sample in enumerate(samples, start):
            n = len(sample.response_ids)
            sample.advantage = advantages[i, :n] if advantages.ndim == 2 else advantages[i]
            sample.returns = returns[i, :n] if returns is not None else None
        self._measure(outcomes, advantages)
        return bool(advantages.any())

    def _advantages(self, outcomes: Outcomes) -> Tensor:
        """The algorithm's, checked; 0 where all outcomes are equal, which do not tell which response is better.

        The algorithm's own would push every sampled response the same way then, until its critic has caught up.
        """
        count = len(outcomes.rewards)
        advantages = self.algorithm.advantages(outcomes)
        if advantages.shape[:1] != (count,) or advantages.ndim > 2 or not advantages.isfinite().all():
            raise ValueError(
                f"{type(self.algorithm).__name__}.advantages must return finite numbers, [B] or [B, T] with "
                f"B = {count}, got shape {tuple(advantages.shape)}: {advantages}"
            )
        return advantages if len(outcomes.rewards.unique()) > 1 else torch.zeros_like(advantages)

    def _measure(self, outcomes: Outcomes, advantages: Tensor) -> None:
        if advantages.ndim == 2:
            advantages = advantages[torch.arange(advantages.shape[1]) < outcomes.lengths[:, None]]
        found = {"advantage": advantages.mean(), "advantage_std": advantages.std(correction=0)}
        if outcomes.values is not None:
            at_prompt = outcomes.values if outcomes.values.ndim == 1 else outcomes.values[:, 0]
            found["value"] = at_prompt.mean()
            found |= calibration(at_prompt, outcomes.rewards, outcomes.mean_reward)._asdict()
        self.meter.mean(found)

    def _cut(self, samples: list[Sample], policy_learns: bool) -> list[Update]:
        """Deal samples over the updates as they were drawn, and those of an update over micro-batches by tokens."""
        args, algorithm = self.args, self.algorithm
        assert args.steps_per_generation is not None
        count = args.steps_per_generation // args.gradient_accumulation_steps
        shares = [samples[i * len(samples) // count : (i + 1) * len(samples) // count] for i in range(count)]
        sizes = [
            (
                len(share),
                sum(len(s.response_ids) for s in share),
                parts_needed(share, args.gradient_accumulation_steps, args.max_tokens_per_micro_batch),
            )
            for share in shares
        ]
        everyone = self.gather([sizes])
        updates = []
        for i, share in enumerate(shares):
            sequences, tokens = (sum(sizes[i][which] for sizes in everyone) for which in (0, 1))
            update = Update(
                micro_batches=deal(share, max(sizes[i][2] for sizes in everyone), algorithm.critic),
                max_length=max([1, *(length(s) for s in share)]),
                # The gradient is averaged over processes, so each divides by its share of the whole count.
                policy_normalizer=self._normalizer(sequences, tokens) / self.world,
                critic_normalizer=max(1, tokens if algorithm.critic == "token" else sequences) / self.world,
                policy_learns=policy_learns and sequences > 0,
                critic_learns=sequences > 0,
            )
            self._add_logprobs(update)
            updates.append(update)
        return updates

    def _normalizer(self, sequences: int, tokens: int) -> float:
        count = self.algorithm.normalizer(sequences, tokens) if sequences else 1
        if not 0 < count < math.inf:
            raise ValueError(
                f"{type(self.algorithm).__name__}.normalizer must return a number greater than 0, got {count} for "
                f"{sequences} sequences of {tokens} tokens"
            )
        return count

    def _add_logprobs(self, update: Update) -> None:
        """Log-probabilities under the sampling policy, where updates will move on from it, and the reference."""
        wanted: dict[str, tuple[PreTrainedModel, AbstractContextManager[Any]]] = {}
        policy = self.model.policy
        if self.args.updates_per_rollout > 1:
            wanted["old_logprobs"] = (policy, nullcontext())
        if self.reference is policy:
            wanted["ref_logprobs"] = (policy, adapter_off(policy))
        elif self.reference is not None:
            wanted["ref_logprobs"] = (self.reference, nullcontext())
        for name, (model, as_it_was) in wanted.items():
            with self.meter.phase("log-probabilities"), use_attention(model, NAME), as_it_was:
                for batch in update.micro_batches:
                    there = {key: value.to(model.device) for key, value in batch.items()}
                    logprobs, _ = policy_logprobs(
                        model, there, temperature=self.args.temperature, max_length=update.max_length
                    )
                    batch[name] = logprobs.cpu()


def _outcomes(everyone: Sequence[tuple[Any, ...]], mean_reward: float) -> Outcomes:
    """Of the facts that processes share about their samples."""
    rewards, groups, prompts, lengths, predicted, greedy = zip(*everyone, strict=True)
    values = None
    if predicted[0] is not None:
        values = torch.stack(predicted) if predicted[0].ndim == 0 else pad_sequence(list(predicted), batch_first=True)
    return Outcomes(
        rewards=torch.tensor(rewards, dtype=torch.float32),
        group_ids=torch.tensor(groups),
        prompts=prompts,
        lengths=torch.tensor(lengths),
        mean_reward=mean_reward,
        values=values,
        greedy_rewards=torch.tensor(greedy, dtype=torch.float32) if greedy[0] is not None else None,
    )


def prompt_name(prompt_ids: Sequence[int]) -> str:
    """Of a prompt's tokens, short: the same whenever it comes."""
    return blake2b(repr(list(prompt_ids)).encode(), digest_size=8).hexdigest()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
