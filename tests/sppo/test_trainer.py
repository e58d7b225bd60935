"""The training loop on tiny models: it learns, does not move when it should not, and reports wrong input."""

import logging
import math
import re
import time

import datasets
import offset_engines
import pytest
import torch
from tiny_models import char_tokenizer, tiny_model
from tiny_run import DATASET, changed, has_a, logged, make, snapshot


@pytest.mark.slow
def test_learns(tmp_path):
    trainer = make(tmp_path, max_steps=40, per_device_train_batch_size=16, eval_dataset=DATASET)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_problems"] == len(DATASET)
    assert before["eval_success_rate"] < 0.5 < 0.9 < after["eval_success_rate"]
    reward = logged(trainer, "reward")
    assert sum(reward[-5:]) > sum(reward[:5]) + 1.5


@pytest.mark.slow
def test_critic_learns_which_prompts_succeed(tmp_path):
    def only_some(prompts, completions, **_):
        return [float(prompt[0] in "012") for prompt in prompts]

    trainer = make(tmp_path, only_some, max_steps=60, per_device_train_batch_size=18, learning_rate=1e-6)
    trainer.train()
    brier, baseline = logged(trainer, "brier"), logged(trainer, "brier_baseline")
    assert brier[0] == pytest.approx(baseline[0])  # it starts as the constant
    assert brier[-1] < 0.05 < 0.2 < baseline[-1]


@pytest.mark.parametrize(("outcome", "beta"), [(0.0, 0.0), (1.0, 0.0), (0.0, 0.5)])
def test_equal_outcomes_do_not_change_the_policy(tmp_path, outcome, beta):
    calls = [0]

    def equal_after_two(completions, **_):
        calls[0] += 1
        return has_a(completions) if calls[0] <= 2 else [outcome] * len(completions)

    trainer = make(tmp_path, equal_after_two, max_steps=14, weight_decay=0.1, beta=beta)
    policies, critics = [], []
    original = trainer._maybe_log_save_evaluate

    def record(*args, **kwargs):
        policies.append(snapshot(trainer.model.policy))
        critics.append(snapshot(trainer.model.critic))
        return original(*args, **kwargs)

    trainer._maybe_log_save_evaluate = record
    trainer.train()
    assert any(not policies[0][name].equal(policies[1][name]) for name in policies[0])  # momentum there is
    assert changed(policies[1], trainer.model.policy) == []
    assert changed(critics[1], trainer.model.critic) != []
    value = logged(trainer, "value")
    assert abs(value[-1] - outcome) < abs(value[2] - outcome)


def test_first_advantages_are_outcome_minus_mean(tmp_path):
    trainer = make(tmp_path, max_steps=1, per_device_train_batch_size=36)
    trainer.train()
    rewards = torch.tensor([s.reward for s in trainer.rollouts.samples])
    advantages = torch.tensor([s.advantage for s in trainer.rollouts.samples])
    torch.testing.assert_close(advantages, rewards - (rewards.sum() + 1) / 38)


@pytest.mark.slow
def test_ratio_is_one_until_the_policy_moves(tmp_path):
    once = make(tmp_path, max_steps=2)
    once.train()
    assert logged(once, "ratio_min") == logged(once, "ratio_max") == [1.0, 1.0]
    twice = make(tmp_path, max_steps=2, num_iterations=2)
    twice.train()
    assert logged(twice, "ratio_max")[0] == 1.0  # same op, same micro-batch: the same bits
    assert logged(twice, "ratio_max")[1] > 1.0


def test_an_update_with_a_nonfinite_gradient_is_skipped(tmp_path):
    trainer = make(tmp_path, max_steps=3)
    before = snapshot(trainer.model)
    original = trainer._clip_grad_norm

    def poison(model):
        trainer.model.critic.model.score.weight.grad[:] = torch.inf
        return original(model)

    trainer._clip_grad_norm = poison
    trainer.train()
    assert changed(before, trainer.model) == ["critic.model.score.bias"]  # set to the prior, not learned
    assert logged(trainer, "skipped_updates") == [1, 1, 1]


