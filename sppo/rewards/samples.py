"""Scoring of rollout samples, with failures reported in the log."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from transformers.utils import logging

from sppo._utils import printable
from sppo.config import SPPOConfig
from sppo.rewards import Reward, Scores, resolve, score
from sppo.rewards.scoring import excerpt
from sppo.rollout.engine import Sample

logger = logging.get_logger(__name__)

_ROUNDING = 1e-6  # of a sum or mean of float32

RewardFunction = Reward | Callable[..., Any] | str


def grade(
    samples: Sequence[Sample],
    rows: Sequence[Mapping[str, Any]],
    reward_funcs: Sequence[Reward],
    *,
    weights: Sequence[float] | None,
    timeout: float,
    workers: int = 1,
    trainer_state: Any = None,
    max_failures_shown: int = 10,
) -> Scores:
    """Set the reward of each sample, or None if a reward function failed on it, and log failures.

    Args:
        samples: the samples, modified in place.
        rows: their rows of the dataset.
        reward_funcs, weights, timeout, workers, trainer_state: as in :func:`sppo.rewards.score`.
        max_failures_shown: how many failures to log one by one, so that a reward that always fails does not flood the
            log.
    """
    usable = [(sample, row) for sample, row in zip(samples, rows, strict=True) if sample.error is None]
    graded = [sample for sample, _ in usable]
    scores = score(
        reward_funcs,
        [sample.prompt for sample in graded],
        [sample.completion for sample in graded],
        _columns(graded, [row for _, row in usable]),
        weights=weights,
        timeout=timeout,
        workers=workers,
        trainer_state=trainer_state,
    )
    errors = [f"{sample.error}; prompt: {excerpt(sample.prompt)}" for sample in samples if sample.error is not None]
    failures = errors + scores.failures
    for i, (sample, reward) in enumerate(zip(graded, scores.rewards, strict=True)):
        sample.reward, sample.logged = reward, scores.log.of_sample(i)
    for failure in failures[:max_failures_shown]:
        logger.warning("%s", printable(failure))
    if len(failures) > max_failures_shown:
        logger.warning("%d more failures for %d samples", len(failures) - max_failures_shown, len(samples))
    return scores


def _columns(samples: Sequence[Sample], rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the columns of the dataset, of the samples, and those that the trainer adds."""
    of_dataset = {name: [row[name] for row in rows] for name in (rows[0] if rows else ()) if name != "prompt"}
    names = {name for sample in samples for name in sample.columns}
    of_samples = {name: [sample.columns.get(name) for sample in samples] for name in sorted(names)}
    return {
        **of_dataset,
        **of_samples,
        "completion_ids": [sample.response_ids for sample in samples],
        "completion_lengths": [len(sample.response_ids) for sample in samples],
        "truncated": [sample.truncated for sample in samples],
    }


def score_samples(
    samples: list[Sample],
    rows: Sequence[dict[str, Any]],
    reward_funcs: Sequence[Reward],
    args: SPPOConfig,
    *,
    as_probability: bool,
    trainer_state: Any = None,
) -> dict[str, float]:
    """Set the reward of each sample, or None if a reward function failed on it; failures are logged.

    Args:
        samples: the samples, modified in place.
        rows: their rows of the dataset.
        reward_funcs: the rewards.
        args: weights and time limit of the rewards.
        as_probability: require rewards in [0, 1], as for a critic that predicts them as a probability.
        trainer_state: the trainer's state, for rewards that take it.

    Returns:
        Mean and standard deviation of each reward function, by name in the log.

    Raises:
        ValueError: with ``as_probability``, a reward outside [0, 1] by more than rounding.
    """
    scores = grade(
        samples,
        rows,
        reward_funcs,
        weights=args.reward_weights,
        timeout=args.reward_timeout,
        workers=args.reward_workers,
        trainer_state=trainer_state,
    )
    for sample in samples:
        reward = sample.reward
        if not as_probability or reward is None:
            continue
        if -_ROUNDING <= reward <= 1 + _ROUNDING:
            sample.reward = min(1.0, max(0.0, reward))
        else:
            raise ValueError(
                f"reward must be in [0, 1], because algorithm={args.algorithm!r} takes it as a probability; got "
                f"{reward} for the prompt {sample.prompt!r}. Rescale the reward functions, or set reward_weights to "
                "bring their sum into that range."
            )
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
