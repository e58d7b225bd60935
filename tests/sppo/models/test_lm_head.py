"""Log-probabilities of models that scale their logits are those of the models' own logits."""

import pytest
import torch
import transformers
from tiny_models import SIZES, tiny_model
from tiny_run import logged, make, snapshot
from torch import nn

from sppo.models.actor_critic import ActorCritic, policy_logprobs
from sppo.models.lm_head import lm_head
from sppo.models.packed_attention import PACKED_ATTENTION, pack, use_attention

SCALED = {  # model class: configuration, and the scale that it means
    "Cohere": ({"logit_scale": 0.25}, 0.25),
    "Cohere2": ({"logit_scale": 0.25, "head_dim": 8, "sliding_window": 3}, 0.25),
    "Granite": ({"logits_scaling": 8.0}, 1 / 8),
    "GraniteMoe": ({"logits_scaling": 8.0, "num_local_experts": 4, "num_experts_per_tok": 2}, 1 / 8),
    "HyperCLOVAX": ({"logits_scaling": 3.0}, 3.0),
}
IDS = [3, 7, 2, 5, 9, 9, 4]


def scaled_model(family, **changes):
    config_class, model_class = (getattr(transformers, f"{family}{kind}", None) for kind in ("Config", "ForCausalLM"))
    if model_class is None:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config_class(**(SIZES | {"bos_token_id": 2} | SCALED[family][0] | changes)))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.2)
    return model


def packed_logprobs(model, temperature):
    packed = pack([IDS])
    batch = packed._asdict() | {"response_index": torch.arange(6), "response_ids": torch.tensor(IDS[1:])}
    with use_attention(model, PACKED_ATTENTION):
        return policy_logprobs(model, batch, temperature=temperature, max_length=7)


def own_logprobs(model, temperature):
    logits = model(input_ids=torch.tensor([IDS]), use_cache=False).logits[0, :-1] / temperature
    logprobs = logits.log_softmax(-1)
    return logprobs.gather(1, torch.tensor(IDS[1:])[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


def gradients(model, logprobs):
    model.zero_grad()
    (logprobs * torch.linspace(-1, 2, len(logprobs))).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_equals_own(model, temperature):
    expected, expected_entropy = own_logprobs(model, temperature)
    expected_gradients = gradients(model, expected)
    logprobs, entropy = packed_logprobs(model, temperature)
    torch.testing.assert_close(logprobs, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entropy, expected_entropy, rtol=1e-4, atol=1e-5)
    found = gradients(model, logprobs)
    assert found.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=2e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", SCALED)
def test_logprobs_and_gradients_equal_those_of_the_models_own_logits(family):
    model = scaled_model(family)
    assert lm_head(model).scale == pytest.approx(SCALED[family][1])
    check_equals_own(model, temperature=0.7)
    ActorCritic(model).check_packing()


class ScaledThenCapped(transformers.Gemma2ForCausalLM):
    """Multiplies logits by ``output_multiplier`` before the softcap, as Muse does."""

    def __init__(self, config):
        super().__init__(config)
        self.lm_head.register_forward_hook(lambda _, __, logits: logits * self.config.output_multiplier)


def test_a_softcap_applies_after_the_scale():
    config = tiny_model("gemma2").config
    config.output_multiplier, config.final_logit_softcapping = 3.0, 2.0
    torch.manual_seed(0)
    model = ScaledThenCapped(config)
    nn.init.normal_(model.lm_head.weight, std=0.5)
    assert own_logprobs(model, 1.0)[0].std() > 0.1
    check_equals_own(model, temperature=0.7)


def test_a_bias_of_the_head_is_scaled_with_the_logits():
    model = scaled_model("Granite", logits_scaling=0.5)
    model.lm_head.bias = nn.Parameter(torch.linspace(-2, 2, SIZES["vocab_size"]))
    check_equals_own(model, temperature=1.3)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Cohere", "Cohere2", "Granite"])
def test_a_training_step_sees_the_scaled_distribution(tmp_path, family):
    """Old, current and reference log-probabilities agree before the first update, and with the sampler's entropy."""
    model = scaled_model(family)
    settings = {"algorithm": "reinforce", "beta": 0.1, "num_iterations": 2, "max_steps": 3, "seed": 1}
    trainer = make(tmp_path, model=model, **settings)
    before = snapshot(model)
    trainer.train()
    assert logged(trainer, "kl")[0] == pytest.approx(0, abs=1e-6)
    assert logged(trainer, "ratio_mean")[0] == pytest.approx(1, abs=1e-5)
    assert any(not p.equal(before[name]) for name, p in model.state_dict().items())
    assert logged(trainer, "skipped_updates") == [0, 0, 0]


class TwiceAsLarge(transformers.LlamaForCausalLM):
    """Scales its logits under a name that no configuration has."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output


def test_an_unknown_scale_is_refused():
    model = TwiceAsLarge(tiny_model("llama").config)
    with pytest.raises(ValueError, match="model=TwiceAsLarge: log-probabilities differ from the model's own forward"):
        ActorCritic(model).check_packing()


def test_a_scale_that_divides_where_it_should_multiply_is_refused(monkeypatch):
    monkeypatch.setattr("sppo.models.lm_head._MULTIPLIED_BY_LOGITS_SCALING", ())
    with pytest.raises(ValueError, match=r"model=HyperCLOVAX.*log-probabilities differ"):
        ActorCritic(scaled_model("HyperCLOVAX")).check_packing()


@pytest.mark.parametrize("value", [0, -1.0, "inv_sqrt_d_model"])
def test_a_scale_that_is_not_a_positive_number_is_refused(value):
    model = tiny_model()
    model.config.logit_scale = value
    with pytest.raises(ValueError, match=r"model.config.logit_scale must be a positive number, got"):
        lm_head(model)


def test_a_head_with_other_parameters_is_refused():
    model = tiny_model("llama")
    model.lm_head.per_token_scale = nn.Parameter(torch.ones(SIZES["vocab_size"]))
    with pytest.raises(ValueError, match="LM head has the parameters per_token_scale besides weight and bias"):
        ActorCritic(model).check_packing()
