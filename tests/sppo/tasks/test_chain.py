"""The chain task and the model that it starts from."""

import json
import random
import re

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from sppo.cli.main import main
from sppo.cli.recipes import read_recipe
from sppo.data import load_prompts
from sppo.rewards import score
from sppo.tasks import chain, chain_model
from sppo.tasks.chain_model import char_tokenizer, warm_started_model

SPEC = "sppo.tasks.chain"
SMALL = {"length": 2, "hidden_size": 8, "num_hidden_layers": 1, "max_steps": 3, "batch_size": 4}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sppo-kernels"


# The task


def test_worked_example():
    assert chain.worked("7-3*2+1=") == "7-3=4;4*2=8;8+1=9;#9"
    assert chain.worked("1-3+2*3=") == "1-3=8;8+2=0;0*3=0;#0"  # a remainder is never negative
    assert chain.worked("7-3*2-1=", 1.0, random.Random(0)) == "7-3=6;6*2=2;2-1=9;#9"


@settings(deadline=None)
@given(length=st.integers(1, 12), seed=st.integers(0, 2**32), split=st.sampled_from(list(chain.SPLITS)))
def test_examples_are_right_and_of_the_length_they_promise(length, seed, split):
    prompt = chain.random_prompt(length, split, random.Random(seed))
    text = chain.worked(prompt)
    assert chain.split_of(prompt) == split
    assert len(prompt) == chain.prompt_tokens(length)
    assert len(text) + 1 == chain.completion_tokens(length)
    assert set(prompt + text) <= set(chain.ALPHABET)
    value = prompt[0]
    for part in re.findall(r"[-+*]\d", prompt):
        value = str(eval(value + part) % 10)
    assert chain.answer(prompt) == value
    assert chain.reward([prompt], [text], [value]) == [1.0]


def test_a_slip_turns_differences_around_as_often_as_it_says():
    rng = random.Random(0)
    turned = sum(chain.worked("7-1=", 0.7, rng) == "7-1=4;#4" for _ in range(2000))
    assert 0.66 < turned / 2000 < 0.74
    assert chain.worked("7+1*3=", 1.0, rng) == chain.worked("7+1*3=")


def test_splits_are_disjoint_whatever_the_seeds():
    train = chain.dataset("train", 4000, length=4, seed=0)
    test = chain.dataset("test", 400, length=4, seed=1)
    assert set(train["prompt"]).isdisjoint(test["prompt"])
    assert len(set(train["prompt"])) == 4000
    assert train["answer"] == [chain.answer(prompt) for prompt in train["prompt"]]
    again = chain.dataset("train", 4000, length=4, seed=0)
    assert again["prompt"] == train["prompt"]
    assert again["prompt"] != chain.dataset("train", 4000, length=4, seed=2)["prompt"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("valid", 4), "split must be one of train, test, got 'valid'"),
        (("train", 4, 0), "length must be at least 1, got 0"),
        (("test", 0, 1), r"size must be in \[1, 5\]"),
        (("test", 6, 1), r"size must be in \[1, 5\] for prompts of length=1, got 6"),
    ],
)
def test_wrong_arguments_are_named(arguments, says):
    with pytest.raises(ValueError, match=says):
        chain.dataset(*arguments)


def test_every_size_that_is_allowed_can_be_drawn():
    assert len(chain.dataset("test", 5, length=1)) == 5
    assert len(chain.dataset("train", 39, length=1)) == 39


@pytest.mark.parametrize(
    ("completion", "wanted"),
    [
        ("7-3=4;#4", 1.0),
        ("#4", 1.0),  # the outcome alone counts
        ("7-3=4;#5", 0.0),
        ("7-3=4;4", 0.0),
        ("7-3=4;#4;", 0.0),
        ("7-3=4;#4\n", 0.0),
        ("7-3=4;#44", 0.0),
        ("#4#5", 0.0),
        ("", 0.0),
    ],
)
def test_reward(completion, wanted):
    assert chain.reward(["7-3="], [completion], ["4"], other=["x"]) == [wanted]


