"""An update's loss and gradient do not depend on how it is divided into micro-batches."""

import offset_engines
import pytest
import torch
from tiny_run import logged, make


def gradients(tmp_path, parts, **settings):
    trainer = make(
        tmp_path,
        gradient_accumulation_steps=parts,
        per_device_train_batch_size=16 // parts,
        max_steps=1,
        max_completion_length=12,
        max_grad_norm=float("inf"),
        critic_max_grad_norm=float("inf"),
        **settings,
    )
    if trainer.model.critic is not None:
        torch.nn.init.normal_(trainer.model.critic.model.score.weight, generator=torch.Generator().manual_seed(0))
    found = {}
    original = trainer._clip_grad_norm

    def record(model):
        found.update({name: p.grad.clone() for name, p in trainer.model.named_parameters()})
        return original(model)

    trainer._clip_grad_norm = record
    trainer.train()
    return found


# Algorithms, ratios and aggregations that differ in the divisor of the loss. A sequence ratio has no other aggregation.
NORMALIZATIONS = [
    {"algorithm": "sppo", "aggregation": "token-mean"},
    {"algorithm": "sppo", "aggregation": "seq-mean-token-mean"},
    {"algorithm": "sppo", "aggregation": "seq-mean-token-sum"},
    {"algorithm": "sppo", "ratio_level": "sequence_mean"},
    {"algorithm": "sppo", "num_generations": 4},
    {"algorithm": "ppo"},
    {"algorithm": "dr_grpo", "num_generations": 4},
    {"algorithm": "gspo", "num_generations": 4},
]


@pytest.mark.slow
@pytest.mark.parametrize("settings", NORMALIZATIONS, ids=lambda s: "-".join(map(str, s.values())))
def test_gradient_does_not_depend_on_the_micro_batches(tmp_path, settings):
    whole = gradients(tmp_path, 1, **settings)
    assert any(gradient.any() for name, gradient in whole.items() if name.startswith("policy."))
    assert any(name.startswith("critic.") for name in whole) == (settings["algorithm"] in ("sppo", "ppo"))
    for changes in ({"parts": 4}, {"parts": 1, "max_tokens_per_micro_batch": 40}):
        for name, gradient in gradients(tmp_path, **changes, **settings).items():
            torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_micro_batches_respect_the_token_limit(tmp_path):
    trainer = make(tmp_path, max_steps=2, max_tokens_per_micro_batch=20, gradient_accumulation_steps=2)
    seen = []
    forward = trainer.model.forward

    def record(batch, **settings):
        seen.append(batch["input_ids"].numel())
        return forward(batch, **settings)

    trainer.model.forward = record
    trainer.train()
    assert len(seen) > 8  # 16 samples of 5 to 8 tokens, twice
    assert max(seen) <= 20
    assert len(seen) % 4 == 0


@pytest.mark.parametrize("each", [False, True])
def test_gradients_are_synchronized_after_the_last_micro_batch_by_default(tmp_path, each):
    config = {"gradient_accumulation_kwargs": {"sync_each_batch": each}}
    trainer = make(tmp_path, max_steps=1, max_tokens_per_micro_batch=20, accelerator_config=config)
    waits = []
    no_sync = trainer.accelerator.no_sync
    trainer.accelerator.no_sync = lambda model: waits.append(model) or no_sync(model)
    trainer.train()
    assert len(trainer.rollouts.update.micro_batches) > 1
    assert bool(waits) != each


@pytest.mark.parametrize("ratio_level", ["token", "sequence_mean"])
@pytest.mark.parametrize("correction", ["token_truncate", "sequence_truncate"])
def test_mean_rollout_weight_does_not_depend_on_the_micro_batches(tmp_path, correction, ratio_level):
    found = []
    for parts in (1, 4):
        trainer = make(
            tmp_path / str(parts),
            rollout_engine=f"{offset_engines.__file__}:OffByLength",
            rollout_correction=correction,
            rollout_cap=1e3,
            ratio_level=ratio_level,
            gradient_accumulation_steps=parts,
            per_device_train_batch_size=16 // parts,
            max_steps=1,
            max_completion_length=12,
        )
        trainer.train()
        found += logged(trainer, "rollout_weight_mean")
    assert found[0] > 1.01
    assert found[1] == pytest.approx(found[0], rel=3e-6)


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_loss_is_that_of_the_whole_update(tmp_path, aggregation):
    trainer = make(
        tmp_path, gradient_accumulation_steps=3, max_steps=1, max_completion_length=12, aggregation=aggregation
    )
    trainer.train()
    samples = trainer.rollouts.samples
    assert len({len(s.response_ids) for s in samples}) > 1
    by_token = -sum(s.advantage.item() * len(s.response_ids) for s in samples)  # all ratios are 1
    expected = {
        "token-mean": by_token / sum(len(s.response_ids) for s in samples),
        "seq-mean-token-mean": -sum(s.advantage.item() for s in samples) / len(samples),
        "seq-mean-token-sum": by_token / len(samples),
    }
    assert logged(trainer, "policy_loss")[0] == pytest.approx(expected[aggregation], abs=1e-5)
    bce = torch.nn.functional.binary_cross_entropy(
        torch.tensor([s.value for s in samples]), torch.tensor([s.reward for s in samples])
    )
    assert logged(trainer, "critic_loss")[0] == pytest.approx(bce.item(), abs=1e-5)
