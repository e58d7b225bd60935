"""Packing and dealing of samples, and the endless row of prompts."""

import math
from collections import Counter
from types import SimpleNamespace

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sppo.algorithm import SPPO
from sppo.config import SPPOConfig
from sppo.experience import ExperienceStream, Progress, Prompts, balance, micro_batch
from sppo.metrics import Meter
from sppo.rollout import Sample


def a_sample(prompt, response, **facts):
    return Sample("", "", prompt, response, truncated=False, **({"reward": 1.0} | facts))


def test_micro_batch():
    batch = micro_batch(
        [
            a_sample([5, 6], [7, 8, 1], advantage=0.5),
            a_sample([9], [1], reward=0.0, advantage=-1.0),
            a_sample([5, 6], [2, 1], advantage=0.25),
        ]
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 5, 6, 2]]  # last tokens predict nothing
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 0, 1, 2]]
    assert batch["cu_seqlens"].tolist() == [0, 4, 5, 8]
    assert batch["response_index"].tolist() == [1, 2, 3, 4, 6, 7]
    assert batch["response_ids"].tolist() == [7, 8, 1, 1, 2, 1]
    assert batch["response_cu_seqlens"].tolist() == [0, 3, 4, 6]
    assert batch["advantages"].tolist() == [0.5, -1.0, 0.25]
    assert batch["prompt_ids"].tolist() == [[5, 6, 9]]  # each distinct prompt once
    assert batch["prompt_cu_seqlens"].tolist() == [0, 2, 3]
    assert batch["last_index"].tolist() == [1, 2, 1]
    assert batch["outcomes"].tolist() == [1.0, 0.0, 1.0]


@given(st.lists(st.integers(1, 100), max_size=40), st.integers(1, 8))
def test_balance_deals_everything_evenly(lengths, parts):
    dealt = balance(lengths, parts)
    assert len(dealt) == parts
    assert sorted(i for part in dealt for i in part) == list(range(len(lengths)))
    weights = [sum(lengths[i] for i in part) for part in dealt]
    assert max(weights) - min(weights) <= max(lengths, default=0)


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
    stream.model, stream.progress, stream.meter = SimpleNamespace(critic=critic), Progress(), Meter()
    stream.algorithm = SPPO(SPPOConfig("out", use_cpu=True))
    stream.gather = lambda items: [*items, 1.0, 1.0] if items == [] and stream.progress.outcomes == 0 else items
    stream._judge([])
    assert critic.score.bias.item() == pytest.approx(math.log(3))  # 3 of 4, with the prior


def test_success_rate_is_never_certain():
    assert Progress().success_rate == 0.5
    assert Progress(outcomes=8, successes=8.0).success_rate == pytest.approx(0.9)
    assert Progress(outcomes=8).success_rate == pytest.approx(0.1)