def test_recipes_can_name_dataset_and_reward():
    data = load_prompts({"name": f"{SPEC}:dataset", "split": "test", "size": 8, "length": 4, "seed": 3})
    assert isinstance(data, Dataset)
    assert data["prompt"] == chain.dataset("test", 8, length=4, seed=3)["prompt"]
    prompts, answers = list(data["prompt"]), list(data["answer"])
    scores = score([f"{SPEC}:reward"], prompts, [chain.worked(p) for p in prompts], {"answer": answers})
    assert scores.rewards == [1.0] * 8


# The model


def test_tokenizer_is_one_token_a_character_and_back():
    tokenizer = char_tokenizer()
    ids = tokenizer(chain.ALPHABET + "<eos>")["input_ids"]
    assert ids == [*range(2, 2 + len(chain.ALPHABET)), tokenizer.eos_token_id]
    assert tokenizer.decode(ids, skip_special_tokens=True) == chain.ALPHABET


def same(one, other):
    return all(a.equal(b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_the_second_time_it_is_read_from_the_cache(cache, monkeypatch):
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    model, tokenizer = warm_started_model(**SMALL)
    assert torch.rand(1) == wanted  # the global random state is left alone
    assert [file.suffix for file in cache.iterdir()] == [".safetensors"]
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert not model.training
    assert not same(model, warm_started_model(**SMALL, slip=0.0)[0])
    assert not same(model, warm_started_model(**SMALL, seed=1)[0])
    assert len(list(cache.iterdir())) == 3

    monkeypatch.setattr(chain_model, "_imitate", None)
    again, _ = warm_started_model(**SMALL)
    assert same(model, again)
    assert not again.training


def test_the_same_settings_give_the_same_weights(cache):
    model, _ = warm_started_model(**SMALL)
    for file in cache.iterdir():
        file.unlink()
    assert same(model, warm_started_model(**SMALL)[0])


def test_a_cache_that_cannot_be_written_is_no_hindrance(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    warm_started_model(**SMALL)
    assert "not kept for the next run" in caplog.text


def test_a_cache_write_that_fails_leaves_nothing(cache, monkeypatch):
    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(chain_model.os, "replace", fail)
    warm_started_model(**SMALL)
    assert list(cache.iterdir()) == []


def test_the_teacher_shows_training_prompts_only():
    tokenizer = char_tokenizer()
    rows = chain_model._examples(tokenizer, 2, 300, 0.5, random.Random(0))
    texts = tokenizer.batch_decode(rows)
    assert {chain.split_of(text[: chain.prompt_tokens(2)]) for text in texts} == {"train"}
    assert all(text.endswith("<eos>") for text in texts)


def test_it_stops_when_the_accuracy_is_reached(cache, caplog):
    caplog.set_level("INFO")
    warm_started_model(**SMALL | {"max_steps": 50}, accuracy=0.0)
    assert "10 steps" in caplog.text


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"slip": 1.5}, r"slip must be in \[0, 1\], got 1.5"),
        ({"accuracy": -1}, r"accuracy must be in \[0, 1\], got -1"),
        ({"max_steps": 0}, "max_steps must be at least 1, got 0"),
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"hidden_size": 20}, "hidden_size must be a multiple of 8"),
    ],
)
def test_wrong_settings_are_named(wrong, says, cache):
    with pytest.raises(ValueError, match=says):
        warm_started_model(**SMALL | wrong)


# The recipe


def test_the_recipe_fits_together():
    recipe = read_recipe("quickstart")
    length = recipe["model_kwargs"]["length"]
    assert recipe["train_dataset"]["length"] == recipe["eval_dataset"]["length"] == length
    assert recipe["args"]["max_completion_length"] >= chain.completion_tokens(length)
    assert recipe["args"]["max_steps"] % recipe["args"]["logging_steps"] == 0  # so that the report counts every update
    assert (recipe["train_dataset"]["split"], recipe["eval_dataset"]["split"]) == ("train", "test")


@pytest.mark.slow
def test_quickstart_learns(cache, tmp_path):
    out = tmp_path / "out"
    settings = ["--max_steps", "20", "--eval_strategy", "no", "--disable_tqdm", "true", "--use_cpu", "true"]
    assert main(["train", "quickstart", "--output_dir", str(out), *settings]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert 0.28 < summary["accuracy_before"] < 0.42
    assert summary["accuracy_after"] > summary["accuracy_before"] + 0.1
    assert (out / "learning_curve.png").stat().st_size > 10_000
