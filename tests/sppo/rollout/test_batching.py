"""Packing and balancing of samples."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sppo.rollout import Sample
from sppo.rollout.batching import (
    balance_by_tokens,
    length,
    make_micro_batches,
    num_micro_batches,
    pack_policy_batch,
)
from sppo_kernels import Support


def a_sample(prompt, response, reward=1.0, **facts):
    return Sample("", "", prompt, response, truncated=False, reward=reward, **facts)


SAMPLES = [
    a_sample([5, 6], [7, 8, 1], advantage=torch.tensor(0.5)),
    a_sample([9], [1], reward=0.0, advantage=torch.tensor(-1.0)),
    a_sample([5, 6], [2, 1], reward=0.5, advantage=torch.tensor(0.25)),
]


def test_one_micro_batch():
    (batch,) = make_micro_batches(SAMPLES, 1, "prompt")
    order = [0, 2, 1]  # the longest first
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 5, 6, 2, 9]]  # last tokens predict nothing
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0]]
    assert batch["cu_seqlens"].tolist() == [0, 4, 7, 8]
    assert batch["response_index"].tolist() == [1, 2, 3, 5, 6, 7]
    assert batch["response_ids"].tolist() == [7, 8, 1, 2, 1, 1]
    assert batch["response_cu_seqlens"].tolist() == [0, 3, 5, 6]
    assert batch["advantages"].tolist() == [SAMPLES[i].advantage for i in order]
    assert batch["prompt_ids"].tolist() == [[5, 6, 9]]  # each distinct prompt once
    assert batch["prompt_cu_seqlens"].tolist() == [0, 2, 3]
    assert batch["last_index"].tolist() == [1, 1, 2]
    assert batch["outcomes"].tolist() == [1.0, 0.5, 0.0]


def test_what_the_policy_did_not_write_is_context_without_a_loss():
    sample = a_sample(
        [5, 6],
        [7, 1, 8, 9, 2, 1],
        mask=[True, True, False, False, True, True],
        advantage=torch.tensor([0.1, 0.2, 0.3, 0.4]),
        logprobs=[-1.0, -2.0, 0.0, 0.0, -3.0, -4.0],
        support=Support.of([[7, 1], [1], [], [], [2, 3], []]),
    )
    assert (sample.num_policy_tokens, sample.num_turns, sample.policy_positions) == (4, 2, [0, 1, 4, 5])
    batch = pack_policy_batch([sample])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 1, 8, 9, 2]]
    assert batch["response_index"].tolist() == [1, 2, 5, 6]
    assert batch["response_ids"].tolist() == [7, 1, 2, 1]
    assert batch["response_cu_seqlens"].tolist() == [0, 4]
    assert batch["rollout_logprobs"].tolist() == [-1.0, -2.0, -3.0, -4.0]
    assert batch["support_ids"].tolist() == [7, 1, 1, 2, 3]
    assert batch["support_offsets"].tolist() == [0, 2, 3, 5, 5]


def test_a_prompt_is_read_once_in_an_update_whichever_micro_batches_its_responses_are_in():
    batches = make_micro_batches(SAMPLES, 2, "prompt")
    assert sorted(token for batch in batches for token in batch["input_ids"][0].tolist()) == [2, 5, 5, 6, 6, 7, 8, 9]
    assert sorted(token for batch in batches for token in batch["prompt_ids"][0].tolist()) == [5, 6, 9]
    assert sorted(outcome for batch in batches for outcome in batch["outcomes"].tolist()) == [0.0, 0.5, 1.0]


def test_inputs_of_a_token_critic():
    values = [torch.arange(3.0), torch.tensor([7.0]), torch.tensor([8.0, 9.0])]
    samples = [
        a_sample(s.prompt_ids, s.response_ids, value=v, returns=v + 10, advantage=-v)
        for s, v in zip(SAMPLES, values, strict=True)
    ]
    (batch,) = make_micro_batches(samples, 1, "token")
    assert batch["values"].tolist() == [0, 1, 2, 8, 9, 7]
    assert batch["returns"].tolist() == [10, 11, 12, 18, 19, 17]
    assert batch["advantages"].tolist() == [0, -1, -2, -8, -9, -7]
    assert "prompt_ids" not in batch


@pytest.mark.parametrize("critic", [None, "prompt", "token"])
def test_more_micro_batches_than_samples(critic):
    samples = [a_sample([5], [1], value=torch.zeros(1), returns=torch.zeros(1), advantage=torch.tensor(1.0))]
    _, empty = make_micro_batches(samples, 2, critic)
    assert empty["input_ids"].tolist() == [[0]]
    assert {name for name, tensor in empty.items() if tensor.numel() == 0} >= {"response_ids", "advantages"}
    expected = {None: [], "prompt": ["last_index", "outcomes"], "token": ["values", "returns"]}[critic]
    assert all(empty[name].numel() == 0 for name in expected)


@given(st.lists(st.integers(1, 60), max_size=30), st.integers(1, 4), st.integers(1, 150))
def test_no_micro_batch_exceeds_the_token_limit(lengths, least, most):
    samples = [a_sample([5], [1] * (n - 1)) for n in lengths]
    parts = num_micro_batches(samples, least, most)
    assert parts % least == 0
    for part in balance_by_tokens([length(s) for s in samples], parts):
        assert sum(lengths[i] for i in part) <= most or len(part) == 1
    if parts > least:  # fewer micro-batches would exceed the limit
        fewer = balance_by_tokens(lengths, parts - least)
        assert any(sum(lengths[i] for i in part) > most and len(part) > 1 for part in fewer)


@given(st.lists(st.integers(1, 100), max_size=40), st.integers(1, 8))
def test_balance_partitions_evenly(lengths, parts):
    dealt = balance_by_tokens(lengths, parts)
    assert len(dealt) == parts
    assert sorted(i for part in dealt for i in part) == list(range(len(lengths)))
    weights = [sum(lengths[i] for i in part) for part in dealt]
    assert max(weights) - min(weights) <= max(lengths, default=0)
