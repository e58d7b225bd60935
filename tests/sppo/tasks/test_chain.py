"""Tests of the chain task: worked examples, splits and rewards."""

import random
import re

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from sppo.data import load_prompts
from sppo.rewards import score
from sppo.tasks import chain

SPEC = "sppo.tasks.chain"


def test_worked_examples_have_one_step_per_operator():
    assert chain.worked_example("7-3*2+1=") == "7-3=4;4*2=8;8+1=9;#9"
    assert chain.worked_example("1-3+2*3=") == "1-3=8;8+2=0;0*3=0;#0"  # a remainder is never negative
    assert chain.worked_example("7-3*2-1=", 1.0, random.Random(0)) == "7-3=6;6*2=2;2-1=9;#9"


@settings(deadline=None)
@given(length=st.integers(1, 12), seed=st.integers(0, 2**32), split=st.sampled_from(list(chain.SPLITS)))
def test_worked_examples_are_correct_and_of_known_length(length, seed, split):
    prompt = chain.random_prompt(length, split, random.Random(seed))
    text = chain.worked_example(prompt)
    assert chain.split_of(prompt) == split
    assert len(prompt) == chain.prompt_tokens(length)
    assert len(text) + 1 == chain.completion_tokens(length)
    assert set(prompt + text) <= set(chain.ALPHABET)
    value = prompt[0]
    for part in re.findall(r"[-+*]\d", prompt):
        value = str(eval(value + part) % 10)
    assert chain.answer(prompt) == value
    assert chain.reward([prompt], [text], [value]) == [1.0]


def test_slips_reverse_differences_with_their_probability():
    rng = random.Random(0)
    reversed_ = sum(chain.worked_example("7-1=", 0.7, rng) == "7-1=4;#4" for _ in range(2000))
    assert 0.66 < reversed_ / 2000 < 0.74
    assert chain.worked_example("7+1*3=", 1.0, rng) == chain.worked_example("7+1*3=")


def test_splits_are_disjoint_for_all_seeds():
    train = chain.dataset("train", 4000, length=4, seed=0)
    test = chain.dataset("test", 400, length=4, seed=1)
    assert set(train["prompt"]).isdisjoint(test["prompt"])
    assert len(set(train["prompt"])) == 4000
    assert train["answer"] == [chain.answer(prompt) for prompt in train["prompt"]]
    again = chain.dataset("train", 4000, length=4, seed=0)
    assert again["prompt"] == train["prompt"]
    assert again["prompt"] != chain.dataset("train", 4000, length=4, seed=2)["prompt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("valid", 4), "split must be one of train, test, got 'valid'"),
        (("train", 4, 0), "length must be at least 1, got 0"),
        (("test", 0, 1), r"size must be in \[1, 5\]"),
        (("test", 6, 1), r"size must be in \[1, 5\] for prompts of length=1, got 6"),
    ],
)
def test_invalid_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        chain.dataset(*arguments)


def test_the_maximum_size_can_be_drawn():
    assert len(chain.dataset("test", 5, length=1)) == 5
    assert len(chain.dataset("train", 39, length=1)) == 39


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("7-3=4;#4", 1.0),
        ("#4", 1.0),  # only the outcome counts
        ("7-3=4;#5", 0.0),
        ("7-3=4;4", 0.0),
        ("7-3=4;#4;", 0.0),
        ("7-3=4;#4\n", 0.0),
        ("7-3=4;#44", 0.0),
        ("#4#5", 0.0),
        ("", 0.0),
    ],
)
def test_the_reward_grades_only_the_final_answer(completion, expected):
    assert chain.reward(["7-3="], [completion], ["4"], other=["x"]) == [expected]


def test_dataset_and_reward_are_loaded_by_name():
    data = load_prompts({"name": f"{SPEC}:dataset", "split": "test", "size": 8, "length": 4, "seed": 3})
    assert isinstance(data, Dataset)
    assert data["prompt"] == chain.dataset("test", 8, length=4, seed=3)["prompt"]
    prompts, answers = list(data["prompt"]), list(data["answer"])
    scores = score([f"{SPEC}:reward"], prompts, [chain.worked_example(p) for p in prompts], {"answer": answers})
    assert scores.rewards == [1.0] * 8
