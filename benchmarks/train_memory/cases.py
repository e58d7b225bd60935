"""Cases of a training step: policy, critic and devices, their settings and their rollouts."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from transformers import Qwen2Config

from benchmarks.harness.model_sizes import QWEN
from sppo.algorithms import algorithm_class
from sppo.config import SPPOConfig
from sppo.rollout import Sample

WITHOUT_CRITIC = ("grpo", "rloo", "remax")
MODELS = {  # DeepSeek-R1-Distill-Qwen has an output embedding of its own, Qwen2.5-0.5B shares its input embedding
    name: Qwen2Config(**size, max_position_embeddings=131_072, tie_word_embeddings=name == "0.5B")
    for name, size in QWEN.items()
}
MODELS["two layers"] = copy.deepcopy(MODELS["0.5B"])  # for --quick
MODELS["two layers"].num_hidden_layers = 2


class Case(NamedTuple):
    """Algorithm and models of a step; ``critic`` is the name of a model, or None for an algorithm without one."""

    algorithm: str
    policy: str
    critic: str | None
    devices: int

    @property
    def name(self) -> str:
        """Name in tables."""
        if self.critic is None:
            return ", ".join(WITHOUT_CRITIC)  # their micro-batches have the same shapes
        return f"{self.algorithm}, critic {self.critic}"


SMALL_CRITIC = Case("sppo", "7B", "1.5B", 4)
TOKEN_CRITIC = Case("ppo", "7B", "7B", 4)
CASES = [
    SMALL_CRITIC,
    Case("sppo", "7B", "7B", 4),
    TOKEN_CRITIC,
    Case("grpo", "7B", None, 4),
    Case("sppo", "1.5B", "0.5B", 1),
    Case("sppo", "1.5B", "1.5B", 1),
    Case("ppo", "1.5B", "1.5B", 1),
    Case("grpo", "1.5B", None, 1),
]
QUICK = [Case("sppo", "two layers", "two layers", 1), Case("ppo", "two layers", "two layers", 1)]
QUICK_SETTINGS = {
    "max_prompt_length": 256,
    "max_completion_length": 1024,
    "gradient_accumulation_steps": 4,
    "steps_per_generation": 16,
}


def settings(case: Case, **overrides: Any) -> SPPOConfig:
    """Return the published settings, adapted to the algorithm and divided over the devices."""
    size = "1.5b" if case.policy == "1.5B" else "7b"
    whole = SPPOConfig.paper(size, use_cpu=True)
    for name in ("gradient_accumulation_steps", "steps_per_generation"):
        overrides.setdefault(name, getattr(whole, name) // case.devices)
    of_algorithm = algorithm_class(case.algorithm).defaults
    chosen = {name: value for name, value in of_algorithm.items() if value is not None}
    return SPPOConfig.paper(size, use_cpu=True, algorithm=case.algorithm, **chosen | overrides)


def samples_of(args: SPPOConfig, kind: str | None) -> list[Sample]:
    """Make a rollout of one process: distinct prompts and responses of maximum length."""
    assert args.max_prompt_length is not None
    response = [1] * args.max_completion_length
    of_tokens = torch.zeros(len(response))
    made = [
        Sample("", "", [i] * args.max_prompt_length, response, truncated=True, reward=1.0, advantage=torch.zeros(()))
        for i in range(args.rollout_size)
    ]
    for sample in made if kind == "token" else ():
        sample.value = sample.returns = sample.advantage = of_tokens
    return made
