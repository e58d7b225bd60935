"""One run: a variant, learning rates and a seed, and how it learned."""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
from collections.abc import Iterable
from hashlib import sha256
from typing import Any, NamedTuple

import torch

from benchmarks.harness import resident
from benchmarks.harness.learning.curve import Curve
from benchmarks.harness.learning.plan import TUNING_SEED, has_trained_critic
from benchmarks.harness.recipe_trainer import QUIET
from benchmarks.harness.results import Row
from benchmarks.learn_smollm2.setups import SETUPS, critic_of
from benchmarks.learn_smollm2.variants import Task
from sppo import SPPOConfig, SPPOTrainer

TRAINING = {"reward": "training_reward", "explained_variance": "explained_variance"}
"""Metrics of training whose means between evaluations are recorded, and their columns."""


class Run(NamedTuple):
    """Definition of a run; ``settings`` as in :mod:`benchmarks.learn_smollm2.variants`.

    ``identity`` is a hash of weights and prompts.
    """

    task: Task
    variant: str
    settings: dict[str, Any]
    learning_rate: float
    critic_learning_rate: float
    seed: int
    identity: str

    @property
    def tokens(self) -> int:
        """Generated tokens at which the run ends, with the update that reaches them."""
        return self.task.tuning_tokens if self.seed == TUNING_SEED else self.task.tokens

    @property
    def key(self) -> str:
        """Hash of everything that determines the result."""
        of_run = [self.identity, self.tokens, self.task.evaluate_every, self.settings.get("critic"), config_of(self)]
        return sha256(json.dumps(of_run, sort_keys=True).encode()).hexdigest()[:16]


class TokenCurve(Curve):
    """A learning curve with an evaluation each time that as many tokens were generated again; ends at a number of them.

    Args:
        every: tokens between evaluations.
        end: tokens at which training stops.
    """

    def __init__(self, every: int, end: int) -> None:
        super().__init__()
        self.every, self.end = every, end
        self._logged: dict[str, list[float]] = {column: [] for column in TRAINING.values()}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end()
        control.should_evaluate = self.tokens >= self.every * len(self.points)
        control.should_training_stop = self.tokens >= self.end

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        for metric, column in TRAINING.items():
            if metric in logs:
                self._logged[column].append(logs[metric])

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        super().on_evaluate(*args, **kwargs)
        self.points[-1] |= {column: _rounded_mean(values) for column, values in self._logged.items()}
        self._logged = {column: [] for column in self._logged}


def _rounded_mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return round(statistics.fmean(values), 4) if values else None


def train(run: Run) -> Row:
    """Train, and return the row of the run with its learning curve."""
    torch.set_num_threads(1)
    setup = SETUPS[run.task.name]
    training, held_out = setup.prompts()
    setup.policy()  # what a process keeps for its later runs does not count as memory of this one
    critic_of(setup, run.settings)
    gc.collect()
    peak = resident.ResidentPeak() if resident.measurable() else None
    policy, tokenizer = setup.policy()
    torch.manual_seed(run.seed)  # here: loading draws random numbers, and only in a process's first run
    curve = TokenCurve(run.task.evaluate_every, run.tokens)
    with tempfile.TemporaryDirectory() as folder:
        curve.trainer = trainer = SPPOTrainer(
            policy,
            setup.reward,
            args=SPPOConfig(folder, console="none", **config_of(run)),
            critic=critic_of(setup, run.settings),
            train_dataset=training,
            eval_dataset=held_out,
            processing_class=tokenizer,
            callbacks=[curve],
        )
        trainer.evaluate()
        trainer.train()
    return {
        "run": run.key,
        "task": run.task.name,
        "variant": run.variant,
        "learning_rate": run.learning_rate,
        "critic_learning_rate": run.critic_learning_rate if has_trained_critic(run.settings) else None,
        "seed": run.seed,
        "peak_bytes": peak and peak.read(),
        **curve.columns,
    }


def config_of(run: Run) -> dict[str, Any]:
    """Return the settings of SPPOConfig."""
    task = run.task
    return {
        **QUIET,
        "report_to": "none",
        "use_cpu": True,
        "bf16": task.bf16,
        "per_device_train_batch_size": task.micro_batch,
        "gradient_accumulation_steps": task.responses // task.micro_batch,
        "per_device_eval_batch_size": 48,
        "max_completion_length": task.longest,
        "temperature": task.temperature,
        "eval_temperature": task.temperature,
        "max_steps": run.tokens // task.responses + 1,  # never reached: a response has at least one token
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 2,
        "learning_rate": run.learning_rate,
        "critic_learning_rate": run.critic_learning_rate,
        "ratio_level": "token",
        "aggregation": "seq-mean-token-mean",
        "seed": run.seed,
        **{name: value for name, value in run.settings.items() if name != "critic"},
    }
