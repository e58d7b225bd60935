"""Training with adapters: what learns, what is saved, what the reference is, and merged weights for engines."""

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import SIZES, char_tokenizer, tiny_model
from tiny_run import DATASET, changed, has_a, logged, snapshot
from transformers import AutoModelForSequenceClassification

from sppo import SPPOConfig, SPPOTrainer
from sppo.models.critic_io import load_critic
from sppo.models.lora import adapter_off, add_adapter, merged_weights
from sppo.models.policy_io import load_policy


def lora(**changes):
    return LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | changes))


def make(folder, model=None, peft_config=None, critic=None, **settings):
    settings = {
        "per_device_train_batch_size": 8,
        "max_completion_length": 4,
        "learning_rate": 3e-2,
        "critic_learning_rate": 3e-2,
        "max_steps": 3,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    } | settings
    return SPPOTrainer(
        model or tiny_model(),
        has_a,
        args=SPPOConfig(str(folder), **settings),
        critic=critic,
        train_dataset=DATASET,
        processing_class=char_tokenizer(),
        peft_config=peft_config,
    )


@pytest.fixture
def base(tmp_path):
    """A folder with a model that can be an adapter's base."""
    tiny_model().save_pretrained(tmp_path / "base")
    char_tokenizer().save_pretrained(tmp_path / "base")
    return load_policy(tmp_path / "base")


def test_only_adapters_and_the_critics_head_learn(tmp_path):
    trainer = make(tmp_path, peft_config=lora(), gradient_checkpointing=True)
    before = snapshot(trainer.model)
    trainer.train()
    moved = changed(before, trainer.model)
    assert all(".lora_" in name or name.startswith("critic.model.score.") for name in moved)
    for part in ("policy.", "critic.model.model.", "critic.model.score."):
        assert any(name.startswith(part) for name in moved)
    names = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert sum("policy.lm_head" in name for name in names) == 0


def test_without_critic_adapter_all_of_the_critic_learns(tmp_path):
    trainer = make(tmp_path, peft_config=lora(), critic_adapter=False, max_steps=2)  # the first moves the head, from 0
    before = snapshot(trainer.model)
    trainer.train()
    assert any(
        name.startswith("critic.model.model.layers") and ".lora_" not in name for name in changed(before, trainer.model)
    )


def test_the_reference_is_the_policy_without_its_adapter(tmp_path):
    """The KL is 0 while the adapter is zero; later it is the KL to the initial weights."""
    trainer = make(tmp_path, peft_config=lora(), beta=0.1, max_steps=3)
    assert trainer.rollouts.reference is trainer.actor_critic.policy
    trainer.train()
    kl = logged(trainer, "kl")
    assert kl[0] == pytest.approx(0, abs=1e-7)
    assert kl[-1] > 1e-5
    policy, ids = trainer.actor_critic.policy, torch.tensor([[3, 4, 5]])
    first = tiny_model()(ids).logits
    assert not torch.allclose(policy(ids).logits, first)
    with adapter_off(policy):
        torch.testing.assert_close(policy(ids).logits, first)


@pytest.mark.slow
def test_the_reference_of_a_trained_adapter_is_the_policy_that_the_run_begins_with(tmp_path, base):
    make(tmp_path / "first", base, lora()).train()
    first = make(tmp_path / "first", base, max_steps=2)
    first.train()
    first.save_model()
    settings = {"beta": 0.1, "max_steps": 3, "num_iterations": 1, "save_strategy": "steps", "save_steps": 1}
    second = make(tmp_path / "second", load_policy(tmp_path / "first"), **settings)
    before = snapshot(second.actor_critic.policy)
    second.train()
    kl = logged(second, "kl")
    assert kl[0] == pytest.approx(0, abs=1e-7)
    assert kl[-1] > 1e-5
    assert changed(before, second.actor_critic.policy), "the adapter did not learn"
    resumed = make(tmp_path / "second", load_policy(tmp_path / "first"), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "second/checkpoint-1"))
    assert changed(snapshot(second.actor_critic.policy), resumed.actor_critic.policy) == []


def test_saved_adapter_and_critic_load_as_transformers_own(tmp_path, base):
    trainer = make(tmp_path / "run", base, lora())
    trainer.train()
    trainer.save_model()
    ids = torch.tensor([[3, 4, 5, 6]])
    policy = PeftModel.from_pretrained(tiny_model(), tmp_path / "run")
    torch.testing.assert_close(policy(ids).logits, trainer.actor_critic.policy(ids).logits)
    assert not (tmp_path / "run" / "model.safetensors").exists()
    critic = load_critic(tmp_path / "run")
    torch.testing.assert_close(critic(ids).logits, trainer.actor_critic.critic.model(ids).logits, rtol=1e-4, atol=1e-5)
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "critic")


@pytest.mark.slow
def test_a_loaded_adapter_continues_to_learn(tmp_path, base):
    trainer = make(tmp_path / "run", base, lora())
    trainer.train()
    trainer.save_model()
    again = make(tmp_path / "more", load_policy(tmp_path / "run"))
    ids = torch.tensor([[3, 4, 5, 6]])
    hidden = again.actor_critic.critic.model.base_model(ids).last_hidden_state  # a copy, adapter merged
    torch.testing.assert_close(
        hidden, trainer.actor_critic.policy.base_model(ids).last_hidden_state, rtol=1e-4, atol=1e-5
    )
    before = snapshot(again.model)
    again.train()
    moved = changed(before, again.model)
    assert any(name.startswith("policy.") for name in moved)
    assert all(".lora_" in name or name.startswith("critic.model.score.") for name in moved)


