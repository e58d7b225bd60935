"""Every algorithm in the training loop: it learns, does not move when it should not, and gets the inputs it needs."""

import pytest
from tiny_run import DATASET, changed, logged, make, snapshot

from sppo import Algorithm
from sppo.algorithms import ALGORITHMS

VARIANTS = [
    {"algorithm": "ppo"},
    {"algorithm": "poise"},
    {"algorithm": "ppo", "lam": 0.9, "num_iterations": 2},
    {"algorithm": "grpo"},
    {"algorithm": "dr_grpo"},
    {"algorithm": "rloo"},
    {"algorithm": "gspo", "num_iterations": 2},
    {"algorithm": "dapo", "overlong_buffer": 0},
    {"algorithm": "cispo", "num_iterations": 2},
    {"algorithm": "opo"},
    {"algorithm": "spo"},
    {"algorithm": "reinforce_plus_plus"},
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
    assert (trainer.model.critic is not None) == (settings["algorithm"] in ("sppo", "poise", "ppo"))
    assert ("brier" in trainer.state.log_history[0]) == (trainer.model.critic is not None)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("outcome", [0.0, 1.0])
def test_equal_outcomes_change_no_policy(tmp_path, algorithm, outcome):
    settings = {"algorithm": algorithm, "num_iterations": 2, "weight_decay": 0.1, "overlong_buffer": 0}
    settings |= {"baseline": 0.3} if algorithm == "reinforce" else {}
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


def test_dynamic_sampling_replaces_groups_of_equal_rewards(tmp_path):
    """Only prompts with a 3 can be solved: others are sampled, recorded and left out."""
    solvable = lambda prompts, completion_ids, **_: [
        float(ids[0] % 2 and "3" in prompt) for prompt, ids in zip(prompts, completion_ids, strict=True)
    ]
    settings = {"algorithm": "dapo", "num_generations": 4, "overlong_buffer": 0, "max_steps": 3}
    trainer = make(tmp_path, solvable, per_device_train_batch_size=16, **settings)
    trainer.train()
    rounds, zero = logged(trainer, "dynamic_sampling_rounds"), logged(trainer, "frac_reward_zero_std")
    assert max(rounds) > 1
    assert all(0 < share < 1 for share in zero)
    assert trainer.rollouts.progress.extra_blocks == sum(rounds) - 3
    groups = [trainer.rollouts.samples[i : i + 4] for i in range(0, 16, 4)]
    assert all(len({s.reward for s in group}) > 1 for group in groups)
    assert len({group[0].group for group in groups}) == 4
    total = sum(logged(trainer, "generated_tokens"))
    assert logged(trainer, "total_generated_tokens")[-1] == total


def test_dynamic_sampling_ends_after_its_rounds(tmp_path):
    settings = {"algorithm": "grpo", "num_generations": 4, "dynamic_sampling": True, "dynamic_sampling_rounds": 3}
    trainer = make(tmp_path, lambda completions, **_: [0.0] * len(completions), max_steps=1, **settings)
    trainer.train()
    assert logged(trainer, "dynamic_sampling_rounds") == [3]
    assert len(trainer.rollouts.samples) == 8


def test_the_length_penalty_counts_for_the_advantage_and_not_in_the_log(tmp_path):
    settings = {"algorithm": "grpo", "num_generations": 4, "overlong_buffer": 4, "max_completion_length": 4}
    ones = lambda completions, **_: [1.0] * len(completions)
    trainer = make(tmp_path, ones, max_steps=1, per_device_train_batch_size=16, **settings)
    trainer.train()
    assert logged(trainer, "reward") == [1.0]
    samples = trainer.rollouts.samples
    assert [s.reward for s in samples] == [1 - len(s.response_ids) / 4 for s in samples]
    assert logged(trainer, "overlong_penalty") == [pytest.approx(sum(s.reward for s in samples) / 16 - 1)]


def test_the_critic_chooses_prompts_before_they_are_sampled(tmp_path):
    """A critic that believes in prompts with a 5 alone: the others are skipped but for one in ten."""
    trainer = make(tmp_path, max_steps=6, prompt_value_range=[0.4, 0.6])
    sampler = trainer.rollouts.sampler
    asked = []

    def values(rows):
        asked.append([row["prompt"] for row in rows])
        return [0.5 if "5" in row["prompt"] else 0.05 for row in rows]

    sampler.prompt_values = values
    trainer.train()
    assert all(prompts == [row["prompt"] for row in sampler.prompts.take(8 * i, 8)] for i, prompts in enumerate(asked))
    assert trainer.rollouts.progress.extra_blocks == len(asked) - 6
    assert sum(logged(trainer, "skipped_prompts")) == 8 * (len(asked) - 6) > 0


def test_spo_draws_uncertain_prompts_more_often_and_resumes_to_the_same_bits(tmp_path):
    by_letter = lambda prompts, completions, **_: [float(p[0] < "3") for p in prompts]
    settings = {"algorithm": "spo", "save_strategy": "steps", "save_steps": 4, "max_steps": 8}
    whole = make(tmp_path / "whole", by_letter, **settings)
    whole.train()
    weights = whole.algorithm.prompt_weights(list(whole.algorithm.state))
    assert max(weights) < 0.55
    part = make(tmp_path / "part", by_letter, **(settings | {"max_steps": 4}))
    part.train()
    rest = make(tmp_path / "part", by_letter, **settings)
    rest.train(resume_from_checkpoint=True)
    assert rest.algorithm.state == whole.algorithm.state
    assert all(a.equal(b) for a, b in zip(rest.model.parameters(), whole.model.parameters(), strict=True))


def test_spo_measures_how_far_the_policy_has_moved(tmp_path):
    odd = lambda completion_ids, **_: [float(ids[0] % 2) for ids in completion_ids]
    trainer = make(tmp_path, odd, algorithm="spo", max_steps=8, learning_rate=1e-2, dataset=DATASET.select(range(4)))
    trainer.train()
    assert max(s.drift for s in trainer.rollouts.samples) > 1e-2
    still = make(tmp_path / "still", algorithm="spo", max_steps=8, learning_rate=0.0, dataset=DATASET.select(range(4)))
    still.train()
    assert max(s.drift for s in still.rollouts.samples) < 1e-5


def test_the_entropy_bonus_raises_the_entropy(tmp_path):
    def entropy(coefficient):
        settings = {"max_steps": 20, "learning_rate": 1e-2, "entropy_coef": coefficient}
        trainer = make(tmp_path / str(coefficient), algorithm="reinforce_plus_plus", **settings)
        trainer.train()
        return logged(trainer, "entropy")[-1]

    assert entropy(0.5) > entropy(0.0) + 0.2
