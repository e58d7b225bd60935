"""Tests of the chain task's initial model: imitation, its cache, and the recipe that trains it further."""

import json
import random

import pytest
import torch

from sppo.cli.main import main
from sppo.cli.recipes import read_recipe
from sppo.tasks import chain, chain_model
from sppo.tasks.chain_model import char_tokenizer, warm_started_model

SMALL = {"length": 2, "hidden_size": 8, "num_hidden_layers": 1, "max_steps": 3, "batch_size": 4}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sppo-kernels"


def test_the_tokenizer_has_one_token_per_character():
    tokenizer = char_tokenizer()
    ids = tokenizer(chain.ALPHABET + "<eos>")["input_ids"]
    assert ids == [*range(2, 2 + len(chain.ALPHABET)), tokenizer.eos_token_id]
    assert tokenizer.decode(ids, skip_special_tokens=True) == chain.ALPHABET


def same_weights(one, other):
    return all(a.equal(b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_the_model_is_cached(cache, monkeypatch):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    model, tokenizer = warm_started_model(**SMALL)
    assert torch.rand(1) == expected  # the global random state is unchanged
    assert [file.suffix for file in cache.iterdir()] == [".safetensors"]
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert not model.training
    assert not same_weights(model, warm_started_model(**SMALL, slip=0.0)[0])
    assert not same_weights(model, warm_started_model(**SMALL, seed=1)[0])
    assert len(list(cache.iterdir())) == 3

    monkeypatch.setattr(chain_model, "_imitate", None)
    again, _ = warm_started_model(**SMALL)
    assert same_weights(model, again)
    assert not again.training


def test_equal_settings_give_equal_weights(cache):
    model, _ = warm_started_model(**SMALL)
    for file in cache.iterdir():
        file.unlink()
    assert same_weights(model, warm_started_model(**SMALL)[0])


def test_an_unwritable_cache_only_warns(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    warm_started_model(**SMALL)
    assert "not cached for the next run" in caplog.text


def test_a_failed_cache_write_leaves_no_file(cache, monkeypatch):
    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(chain_model.os, "replace", fail)
    warm_started_model(**SMALL)
    assert list(cache.iterdir()) == []


def test_examples_are_training_prompts():
    tokenizer = char_tokenizer()
    rows = chain_model._examples(tokenizer, 2, 300, 0.5, random.Random(0))
    texts = tokenizer.batch_decode(rows)
    assert {chain.split_of(text[: chain.prompt_tokens(2)]) for text in texts} == {"train"}
    assert all(text.endswith("<eos>") for text in texts)


def test_imitation_stops_at_the_accuracy(cache, caplog):
    caplog.set_level("INFO")
    warm_started_model(**SMALL | {"max_steps": 50}, accuracy=0.0)
    assert "10 steps" in caplog.text


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"slip": 1.5}, r"slip must be in \[0, 1\], got 1.5"),
        ({"accuracy": -1}, r"accuracy must be in \[0, 1\], got -1"),
        ({"max_steps": 0}, "max_steps must be at least 1, got 0"),
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"hidden_size": 20}, "hidden_size must be a multiple of 8"),
    ],
)
def test_invalid_settings_raise(setting, message, cache):
    with pytest.raises(ValueError, match=message):
        warm_started_model(**SMALL | setting)


# The recipe quickstart


def test_the_recipe_is_consistent():
    recipe = read_recipe("quickstart")
    length = recipe["model_kwargs"]["length"]
    assert recipe["train_dataset"]["length"] == recipe["eval_dataset"]["length"] == length
    assert recipe["args"]["max_completion_length"] >= chain.completion_tokens(length)
    assert recipe["args"]["max_steps"] % recipe["args"]["logging_steps"] == 0  # otherwise the report misses updates
    assert (recipe["train_dataset"]["split"], recipe["eval_dataset"]["split"]) == ("train", "test")


@pytest.mark.slow
def test_quickstart_learns(cache, tmp_path):
    """Run a smaller version of the recipe."""
    out = tmp_path / "out"
    chains = ["--model_kwargs.length", "3", "--train_dataset.length", "3", "--eval_dataset.length", "3"]
    model = ["--model_kwargs.num_hidden_layers", "1", "--model_kwargs.batch_size", "64"]
    sizes = ["--train_dataset.size", "3000", "--eval_dataset.size", "400", "--per_device_train_batch_size", "128"]
    run = ["--max_steps", "30", "--eval_strategy", "no", "--disable_tqdm", "true", "--use_cpu", "true"]
    assert main(["train", "quickstart", "--output_dir", str(out), *chains, *model, *sizes, *run]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert 0.2 < summary["accuracy_before"] < 0.45
    assert summary["accuracy_after"] > summary["accuracy_before"] + 0.12
    assert (out / "learning_curve.png").stat().st_size > 10_000
