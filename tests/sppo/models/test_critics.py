import weakref

import pytest
import torch
from tiny_models import char_tokenizer, tiny_model
from tokenizers import models
from transformers import AutoModelForSequenceClassification

from sppo.models import critics as module
from sppo.models.critic_io import build_critic, load_critic, save_critic
from sppo.models.critics import PromptCritic, TokenCritic, calibration, prompt_values, set_head
from sppo.rollout import Sample


def classifier(**changes):
    config = tiny_model(**changes).config
    config.num_labels = changes.get("num_labels", 1)
    return AutoModelForSequenceClassification.from_config(config)


def test_default_is_the_policys_backbone_with_a_zero_head():
    policy = tiny_model()
    critic = build_critic(None, policy, char_tokenizer())
    for name, tensor in policy.base_model.state_dict().items():
        assert tensor.equal(critic.base_model.state_dict()[name])
        assert tensor.data_ptr() != critic.base_model.state_dict()[name].data_ptr()
    PromptCritic(critic).set_prior(1.0, 8)
    assert prompt_values(critic, [[3, 4], [5]]) == pytest.approx([0.2, 0.2])


def test_each_distinct_prompt_is_read_once(monkeypatch):
    critic = build_critic(None, tiny_model(), char_tokenizer())
    torch.nn.init.normal_(critic.score.weight)
    seen = []
    monkeypatch.setattr(module, "_MAX_TOKENS_PER_FORWARD", 5)
    original = module.pack
    monkeypatch.setattr(module, "pack", lambda chunk: seen.append(chunk) or original(chunk))
    prompts = [[3, 4], [5, 6, 7], [3, 4], [8, 9, 2, 3, 4, 5, 6], [2]]
    values = prompt_values(critic, prompts)
    assert seen == [[(3, 4), (5, 6, 7)], [(8, 9, 2, 3, 4, 5, 6)], [(2,)]]
    alone = [critic(torch.tensor([prompt])).logits.sigmoid().item() for prompt in prompts]
    assert values == pytest.approx(alone, abs=1e-5)


def test_trained_head_is_kept_and_untrained_starts_at_zero(tmp_path):
    trained = classifier()
    set_head(trained, torch.tensor([0.7]))
    save_critic(trained, tmp_path, "prompt")
    critic = build_critic(str(tmp_path), tiny_model(), char_tokenizer())
    assert critic.score.bias.item() == pytest.approx(0.7)
    assert critic.score.weight.equal(trained.score.weight)
    PromptCritic(critic).set_prior(1.0, 2)
    assert critic.score.bias.item() == pytest.approx(0.7)
    assert load_critic(tmp_path).score.bias.equal(trained.score.bias)
    assert not build_critic(classifier(), tiny_model(), char_tokenizer()).score.weight.any()


@pytest.mark.parametrize(
    ("critic", "says"),
    [
        (lambda: tiny_model(), "linear head named 'score' with one label"),
        (lambda: classifier(vocab_size=10), "10 token embeddings and the policy's tokenizer 27 tokens"),
    ],
)
def test_a_critic_that_does_not_fit_is_rejected(critic, says):
    with pytest.raises(ValueError, match=says):
        build_critic(critic(), tiny_model(), char_tokenizer())


def test_another_tokenizer_is_rejected(tmp_path):
    other = char_tokenizer()
    other._tokenizer.model = models.WordLevel({"<pad>": 0, "<eos>": 1, "1": 2, "0": 3}, unk_token="<pad>")
    other.save_pretrained(tmp_path)
    classifier(vocab_size=40).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="another tokenizer"):
        build_critic(str(tmp_path), tiny_model(), char_tokenizer())


def test_saved_critic_is_an_ordinary_classifier(tmp_path, caplog):
    critic = build_critic(None, tiny_model(), char_tokenizer())
    torch.nn.init.normal_(critic.score.weight)
    critic.score.bias.data.fill_(-0.3)
    save_critic(critic, tmp_path, "prompt")
    with caplog.at_level("WARNING"):
        stock = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert "score.bias" not in caplog.text  # nothing missing, nothing unexpected
    logits = torch.cat([stock(torch.tensor([prompt])).logits[0] for prompt in ([3, 4, 5], [7, 2])])
    values = (logits + stock.config.score_bias).sigmoid()
    assert values.tolist() == pytest.approx(prompt_values(critic, [[3, 4, 5], [7, 2]]), abs=1e-6)


