import pytest
import torch
from tiny_models import char_tokenizer, tiny_model
from tokenizers import models
from transformers import AutoModelForSequenceClassification

from sppo import critic as module
from sppo.critic import PromptCritic, build_critic, load_critic, prompt_values, set_head


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
    PromptCritic(critic).set_prior(0.2)
    assert prompt_values(critic, [[3, 4], [5]]) == pytest.approx([0.2, 0.2])


def test_each_distinct_prompt_is_read_once(monkeypatch):
    critic = build_critic(None, tiny_model(), char_tokenizer())
    torch.nn.init.normal_(critic.score.weight)
    seen = []
    monkeypatch.setattr(module, "_TOKENS_AT_ONCE", 5)
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
    trained.save_pretrained(tmp_path)
    critic = build_critic(str(tmp_path), tiny_model(), char_tokenizer())
    assert critic.score.bias.item() == pytest.approx(0.7)
    assert critic.score.weight.equal(trained.score.weight)
    PromptCritic(critic).set_prior(0.5)
    assert critic.score.bias.item() == pytest.approx(0.7)
    assert load_critic(tmp_path, torch.float32).score.bias.item() == pytest.approx(0.7)
    assert not build_critic(classifier(), tiny_model(), char_tokenizer()).score.weight.any()


@pytest.mark.parametrize(
    ("critic", "says"),
    [
        (lambda: tiny_model(), "linear head named 'score' with one label"),
        (lambda: classifier(vocab_size=10), "10 token embeddings and the policy's tokenizer 27 tokens"),
    ],
)
def test_a_critic_that_does_not_fit_is_refused(critic, says):
    with pytest.raises(ValueError, match=says):
        build_critic(critic(), tiny_model(), char_tokenizer())


def test_another_tokenizer_is_refused(tmp_path):
    other = char_tokenizer()
    other._tokenizer.model = models.WordLevel({"<pad>": 0, "<eos>": 1, "1": 2, "0": 3}, unk_token="<pad>")
    other.save_pretrained(tmp_path)
    classifier(vocab_size=40).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="another tokenizer"):
        build_critic(str(tmp_path), tiny_model(), char_tokenizer())
