"""Sequence-Level PPO (arXiv 2604.08865) on transformers: a thin trainer over the fused operations of ``sppo_kernels``.

Names load on first use, so that the command line answers ``--help`` without importing transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sppo.algorithms import Algorithm, RolloutBatch
    from sppo.config import SPPOConfig
    from sppo.models.critic_io import load_critic
    from sppo.rollout import HFRollout, RolloutEngine, Sample
    from sppo.trainer import SPPOTrainer

_HOME = {
    "Algorithm": "algorithms",
    "HFRollout": "rollout",
    "RolloutBatch": "algorithms",
    "RolloutEngine": "rollout",
    "SPPOConfig": "config",
    "SPPOTrainer": "trainer",
    "Sample": "rollout",
    "load_critic": "models.critic_io",
}

__all__ = [
    "Algorithm",
    "HFRollout",
    "RolloutBatch",
    "RolloutEngine",
    "SPPOConfig",
    "SPPOTrainer",
    "Sample",
    "load_critic",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"sppo.{_HOME[name]}"), name)
