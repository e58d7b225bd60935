"""The setting ``save_dtype``: what is saved at the end and pushed is converted, checkpoints are not."""

import json
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from tiny_models import char_tokenizer, tiny_model
from tiny_run import DATASET, changed, has_a, make, snapshot
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from sppo import SPPOConfig, SPPOTrainer, load_critic

IDS = torch.tensor([[3, 4, 5, 6]])
STEPS = {"save_strategy": "steps", "save_steps": 1}


def dtypes_in(folder, file="model.safetensors"):
    return {str(weight.dtype).removeprefix("torch.") for weight in load_file(Path(folder, file)).values()}


def size(folder):
    return Path(folder, "model.safetensors").stat().st_size


def test_the_final_model_and_critic_are_converted(tmp_path):
    trainer = make(tmp_path / "half", save_dtype="bfloat16", max_steps=1)
    trainer.train()
    trainer.save_model()
    plain = make(tmp_path / "plain", max_steps=1)
    plain.train()
    plain.save_model()
    for part in ("", "critic"):
        half, full = tmp_path / "half" / part, tmp_path / "plain" / part
        assert (dtypes_in(half), dtypes_in(full)) == ({"bfloat16"}, {"float32"})
        assert json.loads((half / "config.json").read_text())["dtype"] == "bfloat16"
        assert size(half) < 0.6 * size(full)
        converted, exact = (load_file(folder / "model.safetensors") for folder in (half, full))
        assert converted.keys() == exact.keys()
        assert all(converted[name].equal(weight.bfloat16()) for name, weight in exact.items())
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert policy.dtype == torch.bfloat16
    assert policy.lm_head.weight is policy.model.embed_tokens.weight
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "half/critic").dtype == torch.bfloat16
    bias = trainer.actor_critic.critic.model.score.bias
    assert load_critic(tmp_path / "half").score.bias.item() == pytest.approx(bias.item(), rel=2**-8)


def test_a_model_that_came_in_bfloat16_can_be_saved_in_float32(tmp_path):
    trainer = make(tmp_path, model=tiny_model().to(torch.bfloat16), bf16=True, save_dtype="float32", max_steps=1)
    trainer.train()
    trainer.save_model()
    trained = dict(trainer.actor_critic.policy.named_parameters())
    for name, weight in load_file(tmp_path / "model.safetensors").items():
        assert weight.equal(trained[name])
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"


def test_checkpoints_keep_the_bits_and_resume_to_the_same(tmp_path):
    whole = make(tmp_path / "whole", max_steps=3)
    whole.train()
    make(tmp_path / "cut", save_dtype="bfloat16", max_steps=2, **STEPS).train()
    for part in ("checkpoint-1", "checkpoint-1/critic"):
        assert dtypes_in(tmp_path / "cut" / part) == {"float32"}
        assert json.loads((tmp_path / "cut" / part / "config.json").read_text())["dtype"] == "float32"
    rest = make(tmp_path / "cut", save_dtype=None, max_steps=3, **STEPS)  # may change when a run is resumed
    rest.train(resume_from_checkpoint=True)
    assert changed(snapshot(whole.model), rest.model) == []


def test_an_adapter_and_its_critic_are_converted(tmp_path):
    settings = {"use_cpu": True, "per_device_train_batch_size": 8, "max_completion_length": 4, "max_steps": 2, **STEPS}
    args = SPPOConfig(str(tmp_path), learning_rate=3e-2, save_dtype="bfloat16", disable_tqdm=True, **settings)
    trainer = SPPOTrainer(
        tiny_model(),
        has_a,
        args=args,
        train_dataset=DATASET,
        processing_class=char_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model()
    final, checkpoint = tmp_path, tmp_path / "checkpoint-2"
    for folder, dtype in ((final, "bfloat16"), (checkpoint, "float32")):
        assert dtypes_in(folder, "adapter_model.safetensors") == {dtype}
        assert dtypes_in(folder / "critic") == {dtype}
    assert dtypes_in(checkpoint, "learned.safetensors") == {"float32"}
    saved = PeftModel.from_pretrained(tiny_model(), final)
    torch.testing.assert_close(saved(IDS).logits, trainer.actor_critic.policy(IDS).logits, rtol=2e-2, atol=2e-2)


def test_what_is_pushed_during_training_is_converted(tmp_path, monkeypatch):
    pushed = []

    def upload_folder(self, *, folder_path, **_):
        pushed.append([dtypes_in(Path(folder_path, part)) for part in ("", "critic")])
        done = Future()
        done.set_result(None)
        return done

    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **_: SimpleNamespace(repo_id=name))
    hub = {"push_to_hub": True, "hub_model_id": "acme/mine", "hub_always_push": True}
    make(tmp_path, save_dtype="bfloat16", max_steps=2, **STEPS, **hub).train()
    assert pushed[:2] == [[{"bfloat16"}, {"bfloat16"}]] * 2
    assert dtypes_in(tmp_path / "checkpoint-2") == {"float32"}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"save_dtype": "float16"}, "save_dtype='float16' is not available: weights above 65504"),
        ({"save_dtype": "int8"}, "save_dtype must be one of None, float32, bfloat16, got 'int8'"),
        (
            {"save_dtype": "bfloat16", "push_to_hub": True, "hub_strategy": "checkpoint"},
            "save_dtype='bfloat16' does not apply to the checkpoints that hub_strategy='checkpoint' pushes",
        ),
    ],
)
def test_settings_that_are_refused(tmp_path, settings, says):
    with pytest.raises(ValueError, match=says):
        SPPOConfig(str(tmp_path), use_cpu=True, **settings)
