"""Reward models: sequence classifiers by folder or object, in batches, and in training."""

import pytest
import torch
from tiny_models import SIZES, char_tokenizer
from tiny_run import logged, make
from transformers import Qwen2Config, Qwen2ForSequenceClassification

from sppo.cli.recipes import read_recipe
from sppo.rewards import resolve, score
from sppo.rewards.reward_model import RewardModel

PROMPTS = ["1+1=", "2+3=", "10=", "4="]
COMPLETIONS = ["a", "abc", "", "2b"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def classifier(labels=1, seed=0, **changes):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2ForSequenceClassification(Qwen2Config(**(SIZES | {"num_labels": labels} | changes)))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "judge"
    classifier().save_pretrained(path)
    tokenizer = char_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


@torch.no_grad()
def one_by_one(model, texts):
    return [model(torch.tensor([char_tokenizer()(text)["input_ids"]])).logits[0, 0].item() for text in texts]


def test_scores_are_the_classifiers_logits_whatever_the_batch(folder):
    expected = one_by_one(classifier(), [p + c for p, c in zip(PROMPTS, COMPLETIONS, strict=True)])
    for options in ("", "?batch_size=1", "?batch_size=3"):
        scores = score([f"model:{folder}{options}"], PROMPTS, COMPLETIONS, {})
        assert scores.rewards == pytest.approx(expected, abs=1e-5)
        assert list(scores.means) == ["judge"]
    probabilities = score([f"model:{folder}?sigmoid=true"], PROMPTS, COMPLETIONS, {}).rewards
    assert probabilities == pytest.approx(torch.tensor(expected).sigmoid().tolist(), abs=1e-5)


def test_a_model_without_a_padding_token_reads_rows_alone():
    expected = one_by_one(classifier(), [p + c for p, c in zip(PROMPTS, COMPLETIONS, strict=True)])
    model = RewardModel(classifier(pad_token_id=None), char_tokenizer())
    assert model(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-5)
    assert model(PROMPTS[:1] * 2, ["a", "b"]) == pytest.approx(one_by_one(model.model, ["1+1=a", "1+1=b"]), abs=1e-5)


def test_chat_messages_go_through_the_models_own_template(folder):
    prompts = [[{"role": "user", "content": "1+1="}]]
    completions = [[{"role": "assistant", "content": "ab"}]]
    expected = one_by_one(classifier(), ["1+1=ab"])
    assert score([f"model:{folder}"], prompts, completions, {}).rewards == pytest.approx(expected, abs=1e-5)


def test_long_texts_are_cut_at_the_front():
    (cut,) = RewardModel(classifier(), char_tokenizer(), max_length=3)(["1+1="], ["abc"])
    assert cut == pytest.approx(one_by_one(classifier(), ["abc"])[0], abs=1e-5)


def test_an_object_is_a_reward_as_in_trl(folder):
    model = Qwen2ForSequenceClassification.from_pretrained(folder)
    expected = score([f"model:{folder}"], PROMPTS, COMPLETIONS, {}).rewards
    assert score([model], PROMPTS, COMPLETIONS, {}).rewards == pytest.approx(expected)


def test_the_identity_of_a_run_has_the_models_content(folder, tmp_path):
    identity = resolve(f"model:{folder}").identity()
    assert resolve(f"model:{folder}").identity() == identity
    other = tmp_path / "judge"
    classifier(rope_theta=5.0).save_pretrained(other)
    char_tokenizer().save_pretrained(other)
    assert resolve(f"model:{other}").identity() != identity


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("model:no/such_model", "reward model 'no/such_model' cannot be loaded"),
        ("model:{folder}?batch_size=0", "batch_size must be at least 1, got 0"),
        ("model:{folder}?dtype=int8", "dtype must be float32, bfloat16 or float16, got 'int8'"),
        ("model:{folder}?no_such=1", "unexpected keyword argument 'no_such'"),
    ],
)
def test_errors_name_the_model_and_the_remedy(folder, spec, message, monkeypatch):
    if "no/such" in spec:  # without asking the hub, which takes long where there is none
        missing = lambda *args, **kwargs: (_ for _ in ()).throw(OSError("no such repository"))
        monkeypatch.setattr("sppo.rewards.reward_model.AutoModelForSequenceClassification.from_pretrained", missing)
    with pytest.raises(ValueError, match=message):
        resolve(spec.format(folder=folder))


def test_a_classifier_of_several_labels_is_refused():
    with pytest.raises(ValueError, match="has 2 labels; a reward needs a sequence classifier with one"):
        RewardModel(classifier(labels=2), char_tokenizer())


def test_a_recipe_may_name_a_model_and_no_module_of_that_name(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("reward: model:judge")
    assert read_recipe(str(recipe))["reward"] == "model:judge"
    recipe.write_text("model: model:judge")
    with pytest.raises(ValueError, match="'model:judge' for model, which runs code"):
        read_recipe(str(recipe))


@pytest.mark.slow
def test_a_policy_learns_from_a_reward_model(folder, tmp_path):
    reward = f"model:{folder}?sigmoid=true"
    trainer = make(tmp_path, reward, max_steps=30, per_device_train_batch_size=32)
    trainer.train()
    rewards = logged(trainer, "reward")
    assert sum(rewards[-5:]) > sum(rewards[:5]) + 0.5
