"""Training runs of a second or two with a tiny model, and how to inspect them."""

from __future__ import annotations

import datasets
from tiny_models import char_tokenizer, tiny_model

from sppo import SPPOConfig, SPPOTrainer

PROMPTS = [f"{a}+{b}=" for a in range(6) for b in range(6)]
DATASET = datasets.Dataset.from_dict({"prompt": PROMPTS, "letter": [prompt[0] for prompt in PROMPTS]})


def has_a(completions, **_):
    return [float("a" in completion) for completion in completions]


def make(
    tmp_path, reward=has_a, model=None, dataset=DATASET, tokenizer=None, critic=None, eval_dataset=None, **settings
):
    args = SPPOConfig(
        output_dir=str(tmp_path),
        **(
            {
                "use_cpu": True,
                "per_device_train_batch_size": 8,
                "max_completion_length": 4,
                "learning_rate": 3e-3,
                "critic_learning_rate": 1e-2,
                "max_steps": 3,
                "save_strategy": "no",
                "disable_tqdm": True,
            }
            | settings
        ),
    )
    return SPPOTrainer(
        tiny_model() if model is None else model,
        reward,
        args=args,
        critic=critic,
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer or char_tokenizer(),
    )


def snapshot(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(before, module):
    return [name for name, tensor in module.state_dict().items() if not tensor.equal(before[name])]


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]
