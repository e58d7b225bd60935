"""The probe reads the policy's hidden states of the prompt, learns from outcomes, and does not move the policy."""

import pytest
import torch
from tiny_models import char_tokenizer, tiny_model
from tiny_run import DATASET, logged, make

from sppo import SPPOTrainer, load_critic
from sppo.models.probe import ProbeCritic, ProbeForSequenceClassification
from sppo.optimization import update_loss

BY_PROMPT = lambda prompts, completions, **_: [float(prompt[0] < "3") for prompt in prompts]
SETTINGS = {"algorithm": "poise", "critic_learning_rate": 3e-2, "per_device_train_batch_size": 16}


def test_values_are_those_of_the_last_hidden_state_of_the_prompt(tmp_path):
    trainer = make(tmp_path, BY_PROMPT, max_steps=5, **SETTINGS)
    trainer.train()
    critic, policy = trainer.model.critic, trainer.model.policy.eval()
    assert isinstance(critic, ProbeCritic)
    samples = trainer.rollouts.samples
    expected = []
    for sample in samples:
        with torch.no_grad():
            hidden = policy.model(torch.tensor([sample.prompt_ids])).last_hidden_state[0, -1]
            expected.append(critic.model.score(hidden).sigmoid().item())
    assert [value.item() for value in critic.values(samples)] == pytest.approx(expected, abs=1e-4)


def test_its_loss_is_the_cross_entropy_of_the_outcomes_and_has_no_gradient_in_the_policy(tmp_path):
    trainer = make(tmp_path, BY_PROMPT, max_steps=1, **SETTINGS)
    next(iter(trainer.rollouts))
    update = trainer.rollouts.update
    (batch,) = update.micro_batches
    batch["advantages"] = torch.zeros_like(batch["advantages"])
    trainer.model.critic.model.score.weight.data.normal_(std=0.3)
    loss, output = update_loss(trainer.model, batch, update=update, algorithm=trainer.algorithm, args=trainer.args)
    values = torch.stack(trainer.model.critic.values(trainer.rollouts.samples))
    outcomes = torch.tensor([sample.reward for sample in trainer.rollouts.samples])
    expected = torch.nn.functional.binary_cross_entropy(values, outcomes)
    torch.testing.assert_close(output.critic_loss, expected, rtol=1e-4, atol=1e-5)
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in trainer.model.policy.parameters())
    assert trainer.model.critic.model.score.weight.grad.any()


@pytest.mark.slow
def test_it_learns_which_prompts_are_solved(tmp_path):
    trainer = make(tmp_path, BY_PROMPT, max_steps=40, **SETTINGS)
    trainer.train()
    brier, constant = logged(trainer, "brier"), logged(trainer, "brier_baseline")
    assert sum(brier[-5:]) < 0.75 * sum(constant[-5:])


@pytest.mark.parametrize("adapter", [False, True])
def test_a_resumed_run_has_the_same_bits_and_the_probe_is_saved(tmp_path, adapter):
    peft = pytest.importorskip("peft")
    settings = {**SETTINGS, "save_strategy": "steps", "save_steps": 2}

    def run(folder, steps):
        return SPPOTrainer(
            tiny_model(),
            BY_PROMPT,
            args=make(folder, max_steps=steps, **settings).args,
            train_dataset=DATASET,
            processing_class=char_tokenizer(),
            peft_config=peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM") if adapter else None,
        )

    torch.manual_seed(0)
    whole = run(tmp_path / "whole", 4)
    whole.train()
    torch.manual_seed(0)
    run(tmp_path / "part", 2).train()
    rest = run(tmp_path / "part", 4)
    rest.train(resume_from_checkpoint=True)
    assert all(a.equal(b) for a, b in zip(rest.model.parameters(), whole.model.parameters(), strict=True))
    whole.save_model()
    loaded = load_critic(tmp_path / "whole")
    assert isinstance(loaded, ProbeForSequenceClassification)
    assert loaded.score.weight.equal(whole.model.critic.model.score.weight)
    assert loaded.score.bias.equal(whole.model.critic.model.score.bias)


def test_another_critic_is_refused(tmp_path):
    with pytest.raises(ValueError, match="reads the policy's own hidden states; leave critic= out"):
        make(tmp_path, BY_PROMPT, critic="some/model", **SETTINGS)
