"""Every algorithm in the training loop: it learns, does not move when it should not, and gets the inputs it needs."""

import pytest
from tiny_run import changed, logged, make, snapshot

from sppo import Algorithm
from sppo.algorithms import ALGORITHMS

VARIANTS = [
    {"algorithm": "ppo"},
    {"algorithm": "ppo", "lam": 0.9, "num_iterations": 2},
    {"algorithm": "grpo"},
    {"algorithm": "dr_grpo"},
    {"algorithm": "rloo"},
    {"algorithm": "gspo", "num_iterations": 2},
    {"algorithm": "remax"},
    *({"algorithm": "reinforce", "baseline": baseline} for baseline in (0.5, "running_mean", "prompt_mean")),
    *({"algorithm": "sppo", "ratio_level": level, "num_iterations": 2} for level in ("sequence_mean", "sequence_sum")),
]


@pytest.mark.slow
@pytest.mark.parametrize("settings", VARIANTS, ids=lambda s: "-".join(map(str, s.values())))
def test_every_algorithm_learns(tmp_path, settings):
    trainer = make(tmp_path, max_steps=40, per_device_train_batch_size=16, gradient_accumulation_steps=2, **settings)
    trainer.train()
    reward = logged(trainer, "reward")
    assert sum(reward[-5:]) > sum(reward[:5]) + 1.5
    assert (trainer.model.critic is not None) == (settings["algorithm"] in ("sppo", "ppo"))
    assert ("brier" in trainer.state.log_history[0]) == (trainer.model.critic is not None)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("outcome", [0.0, 1.0])
def test_equal_outcomes_change_no_policy(tmp_path, algorithm, outcome):
    settings = {"algorithm": algorithm, "baseline": 0.3, "num_iterations": 2, "weight_decay": 0.1}
    trainer = make(tmp_path, lambda completions, **_: [outcome] * len(completions), max_steps=4, **settings)
    before = snapshot(trainer.model.policy)
    trainer.train()
    assert changed(before, trainer.model.policy) == []


@pytest.mark.parametrize(
    "wrong", [lambda rewards: rewards[1:], lambda rewards: rewards / 0, lambda rewards: rewards[0]]
)
def test_the_error_for_wrong_advantages_names_the_algorithm(tmp_path, wrong, monkeypatch):
    class Wrong(Algorithm):
        def advantages(self, outcomes):
            return wrong(outcomes.rewards)

    monkeypatch.setitem(ALGORITHMS, "wrong", Wrong)
    with pytest.raises(ValueError, match=r"Wrong.advantages must return finite numbers, .* B = 8, got"):
        make(tmp_path, algorithm="wrong").train()


def test_greedy_responses_are_counted_and_subtracted(tmp_path):
    trainer = make(tmp_path, max_steps=1, algorithm="remax", num_generations=2)
    asked = []
    original = trainer.rollout_engine.generate

    def record(prompts, *, temperature, **settings):
        made = original(prompts, temperature=temperature, **settings)
        asked.append((temperature, made))
        return made

    trainer.rollout_engine.generate = record
    trainer.train()
    (_, sampled), (temperature, greedy) = asked
    assert (temperature, len(sampled), len(greedy)) == (0.0, 8, 4)
    rewards = {s.prompt: s.reward for s in greedy}
    assert all(s.advantage.item() == s.reward - rewards[s.prompt] for s in trainer.rollouts.samples)
    total = sum(len(s.response_ids) for s in [*sampled, *greedy])
    assert logged(trainer, "total_generated_tokens") == [total]


@pytest.mark.slow
def test_running_mean_of_rewards_of_any_size(tmp_path):
    shifted = lambda completions, **_: [100.0 + ("a" in completion) for completion in completions]
    trainer = make(tmp_path, shifted, algorithm="reinforce", max_steps=1)
    trainer.train()
    assert logged(trainer, "advantage") == pytest.approx([0.0], abs=1e-4)
    ppo = make(tmp_path, shifted, algorithm="ppo", max_steps=1)
    ppo.train()
    assert logged(ppo, "value") == pytest.approx(logged(ppo, "reward"))


@pytest.mark.slow
def test_state_set_in_the_constructor_survives_the_start_of_training(tmp_path, monkeypatch):
    class Counting(Algorithm):
        def __init__(self, args):
            super().__init__(args)
            self.state["rollouts"] = 0

        def advantages(self, outcomes):
            self.state["rollouts"] += 1
            return outcomes.rewards - 0.5

        def normalizer(self, sequences, tokens):
            return 0.0 if self.state["rollouts"] > 2 else sequences

    monkeypatch.setitem(ALGORITHMS, "counting", Counting)
    trainer = make(tmp_path, algorithm="counting", max_steps=2)
    trainer.train()
    assert trainer.algorithm.state == {"rollouts": 2}
    with pytest.raises(ValueError, match=r"Counting.normalizer must return a number greater than 0, got 0.0 for 8 seq"):
        make(tmp_path, algorithm="counting", max_steps=3).train()


def test_a_prompt_without_a_greedy_reward_is_rejected(tmp_path):
    asked = []

    def no_greedy(prompts, completions, **_):
        asked.append(len(prompts))
        failing = "3" if len(asked) == 2 else "none"
        return [None if p[0] == failing else float("a" in c) for p, c in zip(prompts, completions, strict=True)]

    trainer = make(tmp_path, no_greedy, algorithm="remax", max_steps=1, per_device_train_batch_size=36)
    trainer.train()
    assert logged(trainer, "rejected_rewards") == [6]


@pytest.mark.slow
def test_rewards_of_any_size_for_algorithms_without_a_prompt_critic(tmp_path):
    far = lambda completions, **_: [10.0 * ("a" in completion) - 3 for completion in completions]
    for algorithm in ("ppo", "grpo"):
        trainer = make(tmp_path, far, algorithm=algorithm, max_steps=3)
        trainer.train()
        assert min(logged(trainer, "reward")) < 0
