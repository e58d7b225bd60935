"""Compared variants, and the task: names of runs and their settings of :class:`sppo.SPPOConfig`.

Everything else is the same for all: the initial policy, the prompts, the number of responses per update, AdamW, and
losses that are means over the tokens of a response and then over responses. ``critic`` is "small" or "probe" if it is
not a copy of the policy's backbone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

CRITIC_RATES = (3e-4,)

VARIANTS: dict[str, dict[str, Any]] = {
    "sppo": {"algorithm": "sppo"},
    "sppo, critic of 6 layers": {"algorithm": "sppo", "critic": "small"},
    "sppo, probe": {"algorithm": "sppo", "critic": "probe"},
    "ppo": {"algorithm": "ppo"},
    "grpo": {"algorithm": "grpo"},
    "rloo": {"algorithm": "rloo"},
    "reinforce, running mean": {"algorithm": "reinforce", "baseline": "running_mean"},
}
QUICK_VARIANTS = ("sppo", "sppo, critic of 6 layers", "sppo, probe", "grpo")


class Task(NamedTuple):
    """What is learned, and how long.

    Attributes:
        name: name in tables, and of the models and prompts in :mod:`benchmarks.learn_smollm2.setups`.
        threshold: the held-out accuracy to reach.
        rates: candidate learning rates of the policy.
        tokens: generated tokens of a counted run.
        tuning_tokens: generated tokens of a run that chooses rates.
        evaluate_every: generated tokens between evaluations, at least those that one update can generate.
        responses: responses per update, for every algorithm.
        micro_batch: responses per forward and backward.
        longest: tokens of the longest response.
        temperature: of sampling, held-out answers included.
        bf16: whether to compute in bfloat16, by autocast over float32 weights.
    """

    name: str
    threshold: float
    rates: tuple[float, ...]
    tokens: int
    tuning_tokens: int
    evaluate_every: int
    responses: int
    micro_batch: int
    longest: int
    temperature: float
    bf16: bool


SUMS = Task(
    "SmolLM2-135M on sums",
    threshold=0.45,
    rates=(1e-5, 3e-5),
    tokens=3_072,
    tuning_tokens=2_048,
    evaluate_every=1_024,
    responses=32,
    micro_batch=32,
    longest=16,
    temperature=0.7,
    bf16=True,
)
QUICK = Task(
    "tiny model on chains",
    threshold=0.4,
    rates=(1e-3,),
    tokens=512,
    tuning_tokens=256,
    evaluate_every=128,
    responses=16,
    micro_batch=8,
    longest=8,
    temperature=1.0,
    bf16=False,
)
