"""Tests of SPPOConfig: defaults, published presets and invalid settings."""

import pytest

from sppo import SPPOConfig


def config(**settings):
    return SPPOConfig(**({"output_dir": "unused", "use_cpu": True, "per_device_train_batch_size": 2} | settings))


def test_defaults_depend_on_other_settings():
    args = config(gradient_accumulation_steps=3, epsilon=0.1)
    assert (args.steps_per_generation, args.epsilon_high, args.rollout_size, args.updates_per_rollout) == (3, 0.1, 6, 1)
    assert config(gradient_accumulation_steps=2, steps_per_generation=6, num_iterations=2).updates_per_rollout == 6


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("1.5b", {"prompts": 256, "updates": 2, "rollouts": 1000, "critic": 5e-6, "decay": 0.01, "prompt": 1024}),
        ("7b", {"prompts": 512, "updates": 16, "rollouts": 200, "critic": 1e-5, "decay": 0.1, "prompt": 2048}),
        (
            "7b-small-critic",
            {"prompts": 512, "updates": 16, "rollouts": 200, "critic": 1e-5, "decay": 0.1, "prompt": 2048},
        ),
    ],
)
def test_paper_returns_the_published_settings(size, expected):
    args = SPPOConfig.paper(size, output_dir="unused", use_cpu=True)
    assert {
        "prompts": args.rollout_size,
        "updates": args.updates_per_rollout,
        "rollouts": args.max_steps // args.updates_per_rollout,
        "critic": args.critic_learning_rate,
        "decay": args.weight_decay,
        "prompt": args.max_prompt_length,
    } == expected
    expected = {
        "algorithm": "sppo",
        "per_device_train_batch_size": 1,
        "num_generations": 1,
        "num_iterations": 1,
        "max_completion_length": 8192,
        "ratio_level": "token",
        "epsilon": 0.2,
        "epsilon_high": 0.2,
        "dual_clip": 3.0,
        "aggregation": "seq-mean-token-mean",
        "beta": 0.0,
        "temperature": 0.6,
        "eval_temperature": 0.6,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "max_grad_norm": 1.0,
        "critic_max_grad_norm": 1.0,
        "critic_weight_decay": 0.01,
        "critic_warmup_steps": 0,
        "optim": "adamw_torch",
        "bf16": True,
    }
    assert {name: getattr(args, name) for name in expected} == expected
    assert getattr(args, "activation_checkpointing", args.gradient_checkpointing)


