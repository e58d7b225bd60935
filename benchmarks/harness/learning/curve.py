"""The learning curve of a run, recorded at each evaluation."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback

from benchmarks.harness.results import Row
from sppo import SPPOTrainer


class Curve(TrainerCallback):
    """Records updates, generated tokens, CPU seconds of training and the mean reward of held-out answers.

    Seconds are CPU time of the run's only thread, so that other processes do not count. Set ``trainer`` at first.
    """

    def __init__(self) -> None:
        self.points: list[Row] = []
        self.seconds, self._since = 0.0, time.process_time()
        self.trainer: SPPOTrainer | None = None

    @property
    def tokens(self) -> int:
        """Tokens generated for training so far."""
        assert self.trainer is not None
        return self.trainer.rollouts.progress.generated_tokens

    @property
    def columns(self) -> Row:
        """The points as one list per measure."""
        return {name: [point[name] for point in self.points] for name in self.points[0]}

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        now = time.process_time()
        self.seconds, self._since = self.seconds + now - self._since, now

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.points.append(
            {
                "updates": state.global_step,
                "tokens": self.tokens,
                "seconds": round(self.seconds, 2),
                "reward": round(metrics["eval_reward"], 4),
            }
        )
        self._since = time.process_time()