@pytest.mark.slow
def test_a_run_with_adapters_resumes_to_the_same_bits(tmp_path):
    settings = {"peft_config": lora(), "save_strategy": "steps", "save_steps": 2}
    whole = make(tmp_path / "whole", **settings, max_steps=4)
    whole.train()
    make(tmp_path / "cut", **settings, max_steps=2).train()
    rest = make(tmp_path / "cut", **settings, max_steps=4)
    rest.train(resume_from_checkpoint=True)
    assert changed(snapshot(whole.model), rest.model) == []
    for other in (None, lora(lora_alpha=16), lora(r=8)):
        with pytest.raises(ValueError, match=r"checkpoint of another run.*adapter"):
            make(tmp_path / "cut", **(settings | {"peft_config": other, "max_steps": 5})).train(
                resume_from_checkpoint=True
            )


def tied():
    return tiny_model("qwen2")


def untied():
    return tiny_model("llama")


def biased_and_untied():
    """A head with a bias, projections with biases, and a norm with one."""
    sizes = SIZES | {"tie_word_embeddings": False}
    torch.manual_seed(0)
    return transformers.PhiForCausalLM(transformers.PhiConfig(**sizes))


def scaled_and_tied():
    torch.manual_seed(0)
    return transformers.GraniteForCausalLM(transformers.GraniteConfig(**SIZES, logits_scaling=8.0))


def buffered():
    """A buffer that is saved, as the selection bias of DeepSeek-V3's router."""
    model = tiny_model("llama")
    layer = model.model.layers[0]
    layer.register_buffer("shift", torch.full((32,), 0.5))
    layer.register_buffer("unsaved", torch.ones(1), persistent=False)
    layer.register_forward_hook(lambda module, _, output: output + module.shift)
    return model


@pytest.mark.parametrize("make_model", [tied, untied, biased_and_untied, scaled_and_tied, buffered])
def test_merged_weights_make_the_model_that_the_adapter_makes(make_model):
    model = make_model()
    for name, buffer in model.named_buffers():
        if name.endswith("shift"):
            buffer.fill_(-2.0)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    add_adapter(model, lora())
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    merged = dict(merged_weights(model))
    plain = make_model()
    assert merged.keys() == plain.state_dict().keys()
    plain.load_state_dict(merged)
    ids = torch.tensor([[3, 4, 5, 6]])
    torch.testing.assert_close(plain(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain(ids).logits, make_model()(ids).logits)


@pytest.mark.parametrize(
    ("config", "error", "says"),
    [
        (object(), TypeError, "must be a peft.LoraConfig, got object"),
        (lora(target_modules=["q_proj", "lm_head"]), ValueError, "output embedding"),
        (lora(target_modules=["q_proj", "embed_tokens"]), ValueError, "input embedding"),
        (lora(lora_dropout=0.3), ValueError, "peft_config.lora_dropout must be 0, got 0.3"),
        (lora(use_dora=True), ValueError, "peft_config.use_dora must be False, got True"),
        (lora(modules_to_save=["norm"]), ValueError, "peft_config.modules_to_save must be None"),
        (lora(init_lora_weights="pissa"), ValueError, "init_lora_weights must be one of True, .*, got 'pissa'"),
        (lora(init_lora_weights="pissa_niter_4"), ValueError, "got 'pissa_niter_4': others change the frozen weights"),
        (lora(init_lora_weights="olora"), ValueError, "got 'olora': others change the frozen weights"),
        (lora(alora_invocation_tokens=[3]), ValueError, "peft_config.alora_invocation_tokens must be None, got"),
        (lora(target_parameters=["mlp.experts.down_proj"]), ValueError, "peft_config.target_parameters must be None"),
        (lora(target_modules=["no_such"]), ValueError, "does not fit Llama.*no_such"),
    ],
)
def test_configurations_that_do_not_fit(tmp_path, config, error, says):
    with pytest.raises(error, match=says):
        make(tmp_path, tiny_model("llama"), peft_config=config)


def test_frozen_bfloat16_weights_stay_and_what_learns_is_float32(tmp_path):
    trainer = make(tmp_path, tiny_model().to(torch.bfloat16), lora(), max_steps=2, bf16=True)
    dtypes = {p.requires_grad: p.dtype for p in trainer.model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    before = snapshot(trainer.model)
    trainer.train()
    assert any(name.startswith("policy.") for name in changed(before, trainer.model))


def test_pefts_wrapper_is_removed(tmp_path):
    model = get_peft_model(tiny_model(), lora())
    trainer = make(tmp_path, model, max_steps=1)
    before = snapshot(trainer.model)
    trainer.train()
    assert any(name.startswith("policy.") for name in changed(before, trainer.model))
    trainer.save_model()
    ids = torch.tensor([[3, 4, 5, 6]])
    saved = PeftModel.from_pretrained(tiny_model(), tmp_path)
    torch.testing.assert_close(saved(ids).logits, trainer.actor_critic.policy(ids).logits)
    with pytest.raises(ValueError, match=r"pass one with a single LoRA adapter called 'default'"):
        make(tmp_path / "other", get_peft_model(tiny_model(), lora(), adapter_name="foo"))
