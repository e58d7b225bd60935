"""The probe reads the policy's hidden states of the prompt, learns from outcomes, and does not move the policy."""

import pickle

import pytest
import torch
from tiny_models import char_tokenizer, tiny_model
from tiny_run import DATASET, logged, make

from sppo import SPPOTrainer, load_critic
from sppo.algorithms import POISE
from sppo.models import probe
from sppo.models.critics import value_head
from sppo.models.probe import ProbeCritic, ProbeForSequenceClassification, fit_logistic
from sppo.optimization import update_loss
from sppo.rollout.engine import Sample

BY_PROMPT = lambda prompts, completions, **_: [float(prompt[0] < "3") for prompt in prompts]
SETTINGS = {"algorithm": "poise", "per_device_train_batch_size": 16}


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


def test_the_fit_minimizes_the_penalized_cross_entropy():
    torch.manual_seed(0)
    states = torch.randn(60, 5) * torch.tensor([1.0, 10.0, 0.1, 3.0, 0.0]) + 4
    outcomes = (states[:, 0] + states[:, 1] / 10 > 4.4).float()
    outcomes[::7] = 0.5  # rewards need not be 0 or 1
    weight, bias = fit_logistic(states, outcomes, ridge=0.3)
    x = states.double()
    scale = (x.std(0, correction=0) + 1e-6) * 5**0.5
    errors = (x @ weight + bias).sigmoid() - outcomes
    standardized = (x - x.mean(0)) / scale
    # The gradient is zero; the bias is that of standardized states, with a success and a failure added.
    torch.testing.assert_close(standardized.T @ errors, -0.3 * weight * scale, rtol=0, atol=1e-4)
    of_bias = (weight @ x.mean(0) + bias).sigmoid()
    assert (errors.sum() + 2 * of_bias - 1).item() == pytest.approx(0, abs=1e-4)
    values = (x @ weight + bias).sigmoid()
    assert (values[outcomes == 1].mean() - values[outcomes == 0].mean()) > 0.3


@pytest.mark.parametrize("outcome", [0.0, 1.0])
def test_the_fit_to_equal_outcomes_is_finite(outcome):
    weight, bias = fit_logistic(torch.randn(8, 3), torch.full((8,), outcome), ridge=0.3)
    assert weight.isfinite().all()
    assert bias.sigmoid().item() == pytest.approx(0.1 + 0.8 * outcome, abs=0.05)


def test_values_do_not_depend_on_the_outcomes_of_their_own_rollout(tmp_path):
    seen = []

    class Watched(POISE):
        def advantages(self, batch):
            seen.append(batch)
            return super().advantages(batch)

    trainer = make(tmp_path, BY_PROMPT, max_steps=2, **SETTINGS)
    trainer.rollouts.algorithm = Watched(trainer.args)
    trainer.train()
    assert len(seen[0].values.unique()) == 1  # nothing is known yet
    assert len(seen[1].values.unique()) > 1
    memory = trainer.model.critic.memory()
    assert memory["outcomes"].tolist() == torch.cat([batch.rewards for batch in seen]).tolist()


def test_it_learns_from_a_few_rollouts_which_prompts_are_solved(tmp_path):
    trainer = make(tmp_path, BY_PROMPT, max_steps=6, **SETTINGS)
    trainer.train()
    brier, constant = logged(trainer, "brier"), logged(trainer, "brier_baseline")
    assert sum(brier[-2:]) < 0.5 * sum(constant[-2:])


def test_it_remembers_the_latest_outcomes_only(monkeypatch):
    monkeypatch.setattr(probe, "REMEMBERED", 5)
    critic = ProbeCritic(tiny_model())
    samples = [Sample("", "", [1, 2 + i], [3], truncated=False, reward=float(i % 2)) for i in range(4)]
    for _ in range(2):
        critic.values(samples)
        critic.observe(samples, lambda items: items)
    assert critic.memory()["outcomes"].tolist() == [1, 0, 1, 0, 1]
    other = ProbeCritic(critic._policy[0])
    other.restore(critic.memory())
    assert value_head(other.model).weight.equal(value_head(critic.model).weight)
    other.restore({})
    assert other.memory()["outcomes"].tolist() == []


def test_what_processes_exchange_is_as_large_as_the_states():
    critic = ProbeCritic(tiny_model())
    samples = [Sample("", "", [1, 2 + i % 6, 3 + i % 5], [3], truncated=False, reward=float(i % 2)) for i in range(30)]
    critic.values(samples)
    sent = []

    def gather(items):
        sent.append(len(pickle.dumps(items)))
        of_another = torch.ones(1, critic.memory()["states"].shape[1]), torch.ones(1)
        return [*items, of_another]

    critic.observe(samples, gather)
    memory = critic.memory()
    assert memory["outcomes"].tolist() == [0, 1] * 15 + [1]
    assert sent[0] < 2 * memory["states"].nbytes + 4000
    critic.values([])
    critic.observe([], gather)  # a process without samples takes part
    assert len(critic.memory()["outcomes"]) == 32


def test_the_optimizer_trains_neither_the_probe_nor_the_policy_because_of_it(tmp_path):
    trainer = make(tmp_path, BY_PROMPT, max_steps=1, **SETTINGS)
    next(iter(trainer.rollouts))
    update = trainer.rollouts.update
    _, output = update_loss(
        trainer.model, update.micro_batches[0], update=update, algorithm=trainer.algorithm, args=trainer.args
    )
    assert output.critic_loss is None
    assert {group["part"] for group in trainer.create_optimizer().param_groups} == {"policy"}


def test_sppo_can_use_it_in_place_of_a_second_model(tmp_path):
    settings = {**SETTINGS, "algorithm": "sppo", "prompt_value_range": [0.01, 0.99]}
    trainer = make(tmp_path, BY_PROMPT, critic="probe", max_steps=6, **settings)
    trainer.train()
    assert isinstance(trainer.model.critic, ProbeCritic)
    assert logged(trainer, "explained_variance")[-1] > 0.3
    trainer.save_model()
    assert isinstance(load_critic(tmp_path), ProbeForSequenceClassification)


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
    assert rest.model.critic.memory()["outcomes"].equal(whole.model.critic.memory()["outcomes"])
    whole.save_model()
    loaded = load_critic(tmp_path / "whole")
    assert isinstance(loaded, ProbeForSequenceClassification)
    assert loaded.score.weight.equal(whole.model.critic.model.score.weight)
    assert loaded.score.bias.equal(whole.model.critic.model.score.bias)


def test_another_critic_is_refused(tmp_path):
    with pytest.raises(ValueError, match="reads the policy's own hidden states; leave critic= out"):
        make(tmp_path, BY_PROMPT, critic="some/model", **SETTINGS)
