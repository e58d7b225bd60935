"""Compared variants and tasks: names of runs and their settings of :class:`sppo.SPPOConfig`.

Everything else is the same for all: the initial policy, 64 responses per update, Adam, no clipping except where it is
studied (with one update per rollout all ratios are 1), and losses that are means over tokens. Three settings belong to
this suite: ``critic`` is "one layer" if it is not a copy of the policy, ``rollouts`` is the number of rollouts if it is
not the task's, and ``rates_of`` names the variant whose learning rates are used; other variants choose their own.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.learn import digit_walk
from benchmarks.learn.policy import tokenizer
from sppo.algorithms import SPPO, Algorithm, RolloutBatch
from sppo.rollout.prompts import prompt_hash

OWN = ("critic", "rollouts", "rates_of")


class Task(NamedTuple):
    """Digit walks of one length.

    Attributes:
        difficulty: "even" for rules of one difficulty, "mixed" for two.
        horizon: steps of a walk.
        rollouts: rollouts per run.
        threshold: the reward to reach.
        rates: candidate learning rates of the policy.
    """

    difficulty: str
    horizon: int
    rollouts: int
    threshold: float
    rates: tuple[float, ...] = (1e-4, 3e-4)

    @property
    def name(self) -> str:
        """Name in tables."""
        return f"{self.difficulty}, {self.horizon} steps"


SHORT = Task("even", 16, 60, 0.65, rates=(1e-4, 3e-4, 1e-3))
MIDDLE = Task("even", 64, 60, 0.65, rates=(1e-4, 3e-4, 1e-3))
MIXED = Task("mixed", 64, 60, 0.75)  # 1e-3 was best for no algorithm on the two above
LONG = Task("even", 256, 40, 0.4)  # few reach 0.65 in 40 rollouts
TASKS = (SHORT, MIDDLE, MIXED, LONG)
QUICK = Task("even", 4, 10, 0.7, rates=(3e-4,))

CRITIC_RATES = (1e-4, 1e-3)

ALGORITHMS: dict[str, dict[str, Any]] = {
    "sppo": {"algorithm": "sppo"},
    "ppo": {"algorithm": "ppo"},
    "ppo, lambda 0.95": {"algorithm": "ppo", "lam": 0.95},
    "grpo": {"algorithm": "grpo"},
    "rloo": {"algorithm": "rloo"},
    "remax": {"algorithm": "remax"},
    "reinforce, running mean": {"algorithm": "reinforce", "baseline": "running_mean"},
    "reinforce, mean per prompt": {"algorithm": "reinforce", "baseline": "prompt_mean"},
}

_SPPO = {"algorithm": "sppo", "rates_of": "sppo"}
_FOUR = {"algorithm": "sppo", "per_device_train_batch_size": 16, "steps_per_generation": 4}
_LIKE_FOUR = _FOUR | {"rates_of": "sppo, 4 updates per rollout"}
_OTHER_PROMPTS = {"sppo, critic reads other prompts": _SPPO | {"algorithm": f"{__name__}:OtherPrompts"}}
_FASTER_CRITIC = {"sppo, critic's rate 1e-3": _SPPO | {"critic_learning_rate": 1e-3}}
_CENTRED = {"sppo, centred": _SPPO | {"algorithm": f"{__name__}:Centred"}}
VARIANTS: dict[Task, dict[str, dict[str, Any]]] = {
    SHORT: {
        **_OTHER_PROMPTS,
        **_FASTER_CRITIC,
        **_CENTRED,
        "reinforce, 0.3": {"algorithm": "reinforce", "baseline": 0.3, "rates_of": "reinforce, running mean"},
    },
    MIXED: {
        "sppo, critic of one layer": _SPPO | {"critic": "one layer"},
        **_OTHER_PROMPTS,
        "reinforce, mean per rule": {"algorithm": f"{__name__}:RuleMean", "rates_of": "reinforce, running mean"},
        **_FASTER_CRITIC,
        "sppo, critic's rate 1e-3, alone for 10 rollouts": _SPPO
        | {"critic_learning_rate": 1e-3, "critic_warmup_steps": 10},
    },
    MIDDLE: {
        "grpo, 64 prompts": {"algorithm": "grpo", "per_device_train_batch_size": 512, "rollouts": 20},
        **_CENTRED,
        "sppo, sparse backward": _SPPO | {"logprobs_backward": "sparse"},
        "sppo, 4 updates per rollout": _FOUR,
        "sppo, 4 updates, clip 0.05": _LIKE_FOUR | {"epsilon": 0.05},
        "sppo, 4 updates, clip 0.8": _LIKE_FOUR | {"epsilon": 0.8},
        "sppo, 4 updates, ratio of sum": _LIKE_FOUR | {"ratio_level": "sequence_sum"},
        "sppo, 4 updates, ratio of mean, GSPO's clip": _LIKE_FOUR
        | {"ratio_level": "sequence_mean", "epsilon": 3e-4, "epsilon_high": 4e-4},
    },
}


class OtherPrompts(SPPO):
    """SPPO with the values of other prompts of the rollout: the same mean, but no information about the prompt."""

    def advantages(self, outcomes: RolloutBatch) -> Tensor:
        """Compute advantages as :class:`sppo.Algorithm` defines."""
        assert outcomes.values is not None
        return outcomes.rewards - torch.roll(outcomes.values, 1)


class Centred(SPPO):
    """SPPO with advantages of mean 0 over the rollout, as group-relative and whitened ones have."""

    def advantages(self, outcomes: RolloutBatch) -> Tensor:
        """Compute advantages as :class:`sppo.Algorithm` defines."""
        advantages = super().advantages(outcomes)
        return advantages - advantages.mean()


class RuleMean(Algorithm):
    """A moving average of the rewards of each rule as baseline, about what a perfect critic could predict."""

    defaults = SPPO.defaults

    def advantages(self, outcomes: RolloutBatch) -> Tensor:
        """Compute advantages as :class:`sppo.Algorithm` defines."""
        rules = [_rules()[name] for name in outcomes.prompts]
        expected = torch.tensor([self.state.get(rule, 0.5) for rule in rules])
        for rule in sorted(set(rules)):
            of_rule = outcomes.rewards[[other == rule for other in rules]].mean().item()
            self.state[rule] = 0.7 * self.state.get(rule, 0.5) + 0.3 * of_rule
        return outcomes.rewards - expected


@cache
def _rules() -> dict[str, str]:
    """Return the rule of each prompt by the prompt's hash."""
    prompts = digit_walk.prompts("train")
    return {prompt_hash(ids): prompt[0] for prompt, ids in zip(prompts, tokenizer()(prompts)["input_ids"], strict=True)}