def test_a_run_ends_after_ten_updates_in_a_row_without_finite_gradients(tmp_path):
    trainer = make(tmp_path, max_steps=30)
    original, calls = trainer._clip_grad_norm, []

    def poison(model):
        calls.append(1)
        if len(calls) != 4:
            trainer.model.critic.model.score.weight.grad[:] = torch.nan
        return original(model)

    trainer._clip_grad_norm = poison
    with pytest.raises(FloatingPointError, match=r"10 updates in a row were not finite.*before update 5"):
        trainer.train()
    assert len(calls) == 14


def test_only_the_critic_learns_during_its_warmup(tmp_path):
    trainer = make(tmp_path, max_steps=3, critic_warmup_steps=3)
    before = snapshot(trainer.model.policy)
    trainer.train()
    assert changed(before, trainer.model.policy) == []
    assert trainer.model.critic.model.score.weight.any()


@pytest.mark.slow
def test_beta_pulls_back_to_the_initial_policy(tmp_path):
    free, bound = (make(tmp_path, max_steps=12, beta=beta) for beta in (0.0, 5.0))
    start = snapshot(free.model.policy)
    distance = []
    for trainer in (free, bound):
        trainer.train()
        now = trainer.model.policy.state_dict()
        distance.append(sum((now[name] - tensor).square().sum() for name, tensor in start.items()))
    assert distance[1] < distance[0]
    assert logged(bound, "kl")[-1] > 0


@pytest.mark.parametrize("algorithm", ["sppo", "ppo"])
def test_the_policy_does_not_learn_from_masked_completions(tmp_path, algorithm):
    settings = {"algorithm": algorithm, "max_completion_length": 1, "max_steps": 2}
    trainer = make(tmp_path, mask_truncated_completions=True, **settings)
    before = snapshot(trainer.model.policy), snapshot(trainer.model.critic)
    trainer.rollout_engine.eos_ids = {-7}  # nothing ever ends
    trainer.train()
    assert changed(before[0], trainer.model.policy) == []
    # A prompt critic predicts their rewards all the same; a token critic would read their tokens.
    assert bool(changed(before[1], trainer.model.critic)) == (algorithm == "sppo")


@pytest.mark.parametrize("algorithm", ["grpo", "sppo"])
def test_masked_completions_keep_their_place_in_the_group_and_in_the_critics_outcomes(tmp_path, algorithm):
    """Of each group the first response is right and ends, the three others are wrong and cut off."""

    def first_of_four(prompts, **_):
        return [float(i % 4 == 0) for i in range(len(prompts))]

    settings = {"algorithm": algorithm, "num_generations": 4, "max_steps": 1, "mask_truncated_completions": True}
    trainer = make(tmp_path, first_of_four, **settings)
    generate = trainer.rollout_engine.generate

    def three_of_four_truncated(*args, **kwargs):
        samples = generate(*args, **kwargs)
        for i, sample in enumerate(samples):
            sample.truncated = i % 4 != 0
        return samples

    trainer.rollout_engine.generate = three_of_four_truncated
    trainer.train()
    advantages = torch.tensor([s.advantage for s in trainer.rollouts.samples]).view(-1, 4)
    update = trainer.rollouts.update
    if algorithm == "grpo":
        assert advantages[:, 0].tolist() == pytest.approx([1.5] * len(advantages), rel=1e-4)
    else:
        assert (advantages[:, 0] > 0.5).all()
        assert sum(len(batch["outcomes"]) for batch in update.micro_batches) == update.critic_normalizer == 8
    assert update.policy_normalizer == sum(len(batch["advantages"]) for batch in update.micro_batches) == 2
    assert update.policy_learns


def test_advantages_of_masked_completions_do_not_let_the_policy_move(tmp_path):
    trainer = make(tmp_path, mask_truncated_completions=True, max_steps=2)
    before, generate = snapshot(trainer.model.policy), trainer.rollout_engine.generate

    def second_half_truncated(*args, **kwargs):
        samples = generate(*args, **kwargs)
        for i, sample in enumerate(samples):
            sample.truncated = i >= 4
        return samples

    trainer.rollout_engine.generate = second_half_truncated
    trainer.algorithm.advantages = lambda batch: torch.tensor([0.0] * 4 + [1.0] * 4)
    trainer.train()
    assert not trainer.rollouts.update.policy_learns
    assert changed(before, trainer.model.policy) == []


