"""Tests of calling reward functions: per batch or per sample, and checking the values that they return."""

import asyncio
import re
import sys
import time

import numpy as np
import pytest
import torch
from reward_batches import COMPLETIONS, score_batch


@pytest.mark.parametrize("ones", [np.ones(3), torch.ones(3), [True, 1, np.float32(1)], (1, 1, 1)])
def test_any_sequence_of_numbers_is_accepted(ones):
    assert score_batch(lambda prompts, completions, **columns: ones).rewards == [1.0, 1.0, 1.0]


# One call per sample


def is_answer(prompt, completion, answer):
    """Compare a sample with the column ``answer``; raise for the second one."""
    if completion == "bb":
        raise KeyError("no such thing")
    return float((prompt, completion) == answer)


class AsyncReward:
    async def __call__(self, completion, **columns):
        await asyncio.sleep(0.2)
        if completion == "bb":
            sys.exit("no")
        return float(completion == columns["answer"][1])


@pytest.mark.parametrize("reward", [is_answer, AsyncReward()])
def test_a_reward_of_one_sample_is_called_per_sample(reward):
    answers = [("one", "a"), ("two", "bb"), ("three", "c")]
    start = time.monotonic()
    scores = score_batch(reward, {"answer": answers, "completion": ["of the dataset"] * 3})
    assert time.monotonic() - start < 0.5, "async calls did not run concurrently, or calls were repeated"
    assert scores.rewards == [1.0, None, 0.0]
    (failure,) = scores.failures
    assert re.search(
        r"raised (KeyError: 'no such thing'|SystemExit: no) \(test_worker.py:\d+\); prompt: 'two'", failure
    )


def test_a_sample_that_raises_is_not_called_again():
    calls = []

    def careless(completion):
        calls.append(completion)
        return 1 / (completion != "bb")

    assert score_batch(careless).rewards == [1.0, None, 1.0]
    assert calls == COMPLETIONS


# Values and errors


class BrokenValue:
    """A value whose methods raise."""

    def item(self):
        raise KeyError("nothing inside")


class BrokenError(Exception):
    """An error whose text cannot be read."""

    def __str__(self):
        raise RuntimeError("no words")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "returned None"),
        (float("nan"), "returned nan"),
        (float("inf"), "returned inf"),
        ("1.0", "returned '1.0', not a number"),
        (np.ones(2), "not a number"),
        (1j, "not a number"),
        (10**400, "raised OverflowError"),
        (BrokenValue(), "raised KeyError"),
    ],
)
def test_an_invalid_value_affects_only_its_sample(value, message):
    scores = score_batch(lambda prompts, completions, **columns: [1.0, value, 1.0])
    assert scores.rewards == [1.0, None, 1.0]
    assert list(scores.means.values()) == [1.0]
    (failure,) = scores.failures
    assert message in failure
    assert "prompt: 'two'" in failure
    assert "<lambda>" in failure


@pytest.mark.parametrize(
    ("error", "message"), [(KeyError("k"), "raised KeyError: 'k'"), (BrokenError(), "raised BrokenError: a ")]
)
def test_a_generator_that_raises_affects_only_its_sample(error, message):
    def lazy(prompts, completions, **columns):
        for completion in completions:
            if completion == "bb":
                raise error
            yield 1.0

    scores = score_batch(lazy)
    assert scores.rewards == [1.0, None, 1.0]
    (failure,) = scores.failures
    assert message in failure