def test_paper_takes_overrides():
    assert SPPOConfig.paper(output_dir="unused", use_cpu=True, temperature=1.0).temperature == 1.0
    with pytest.raises(ValueError, match="size must be one of"):
        SPPOConfig.paper("70b", output_dir="unused")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"algorithm": "pppo"},
            "algorithm must be one of sppo, poise, ppo, grpo.*, or module:Class .*, got 'pppo'; did you mean 'ppo'",
        ),
        ({"algorithm": "sppo.nothing:X"}, "cannot import 'sppo.nothing:X'"),
        ({"algorithm": "sppo:SPPOConfig"}, "name a subclass of sppo.Algorithm"),
        ({"baseline": "median"}, "baseline must be a number, running_mean or prompt_mean, got 'median'"),
        ({"baseline": float("nan")}, "baseline must be a number, running_mean or prompt_mean, got nan"),
        ({"algorithm": SPPOConfig}, "algorithm must be one of sppo"),
        ({"algorithm": "grpo", "num_generations": 1}, "num_generations must be at least 2 for algorithm='grpo'"),
        ({"epsilon": "0.2"}, "epsilon must be a number 0 or more, got '0.2'"),
        ({"lam": 1.5}, r"lam must be in \[0, 1\], got 1.5"),
        ({"max_tokens_per_micro_batch": 0}, "max_tokens_per_micro_batch must be at least 1, got 0"),
        ({"ratio_level": "word"}, "ratio_level must be one of token"),
        ({"aggregation": "mean"}, "aggregation must be one of"),
        ({"logprobs_backward": "auto"}, "logprobs_backward must be one of cache, recompute, sparse, got 'auto'"),
        ({"logprobs_projection": "auto"}, "logprobs_projection must be one of vendor, fused, got 'auto'"),
        ({"mass_tolerance": 0.0}, r"mass_tolerance must be in \(0, 1\), got 0.0"),
        (
            {
                "rollout_engine": "vllm",
                "rollout_correction": "sequence_mask",
                "min_p": 0.1,
                "replay_sampling_support": False,
            },
            "would shrink the weight with each token; use replay_sampling_support=True",
        ),
        ({"rollout_correction": "all"}, "rollout_correction must be one of none, token_truncate"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0 is not available"),
        ({"use_liger_kernel": True}, "use_liger_kernel=True is not available"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
        ({"max_steps": -5}, "max_steps must be at least 1, or -1 to count epochs, got -5"),
        ({"learning_rate": -1.0}, "learning_rate must be 0 or more, got -1.0"),
        ({"reward_workers": 0}, "reward_workers must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be greater than 0"),
        ({"temperature": float("nan")}, "temperature must be greater than 0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
        ({"top_k": -1}, "top_k must be 0 or more"),
        ({"min_p": 0.0}, r"min_p must be in \(0, 1\), got 0.0"),
        ({"min_p": 1}, r"min_p must be in \(0, 1\), got 1"),
        ({"epsilon": -0.1}, "epsilon must be 0 or more"),
        ({"dual_clip": 1.0}, "dual_clip must be greater than 1"),
        ({"max_completion_length": 0}, "max_completion_length must be at least 1"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be greater than 0"),
        (
            {"gradient_accumulation_steps": 2, "steps_per_generation": 3},
            "multiple of gradient_accumulation_steps=2, got 3",
        ),
        ({"num_generations": 3}, "num_generations must divide"),
        ({"max_turns": 1.5}, "max_turns must be a whole number, got 1.5"),
        ({"prompt_value_range": 0.5}, "prompt_value_range must be two rising numbers"),
        (
            {"algorithm": "spo", "prompt_value_range": [0.1, 0.9]},
            "prompt_value_range=.* needs a prompt critic",
        ),
        ({"lam": 0.9}, "lam=0.9 has no effect with algorithm='sppo'; leave it out, or use one of ppo"),
        ({"scale_rewards": "batch"}, "scale_rewards='batch' has no effect .* one of grpo, dr_grpo, dapo, cispo, gspo"),
        ({"scale_rewards": "all"}, "scale_rewards must be one of group, batch, none, got 'all'"),
        (
            {"algorithm": "cispo", "num_generations": 2, "dual_clip": 3.0},
            "dual_clip=3.0 does not fit algorithm='cispo'; leave it None",
        ),
        ({"prompt_value_range": [0.9, 0.1]}, "prompt_value_range must be two rising numbers in"),
        ({"rollout_floor": 0.5}, "rollout_floor=0.5 is for rollout_correction token_mask or sequence_mask"),
        ({"overlong_buffer": 5}, "overlong_buffer=5 has no effect with algorithm='sppo'"),
        ({"per_device_train_batch_size": 1}, "a rollout of one completion"),
    ],
)
def test_invalid_settings_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_a_sequence_correction_may_truncate_where_the_support_is_replayed():
    settings = {"rollout_engine": "vllm", "rollout_correction": "sequence_mask"}
    assert config(**settings, top_p=0.9).is_truncated
    assert not config(**settings, replay_sampling_support=False).is_truncated


def test_the_best_checkpoint_has_the_highest_reward():
    args = SPPOConfig("out", use_cpu=True, save_strategy="best", eval_strategy="steps", eval_steps=1)
    assert (args.metric_for_best_model, args.greater_is_better) == ("reward", True)


def test_bf16_without_an_accelerator_sets_use_cpu(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert SPPOConfig("out", bf16=True).use_cpu


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_paper_checkpointing_has_two_names_to_disable_it(name):
    if name in SPPOConfig.__dataclass_fields__:
        args = SPPOConfig.paper("7b", output_dir="unused", use_cpu=True, **{name: False})
        assert not getattr(args, "activation_checkpointing", False)
        assert not args.gradient_checkpointing


def test_continuing_on_a_full_disk_is_for_one_process(monkeypatch):
    """The others would wait for the checkpoint."""
    args = SPPOConfig("unused", use_cpu=True, full_disk="continue")
    args.check_processes()
    monkeypatch.setattr(SPPOConfig, "world_size", property(lambda self: 2))
    with pytest.raises(ValueError, match="full_disk='continue' is for one process, this run has 2"):
        args.check_processes()


def test_settings_of_trl_name_their_replacement():
    with pytest.raises(TypeError, match="has no setting 'loss_type': set algorithm="):
        SPPOConfig("unused", loss_type="dapo")
