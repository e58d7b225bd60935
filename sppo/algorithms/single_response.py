"""Algorithms that need one response per prompt and no critic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sppo.algorithms.base import Algorithm, RolloutBatch, standardized


class ReMax(Algorithm):
    """ReMax (arXiv 2310.10505): ``A = R - R of the greedy response``."""

    needs_greedy_baseline = True
    defaults = Algorithm.defaults | {"aggregation": "seq-mean-token-sum"}

    def advantages(self, batch: RolloutBatch) -> Tensor:
        """See :class:`Algorithm`."""
        assert batch.greedy_rewards is not None
        return batch.rewards - batch.greedy_rewards


class Reinforce(Algorithm):
    """REINFORCE (Williams, 1992) with the setting ``baseline``, for comparison with SPPO's critic.

    A number is a constant baseline; ``"running_mean"`` is the mean reward of all earlier rollouts; ``"prompt_mean"`` is
    the prompt's own mean reward in earlier rollouts, or the running mean if it had none.
    """

    reads = ("baseline", "overlong_buffer")
    defaults = Algorithm.defaults | {"aggregation": "seq-mean-token-sum"}

    def advantages(self, batch: RolloutBatch) -> Tensor:
        """See :class:`Algorithm`."""
        if self.args.baseline == "prompt_mean":
            return batch.rewards - torch.tensor(self._prompt_means(batch))
        running = self.args.baseline == "running_mean"
        return batch.rewards - (batch.mean_reward if running else float(self.args.baseline))

    def _prompt_means(self, batch: RolloutBatch) -> list[float]:
        """Return each prompt's mean reward in earlier rollouts, and add its new rewards for the next one."""
        seen = [self.state.get(prompt, (0, 0.0)) for prompt in batch.prompts]
        for prompt, reward in zip(batch.prompts, batch.rewards.tolist(), strict=True):
            count, total = self.state.get(prompt, (0, 0.0))
            self.state[prompt] = (count + 1, total + reward)
        return [total / count if count else batch.mean_reward for count, total in seen]


class ReinforcePlusPlus(Algorithm):
    """REINFORCE++ (arXiv 2501.03262): ``A = (R - mean) / std`` over the whole batch, the clipped ratio of PPO.

    The paper adds a KL penalty to the reward of each token; here ``beta`` adds it to the loss.
    """

    reads = ("overlong_buffer",)
    defaults = Algorithm.defaults | {"aggregation": "token-mean"}

    def advantages(self, batch: RolloutBatch) -> Tensor:
        """See :class:`Algorithm`."""
        return standardized(batch.rewards)


class SPO(Algorithm):
    """Single-stream Policy Optimization (arXiv 2509.13232): a value tracker per prompt in place of a critic.

    A prompt's success rate is tracked as a Beta distribution. After a response with reward ``r``::

        rho = 2^(-D / 0.06), limited to [0.875, 0.96]      a <- rho a + r      b <- rho b + 1 - r      v = a / (a + b)

    ``D`` is the mean absolute change of the log-probabilities of the prompt's previous response since it was sampled:
    the more the policy has changed, the sooner old outcomes are forgotten. ``A`` is ``r - v``, with ``v`` from before
    the response, standardized over the batch. Prompts are drawn with weights ``sqrt(v (1 - v)) + 0.05``.

    The paper starts the trackers with eight responses per prompt that are sampled before training. Here they start at
    ``a = b = 1/2``, and ``D`` is measured on the first 128 tokens of a response.
    """

    rewards_are_probabilities = True
    tracks_drift = True
    draws_prompts = True
    defaults = Algorithm.defaults | {"aggregation": "token-mean"}

    _HALF_LIFE = 0.06
    _LEAST_KEPT, _MOST_KEPT = 0.875, 0.96
    _EXPLORATION = 0.05

    def advantages(self, batch: RolloutBatch) -> Tensor:
        """See :class:`Algorithm`."""
        assert batch.drifts is not None
        advantages = batch.rewards - torch.tensor([self._value(prompt) for prompt in batch.prompts])
        facts = zip(batch.prompts, batch.rewards.tolist(), batch.drifts.tolist(), batch.traces, strict=True)
        for prompt, reward, drift, (tokens, logprobs) in facts:
            kept = min(self._MOST_KEPT, max(self._LEAST_KEPT, 2.0 ** (-drift / self._HALF_LIFE)))
            a, b = self._tracker(prompt)
            tracker = {"a": kept * a + reward, "b": kept * b + 1 - reward, "tokens": tokens, "logprobs": logprobs}
            self.state[prompt] = tracker
        return standardized(advantages)

    def prompt_weights(self, prompts: Sequence[str]) -> list[float]:
        """See :class:`Algorithm`."""
        values = map(self._value, prompts)
        return [math.sqrt(value * (1 - value)) + self._EXPLORATION for value in values]

    def trace(self, prompt: str) -> tuple[list[int], list[float]] | None:
        """See :class:`Algorithm`."""
        tracker: dict[str, Any] | None = self.state.get(prompt)
        return None if tracker is None else (tracker["tokens"], tracker["logprobs"])

    def _value(self, prompt: str) -> float:
        a, b = self._tracker(prompt)
        return a / (a + b)

    def _tracker(self, prompt: str) -> tuple[float, float]:
        tracker = self.state.get(prompt, {"a": 0.5, "b": 0.5})
        return tracker["a"], tracker["b"]
