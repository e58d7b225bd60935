"""One run: a task, a variant, a learning rate and a seed, and how it learned."""

from __future__ import annotations

import json
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedModel

from benchmarks.harness.learning.curve import Curve
from benchmarks.harness.recipe_trainer import QUIET
from benchmarks.harness.results import Row
from benchmarks.learn import digit_walk
from benchmarks.learn.policy import load_policy, new_config, tokenizer
from benchmarks.learn.variants import OWN, Task
from sppo import SPPOConfig, SPPOTrainer

RESPONSES = 64  # per rollout, for every algorithm
EVALUATE_EVERY = 5  # such rollouts; larger ones are evaluated each time
HELD_OUT_COPIES = 2  # answers per held-out prompt


class Run(NamedTuple):
    """Definition of a run; ``settings`` as in :mod:`benchmarks.learn.variants`, ``policy`` is a hash of the weights."""

    task: Task
    variant: str
    settings: dict[str, Any]
    learning_rate: float
    critic_learning_rate: float
    seed: int
    policy: str

    @property
    def key(self) -> str:
        """Hash of everything that determines the result."""
        of_task = self.task.difficulty, self.task.horizon, HELD_OUT_COPIES, self.policy
        decides = json.dumps([of_task, self.settings.get("critic"), config_of(self)], sort_keys=True)
        return sha256(decides.encode()).hexdigest()[:16]


def train(run: Run, policy: Path) -> Row:
    """Train, and return the row of the run with its learning curve."""
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    curve = Curve()
    with tempfile.TemporaryDirectory() as folder:
        curve.trainer = trainer = SPPOTrainer(
            load_policy(policy),
            digit_walk.reward,
            args=SPPOConfig(folder, console="none", **config_of(run)),
            critic=_small_critic() if "critic" in run.settings else None,
            train_dataset=digit_walk.dataset("train", run.task.horizon),
            eval_dataset=digit_walk.dataset("test", run.task.horizon, copies=HELD_OUT_COPIES),
            processing_class=tokenizer(),
            callbacks=[curve],
        )
        trainer.evaluate()
        trainer.train()
    return {
        "run": run.key,
        "task": run.task.name,
        "variant": run.variant,
        "learning_rate": run.learning_rate,
        "critic_learning_rate": trainer.args.critic_learning_rate if trainer.algorithm.critic else None,
        "seed": run.seed,
        **curve.columns,
    }


def config_of(run: Run) -> dict[str, Any]:
    """Return the settings of SPPOConfig."""
    settings: dict[str, Any] = {
        **QUIET,
        "report_to": "none",
        "use_cpu": True,
        "per_device_train_batch_size": RESPONSES,
        "per_device_eval_batch_size": 256,
        "max_completion_length": run.task.horizon,
        "eval_temperature": 1.0,
        "eval_strategy": "steps",
        "learning_rate": run.learning_rate,
        "critic_learning_rate": run.critic_learning_rate,
        "ratio_level": "token",
        "aggregation": "seq-mean-token-mean",
        "seed": run.seed,
        **{name: value for name, value in run.settings.items() if name not in OWN},
    }
    updates = settings.get("steps_per_generation", 1)
    evaluate_every = max(1, EVALUATE_EVERY * RESPONSES // (settings["per_device_train_batch_size"] * updates))
    rollouts = run.settings.get("rollouts", run.task.rollouts)
    return settings | {"max_steps": updates * rollouts, "eval_steps": updates * evaluate_every}


def _small_critic() -> PreTrainedModel:
    """Make a critic of one layer and a quarter of the policy's width, with random weights."""
    config: LlamaConfig = new_config(hidden_size=16, layers=1)
    config.num_labels = 1
    return LlamaForSequenceClassification(config)
