"""TRL's trainers with prepared responses, and a meter of the phases that this project's trainer has.

The wrapped methods are private ones of TRL 1.16. What TRL computes is unchanged.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import trl

from benchmarks.step.prepared import Prepared
from sppo.reporting.meter import Meter


class Metered:
    """Phases of both trainers; they generate if ``prepared`` is None."""

    meter: Meter
    prepared: Prepared | None

    def _generate(self, *args: Any, **settings: Any) -> Any:
        with self.meter.phase("rollout"):
            made = super()._generate(*args, **settings)
        responses = made[1]
        self.meter.mean({"response_length": sum(map(len, responses)) / len(responses)})
        return made

    def _calculate_rewards(self, *args: Any, **settings: Any) -> Any:
        with self.meter.phase("reward"):
            return super()._calculate_rewards(*args, **settings)

    def _get_per_token_logps_and_entropies(self, *args: Any, **settings: Any) -> Any:
        """Compute log-probabilities, which with gradients are a part of the update."""
        with self._scoring():
            return super()._get_per_token_logps_and_entropies(*args, **settings)

    def _scoring(self) -> AbstractContextManager[None]:
        return nullcontext() if torch.is_grad_enabled() else self.meter.phase("log-probabilities")

    def log(self, logs: dict[str, float], *args: Any, **settings: Any) -> None:
        if "loss" in logs:
            self.meter.read(list)
        super().log(logs, *args, **settings)


class GRPO(Metered, trl.GRPOTrainer):
    """TRL's GRPO, whose engine returns responses and log-probabilities, if there are any."""

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **settings: Any) -> Any:
        if self.prepared is None:
            return super()._generate_single_turn(prompt_ids, *args, **settings)
        return self.prepared.answer(len(prompt_ids)), None


class RLOO(Metered, trl.RLOOTrainer):
    """TRL's RLOO, whose engine returns only responses."""

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **settings: Any) -> Any:
        if self.prepared is None:
            return super()._generate_single_turn(prompt_ids, *args, **settings)
        return self.prepared.answer(len(prompt_ids))


KINDS: dict[str, tuple[Any, Any]] = {
    "grpo": (GRPO, partial(trl.GRPOConfig, loss_type="grpo")),
    "rloo": (RLOO, trl.RLOOConfig),
}
