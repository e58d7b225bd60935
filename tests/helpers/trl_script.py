"""A script for TRL's GRPOTrainer, which docs/guides/from-trl.md shows."""

import datasets
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer


def has_a(completions, log_metric, **kwargs):
    """Reward an "a"; the columns of the dataset are in kwargs."""
    rewards = [float("a" in completion) for completion in completions]
    log_metric("share with an a", sum(rewards) / len(rewards))
    return rewards


def short_at_first(completion_ids, trainer_state, **kwargs):
    """Reward short completions, more strictly in later updates."""
    limit = max(2, 4 - trainer_state.global_step)
    return [float(len(ids) <= limit) for ids in completion_ids]


args = GRPOConfig(
    output_dir="runs/grpo",
    per_device_train_batch_size=16,
    num_generations=8,
    max_completion_length=4,
    reward_weights=[0.75, 0.25],
    learning_rate=3e-3,
    max_steps=3,
    use_cpu=True,
    report_to=[],
)
trainer = GRPOTrainer(
    model=AutoModelForCausalLM.from_pretrained("path/to/model"),
    reward_funcs=[has_a, short_at_first],
    args=args,
    train_dataset=datasets.Dataset.from_dict({"prompt": [f"{a}+{b}=" for a in range(6) for b in range(6)]}),
    processing_class=AutoTokenizer.from_pretrained("path/to/model"),
)
trainer.train()
