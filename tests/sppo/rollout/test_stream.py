"""The stages of a rollout, apart from a trainer."""

import math
from types import SimpleNamespace

import datasets
import pytest
import torch

from sppo.algorithms import SPPO
from sppo.config import SPPOConfig
from sppo.models.critics import PromptCritic
from sppo.reporting.meter import Meter
from sppo.rollout.prompts import Prompts
from sppo.rollout.records import ProcessContext, Progress, SampleFacts
from sppo.rollout.stream import RolloutStream


def test_a_process_without_samples_starts_its_critic_like_the_others():
    critic = torch.nn.Module()
    critic.score = torch.nn.Linear(4, 1)
    torch.nn.init.zeros_(critic.score.weight)
    facts = [SampleFacts(1.0, i, "p", 3, False, torch.tensor(0.75)) for i in range(2)]
    others = [[1.0, 1.0], facts, [2]]
    args = SPPOConfig("out", use_cpu=True)
    stream = RolloutStream(
        prompts=Prompts(datasets.Dataset.from_dict({"prompt": ["p"]}), seed=0, shuffle=False),
        episodes=None,
        reward_funcs=[],
        model=SimpleNamespace(critic=PromptCritic(critic)),
        algorithm=SPPO(args),
        args=args,
        meter=Meter(),
        process=ProcessContext(rank=1, world_size=2, gather=lambda items: [*others.pop(0), *items]),
    )
    stream._compute_advantages([], stream._update_reward_stats([]))
    assert critic.score.bias.item() == pytest.approx(math.log(3))  # 3 of 4, with the prior


def test_mean_reward():
    assert Progress().mean_reward == 0.0
    assert Progress(outcomes=8, successes=6.0).mean_reward == 0.75
