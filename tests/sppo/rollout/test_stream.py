"""Packing and dealing of samples, and the endless row of prompts."""

import math
from collections import Counter
from types import SimpleNamespace

import datasets
import pytest
import torch

from sppo.algorithms import SPPO
from sppo.config import SPPOConfig
from sppo.models.critics import PromptCritic
from sppo.reporting.meter import Meter
from sppo.rollout.prompts import Prompts
from sppo.rollout.stream import ExperienceStream, Progress


def test_prompts_are_all_seen_each_epoch_in_a_new_order():
    prompts = Prompts(datasets.Dataset.from_dict({"prompt": list("abcdefg")}), seed=3, shuffle=True)
    taken = [row["prompt"] for row in prompts.take(0, 21)]
    epochs = ["".join(taken[i : i + 7]) for i in (0, 7, 14)]
    assert all(Counter(epoch) == Counter("abcdefg") for epoch in epochs)
    assert len(set(epochs)) == 3
    assert [row["prompt"] for row in prompts.take(5, 9)] == taken[5:14]  # a function of the place alone
    straight = Prompts(prompts.dataset, seed=3, shuffle=False)
    assert "".join(row["prompt"] for row in straight.take(5, 4)) == "fgab"


def test_a_process_without_samples_starts_its_critic_like_the_others():
    critic = torch.nn.Module()
    critic.score = torch.nn.Linear(4, 1)
    torch.nn.init.zeros_(critic.score.weight)
    stream = object.__new__(ExperienceStream)
    stream.model, stream.progress, stream.meter = SimpleNamespace(judge=PromptCritic(critic)), Progress(), Meter()
    stream.algorithm = SPPO(SPPOConfig("out", use_cpu=True))
    stream.rank, others = 1, [[1.0, 1.0], [(1.0, i, "p", 3, torch.tensor(0.75), None) for i in range(2)], [2]]
    stream.gather = lambda items: [*others.pop(0), *items]
    stream._judge([], stream._take_in([]))
    assert critic.score.bias.item() == pytest.approx(math.log(3))  # 3 of 4, with the prior


def test_mean_reward():
    assert Progress().mean_reward == 0.0
    assert Progress(outcomes=8, successes=6.0).mean_reward == 0.75
