"""The estimators that are compared in every case, by name."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.harness.results import Row
from benchmarks.signal.estimators import (
    Estimator,
    TokenEstimator,
    gae_advantages,
    shrunk,
    shuffled,
    with_baseline,
    with_group,
)
from benchmarks.signal.pools import Pool
from benchmarks.signal.predictions import GROUP_SIZES
from benchmarks.signal.theory import Facts

REFERENCE, CONSTANT, BEST = "sppo, ideal critic", "sppo, constant critic", "best baseline"
LAMBDAS = (1.0, 0.95, 0.9)
EXPLAINED = (0.25, 0.5, 0.75)
ESTIMATE = 64
"""Responses of an estimate whose signal is reported."""


def describe(pool: Pool, success: Tensor, norms: Tensor) -> Row:
    """Return facts about a pool, given the rates of success ``[M]`` and the squared norms of scores ``[M, G]``."""
    right = pool.rewards > 0.5
    return {
        "tokens": pool.mean_length,
        "mean_reward": pool.rewards.mean().item(),
        "success": success.mean().item(),
        "success_variance": success.var(correction=0).item(),
        "brier_of_ideal": (pool.rewards - success[:, None]).square().mean().item(),
        "brier_expected": (success * (1 - success)).mean().item(),
        "norms": {"right": norms[right].mean().item(), "wrong": norms[~right].mean().item()},
    }


def prompt_baselines(facts: Facts, pool: Pool) -> dict[str, Tensor]:
    """Return baselines that need no training, by name, in the shape of ``facts.success``."""
    success = facts.success
    return {
        REFERENCE: success,
        **{f"sppo, critic that explains {share:.0%}": shrunk(success, share) for share in EXPLAINED},
        "sppo, values of other prompts": shuffled(success),
        CONSTANT: pool.rewards.mean().expand_as(success),
        BEST: facts.best_baseline(),
        "no baseline": torch.zeros_like(success),
    }


def all_estimators(baselines: dict[str, Tensor], pool: Pool) -> dict[str, Estimator]:
    """Return the estimators whose advantages are those of whole responses, by name."""
    return {
        **{name: with_baseline(values) for name, values in baselines.items()},
        "remax": with_baseline(pool.greedy_rewards, responses=2),
        **{f"rloo, {k} responses": with_group(k, "rloo") for k in GROUP_SIZES},
        **{f"grpo, {k} responses": with_group(k, "grpo") for k in GROUP_SIZES},
    }


def gae_estimators(pool: Pool, values: dict[str, Tensor]) -> dict[str, TokenEstimator]:
    """Return PPO's estimators by name, given each critic's values ``[M, G, T]``.

    Advantages are centred over all tokens, as whitening does; its scale has no effect here. They are unbiased with the
    ideal values, and with any values if lambda is 1.
    """
    masks = pool.padded(pool.mask(m) for m in range(len(pool.prompts)))
    found = {}
    for critic, each in values.items():
        for lam in LAMBDAS:
            advantages = torch.stack(
                [
                    gae_advantages(rewards, value, mask, lam)
                    for rewards, value, mask in zip(pool.rewards, each[..., : pool.longest], masks, strict=True)
                ]
            )
            centred = (advantages - advantages.sum() / masks.sum()) * masks
            found[f"ppo, {critic} critic, lambda {lam:g}"] = TokenEstimator(centred, critic == "ideal" or lam == 1)
    return found
