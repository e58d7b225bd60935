"""The signal of each level of the ratio when a rollout serves several updates.

Responses of a policy are used after the policy has made some updates on other responses of the same rollout. The true
gradient is then that of the updated policy, which is estimated from responses of its own.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.results import Row
from benchmarks.learn.policy import load_policy
from benchmarks.signal.comparison import ESTIMATE
from benchmarks.signal.estimators import TokenEstimator, with_baseline
from benchmarks.signal.gradients import ResponseGradients
from benchmarks.signal.measure import measure
from benchmarks.signal.pools import Pool
from benchmarks.signal.statistics import statistics
from benchmarks.signal.walks import PROMPT_TOKENS, Walk, choose_prompts, ideal_values, sample_pool
from sppo_kernels import policy_loss

LEVELS: dict[str, dict[str, Any]] = {
    "token ratio, clip 0.2": {"ratio_level": "token"},
    "token ratio, no clip": {"ratio_level": "token", "clip_low": 1.0, "clip_high": 1e9},
    "ratio of sum, clip 0.2": {"ratio_level": "sequence_sum"},
    "ratio of sum, no clip": {"ratio_level": "sequence_sum", "clip_low": 1.0, "clip_high": 1e9},
    "ratio of mean, GSPO's clip": {"ratio_level": "sequence_mean", "clip_low": 3e-4, "clip_high": 4e-4},
    "ratio of mean, no clip": {"ratio_level": "sequence_mean", "clip_low": 1.0, "clip_high": 1e9},
}
NO_RATIO, ON_POLICY = "no ratio", "responses of the updated policy"
BATCH, RATE = 16, 3e-4


class Size(NamedTuple):
    """Size of a measurement.

    Attributes:
        prompts: number of prompts.
        responses: responses of the old policy to each.
        fresh: responses of the updated policy to each, from which the true gradient is estimated.
        updates: numbers of updates since the responses were sampled.
    """

    prompts: int = 128
    responses: int = 16
    fresh: int = 64
    updates: tuple[int, ...] = (1, 3)


def measure_levels(walk: Walk, policy_file: Path, size: Size) -> Row:
    """Measure a case, and return its report: a row per level and number of updates."""
    old, prompts = load_policy(policy_file), choose_prompts(size.prompts)
    pool = sample_pool(old, prompts, walk.horizon, size.responses)
    old_logprobs = _logprobs(ResponseGradients(old), pool, walk.horizon)
    rows = []
    for updates in size.updates:
        new = _updated(old, walk, prompts, updates)
        gradients = ResponseGradients(new)
        fresh = sample_pool(new, prompts, walk.horizon, size.fresh, seed=2)
        success = ideal_values(new, fresh, prompts, walk.horizon)[:, 0, 0]
        moments, _ = measure(gradients, fresh, {ON_POLICY: with_baseline(success)}, {})
        logprobs = _logprobs(gradients, pool, walk.horizon)
        advantages = pool.rewards - ideal_values(old, pool, prompts, walk.horizon)[:, :1, 0]
        stale = {
            name: TokenEstimator(_weights(logprobs, old_logprobs, advantages, pool, settings), unbiased=False)
            for name, settings in LEVELS.items()
        }
        stale[NO_RATIO] = TokenEstimator(advantages[..., None].expand_as(logprobs), unbiased=False)
        moments |= measure(gradients, pool, {}, stale)[0]
        change = (logprobs - old_logprobs).sum(2)
        for row in statistics(moments, ON_POLICY, responses=ESTIMATE, compared_with=ON_POLICY):
            rows.append({"updates": updates, "ratio_spread": change.std().item(), **row})
    return {"case": walk.name, **walk._asdict(), **size._asdict(), "rate": RATE, "batch": BATCH, "rows": rows}


def _updated(old: Any, walk: Walk, prompts: list[str], updates: int) -> Any:
    """Return the policy after updates of SPPO with the ideal critic, on responses that are not measured."""
    new = copy.deepcopy(old)
    optimizer = torch.optim.Adam(new.parameters(), lr=RATE)
    pool = sample_pool(old, prompts, walk.horizon, -(-updates * BATCH // len(prompts)), seed=3)
    advantages = pool.rewards - ideal_values(old, pool, prompts, walk.horizon)[:, :1, 0]
    order = torch.randperm(pool.rewards.numel(), generator=torch.Generator().manual_seed(0)).tolist()
    for update in range(updates):
        loss = torch.zeros(())
        for index in order[update * BATCH : (update + 1) * BATCH]:
            m, g = divmod(index, pool.rewards.shape[1])
            tokens = torch.tensor(pool.prompts[m] + pool.responses[m][g])
            logits = new(tokens[None, :-1], use_cache=False).logits[0, PROMPT_TOKENS - 1 :]
            logprobs = logits.log_softmax(-1).gather(1, tokens[PROMPT_TOKENS:, None])
            loss = loss - advantages[m, g] * logprobs.mean() / BATCH
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(new.parameters(), 1.0)
        optimizer.step()
    return new.eval()


def _logprobs(gradients: ResponseGradients, pool: Pool, horizon: int) -> Tensor:
    """Return float32 ``[M, G, T]``, 0 after the end of a response."""
    found = (gradients.logprobs(pool.tokens(m), len(prompt)) * pool.mask(m) for m, prompt in enumerate(pool.prompts))
    return pool.padded(found, horizon)


def _weights(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, pool: Pool, settings: dict[str, Any]
) -> Tensor:
    """Return the weight ``[M, G, T]`` of each token's score in the negative gradient of the policy loss."""
    current = logprobs.flatten(0, 1).requires_grad_()
    masks = pool.padded((pool.mask(m) for m in range(len(pool.prompts))), logprobs.shape[2])
    output = policy_loss(
        current,
        old_logprobs.flatten(0, 1),
        advantages.flatten(),
        mask=masks.flatten(0, 1).bool(),
        aggregation="seq-mean-token-sum",
        normalizer=1.0,
        **settings,
    )
    (gradient,) = torch.autograd.grad(output.loss, current)
    return -gradient.reshape(logprobs.shape)
