"""The first stages of a rollout: choice of prompts, sampling and rewards."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.utils import logging

from sppo.algorithms import Algorithm
from sppo.config import SPPOConfig
from sppo.reporting.meter import Meter
from sppo.rewards import Reward
from sppo.rewards.lengths import overlong
from sppo.rewards.samples import score_samples
from sppo.rollout.engine import Sample, rollout_seed
from sppo.rollout.episodes import Episodes
from sppo.rollout.prompts import Prompts, prompt_hash
from sppo.rollout.records import CompletionStats, ProcessContext, Progress
from sppo.rollout.rollout_func import check_masks
from sppo.rollout.support import SupportStats, support_metrics, take_supports

logger = logging.get_logger(__name__)

Row = dict[str, Any]

PromptValues = Callable[[Sequence[Row]], list[float]]
"""A function that predicts the reward of each prompt."""

MAX_BLOCKS = 4
"""How many prompts the critic looks at, at most, for each one that is sampled."""

_EXPLORED = 0.1  # probability that a prompt outside of prompt_value_range is sampled all the same


class RolloutSampler:
    """Samples and scores the completions of a rollout on this process.

    Args:
        prompts: the dataset, and the order of its prompts.
        episodes: samples completions.
        reward_funcs: resolved rewards.
        algorithm: says how prompts are chosen, and what is sampled for each.
        args: settings of the run.
        meter: collects the metrics of each rollout.
        process: this process among those of the run.
        vocab_size: number of tokens in the policy's vocabulary.
        trainer_state: returns the trainer's state, for rewards that take it.
        prompt_values: the critic's prediction, for ``prompt_value_range``.
    """

    def __init__(
        self,
        *,
        prompts: Prompts,
        episodes: Episodes,
        reward_funcs: Sequence[Reward],
        algorithm: Algorithm,
        args: SPPOConfig,
        meter: Meter,
        process: ProcessContext,
        vocab_size: int,
        trainer_state: Callable[[], Any],
        prompt_values: PromptValues,
    ) -> None:
        assert args.num_generations is not None
        self.prompts = prompts
        self.episodes = episodes
        self.reward_funcs = reward_funcs
        self.algorithm = algorithm
        self.args = args
        self.meter = meter
        self.process = process
        self.vocab_size = vocab_size
        self.trainer_state = trainer_state
        self.prompt_values = prompt_values
        self.num_generations = args.num_generations
        self.num_prompts = args.rollout_size // args.num_generations

    def sample(self, rollout: int, progress: Progress) -> list[Sample]:
        """Sample completions of a rollout's prompts and score them.

        Args:
            rollout: its number.
            progress: the position of the run, which is moved past the prompts and completions.
        """
        informative: list[Sample] = []
        others: list[Sample] = []
        rounds = self.args.dynamic_sampling_rounds if self.args.dynamic_sampling else 1
        for number in range(rounds):
            if number:
                progress.extra_blocks += 1
            samples = self._sample_block(rollout, number, progress)
            groups = _by_group(samples)
            for group in groups if self.args.dynamic_sampling else ():
                (informative if _is_informative(group) else others).extend(group)
            size = self.num_prompts * self.num_generations
            if rounds > 1 and min(self.process.gather([len(informative)])) >= size:
                break
        if self.args.dynamic_sampling:
            self.meter.mean({"dynamic_sampling_rounds": number + 1})
            samples = [*informative, *others][:size]
        self._penalize_length(samples)
        return samples

    def _sample_block(self, rollout: int, number: int, progress: Progress) -> list[Sample]:
        """Sample completions of one block of prompts, and record their metrics."""
        rows, first = self._choose(rollout, progress)
        keys = (self.args.seed, rollout, self.process.rank, *([number] if number else []))
        seed = rollout_seed(*keys)
        repeated = [row for row in rows for _ in range(self.num_generations)]
        samples = self._sample_and_score(repeated, seed, self.args.temperature)
        greedy: list[Sample] = []
        if self.algorithm.needs_greedy_baseline:
            greedy = self._sample_and_score(rows, seed, temperature=0.0)
        for i, sample in enumerate(samples):
            sample.group = first + i // self.num_generations
            if greedy:
                sample.greedy_reward = greedy[i // self.num_generations].reward
        generated = sum(self.process.gather([s.num_policy_tokens for s in [*samples, *greedy]]))
        self.meter.sum("generated_tokens", generated)
        progress.generated_tokens += generated
        self._record(samples, rollout)
        return samples

    def _choose(self, rollout: int, progress: Progress) -> tuple[list[Row], int]:
        """Return this process's prompts, and the number of the first one; no two in a rollout have the same number."""
        count, rank, world_size = self.num_prompts, self.process.rank, self.process.world_size

        def first() -> int:
            return ((rollout + progress.extra_blocks) * world_size + rank) * count

        if self.algorithm.draws_prompts:
            seed = rollout_seed(self.args.seed, rollout, progress.extra_blocks)
            rows = self.prompts.draw(count * world_size, self.algorithm.prompt_weights, seed=seed)
            return rows[rank * count : (rank + 1) * count], first()
        if self.args.prompt_value_range is None:
            return self.prompts.take(first(), count), first()
        low, high = self.args.prompt_value_range
        chosen: list[Row] = []
        skipped: list[tuple[float, Row]] = []
        start = first()
        for number in range(MAX_BLOCKS):
            progress.extra_blocks += bool(number)
            rows = self.prompts.take(first(), count)
            explores = torch.rand(count, generator=torch.Generator().manual_seed(rollout_seed(self.args.seed, first())))
            with self.meter.phase("critic"):
                values = self.prompt_values(rows)
            for row, value, explored in zip(rows, values, explores.tolist(), strict=True):
                if low <= value <= high or explored < _EXPLORED:
                    chosen.append(row)
                else:
                    skipped.append((abs(value - 0.5), row))
            if min(self.process.gather([len(chosen)])) >= count:
                break
        self.meter.sum("skipped_prompts", sum(self.process.gather([len(chosen) + len(skipped) - count])))
        missing = max(0, count - len(chosen))
        nearest = sorted(skipped, key=lambda each: each[0])[:missing]
        return [*chosen[:count], *(row for _, row in nearest)], start

    def _sample_and_score(self, rows: list[Row], seed: int, temperature: float) -> list[Sample]:
        """Sample a completion of each row's prompt and set its reward."""
        with self.meter.phase("rollout"):
            batch_size = self.args.rollout_batch_size or len(rows)
            samples = self.episodes.play(rows, seed=seed, temperature=temperature, batch_size=batch_size)
            check_masks(samples, self.episodes.name)
            self._name(samples, rows)
            if temperature > 0:
                take_supports(samples, self.episodes.name, self.args, self.vocab_size)
        with self.meter.phase("reward"):
            algorithm = self.algorithm
            means = score_samples(
                samples,
                rows,
                self.reward_funcs,
                self.args,
                as_probability=algorithm.critic == "prompt" or algorithm.rewards_are_probabilities,
                trainer_state=self.trainer_state(),
            )
            if temperature > 0:
                self.meter.mean(means)
        return samples

    def _name(self, samples: Sequence[Sample], rows: Sequence[Row]) -> None:
        """Give each sample the name of its row's prompt, which an environment may have replaced."""
        names = {id(row): prompt_hash(self.prompts.encode(row)) for row in {id(row): row for row in rows}.values()}
        for sample, row in zip(samples, rows, strict=True):
            sample.name = names[id(row)]
            if self.args.prompt_value_range is not None and sample.name != prompt_hash(sample.prompt_ids):
                raise ValueError(
                    "prompt_value_range chooses prompts before they are sampled, and the environment replaced one in "
                    "reset(); put its text into the dataset, or leave prompt_value_range out"
                )

    def _penalize_length(self, samples: Sequence[Sample]) -> None:
        """Reduce the reward of completions that are nearly too long, after it was recorded."""
        buffer = self.algorithm.overlong_buffer()
        if not buffer:
            return
        lengths = [len(s.response_ids) for s in samples]
        penalties = overlong(lengths, max_tokens=self.args.max_completion_length, buffer=buffer)
        for sample, penalty in zip(samples, penalties, strict=True):
            sample.reward = None if sample.reward is None else sample.reward + penalty
        self.meter.mean({"overlong_penalty": _mean(self.process.gather(penalties))})

    def _record(self, samples: list[Sample], rollout: int) -> None:
        """Record the metrics of a block's completions, on all processes."""
        stats = self.process.gather(
            [
                CompletionStats(
                    group=s.group,
                    num_tokens=s.num_policy_tokens,
                    num_environment_tokens=len(s.response_ids) - s.num_policy_tokens,
                    num_turns=None if s.mask is None else s.num_turns,
                    truncated=s.truncated,
                    reward=s.reward if has_rewards(s, self.algorithm) else None,
                    support=SupportStats.of(s, self.vocab_size),
                )
                for s in samples
            ]
        )
        rewards = [each.reward for each in stats if each.reward is not None]
        self.meter.mean({"response_length": _mean([each.num_tokens for each in stats])})
        self.meter.mean({"truncated": _mean([each.truncated for each in stats])})
        if any(each.num_turns is not None for each in stats):
            self.meter.mean({"environment_tokens": _mean([each.num_environment_tokens for each in stats])})
            self.meter.mean({"turns": _mean([each.num_turns or 1 for each in stats])})
        self.meter.mean(support_metrics([each.support for each in stats]))
        self.meter.sum("rejected_rewards", len(stats) - len(rewards))
        if self.algorithm.uses_groups and stats:
            groups = _by_group(stats)
            self.meter.mean({"frac_reward_zero_std": _mean([not _is_informative(group) for group in groups])})
        if rewards:
            success = _mean([reward >= 1 for reward in rewards])
            self.meter.mean({"reward": _mean(rewards), "success_rate": success})
        else:
            logger.warning(
                f"none of the {len(stats)} completions of rollout {rollout} could be scored: its updates change "
                "nothing; see the reward failures above"
            )


def has_rewards(sample: Sample, algorithm: Algorithm) -> bool:
    """Tell whether a sample has the rewards that the algorithm needs."""
    has_baseline = sample.greedy_reward is not None or not algorithm.needs_greedy_baseline
    return sample.reward is not None and has_baseline


def _by_group(items: Sequence[Any]) -> list[list[Any]]:
    """Return the items of each group, in the order of sampling."""
    groups = defaultdict(list)
    for item in items:
        groups[item.group].append(item)
    return list(groups.values())


def _is_informative(group: Sequence[Any]) -> bool:
    """Tell whether the rewards of a group differ."""
    return len({item.reward for item in group if item.reward is not None}) > 1


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
