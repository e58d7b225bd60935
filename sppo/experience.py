"""Experience: the iterable of packed micro-batches that the trainer reads.

    prompts -> rollout engine -> rewards -> critic values -> advantages -> packed micro-batches

A rollout is made at the moment its first micro-batch is asked for, so the policy that samples is the one just updated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel
from transformers.utils import logging

from sppo.actor_critic import ActorCritic, policy_logprobs
from sppo.algorithm import Algorithm
from sppo.attention import NAME, cumulative, pack, use_attention
from sppo.config import SPPOConfig
from sppo.critic import prompt_values, set_prior
from sppo.metrics import Gather, Meter
from sppo.rewards import Reward, score
from sppo.rollout import RolloutEngine, Sample, rollout_seed

logger = logging.get_logger(__name__)

MicroBatch = dict[str, Tensor]

_FAILURES_SHOWN = 10  # of a rollout: a reward that always fails must not fill the screen


@dataclass
class Update:
    """The micro-batches of one optimizer step and what they have in common.

    Attributes:
        micro_batches: ``gradient_accumulation_steps`` of them.
        max_length: tokens of their longest sequence.
        policy_normalizer: what the policy's loss is divided by: tokens or sequences of the update, a process's share.
        critic_normalizer: samples of the update, a process's share.
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
    """

    updates: int = 0
    outcomes: int = 0
    successes: float = 0.0
    generated_tokens: int = 0

    @property
    def success_rate(self) -> float:
        """Mean outcome so far, with one success and one failure added (the mean under a uniform prior)."""
        return (self.successes + 1) / (self.outcomes + 2)


class Prompts:
    """An endless row of the dataset's rows: each epoch all of them, in an order that its number and the seed decide."""

    def __init__(self, dataset: datasets.Dataset, *, seed: int, shuffle: bool) -> None:
        self.dataset = dataset
        self.seed = seed
        self.shuffle = shuffle
        self._epoch = -1
        self._order: list[int] = []

    def take(self, start: int, count: int) -> list[dict[str, Any]]:
        """Rows ``start`` to ``start + count`` of the endless row."""
        return [self.dataset[self._index(position)] for position in range(start, start + count)]

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, len(self.dataset))
        if not self.shuffle:
            return place
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(rollout_seed(self.seed, epoch))
            self._epoch, self._order = epoch, torch.randperm(len(self.dataset), generator=generator).tolist()
        return self._order[place]


