"""Scoring of rollout samples, with failures reported in the log."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from transformers.utils import logging

from sppo.config import SPPOConfig
from sppo.rewards import Reward, resolve, score
from sppo.rollout.engine import Sample

logger = logging.get_logger(__name__)

RewardFunction = Reward | Callable[..., Any] | str

_MAX_FAILURES_SHOWN = 10  # per rollout, so that a reward that always fails does not flood the log


def score_samples(
    samples: list[Sample],
    rows: Sequence[dict[str, Any]],
    reward_funcs: Sequence[Reward],
    args: SPPOConfig,
    *,
    as_probability: bool,
) -> dict[str, float]:
    """Set the reward of each sample, or None if a reward function failed on it; failures are logged.

    Args:
        samples: the samples, modified in place.
        rows: their rows of the dataset.
        reward_funcs: the rewards.
        args: weights and time limit of the rewards.
        as_probability: require rewards in [0, 1], as for a critic that predicts them as a probability.

    Returns:
        Mean and standard deviation of each reward function, by name in the log.

    Raises:
        ValueError: with ``as_probability``, a reward outside [0, 1].
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
    for failure in scores.failures[:_MAX_FAILURES_SHOWN]:
        logger.warning(failure)
    if len(scores.failures) > _MAX_FAILURES_SHOWN:
        more = len(scores.failures) - _MAX_FAILURES_SHOWN
        logger.warning(f"{more} more failures for {len(samples)} samples; rejected_rewards counts the samples")
    for sample, reward in zip(samples, scores.rewards, strict=True):
        if as_probability and reward is not None and not 0 <= reward <= 1:
            raise ValueError(
                f"reward must be in [0, 1], because the critic predicts it as a probability; got {reward} for the "
                f"prompt {sample.prompt!r}. Rescale the reward functions, or set reward_weights to bring their sum "
                "into that range."
            )
        sample.reward = reward
    return scores.metrics()


def resolve_rewards(
    reward_funcs: RewardFunction | Sequence[RewardFunction], weights: Sequence[float] | None
) -> list[Reward]:
    """Resolve one or several rewards.

    Raises:
        ValueError: a reward does not exist, or the numbers of weights and rewards differ.
    """
    funcs = reward_funcs if isinstance(reward_funcs, (list, tuple)) else [cast(RewardFunction, reward_funcs)]
    if weights is not None and len(weights) != len(funcs):
        raise ValueError(f"reward_weights has {len(weights)} values for {len(funcs)} reward_funcs; give one for each")
    return [resolve(func) for func in funcs]