def test_samples_that_a_reward_fails_on_are_skipped(tmp_path, caplog):
    def fussy(prompts, completions, **_):
        return [
            None if prompt[0] == "3" else float("a" in text) for prompt, text in zip(prompts, completions, strict=True)
        ]

    trainer = make(tmp_path, fussy, per_device_train_batch_size=18, gradient_accumulation_steps=2, max_steps=2)
    trainer.train()
    assert logged(trainer, "rejected_rewards") == [6, 6]
    assert "returned None" in caplog.text


def test_a_run_continues_if_every_reward_fails(tmp_path):
    trainer = make(
        tmp_path, lambda completions, **_: [None] * len(completions), max_steps=3, gradient_accumulation_steps=2
    )
    before = snapshot(trainer.model)
    trainer.train()
    assert changed(before, trainer.model) == []


def test_columns_reach_the_reward(tmp_path):
    def matches(prompts, completions, letter, **_):
        assert [prompt[0] for prompt in prompts] == letter
        return [float(a in text) for a, text in zip(letter, completions, strict=True)]

    trainer = make(tmp_path, matches, max_steps=1, num_generations=2)
    trainer.train()
    assert logged(trainer, "rejected_rewards") == [0]
    asked = [s.prompt for s in trainer.rollouts.samples]
    assert asked[0::2] == asked[1::2]


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({"bf16": True}, "bfloat16"),
        ({"bf16": True, "rollout_engine_kwargs": {"dtype": "float32"}}, "float32"),
        ({}, None),
    ],
)
def test_vllm_samples_in_the_precision_of_training(tmp_path, monkeypatch, settings, dtype):
    """With bf16 the policy's weights are float32, which would be vLLM's default."""
    given = []
    record = lambda name, policy, tokenizer, own, **_: given.append((name, own))
    monkeypatch.setattr("sppo.rollout.building.make_engine", record)
    make(tmp_path, rollout_engine="vllm", **settings)
    assert [(name, own.get("dtype")) for name, own in given] == [("vllm", dtype)]


