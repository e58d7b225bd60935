import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_model
from tiny_run import logged, make

from sppo import SPPOConfig
from sppo.models.policy_io import ensure_fp32_weights, from_folder, load_policy


def test_bf16_converts_sixteen_bit_weights_to_float32(caplog):
    args = SPPOConfig("unused", use_cpu=True, bf16=True, per_device_train_batch_size=2)
    model = tiny_model().to(torch.bfloat16)
    expected = {name: tensor.float() for name, tensor in model.state_dict().items()}
    for name, tensor in ensure_fp32_weights(model, args).state_dict().items():
        assert tensor.dtype == torch.float32
        assert tensor.equal(expected[name])
    assert "lost in rounding" not in caplog.text


def test_bfloat16_weights_without_bf16_are_kept_with_a_warning(caplog):
    args = SPPOConfig("unused", use_cpu=True, per_device_train_batch_size=2)
    assert ensure_fp32_weights(tiny_model().to(torch.bfloat16), args).dtype == torch.bfloat16
    assert "steps of less than 1/256 of a weight are lost in rounding. bf16=True" in caplog.text
    assert ensure_fp32_weights(tiny_model(), args).dtype == torch.float32
    assert ensure_fp32_weights(tiny_model().half(), args).dtype == torch.float32


@pytest.mark.parametrize("algorithm", ["sppo", "ppo"])
def test_a_run_in_bfloat16_takes_small_steps(tmp_path, algorithm):
    """Steps are smaller than the rounding of bfloat16 weights."""
    model = tiny_model().to(torch.bfloat16)
    trainer = make(tmp_path, model=model, bf16=True, max_steps=2, learning_rate=1e-6, algorithm=algorithm)
    before = {name: p.detach().clone() for name, p in trainer.model.policy.named_parameters()}
    trainer.train()
    after = dict(trainer.model.policy.named_parameters())
    count = lambda same: sum((~same(before[name], p)).sum().item() for name, p in after.items())
    moved = count(torch.eq)
    assert moved > 1000
    assert count(lambda a, b: a.bfloat16() == b.bfloat16()) < 0.2 * moved
    assert logged(trainer, "skipped_updates") == [0, 0]


def test_a_loss_of_the_router_is_refused():
    model = tiny_model()
    model.config.output_router_logits = True
    with pytest.raises(
        ValueError, match="output_router_logits is True, which asks for the router's load-balancing loss"
    ):
        load_policy(model)


@pytest.mark.parametrize("given", ["a model", "a folder", "a model from a folder"])
def test_the_final_model_has_the_dtype_in_which_the_policy_came(tmp_path, given):
    """Checkpoints have float32, in which it is trained."""
    model = tiny_model().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    settings = {"bf16": True, "max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    folder = str(tmp_path / "model")
    policy = {"a model": model, "a folder": folder, "a model from a folder": from_folder(folder)}[given]
    trainer = make(tmp_path / "run", model=policy, **settings)
    trainer.train()
    trainer.save_model()
    for folder, dtype in ((tmp_path / "run", "bfloat16"), (tmp_path / "run/checkpoint-1", "float32")):
        for part in (folder, folder / "critic"):
            assert json.loads((part / "config.json").read_text())["dtype"] == dtype
            weights = load_file(part / "model.safetensors")
            assert {str(weight.dtype) for weight in weights.values()} == {f"torch.{dtype}"}
    saved = load_file(tmp_path / "run/model.safetensors")
    for name, weight in load_file(tmp_path / "run/checkpoint-1/model.safetensors").items():
        assert saved[name].equal(weight.to(torch.bfloat16))
