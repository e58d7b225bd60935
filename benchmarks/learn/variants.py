"""What is compared, on which tasks: names of runs and the settings of :class:`sppo.SPPOConfig` that they stand for.

Everything else is the same for all: the policy they begin with, 64 responses an update, Adam, no clipping but where it
is studied (with one update a rollout all ratios are 1), losses that are means over tokens. Three settings are this
suite's own: ``critic`` is "one layer" where it is no copy of the policy, ``rollouts`` are those of a run that has not
as many as its task, and ``rates_of`` names the variant whose learning rates it has; others have their own ones chosen.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.learn import walks
from benchmarks.learn.policy import tokenizer
from sppo.algorithms import SPPO, Algorithm, RolloutBatch
from sppo.rollout.prompts import prompt_hash

OWN = ("critic", "rollouts", "rates_of")


class Task(NamedTuple):
    """Walks of a length, by rules of one difficulty or of two.

    Attributes:
        rollouts: of a run.
        threshold: the reward it is to reach.
        rates: of the policy, to choose from.
    """

    difficulty: str
    horizon: int
    rollouts: int
    threshold: float
    rates: tuple[float, ...] = (1e-4, 3e-4)

    @property
    def name(self) -> str:
        return f"{self.difficulty}, {self.horizon} steps"


SHORT = Task("even", 16, 60, 0.65, rates=(1e-4, 3e-4, 1e-3))
MIDDLE = Task("even", 64, 60, 0.65, rates=(1e-4, 3e-4, 1e-3))
MIXED = Task("mixed", 64, 60, 0.75)  # 1e-3 was best for no algorithm on the two above
LONG = Task("even", 256, 40, 0.4)  # few get to 0.65 in 40 rollouts
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
    "reinforce, one mean": {"algorithm": "reinforce", "baseline": "running_mean"},
    "reinforce, a mean a prompt": {"algorithm": "reinforce", "baseline": "prompt_mean"},
}

_SPPO = {"algorithm": "sppo", "rates_of": "sppo"}
_FOUR = {"algorithm": "sppo", "per_device_train_batch_size": 16, "steps_per_generation": 4}
_LIKE_FOUR = _FOUR | {"rates_of": "sppo, 4 updates a rollout"}
_OTHER_PROMPTS = {"sppo, critic reads other prompts": _SPPO | {"algorithm": f"{__name__}:OtherPrompts"}}
_FASTER_CRITIC = {"sppo, critic's rate 1e-3": _SPPO | {"critic_learning_rate": 1e-3}}
_CENTRED = {"sppo, centred": _SPPO | {"algorithm": f"{__name__}:Centred"}}
VARIANTS: dict[Task, dict[str, dict[str, Any]]] = {
    SHORT: {
        **_OTHER_PROMPTS,
        **_FASTER_CRITIC,
        **_CENTRED,
        "reinforce, 0.3": {"algorithm": "reinforce", "baseline": 0.3, "rates_of": "reinforce, one mean"},
    },
    MIXED: {
        "sppo, critic of one layer": _SPPO | {"critic": "one layer"},
        **_OTHER_PROMPTS,
        "reinforce, a mean a rule": {"algorithm": f"{__name__}:RuleMean", "rates_of": "reinforce, one mean"},
        **_FASTER_CRITIC,
        "sppo, critic's rate 1e-3, alone for 10 rollouts": _SPPO
        | {"critic_learning_rate": 1e-3, "critic_warmup_steps": 10},
    },
    MIDDLE: {
        "grpo, 64 prompts": {"algorithm": "grpo", "per_device_train_batch_size": 512, "rollouts": 20},
        **_CENTRED,
        "sppo, sparse backward": _SPPO | {"logprobs_backward": "sparse"},
        "sppo, 4 updates a rollout": _FOUR,
        "sppo, 4 updates, clip 0.05": _LIKE_FOUR | {"epsilon": 0.05},
        "sppo, 4 updates, clip 0.8": _LIKE_FOUR | {"epsilon": 0.8},
        "sppo, 4 updates, ratio of sum": _LIKE_FOUR | {"ratio_level": "sequence_sum"},
        "sppo, 4 updates, ratio of mean, GSPO's clip": _LIKE_FOUR
        | {"ratio_level": "sequence_mean", "epsilon": 3e-4, "epsilon_high": 4e-4},
    },
}


class OtherPrompts(SPPO):
    """SPPO with each value that of another prompt of the rollout: as good a mean, and nothing of the prompt itself."""

    def advantages(self, outcomes: RolloutBatch) -> Tensor:
        """See :class:`sppo.Algorithm`."""
        assert outcomes.values is not None
        return outcomes.rewards - torch.roll(outcomes.values, 1)


class Centred(SPPO):
    """SPPO with advantages that have a mean of 0 over the rollout, as those of groups and whitened ones do."""

    def advantages(self, outcomes: RolloutBatch) -> Tensor:
        """See :class:`sppo.Algorithm`."""
        advantages = super().advantages(outcomes)
        return advantages - advantages.mean()


class RuleMean(Algorithm):
    """A moving average of the rewards of each rule: about what a critic could know that has understood what decides."""

    defaults = SPPO.defaults

    def advantages(self, outcomes: RolloutBatch) -> Tensor:
        """See :class:`sppo.Algorithm`."""
        rules = [_rules()[name] for name in outcomes.prompts]
        expected = torch.tensor([self.state.get(rule, 0.5) for rule in rules])
        for rule in sorted(set(rules)):
            of_rule = outcomes.rewards[[other == rule for other in rules]].mean().item()
            self.state[rule] = 0.7 * self.state.get(rule, 0.5) + 0.3 * of_rule
        return outcomes.rewards - expected


@cache
def _rules() -> dict[str, str]:
    """The rule of each prompt, by the name that outcomes have for it."""
    prompts = walks.prompts("train")
    return {prompt_hash(ids): prompt[0] for prompt, ids in zip(prompts, tokenizer()(prompts)["input_ids"], strict=True)}