def test_rounding_does_not_end_a_run(tmp_path):
    """A mean of float32 may be just above 1 or below 0."""
    trainer = make(tmp_path, lambda completions, **_: [1.0000004, -2e-7] * (len(completions) // 2), max_steps=1)
    trainer.train()
    assert {sample.reward for sample in trainer.rollouts.samples} == {0.0, 1.0}


def test_rewards_outside_zero_and_one_are_rejected(tmp_path):
    with pytest.raises(ValueError, match=r"reward must be in \[0, 1\].*got 2"):
        make(tmp_path, lambda completions, **_: [2.0] * len(completions)).train()


def test_policy_and_critic_are_clipped_separately(tmp_path):
    trainer = make(tmp_path, max_steps=1, max_grad_norm=1e-3, critic_max_grad_norm=float("inf"))
    norms = {}
    step = trainer.callback_handler.on_pre_optimizer_step

    def record(args, state, control):
        for name in ("policy", "critic"):
            gradients = [p.grad.norm() for p in getattr(trainer.model, name).parameters()]
            norms[name] = torch.stack(gradients).norm().item()
        return step(args, state, control)

    trainer.callback_handler.on_pre_optimizer_step = record
    trainer.train()
    assert norms["policy"] == pytest.approx(1e-3, rel=1e-2)
    assert norms["critic"] == pytest.approx(logged(trainer, "critic_grad_norm")[0], rel=1e-4)


@pytest.mark.parametrize(("budget", "kept"), [(0, False), (2**30, True)])
def test_logits_budget_reaches_the_log_probabilities(tmp_path, caplog, budget, kept):
    with caplog.at_level(logging.DEBUG, logger="sppo_kernels"):
        make(tmp_path, max_steps=1, logits_budget_bytes=budget).train()
    (update,) = (x for x in caplog.messages if x.startswith("backward"))
    assert update.startswith("backward: 0 tokens cached") != kept
    assert update.endswith(" 0 recomputed") == kept


@pytest.mark.slow
def test_mass_tolerance_reaches_the_log_probabilities(tmp_path, caplog):
    """A looser tolerance keeps fewer entries, and the update is nearly the same."""
    weights = {}
    for name, settings in {"cache": {}, "sparse": {"logprobs_backward": "sparse", "mass_tolerance": 1e-6}}.items():
        with caplog.at_level(logging.DEBUG, logger="sppo_kernels"):
            trainer = make(tmp_path / name, max_steps=1, **settings)
            trainer.train()
        weights[name] = torch.cat([p.detach().flatten() for p in trainer.model.policy.parameters()])
        served = r"0 tokens cached, [1-9]\d* sparse" if settings else r"[1-9]\d* tokens cached, 0 sparse"
        assert any(re.search(served + ", 0 recomputed", message) for message in caplog.messages)
        caplog.clear()
    torch.testing.assert_close(weights["sparse"], weights["cache"], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_fused_projection_gives_the_same_update(tmp_path, caplog):
    """It computes log-probabilities before the update and in it."""
    weights = {}
    for name in ("vendor", "fused"):
        with caplog.at_level(logging.DEBUG, logger="sppo_kernels"):
            trainer = make(tmp_path / name, max_steps=1, num_iterations=1, logprobs_projection=name)
            trainer.train()
        weights[name] = torch.cat([p.detach().flatten() for p in trainer.model.policy.parameters()])
        assert any("fused projection" in message for message in caplog.messages) == (name == "fused")
        caplog.clear()
    torch.testing.assert_close(weights["fused"], weights["vendor"], rtol=1e-3, atol=1e-5)


def test_two_learning_rates(tmp_path):
    trainer = make(tmp_path, learning_rate=1e-4, critic_learning_rate=2e-3, weight_decay=0.1)
    rates = {}
    for group in trainer.create_optimizer().param_groups:
        for parameter in group["params"]:
            rates[id(parameter)] = (group["lr"], group["weight_decay"])
    named = {name: rates[id(p)] for name, p in trainer.model.named_parameters()}
    assert named["policy.model.layers.0.mlp.up_proj.weight"] == (1e-4, 0.1)
    assert named["policy.model.norm.weight"] == (1e-4, 0.0)
    assert named["critic.model.model.layers.0.mlp.up_proj.weight"] == (2e-3, 0.1)
    assert named["critic.model.score.bias"] == (2e-3, 0.0)


@pytest.mark.slow
def test_evaluate_does_not_affect_training(tmp_path):
    trainers = [
        make(tmp_path, max_steps=4, eval_dataset=DATASET, **s)
        for s in ({}, {"eval_strategy": "steps", "eval_steps": 1})
    ]
    for trainer in trainers:
        trainer.train()
    assert changed(snapshot(trainers[0].model), trainers[1].model) == []
    assert len(logged(trainers[1], "eval_success_rate")) == 4


def test_evaluate_several_datasets_without_training(tmp_path):
    named = {"easy": DATASET.select(range(3)), "hard": DATASET.select(range(5))}
    trainer = make(tmp_path, dataset=None, eval_dataset=named)
    metrics = trainer.evaluate()
    assert (metrics["eval_easy_problems"], metrics["eval_hard_problems"]) == (3, 5)
    with pytest.raises(ValueError, match="train_dataset is None"):
        trainer.train()


@pytest.mark.slow
def test_evaluation_scores_as_many_samples_at_once_as_a_rollout(tmp_path):
    def slow(completions, **_):
        time.sleep(0.05 * len(completions))
        return [1.0] * len(completions)

    trainer = make(tmp_path, slow, eval_dataset=DATASET, per_device_train_batch_size=2, reward_timeout=0.5)
    assert trainer.evaluate()["eval_problems"] == len(DATASET)  # 0.1 s for each two, 1.8 s in all


def test_metrics_and_completions_are_shown(tmp_path, capsys):
    trainer = make(tmp_path, max_steps=1, log_completions=True, num_completions_to_print=2)
    trainer.train()
    entry = trainer.state.log_history[0]
    wanted = """
        reward rewards/has_a success_rate response_length truncated rejected_rewards advantage advantage_std brier
        brier_baseline ratio_mean ratio_min ratio_max clip_fraction approx_kl entropy policy_loss critic_loss
        policy_grad_norm critic_grad_norm tokens_per_second generated_tokens total_generated_tokens
        seconds/rollout seconds/reward seconds/critic seconds/update
    """
    assert set(wanted.split()) <= set(entry)
    assert entry["generated_tokens"] == sum(len(s.response_ids) for s in trainer.rollouts.samples)
    assert capsys.readouterr().out.count("+") >= 2


def test_epochs_count_the_data(tmp_path):
    trainer = make(
        tmp_path, max_steps=-1, num_train_epochs=2, per_device_train_batch_size=9, gradient_accumulation_steps=2
    )
    trainer.train()
    assert trainer.state.global_step == 4  # 36 prompts, 18 an update
    assert trainer.state.epoch == 2


CHATS = datasets.Dataset.from_dict({"prompt": [[{"role": "user", "content": "1"}]]})


def no_eos():
    tokenizer = char_tokenizer()
    tokenizer.eos_token = None
    return tokenizer


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: {"dataset": datasets.Dataset.from_dict({"question": ["1"]})}, "no column 'prompt', only"),
        (lambda: {"dataset": DATASET.select([])}, "train_dataset is empty"),
        (lambda: {"eval_dataset": DATASET.select([])}, "eval_dataset is empty"),
        (
            lambda: {"dataset": datasets.Dataset.from_dict({"prompt": ["1", ""]})},
            "train_dataset row 1: prompt must be text",
        ),
        (lambda: {"dataset": datasets.Dataset.from_dict({"prompt": [1, 2]})}, "row 0: prompt must be text .* got 1"),
        (
            lambda: {"dataset": CHATS},
            "row 0: prompt is a list of chat messages and processing_class has no chat_template",
        ),
        (lambda: {"model": tiny_model(vocab_size=20)}, "27 tokens and model 20 embeddings"),
        (lambda: {"tokenizer": no_eos()}, "no eos_token"),
        (lambda: {"max_prompt_length": 1}, "max_prompt_length=1 leaves no prompt"),
        (lambda: {"reward_weights": [1.0, 2.0]}, "2 values for 1 reward_funcs"),
        (lambda: {"reward": "no_such_reward"}, "no reward named"),
    ],
)
def test_errors_name_the_wrong_input_before_training(tmp_path, wrong, says):
    with pytest.raises(ValueError, match=says):
        make(tmp_path, **wrong())


