"""The rewards of samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from transformers.utils import logging

from sppo.config import SPPOConfig
from sppo.rewards import Reward, resolve, score
from sppo.rollout.engine import Sample

logger = logging.get_logger(__name__)

RewardFunction = Reward | Callable[..., Any] | str

_FAILURES_SHOWN = 10  # of a rollout: a reward that always fails must not fill the screen


def score_samples(
    samples: list[Sample],
    rows: Sequence[dict[str, Any]],
    reward_funcs: Sequence[Reward],
    args: SPPOConfig,
    as_probability: bool,
) -> dict[str, float]:
    """Set each sample's reward; the mean of each reward function by name. What fails costs a sample and is reported.

    Raises:
        ValueError: with ``as_probability``, a reward outside [0, 1], which the critic could not predict as one.
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
        if as_probability and reward is not None and not 0 <= reward <= 1:
            raise ValueError(
                f"reward must be in [0, 1], as the critic predicts it as a probability; got {reward} for the prompt "
                f"{sample.prompt!r}. Rescale the reward functions or set reward_weights so that their sum stays inside."
            )
        sample.reward = reward
    return scores.metrics()


def resolve_rewards(
    reward_funcs: RewardFunction | Sequence[RewardFunction], weights: Sequence[float] | None
) -> list[Reward]:
    """Resolve one reward or several.

    Raises:
        ValueError: a reward does not exist, or there are not as many weights as rewards.
    """
    funcs = reward_funcs if isinstance(reward_funcs, (list, tuple)) else [cast(RewardFunction, reward_funcs)]
    if weights is not None and len(weights) != len(funcs):
        raise ValueError(f"reward_weights has {len(weights)} values for {len(funcs)} reward_funcs")
    return [resolve(func) for func in funcs]
