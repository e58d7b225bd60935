"""Adapters on quantized base models: with bitsandbytes on a CPU, and what is refused, with stand-ins for quantizers."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel
from tiny_models import char_tokenizer, tiny_model
from tiny_run import DATASET, changed, has_a, logged, snapshot
from torch import nn

from sppo import SPPOConfig, SPPOTrainer, load_critic
from sppo.cli.recipes import _load_critic, load_model
from sppo.models.critic_io import build_critic
from sppo.models.lora import add_adapter, merged_weights
from sppo.models.policy_io import from_folder
from sppo.models.quantization import bitsandbytes_config, quantizer
from sppo.rollout.vllm import _start

IDS = torch.tensor([[3, 4, 5, 6]])
FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
WIDE = {"hidden_size": 64, "intermediate_size": 128}
QUANTIZED = {
    "nf4": FOUR_BITS,
    "fp4, double": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
}


def lora(**changes):
    return LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | changes))


def make(folder, model, peft_config=None, critic=None, **settings):
    settings = {
        "per_device_train_batch_size": 8,
        "max_completion_length": 4,
        "learning_rate": 3e-2,
        "critic_learning_rate": 3e-2,
        "max_steps": 3,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    } | settings
    return SPPOTrainer(
        model,
        has_a,
        args=SPPOConfig(str(folder), **settings),
        critic=critic,
        train_dataset=DATASET,
        processing_class=char_tokenizer(),
        peft_config=peft_config,
    )


@pytest.fixture
def base(tmp_path):
    """A folder with a model of plain weights, in which blocks of 64 weights are rows or parts of them."""
    tiny_model(**WIDE).save_pretrained(tmp_path / "base")
    char_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture(params=QUANTIZED)
def quantization(request):
    """The settings of each kind of quantization, as a recipe has them."""
    pytest.importorskip("bitsandbytes")
    return QUANTIZED[request.param]


def packed(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.is_floating_point()}


@pytest.mark.slow
def test_a_run_learns_adapters_and_resumes_to_the_same_bits(tmp_path, base, quantization):
    """With updates that reuse a rollout: the ratio is 1 before the first, as the same forward gives both."""
    load = lambda: load_model(str(base), {"quantization_config": quantization})[0]
    settings = {"save_strategy": "steps", "save_steps": 1, "beta": 0.1, "num_iterations": 2, "max_steps": 4}
    whole = make(tmp_path / "whole", load(), lora(), **settings)
    frozen = packed(whole.model)
    assert {name.split(".")[0] for name in frozen} == {"policy", "critic"}
    whole.train()
    assert all(frozen[name].equal(weight) for name, weight in packed(whole.model).items())
    assert logged(whole, "kl")[0] == pytest.approx(0, abs=1e-6)
    assert logged(whole, "kl")[-1] > 1e-5
    assert logged(whole, "ratio_mean")[0] == pytest.approx(1, abs=1e-6)
    for moment in (1, 2):
        rest = make(tmp_path / f"cut{moment}", load(), lora(), **settings)
        rest.train(resume_from_checkpoint=str(tmp_path / f"whole/checkpoint-{moment}"))
        assert changed(snapshot(whole.model), rest.model) == []


@pytest.mark.slow
def test_saved_adapter_and_critic_are_those_that_learned(tmp_path, base, quantization):
    load = lambda: from_folder(base, quantization_config=dict(quantization))
    trainer = make(tmp_path / "run", load(), lora())
    trainer.train()
    trainer.save_model()
    assert not (tmp_path / "run/model.safetensors").exists()
    # In training mode bitsandbytes computes with plain weights on a CPU.
    policy, critic = trainer.actor_critic.policy.train(), trainer.actor_critic.critic.model.train()
    again = PeftModel.from_pretrained(load(), tmp_path / "run").train()
    torch.testing.assert_close(again(IDS).logits, policy(IDS).logits)
    assert "quantization_config" not in json.loads((tmp_path / "run/critic/config.json").read_text())
    saved = load_critic(tmp_path / "run")
    assert {p.dtype for p in saved.parameters()} == {torch.float32}
    torch.testing.assert_close(saved(IDS).logits, critic(IDS).logits, rtol=1e-3, atol=1e-3)


def test_merged_weights_make_the_model_that_the_adapter_makes(base, quantization):
    """Engines with their own weights get these; the model itself keeps its bits."""
    model = from_folder(base, quantization_config=quantization).train()  # int8 computes with plain weights on a CPU
    add_adapter(model, lora(target_modules=["q_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    before = snapshot(model)
    plain = tiny_model(**WIDE)
    plain.load_state_dict(dict(merged_weights(model)))
    torch.testing.assert_close(plain(IDS).logits, model(IDS).logits, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(plain(IDS).logits, tiny_model(**WIDE)(IDS).logits, atol=1e-2)
    assert changed(before, model) == []


def test_the_critic_starts_as_a_copy_of_the_quantized_backbone(base, quantization):
    policy = from_folder(base, quantization_config=quantization)
    critic = build_critic(None, policy, char_tokenizer())
    states = [model.base_model(IDS).last_hidden_state for model in (policy, critic)]
    assert torch.equal(*states)
    assert quantizer(critic) == "bitsandbytes"
    assert packed(critic).keys() == packed(policy).keys()
    add_adapter(critic, lora(task_type="SEQ_CLS"))
    assert quantizer(policy) == "bitsandbytes"
    assert not any("lora_" in name for name, _ in policy.named_parameters())


def test_a_recipes_critic_may_be_quantized(tmp_path, base, quantization):
    build_critic(None, tiny_model(**WIDE), char_tokenizer()).save_pretrained(tmp_path / "critic")
    critic = _load_critic({"model": str(tmp_path / "critic"), "quantization_config": quantization})
    trainer = make(tmp_path / "run", tiny_model(**WIDE), lora(), critic, max_steps=2)
    assert quantizer(trainer.actor_critic.critic.model) == "bitsandbytes"
    before = snapshot(trainer.actor_critic.critic)
    trainer.train()
    moved = changed(before, trainer.actor_critic.critic)
    assert moved
    assert all(".lora_" in name or name.startswith("model.score.") for name in moved)


def test_a_folder_with_packed_weights_needs_no_settings(tmp_path, base, quantization):
    """As the 4-bit models on the hub are."""
    model = from_folder(base, quantization_config=quantization).train()
    model.save_pretrained(tmp_path / "packed")
    loaded = from_folder(tmp_path / "packed").train()
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)
    trainer = make(tmp_path / "run", loaded, lora(), max_steps=2)
    before = snapshot(trainer.model)
    trainer.train()
    moved = changed(before, trainer.model)
    assert any(name.startswith("policy.") for name in moved)
    assert all(".lora_" in name or name.startswith("critic.model.score.") for name in moved)


def test_a_quantized_policy_may_have_a_critic_of_plain_weights(tmp_path, base, quantization):
    critic = build_critic(None, tiny_model(), char_tokenizer())
    trainer = make(tmp_path, from_folder(base, quantization_config=quantization), lora(), critic, max_steps=2)
    before = snapshot(trainer.model)
    trainer.train()
    assert any(name.startswith("policy.") for name in changed(before, trainer.model))


def test_what_a_quantized_model_cannot_do(tmp_path, base, quantization):
    load = lambda **more: from_folder(base, quantization_config=quantization | more)
    with pytest.raises(ValueError, match=r"model=Qwen2ForCausalLM has quantized weights.*pass peft_config"):
        make(tmp_path, load())
    with pytest.raises(ValueError, match=r"critic=Qwen2.* has quantized weights.*critic_adapter=True"):
        make(tmp_path, load(), lora(), critic_adapter=False)
    adapted = load()
    add_adapter(adapted, lora())
    with pytest.raises(ValueError, match=r"copy of a policy that is quantized and has an adapter.*pass critic="):
        make(tmp_path, adapted)
    before = snapshot(adapted)
    make(tmp_path, adapted, algorithm="reinforce").train()
    assert changed(before, adapted)


def test_a_quantized_head_is_refused(tmp_path, quantization):
    tiny_model("llama", **WIDE).save_pretrained(tmp_path / "untied")
    model = from_folder(tmp_path / "untied", quantization_config=quantization | {"llm_int8_skip_modules": ["o_proj"]})
    with pytest.raises(ValueError, match="quantized head, which is read as one matrix here; name it in llm_int8_skip"):
        make(tmp_path / "run", model, lora())


def test_outliers_of_a_batch_are_refused(tmp_path, base):
    pytest.importorskip("bitsandbytes")
    model = from_folder(base, quantization_config={"load_in_8bit": True})
    with pytest.raises(ValueError, match=r"llm_int8_threshold above 0: which columns are outliers .* or in 4 bits"):
        make(tmp_path / "run", model, lora())


def test_a_quantized_model_can_be_evaluated_without_an_adapter(tmp_path, base, quantization):
    args = SPPOConfig(str(tmp_path), use_cpu=True, max_completion_length=4, disable_tqdm=True)
    model = from_folder(base, quantization_config=quantization | {"llm_int8_threshold": 6.0})
    trainer = SPPOTrainer(model, has_a, args=args, eval_dataset=DATASET, processing_class=char_tokenizer())
    assert trainer.evaluate()["eval_problems"] == len(DATASET)


# Without bitsandbytes


def stand_in(method):
    """Make a model that transformers marked as quantized, as it does for each quantizer."""
    model = tiny_model()
    model.is_quantized = True
    model.config.quantization_config = SimpleNamespace(quant_method=method)
    return model


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "torchao", "mxfp4", "hqq", "compressed-tensors"])
@pytest.mark.parametrize("part", ["model", "critic"])
def test_other_quantizers_are_refused_by_name(tmp_path, method, part):
    critic = build_critic(None, tiny_model(), char_tokenizer())
    model = stand_in(method) if part == "model" else tiny_model()
    if part == "critic":
        critic.is_quantized, critic.config.quantization_config = True, {"quant_method": method}
    with pytest.raises(ValueError, match=rf"{part}=Qwen2\w+ has weights quantized by {method}, on which training was"):
        make(tmp_path, model, lora(), critic)


def test_packed_weights_without_a_quantizers_name_are_refused(tmp_path):
    model = tiny_model()
    layer = model.model.layers[0].mlp.down_proj
    layer.weight = nn.Parameter(torch.zeros(32, 48, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="has weights quantized by an unknown quantizer"):
        make(tmp_path, model, lora())


def test_quantized_weights_need_an_adapter(tmp_path):
    with pytest.raises(ValueError, match=r"has quantized weights, which cannot be trained; pass peft_config, or load"):
        make(tmp_path, stand_in("bitsandbytes"))


def test_eight_bit_weights_that_are_not_packed_are_refused(tmp_path):
    model = stand_in("bitsandbytes")
    model.config.quantization_config.llm_int8_has_fp16_weight = True
    with pytest.raises(ValueError, match="has llm_int8_has_fp16_weight=True, whose weights are not packed"):
        make(tmp_path, model, lora())


def test_sharded_runs_of_quantized_weights_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="quantized weights: sharding them by FSDP was not tried here"):
        make(tmp_path, stand_in("bitsandbytes"), lora())


def test_vllm_starts_with_plain_weights(monkeypatch):
    started = lambda model, **_: json.loads(Path(model, "config.json").read_text())
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=started))
    policy = stand_in("bitsandbytes")
    assert "quantization_config" not in _start(policy, None, {"skip_tokenizer_init": True})
    assert policy.config.quantization_config.quant_method == "bitsandbytes"


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"load_in_4bits": True}, ValueError, "no key 'load_in_4bits'; did you mean 'load_in_4bit'"),
        ({"bnb_4bit_quant_type": "nf4"}, ValueError, "must have load_in_4bit or load_in_8bit"),
        ({"quant_method": "gptq", "bits": 4}, ValueError, "quant_method must be 'bitsandbytes', got 'gptq'"),
    ],
)
def test_mappings_that_are_no_configuration(settings, error, says):
    with pytest.raises(error, match=says):
        bitsandbytes_config(settings)


def test_a_mapping_becomes_a_configuration(monkeypatch):
    monkeypatch.setattr("sppo.models.quantization.is_bitsandbytes_available", lambda: True)
    config = bitsandbytes_config({**FOUR_BITS, "bnb_4bit_compute_dtype": "bfloat16"})
    assert (config.load_in_4bit, config.bnb_4bit_compute_dtype) == (True, torch.bfloat16)
    monkeypatch.setattr("sppo.models.quantization.is_bitsandbytes_available", lambda: False)
    with pytest.raises(ImportError, match=r"pip install 'sppo-kernels\[quantization\]'"):
        bitsandbytes_config(FOUR_BITS)
