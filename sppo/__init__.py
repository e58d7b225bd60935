"""Sequence-Level PPO (arXiv 2604.08865) on transformers: a thin trainer over the fused operations of ``sppo_kernels``.

Names load on first use, so that the command line answers ``--help`` without importing transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sppo.algorithm import SPPO, Algorithm
    from sppo.config import SPPOConfig
    from sppo.rollout import HFRollout, RolloutEngine
    from sppo.trainer import SPPOTrainer

_HOME = {
    "SPPO": "algorithm",
    "Algorithm": "algorithm",
    "HFRollout": "rollout",
    "RolloutEngine": "rollout",
    "SPPOConfig": "config",
    "SPPOTrainer": "trainer",
}

__all__ = ["SPPO", "Algorithm", "HFRollout", "RolloutEngine", "SPPOConfig", "SPPOTrainer"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"sppo.{_HOME[name]}"), name)
