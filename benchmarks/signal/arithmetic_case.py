"""The case of SmolLM2-135M-Instruct on sums of different difficulty."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.harness.arithmetic_prompts import prompts
from benchmarks.harness.results import Row
from benchmarks.signal.arithmetic import TEMPERATURE, sample_pool
from benchmarks.signal.comparison import (
    CONSTANT,
    ESTIMATE,
    REFERENCE,
    all_estimators,
    describe,
    gae_estimators,
    prompt_baselines,
)
from benchmarks.signal.critics import RESPONSES, prompt_values, samples_of, token_values, train_offline
from benchmarks.signal.gradients import ResponseGradients
from benchmarks.signal.measure import measure
from benchmarks.signal.pools import Pool
from benchmarks.signal.predictions import Predictor
from benchmarks.signal.statistics import statistics
from benchmarks.signal.theory import Facts
from sppo.models.critic_io import build_critic
from sppo.models.critics import Critic, PromptCritic, TokenCritic
from sppo.models.probe import ProbeCritic

LAYERS = (5, 15, 25)
"""Layers of the policy whose parameters' gradients are measured."""
SKETCH = 16_384
"""Dimensions of the random projection of the gradients."""
SMALL_LAYERS = 6


class Size(NamedTuple):
    """Size of a measurement: prompts, responses to each, and rollouts to train critics on."""

    prompts: int = 64
    responses: int = 16
    rollouts: int = 20


def measure_arithmetic(size: Size, report: Callable[[str], None]) -> Row:
    """Measure the case, and return its report: facts about it, and a row per estimator."""
    from sppo.tasks import smollm2

    policy, tokenizer = smollm2.policy()
    report("sampling")
    pool = sample_pool(policy, tokenizer, prompts(size.prompts, seed=2), size.responses)
    seen = sample_pool(
        copy.deepcopy(policy).to(torch.bfloat16), tokenizer, prompts(size.rollouts * RESPONSES, seed=1), 1, seed=1
    )
    rollouts = [samples_of(seen)[i : i + RESPONSES] for i in range(0, len(seen.prompts), RESPONSES)]
    kinds: dict[str, tuple[Callable[[], Critic], float]] = {
        "sppo, critic, rate 1e-5": (lambda: PromptCritic(build_critic(None, policy, tokenizer)), 1e-5),
        "sppo, critic, rate 1e-4": (lambda: PromptCritic(build_critic(None, policy, tokenizer)), 1e-4),
        "sppo, small critic, rate 1e-4": (lambda: PromptCritic(_small(policy, tokenizer, "prompt")), 1e-4),
        "sppo, small critic, rate 3e-4": (lambda: PromptCritic(_small(policy, tokenizer, "prompt")), 3e-4),
        "sppo, probe": (lambda: ProbeCritic(policy), 0.0),
    }
    explained: dict[str, list[list[float]]] = {}
    trained: dict[str, Tensor] = {}
    for name, (make, rate) in kinds.items():
        report(name)
        curve: list[float] = []
        critic = make()
        train_offline(
            critic,
            rollouts,
            rate=rate,
            after_rollout=lambda critic, curve=curve: curve.append(explained_by(prompt_values(critic, pool), pool)),
        )
        explained[name] = [curve]
        trained[f"{name}, seed 0"] = prompt_values(critic, pool)
    report("token critic")
    token_critic = TokenCritic(_small(policy, tokenizer, "token"), cliprange=0.2)
    train_offline(token_critic, rollouts, rate=3e-4, after_rollout=lambda critic: None)
    others = left_out(pool.rewards)
    names = [name for name, _ in policy.named_parameters() if any(f".layers.{layer}." in name for layer in LAYERS)]
    gradients = ResponseGradients(policy, names=names, temperature=TEMPERATURE, sketch_size=SKETCH)
    facts = _facts(others, *_fit_norms(gradients, pool))
    baselines = prompt_baselines(facts, pool) | trained
    moments, norms = measure(
        gradients,
        pool,
        all_estimators(baselines, pool),
        gae_estimators(pool, {"trained": token_values(token_critic, pool)}),
        lambda done: report(f"gradients of prompt {done}"),
    )
    success = pool.rewards.mean(1)
    predictor = Predictor(
        moments[REFERENCE],
        _facts(success, facts.right[0, 0], facts.wrong[0, 0]),
        responses=size.responses,
        estimate=ESTIMATE,
    )
    predicted = {
        **predictor.baselines(
            {name: values if values.ndim == 1 else values.mean(1) for name, values in baselines.items()}
        ),
        **predictor.groups(),
        "remax": predictor.greedy(pool.greedy_rewards),
    }
    rows = statistics(moments, REFERENCE, responses=ESTIMATE, compared_with=CONSTANT)
    return {
        "case": "SmolLM2-135M on sums",
        **size._asdict(),
        **describe(pool, success, norms),
        "success_variance": variance_of_success(pool),
        "explained_by_rollout": explained,
        "rows": [row | {"predicted": predicted.get(row["estimator"])} for row in rows],
    }


def left_out(rewards: Tensor) -> Tensor:
    """Return the mean reward ``[M, G]`` of the other responses to a prompt, which the response does not change."""
    return (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)


def variance_of_success(pool: Pool) -> float:
    """Estimate the variance of the rates of success over prompts, without that of the mean of few responses."""
    rates = pool.rewards.mean(1)
    return (rates.var(correction=0) - _noise(pool)).item()


def explained_by(values: Tensor, pool: Pool) -> float:
    """Return the share of the variance of success that ``values`` ``[M]`` explain, estimated without bias."""
    error = (values - pool.rewards.mean(1)).square().mean() - _noise(pool)
    return 1 - error.item() / variance_of_success(pool)


def _noise(pool: Pool) -> Tensor:
    """Return the mean variance of a prompt's mean reward as an estimate of its rate of success."""
    rates = pool.rewards.mean(1)
    return (rates * (1 - rates)).mean() / (pool.rewards.shape[1] - 1)


def _facts(success: Tensor, right: Tensor, wrong: Tensor) -> Facts:
    return Facts(success, right.expand_as(success), wrong.expand_as(success))


def _fit_norms(gradients: ResponseGradients, pool: Pool) -> tuple[Tensor, Tensor]:
    """Return the mean squared norms, 0-d, of the scores of right and of wrong responses, of four per prompt."""
    few = Pool(pool.prompts, [each[:4] for each in pool.responses], pool.rewards[:, :4], pool.greedy_rewards)
    _, norms = measure(gradients, few, {}, {})
    is_right = few.rewards > 0.5
    return norms[is_right].mean(), norms[~is_right].mean()


def _small(policy: PreTrainedModel, tokenizer: Any, kind: str) -> PreTrainedModel:
    from sppo.tasks import smollm2

    return build_critic(smollm2.critic(SMALL_LAYERS), policy, tokenizer, kind)