def test_a_smaller_critic(tmp_path):
    from transformers import AutoModelForSequenceClassification

    config = tiny_model(hidden_size=16, num_hidden_layers=1).config
    config.num_labels = 1
    trainer = make(tmp_path, critic=AutoModelForSequenceClassification.from_config(config))
    trainer.train()
    assert trainer.model.critic.model.score.weight.any()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "stage 3 shards weights"),
        (
            {"deepspeed": {"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}}},
            "one learning rate for policy and critic",
        ),
    ],
)
def test_settings_that_deepspeed_does_not_support_are_rejected(tmp_path, settings, says):
    pytest.importorskip("deepspeed")
    with pytest.raises(ValueError, match=says):
        make(tmp_path, **settings)


@pytest.mark.parametrize(
    ("settings", "weight"),
    [
        ({}, math.exp(0.1)),
        ({"rollout_cap": 1.05, "num_iterations": 2}, 1.05),
        ({"rollout_correction": "none"}, 1.0),
        ({"rollout_correction": "sequence_mask", "rollout_cap": 1.01, "ratio_level": "sequence_mean"}, 0.0),
    ],
)
def test_the_loss_corrects_for_the_engines_log_probabilities(tmp_path, settings, weight):
    settings = {
        "rollout_engine": f"{offset_engines.__file__}:OffByATenth",
        "temperature": 0.7,
        "max_steps": 1,
    } | settings
    trainer = make(tmp_path, **settings)
    before = snapshot(trainer.actor_critic.policy)
    trainer.train()
    assert logged(trainer, "rollout_kl") == pytest.approx([-0.1], abs=1e-4)
    assert logged(trainer, "rollout_weight_mean") == pytest.approx([weight], abs=1e-3)
    # At first the ratio is 1, so the loss is the weight times the mean of -advantages: nothing where all are masked.
    assert (logged(trainer, "policy_grad_norm")[0] == 0) == (weight == 0)
    assert bool(changed(before, trainer.actor_critic.policy)) == (weight > 0)
