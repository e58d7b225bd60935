"""``rollout_func`` in TRL's form."""

import pytest
import torch
from tiny_models import char_tokenizer, tiny_model
from tiny_run import DATASET, logged, make

from sppo import SPPOTrainer
from sppo.tasks.calculator import Calculator

SIZE = len(char_tokenizer())


def rollout(prompts, trainer):
    """Sample three random tokens; the middle one is the environment's."""
    tokenizer = trainer.processing_class
    completions = torch.randint(2, SIZE, (len(prompts), 3)).tolist()
    return {
        "prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts],
        "completion_ids": completions,
        "logprobs": [[-1.0, 0.0, -2.0]] * len(prompts),
        "env_mask": [[1, 0, 1]] * len(prompts),
        "score": [float(tokens[0] % 2) for tokens in completions],
    }


def score(completions, score):
    return score


def trainer_with(tmp_path, function, **settings):
    args = make(tmp_path, **({"max_steps": 1} | settings)).args
    return SPPOTrainer(
        tiny_model(), score, args=args, train_dataset=DATASET, processing_class=char_tokenizer(), rollout_func=function
    )


def test_a_function_of_trl_samples_masks_and_adds_columns(tmp_path):
    trainer = trainer_with(tmp_path, rollout)
    trainer.train()
    samples = trainer.rollouts.samples
    assert all(s.reward == float(s.response_ids[0] % 2) for s in samples)
    assert all(s.mask == [True, False, True] and s.truncated for s in samples)
    assert logged(trainer, "response_length") == [2.0]
    assert "rollout_kl" in trainer.state.log_history[0]
    (batch,) = trainer.rollouts.updates[0].micro_batches
    assert batch["rollout_logprobs"].tolist() == [-1.0, -2.0] * 8


def test_a_resumed_run_samples_the_same(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1}
    whole = trainer_with(tmp_path / "whole", rollout, max_steps=2, **settings)
    whole.train()
    trainer_with(tmp_path / "part", rollout, max_steps=1, **settings).train()
    rest = trainer_with(tmp_path / "part", rollout, max_steps=2, **settings)
    rest.train(resume_from_checkpoint=True)
    assert all(a.equal(b) for a, b in zip(rest.model.parameters(), whole.model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"completion_ids": None}, "must return a dict with prompt_ids, completion_ids; completion_ids is missing"),
        ({"score": [1.0]}, "score must be a list of 8 values, one per prompt"),
        ({"logprobs": [[-1.0] * 2] * 8}, "logprobs of sample 0 has 2 values for 3 tokens"),
        ({"completion_ids": [[]] * 8}, "completion_ids of sample 0 is empty"),
        ({"env_mask": [[1, 0]] * 8}, "the mask of sample 0 has 2 values, 1 of them true, for a response of 3 tokens"),
        ({"env_mask": [[0, 0, 0]] * 8}, "the mask of sample 0 has 3 values, 0 of them true"),
    ],
)
def test_errors_say_what_the_function_must_return(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        trainer_with(tmp_path, lambda prompts, trainer: rollout(prompts, trainer) | change).train()


def test_an_engine_and_a_function_exclude_each_other(tmp_path):
    args = make(tmp_path).args
    with pytest.raises(ValueError, match="rollout_engine and rollout_func are both given"):
        SPPOTrainer(
            tiny_model(),
            score,
            args=args,
            train_dataset=DATASET,
            processing_class=char_tokenizer(),
            rollout_func=rollout,
            rollout_engine=object(),
        )


def test_tensors_are_read_as_numbers(tmp_path):
    as_tensors = lambda prompts, trainer: {
        "prompt_ids": [torch.tensor([5])] * len(prompts),
        "completion_ids": [torch.tensor([6, 1])] * len(prompts),
        "score": [1.0] * len(prompts),
    }
    trainer = trainer_with(tmp_path, as_tensors)
    trainer.train()
    sample = trainer.rollouts.samples[0]
    assert (sample.response_ids, sample.truncated) == ([6, 1], False)


def test_a_function_and_an_environment_exclude_each_other(tmp_path):
    args = make(tmp_path).args
    common = {"args": args, "train_dataset": DATASET, "processing_class": char_tokenizer()}
    with pytest.raises(ValueError, match="rollout_func samples complete responses"):
        SPPOTrainer(tiny_model(), score, rollout_func=rollout, environment_factory=Calculator, **common)
