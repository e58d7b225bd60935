"""Rollouts: engines that sample completions, and the stages that turn them into micro-batches.

    name         engine                                               log-probabilities   weights
    hf           transformers' generate(), left-padded batches        the trainer's       the trained model's
    continuous   transformers' continuous batching, paged cache       its own             the trained model's
    vllm         vLLM in this process, or a server                    its own             copied before each rollout

If an engine computes probabilities with its own kernels, its samples have ``logprobs``, and the policy loss corrects
for the difference from the trainer's (``rollout_correction``). With top_k, top_p or min_p its samples have
``support``, the tokens that were kept (:mod:`sppo.rollout.support`). An engine is a class with one method, see
:class:`RolloutEngine`. :mod:`sppo.rollout.stream` makes rollouts, :mod:`sppo.rollout.batching` micro-batches.
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
    """Return the class of an engine by its name, or your own by ``module:Class``.

    Your own must accept the arguments of :class:`HFRollout`, among them ``min_p`` and ``return_support``, but
    ``stop_strings`` and ``generation_kwargs`` only if these settings are used. Its samples have ``support`` if it
    truncates the distribution and can tell which tokens it kept.

    Raises:
        ValueError: there is no such engine.
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
    """Make the engine of that name.

    Args:
        name: see :func:`engine_class`.
        policy: the policy that is trained.
        tokenizer: its tokenizer.
        settings: settings of this engine.
        given: arguments that all engines have.

    Raises:
        ValueError: there is no such engine, or it has no such setting.
    """
    kind = engine_class(name)
    try:
        return kind(policy, tokenizer, **given, **settings)
    except TypeError as error:
        raise ValueError(f"rollout_engine_kwargs={settings!r} does not fit rollout_engine={name!r}: {error}") from error
