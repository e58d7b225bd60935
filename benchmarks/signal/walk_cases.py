"""The cases of digit walks: every algorithm's estimator, with ideal and with trained critics."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.harness.results import Row
from benchmarks.learn import digit_walk
from benchmarks.learn.policy import load_policy, tokenizer
from benchmarks.signal.comparison import (
    CONSTANT,
    ESTIMATE,
    LAMBDAS,
    REFERENCE,
    all_estimators,
    describe,
    gae_estimators,
    prompt_baselines,
)
from benchmarks.signal.critics import explained_share, prompt_values, token_values, train_critic
from benchmarks.signal.gradients import ResponseGradients
from benchmarks.signal.measure import measure
from benchmarks.signal.predictions import Predictor
from benchmarks.signal.statistics import statistics
from benchmarks.signal.theory import Steps, fit_steps
from benchmarks.signal.walks import Walk, choose_prompts, ideal_values, sample_pool, wrong_steps
from sppo.models.critics import Critic

TRAINED: dict[str, dict[str, Any]] = {
    "sppo, critic, rate 1e-5": {},
    "sppo, critic, rate 1e-4": {"critic_learning_rate": 1e-4},
    "sppo, critic, rate 1e-3": {"critic_learning_rate": 1e-3},
    "sppo, probe": {"critic": "probe"},
}
"""Critics that are trained: a copy of the policy at three rates, and a probe."""


class Size(NamedTuple):
    """Size of a measurement: prompts, responses to each, seeds of trained critics, and rollouts of their training."""

    prompts: int = 128
    responses: int = 32
    critics: int = 3
    rollouts: int = 20


def measure_walk(walk: Walk, policy_file: Path, size: Size) -> Row:
    """Measure a case, and return its report: facts about it, and a row per estimator."""
    policy, prompts = load_policy(policy_file), choose_prompts(size.prompts)
    pool = sample_pool(policy, prompts, walk.horizon, size.responses)
    values = ideal_values(policy, pool, prompts, walk.horizon)
    success = values[:, 0, 0]
    gradients = ResponseGradients(policy)
    steps = Steps(success, walk.horizon, *_fit_steps(gradients, policy, prompts, walk))
    explained: dict[str, list[list[float]]] = {name: [] for name in TRAINED}
    trained = {}
    for name, settings in TRAINED.items():
        for seed in range(size.critics):
            curve: list[float] = []
            critic = _train(
                policy,
                walk,
                size.rollouts,
                lambda critic, curve=curve: curve.append(explained_share(prompt_values(critic, pool), success)),
                seed=seed,
                **settings,
            )
            explained[name].append(curve)
            trained[f"{name}, seed {seed}"] = prompt_values(critic, pool)
    baselines = prompt_baselines(steps.facts(), pool) | trained
    token_critic = _train(policy, walk, size.rollouts, algorithm="ppo", critic_learning_rate=1e-3)
    moments, norms = measure(
        gradients,
        pool,
        all_estimators(baselines, pool),
        gae_estimators(pool, {"ideal": values, "trained": token_values(token_critic, pool)}),
    )
    predictor = Predictor(moments[REFERENCE], steps.facts(), responses=size.responses, estimate=ESTIMATE)
    predicted = {
        **predictor.baselines(baselines),
        **predictor.groups(),
        "remax": predictor.greedy(pool.greedy_rewards),
        **{f"ppo, ideal critic, lambda {lam:g}": predictor.signal(steps.ideal_gae(lam)) for lam in LAMBDAS},
    }
    rows = statistics(moments, REFERENCE, responses=ESTIMATE, compared_with=CONSTANT)
    return {
        "case": walk.name,
        **walk._asdict(),
        **size._asdict(),
        **describe(pool, success, norms),
        "step_norms": {"right": steps.right.mean().item(), "wrong": steps.wrong.mean().item()},
        "explained_by_rollout": explained,
        "rows": [row | {"predicted": predicted.get(row["estimator"])} for row in rows],
    }


def _fit_steps(
    gradients: ResponseGradients, policy: LlamaForCausalLM, prompts: list[str], walk: Walk
) -> tuple[Tensor, Tensor]:
    """Fit the norms ``[M]`` of right and of wrong steps for each rule, to responses that are not measured."""
    pool = sample_pool(policy, prompts, walk.horizon, 4, seed=1)
    _, norms = measure(gradients, pool, {}, {})
    wrong = wrong_steps(pool, prompts)
    rules = [prompt[0] for prompt in prompts]
    of_rule = {}
    for rule in set(rules):
        chosen = [m for m, other in enumerate(rules) if other == rule]
        of_rule[rule] = fit_steps(norms[chosen], wrong[chosen], walk.horizon)
    right_norms, wrong_norms = zip(*(of_rule[rule] for rule in rules), strict=True)
    return torch.tensor(right_norms).clamp(min=0), torch.tensor(wrong_norms).clamp(min=0)


def _train(
    policy: LlamaForCausalLM,
    walk: Walk,
    rollouts: int,
    after_rollout: Callable[[Critic], None] = lambda critic: None,
    **settings: Any,
) -> Critic:
    """Train a critic on walks; see :func:`benchmarks.signal.critics.train_critic`."""
    return train_critic(
        copy.deepcopy(policy),
        tokenizer(),
        digit_walk.dataset("train", walk.horizon),
        digit_walk.reward,
        after_rollout=after_rollout,
        rollouts=rollouts,
        max_completion_length=walk.horizon,
        **settings,
    )
