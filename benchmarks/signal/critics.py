"""Critics trained by the trainer while the policy stands still, as in the first rollouts of a run."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from benchmarks.harness.recipe_trainer import QUIET
from benchmarks.signal.pools import Pool
from sppo import SPPOConfig, SPPOTrainer
from sppo.models.critics import Critic, TokenCritic
from sppo.models.packed_attention import PACKED_ATTENTION, use_attention
from sppo.rollout.batching import length, make_micro_batches
from sppo.rollout.engine import Sample

ROLLOUTS, RESPONSES = 20, 64


def explained_share(values: Tensor, success: Tensor) -> float:
    """Return the share of the variance of ``success`` ``[M]`` that ``values`` ``[M]`` explain.

    It is also the ratio of the variance of outcomes that a critic with these values explains to that which the ideal
    critic does.
    """
    return 1 - ((values - success).square().mean() / success.var(correction=0)).item()


def train_critic(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train_dataset: Any,
    reward: Any,
    *,
    critic: PreTrainedModel | str | None = None,
    after_rollout: Callable[[Critic], None] = lambda critic: None,
    rollouts: int = ROLLOUTS,
    **settings: Any,
) -> Critic:
    """Train the critic of an algorithm for some rollouts of a policy that does not change.

    Args:
        policy: the policy.
        tokenizer: its tokenizer.
        train_dataset: prompts.
        reward: their reward.
        critic: see :class:`sppo.SPPOTrainer`.
        after_rollout: called with the critic after its update on each rollout.
        rollouts: number of rollouts.
        settings: further settings of :class:`sppo.SPPOConfig`.
    """

    class AfterRollout(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            after_rollout(trainer.actor_critic.critic)

    defaults = {"report_to": "none", "use_cpu": True, "per_device_train_batch_size": RESPONSES}
    with tempfile.TemporaryDirectory() as folder:
        trainer = SPPOTrainer(
            policy,
            reward,
            args=SPPOConfig(
                folder,
                **QUIET | {"console": "none"} | defaults | settings,
                max_steps=rollouts,
                critic_warmup_steps=rollouts,  # the policy learns nothing
            ),
            critic=critic,
            train_dataset=train_dataset,
            processing_class=tokenizer,
            callbacks=[AfterRollout()],
        )
        trainer.train()
    assert trainer.actor_critic.critic is not None
    return trainer.actor_critic.critic


def train_offline(
    critic: Critic, rollouts: Sequence[Sequence[Sample]], *, rate: float, after_rollout: Callable[[Critic], None]
) -> None:
    """Train a critic as the trainer does, with one update per rollout, on samples with rewards that exist already.

    A policy that does not change samples the same at any time, so this saves sampling and the policy's gradient. A
    token critic's targets are the rewards, those of lambda 1.
    """
    learned = [parameter for parameter in critic.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=rate, weight_decay=0.0) if learned else None
    kind = "token" if isinstance(critic, TokenCritic) else "prompt"
    first = [sample.reward or 0.0 for sample in rollouts[0]]
    critic.set_prior(sum(first), len(first))
    for samples in rollouts:
        with torch.no_grad():
            for sample, value in zip(samples, critic.values(samples), strict=True):
                sample.value, sample.advantage = value, torch.zeros(())
                sample.returns = torch.full((len(sample.response_ids),), sample.reward)
        if optimizer is not None:
            (batch,) = make_micro_batches(samples, 1, kind)
            count = len(samples) if kind == "prompt" else sum(len(sample.response_ids) for sample in samples)
            longest = max(map(length, samples))
            with use_attention(critic.model, PACKED_ATTENTION), torch.autocast("cpu", torch.bfloat16):
                loss = critic.loss(batch, longest, count)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
        critic.observe(samples, lambda items: items)
        after_rollout(critic)


def samples_of(pool: Pool) -> list[Sample]:
    """Return the first response to each prompt of a pool, with its reward."""
    return [
        dataclasses.replace(_sample(prompt, responses[0]), reward=reward)
        for prompt, responses, reward in zip(pool.prompts, pool.responses, pool.rewards[:, 0].tolist(), strict=True)
    ]


@torch.no_grad()
def prompt_values(critic: Critic, pool: Pool) -> Tensor:
    """Return a prompt critic's values of a pool's prompts, float32 ``[M]``."""
    return torch.stack(critic.values([_sample(prompt, [0]) for prompt in pool.prompts]))


@torch.no_grad()
def token_values(critic: Critic, pool: Pool) -> Tensor:
    """Return a token critic's values before each response token, float32 ``[M, G, T]``, 0 after the end."""
    values = torch.zeros(*pool.rewards.shape, pool.longest)
    for m, (prompt, responses) in enumerate(zip(pool.prompts, pool.responses, strict=True)):
        found = critic.values([_sample(prompt, response) for response in responses])
        for g, each in enumerate(found):
            values[m, g, : len(each)] = each
    return values


def _sample(prompt: list[int], response: list[int]) -> Sample:
    return Sample(prompt="", completion="", prompt_ids=prompt, response_ids=response, truncated=False)