class ExperienceStream(IterableDataset):
    """Yields one epoch of micro-batches; iterated again it goes on where it stopped.

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
        reference: frozen initial policy, where ``beta`` asks for one.
        autocast: makes the precision context of the forwards.
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
    ) -> None:
        self.prompts, self.engine, self.reward_funcs = prompts, engine, reward_funcs
        self.model, self.algorithm, self.reference = model, algorithm, reference
        self.args, self.meter, self.gather, self.autocast = args, meter, gather, autocast
        self.rank, self.world = rank, world
        self.prompts_per_rollout = args.rollout_size // args.num_generations
        rollouts = math.ceil(len(prompts.dataset) / (self.prompts_per_rollout * world))
        self.updates_per_epoch = rollouts * args.updates_per_rollout
        self.samples: list[Sample] = []
        self.restart(Progress(), [])

    def restart(self, progress: Progress, updates: list[Update]) -> None:
        """Go on from a place, with the updates of the rollout that it is in the middle of (else none)."""
        self.progress = progress
        self.updates = updates

    def __len__(self) -> int:
        return self.updates_per_epoch * self.args.gradient_accumulation_steps

    def __iter__(self) -> Iterator[MicroBatch]:
        while True:
            rollout, step = divmod(self.progress.updates, self.args.updates_per_rollout)
            if step == 0:
                self.updates = self._collect(rollout)
            self.update = self.updates[step % len(self.updates)]
            self.progress.updates += 1
            yield from self.update.micro_batches
            if self.progress.updates % self.updates_per_epoch == 0:
                return

    @property
    def policy_learns(self) -> bool:
        """Whether the current update may move the policy."""
        return self.update.policy_learns and self.progress.updates > self.args.critic_warmup_steps

    def _collect(self, rollout: int) -> list[Update]:
        with torch.no_grad(), self.autocast():
            self.samples = self._generate(rollout)
            kept = [
                s
                for s in self.samples
                if s.reward is not None and not (s.truncated and self.args.mask_truncated_completions)
            ]
            with self.meter.phase("critic"):
                policy_learns = self._judge(kept)
                return self._cut(kept, policy_learns)

    def _generate(self, rollout: int) -> list[Sample]:
        """Completions with their rewards."""
        count = self.prompts_per_rollout
        rows = self.prompts.take((rollout * self.world + self.rank) * count, count)
        rows = [row for row in rows for _ in range(self.args.num_generations)]
        with self.meter.phase("rollout"):
            samples = self.engine.generate(
                [row["prompt"] for row in rows],
                seed=rollout_seed(self.args.seed, rollout, self.rank),
                temperature=self.args.temperature,
                batch_size=self.args.rollout_batch_size or len(rows),
            )
        with self.meter.phase("reward"):
            self.meter.mean(score_samples(samples, rows, self.reward_funcs, self.args))
        facts = self.gather([(len(s.response_ids), s.truncated, s.reward) for s in samples])
        rewards = [reward for *_, reward in facts if reward is not None]
        self.meter.mean(
            {
                "response_length": _mean([n for n, *_ in facts]),
                "truncated": _mean([truncated for _, truncated, _ in facts]),
                "reward": _mean(rewards),
                "success_rate": _mean([reward >= 1 for reward in rewards]),
            }
        )
        self.meter.sum("generated_tokens", sum(n for n, *_ in facts))
        self.meter.sum("rejected_rewards", len(facts) - len(rewards))
        self.progress.generated_tokens += sum(n for n, *_ in facts)
        return samples

    def _judge(self, samples: list[Sample]) -> bool:
        """Values and advantages; False where they leave nothing for the policy to learn."""
        outcomes = [s.reward for s in samples if s.reward is not None]
        everyone = self.gather(outcomes)
        before, first = self.progress.success_rate, self.progress.outcomes == 0
        self.progress.outcomes += len(everyone)
        self.progress.successes += sum(everyone)
        values = [self.progress.success_rate if first else before] * len(samples)
        baseline = values
        if self.model.critic is not None:
            if first and everyone:  # on each process, whether it has samples or not: replicas stay alike
                set_prior(self.model.critic, self.progress.success_rate)
            values = prompt_values(self.model.critic, [s.prompt_ids for s in samples])
        advantages = self.algorithm.advantages(outcomes, values, all_equal=len(set(everyone)) <= 1)
        for sample, value, advantage in zip(samples, values, advantages, strict=True):
            sample.value, sample.advantage = value, advantage
        everything = self.gather(list(zip(outcomes, values, baseline, advantages, strict=True)))
        if everything:
            spread = torch.tensor([advantage for *_, advantage in everything])
            self.meter.mean(
                {
                    "advantage": spread.mean(),
                    "advantage_std": spread.std(correction=0),
                    "value": _mean([value for _, value, _, _ in everything]),
                    "brier": _mean([(outcome - value) ** 2 for outcome, value, _, _ in everything]),
                    "brier_baseline": _mean([(outcome - base) ** 2 for outcome, _, base, _ in everything]),
                }
            )
        return any(advantage for *_, advantage in everything)

    def _cut(self, samples: list[Sample], policy_learns: bool) -> list[Update]:
        """Deal samples over the updates as they were drawn, and those of an update over micro-batches by tokens."""
        assert self.args.steps_per_generation is not None
        count = self.args.steps_per_generation // self.args.gradient_accumulation_steps
        shares = [samples[i * len(samples) // count : (i + 1) * len(samples) // count] for i in range(count)]
        sizes = [(len(share), sum(len(s.response_ids) for s in share)) for share in shares]
        everyone = self.gather([sizes])
        per_token = self.args.ratio_level == "token" and self.args.aggregation == "token-mean"
        updates = []
        for i, share in enumerate(shares):
            sequences, tokens = (sum(sizes[i][which] for sizes in everyone) for which in (0, 1))
            parts = balance([_length(s) for s in share], self.args.gradient_accumulation_steps)
            update = Update(
                micro_batches=[micro_batch([share[j] for j in part]) for part in parts],
                max_length=max([1, *(_length(s) for s in share)]),
                # The gradient is averaged over processes, so each divides by its share of the whole count.
                policy_normalizer=max(1, tokens if per_token else sequences) / self.world,
                critic_normalizer=max(1, sequences) / self.world,
                policy_learns=policy_learns and sequences > 0,
                critic_learns=sequences > 0,
            )
            self._add_logprobs(update)
            updates.append(update)
        return updates

    def _add_logprobs(self, update: Update) -> None:
        """Log-probabilities under the sampling policy, where updates will move on from it, and the reference."""
        wanted = {}
        if self.args.updates_per_rollout > 1:
            wanted["old_logprobs"] = self.model.policy
        if self.reference is not None:
            wanted["ref_logprobs"] = self.reference
        for name, policy in wanted.items():
            with use_attention(policy, NAME):
                for batch in update.micro_batches:
                    there = {key: value.to(policy.device) for key, value in batch.items()}
                    logprobs, _ = policy_logprobs(
                        policy, there, temperature=self.args.temperature, max_length=update.max_length
                    )
                    batch[name] = logprobs.cpu()


def score_samples(
    samples: list[Sample], rows: Sequence[dict[str, Any]], reward_funcs: Sequence[Reward], args: SPPOConfig
) -> dict[str, float]:
    """Set each sample's reward; the mean of each reward function by name. What fails costs a sample and is reported.

    Raises:
        ValueError: a reward outside [0, 1], which the critic could not predict as a probability.
    """
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    scores = score(
        reward_funcs,
        [s.prompt for s in samples],
        [s.completion for s in samples],
        columns,
        weights=args.reward_weights,
        timeout=args.reward_timeout,
    )
    for failure in scores.failures[:_FAILURES_SHOWN]:
        logger.warning(failure)
    if len(scores.failures) > _FAILURES_SHOWN:
        more = len(scores.failures) - _FAILURES_SHOWN
        logger.warning(f"and {more} more such failures of {len(samples)} samples; rejected_rewards counts them")
    for sample, reward in zip(samples, scores.rewards, strict=True):
        if reward is not None and not 0 <= reward <= 1:
            raise ValueError(
                f"reward must be in [0, 1], as the critic predicts it as a probability; got {reward} for the prompt "
                f"{sample.prompt!r}. Rescale the reward functions or set reward_weights so that their sum stays inside."
            )
        sample.reward = reward
    return {f"rewards/{name}": mean for name, mean in scores.means.items() if not math.isnan(mean)}


def micro_batch(samples: Sequence[Sample]) -> MicroBatch:
    """Lay samples behind each other without padding.

    Returns:
        ``input_ids``, ``position_ids`` ``[1, N]``, ``cu_seqlens`` ``[B + 1]``: prompts with responses, but for
        their last tokens, which predict nothing;
        ``response_index``, ``response_ids`` ``[R]``: the positions that predict response tokens, and these tokens;
        ``response_cu_seqlens`` ``[B + 1]``, ``advantages`` ``[B]``;
        ``prompt_ids``, ``prompt_position_ids`` ``[1, M]``, ``prompt_cu_seqlens``: the distinct prompts;
        ``last_index``, ``outcomes`` ``[B]``: where each sample's prompt ends among them, and how it came out.
        Without samples there is one token of input and nothing to learn (B and R are 0).
    """
    sequences = pack([(s.prompt_ids + s.response_ids)[:-1] for s in samples] or [[0]])
    distinct = list(dict.fromkeys(tuple(s.prompt_ids) for s in samples)) or [(0,)]
    prompts = pack(distinct)
    last = dict(zip(distinct, (prompts.cu_seqlens[1:] - 1).tolist(), strict=True))
    index: list[int] = []
    start = 0
    for s in samples:
        begin = start + len(s.prompt_ids) - 1
        index += range(begin, begin + len(s.response_ids))
        start = begin + len(s.response_ids)
    return {
        "input_ids": sequences.input_ids,
        "position_ids": sequences.position_ids,
        "cu_seqlens": sequences.cu_seqlens,
        "response_index": torch.tensor(index, dtype=torch.long),
        "response_ids": torch.tensor([token for s in samples for token in s.response_ids], dtype=torch.long),
        "response_cu_seqlens": cumulative([len(s.response_ids) for s in samples]),
        "advantages": torch.tensor([s.advantage for s in samples], dtype=torch.float32),
        "prompt_ids": prompts.input_ids,
        "prompt_position_ids": prompts.position_ids,
        "prompt_cu_seqlens": prompts.cu_seqlens,
        "last_index": torch.tensor([last[tuple(s.prompt_ids)] for s in samples], dtype=torch.long),
        "outcomes": torch.tensor([s.reward for s in samples], dtype=torch.float32),
    }


def balance(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Deal indices over parts of about the same total length: the longest first, to the lightest part."""
    dealt: list[list[int]] = [[] for _ in range(parts)]
    weight = [0] * parts
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        lightest = weight.index(min(weight))
        dealt[lightest].append(i)
        weight[lightest] += lengths[i]
    return dealt


def _length(sample: Sample) -> int:
    return len(sample.prompt_ids) + len(sample.response_ids)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
