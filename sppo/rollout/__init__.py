"""Rollout engines: prompts in, sampled completions out; each a class with one method, :class:`RolloutEngine`.

    name         engine                                               log-probabilities   weights
    hf           transformers' generate(), left-padded batches        the trainer's own   the trained model itself
    continuous   transformers' continuous batching, paged cache       its own             the trained model itself
    vllm         vLLM in this process                                 its own             copied before each rollout

Where an engine computes a token's probability by kernels of its own, its samples carry ``logprobs``, and the policy
loss weighs tokens by how far the trainer's are from them (``rollout_correction``).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from sppo.rollout.engine import Prompt, RolloutEngine, Sample, encode, rollout_seed
from sppo.rollout.hf import HFRollout

__all__ = [
    "ENGINES",
    "HFRollout",
    "Prompt",
    "RolloutEngine",
    "Sample",
    "encode",
    "engine_class",
    "make_engine",
    "rollout_seed",
]

ENGINES = {
    "hf": "sppo.rollout.hf:HFRollout",
    "continuous": "sppo.rollout.continuous:ContinuousRollout",
    "vllm": "sppo.rollout.vllm:VLLMRollout",
}


def engine_class(name: str) -> Callable[..., RolloutEngine]:
    """An engine by its name, or one of your own as ``module:Class``, made with the arguments of :class:`HFRollout`.

    Raises:
        ValueError: there is none of that name.
    """
    from sppo._utils import import_object

    if name in ENGINES:
        module, _, kind = ENGINES[name].partition(":")
        return getattr(import_module(module), kind)
    if ":" not in name:
        raise ValueError(f"rollout_engine must be one of {', '.join(ENGINES)}, or module:Class, got {name!r}")
    found: Any = import_object(name)
    return found


def make_engine(name: str, policy: Any, tokenizer: Any, settings: dict[str, Any], **given: Any) -> RolloutEngine:
    """The engine of that name, with settings of its own.

    Raises:
        ValueError: there is none, or it has no such setting.
    """
    kind = engine_class(name)
    try:
        return kind(policy, tokenizer, **given, **settings)
    except TypeError as error:
        raise ValueError(f"rollout_engine_kwargs={settings!r} does not fit rollout_engine={name!r}: {error}") from error