def test_calibration():
    values, outcomes = torch.tensor([0.05, 0.05, 0.55, 0.55, 1.0]), torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0])
    found = calibration(values, outcomes, baseline=0.8)
    squares = [0.05**2, 0.95**2, 0.45**2, 0.45**2, 0.0]
    assert found.brier == pytest.approx(sum(squares) / 5)
    assert found.brier_baseline == pytest.approx((0.8**2 + 4 * 0.2**2) / 5)
    assert found.explained_variance == pytest.approx(1 - found.brier / found.brier_baseline)
    assert found.expected_calibration_error == pytest.approx((2 * 0.45 + 2 * 0.45 + 0) / 5)
    assert calibration(torch.ones(2), torch.ones(2), baseline=1.0).explained_variance == 0.0


def test_values_before_each_token():
    critic = build_critic(None, tiny_model(), char_tokenizer())
    torch.nn.init.normal_(critic.score.weight)
    samples = [Sample("", "", [3, 4], [5, 6, 7], truncated=False), Sample("", "", [8], [9], truncated=False)]
    first, second = TokenCritic(critic, 0.2).values(samples)
    states = critic.base_model(torch.tensor([[3, 4, 5, 6]])).last_hidden_state[0]
    torch.testing.assert_close(first, critic.score(states)[1:, 0])
    assert (len(first), len(second)) == (3, 1)


def test_hidden_states_exist_one_chunk_at_a_time(monkeypatch):
    model = build_critic(None, tiny_model(), char_tokenizer(), "token")
    monkeypatch.setattr(module, "_MAX_TOKENS_PER_FORWARD", 4)
    read, chunks = module.packed_hidden, []

    def states(*args):
        assert sum(chunk() is not None for chunk in chunks) <= 2  # the previous one is still referenced by the reader
        out = read(*args)
        chunks.append(weakref.ref(out.untyped_storage()))
        return out

    monkeypatch.setattr(module, "packed_hidden", states)
    samples = [Sample("", "", [2, 3 + i], [4, 5, 1], truncated=False) for i in range(6)]
    with torch.no_grad():
        TokenCritic(model, 0.2).values(samples)
        assert len(chunks) == 6
        prompt_values(model, [[2, 3 + i] for i in range(12)])
        assert len(chunks) == 12


def test_a_saved_critic_loads_from_each_kind_of_path(tmp_path):
    critic = build_critic(None, tiny_model(), char_tokenizer())
    torch.nn.init.normal_(critic.score.weight)
    critic.score.bias.data.fill_(-0.3)
    save_critic(critic, tmp_path / "run" / "critic", "prompt")
    expected = prompt_values(critic, [[3, 4], [5]])
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "critic")
    for given in (str(tmp_path / "run"), tmp_path / "run" / "critic", stock):
        again = build_critic(given, tiny_model(), char_tokenizer())
        assert prompt_values(again, [[3, 4], [5]]) == pytest.approx(expected)
    assert prompt_values(load_critic(tmp_path / "run"), [[3, 4], [5]]) == pytest.approx(expected)
    tiny_model().save_pretrained(tmp_path / "policy")
    with pytest.raises(ValueError, match="there is no critic in"):
        load_critic(tmp_path / "policy")
    with pytest.raises(ValueError, match="trained as a prompt critic, but the algorithm needs a token critic"):
        build_critic(str(tmp_path / "run"), tiny_model(), char_tokenizer(), "token")


@pytest.mark.parametrize(("total", "expected"), [(8.0, 0.9), (0.0, 0.1), (4.0, 0.5)])
def test_a_prior_is_never_certain(total, expected):
    critic = build_critic(None, tiny_model(), char_tokenizer())
    PromptCritic(critic).set_prior(total, 8)
    assert prompt_values(critic, [[3]]) == pytest.approx([expected])
