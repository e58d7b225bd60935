"""Algorithms: responses per prompt, critic, advantage and policy loss.

    name                 critic   advantage of a response                  ratio          mean over         responses
    sppo                 prompt   R - V(prompt)                            token          token means       1
    poise                probe    R - V(prompt)                            token          tokens            1
    ppo                  token    GAE over V(prompt + tokens), whitened    token          tokens            1
    grpo                          (R - group mean) / group std             token          token means       8
    dr_grpo                       R - group mean                           token          token sums        8
    dapo                          as grpo                                  token          tokens            8
    cispo                         as grpo                                  token          tokens            8
    gspo                          as grpo                                  sequence_mean  sequences         8
    rloo                          R - mean of the group's others           sequence_sum   sequences         4
    opo                           R - length-weighted group mean           token          token sums        8
    spo                           R - tracked value, standardized          token          tokens            1
    reinforce_plus_plus           R, standardized                          token          tokens            1
    reinforce                     R - constant, running or prompt's mean   token          token sums        1
    remax                         R - R of the greedy response             token          token sums        1

Token means and sums are of a response, and their mean is taken over responses. Everything else is shared: rollouts,
rewards, packing, gradient clipping, optimizer. The last three columns are defaults that settings override.
docs/concepts/algorithms.md has the formulas and shows how to add an algorithm.
"""

from __future__ import annotations

import difflib

from sppo._utils import import_object
from sppo.algorithms.base import Algorithm, AlgorithmSettings, RolloutBatch
from sppo.algorithms.critics import POISE, PPO, SPPO
from sppo.algorithms.groups import CISPO, DAPO, GRPO, GSPO, OPO, RLOO, DrGRPO
from sppo.algorithms.single_response import SPO, Reinforce, ReinforcePlusPlus, ReMax

__all__ = ["ALGORITHMS", "Algorithm", "AlgorithmSettings", "RolloutBatch", "algorithm_class", "readers_of"]

ALGORITHMS: dict[str, type[Algorithm]] = {
    "sppo": SPPO,
    "poise": POISE,
    "ppo": PPO,
    "grpo": GRPO,
    "dr_grpo": DrGRPO,
    "dapo": DAPO,
    "cispo": CISPO,
    "gspo": GSPO,
    "rloo": RLOO,
    "opo": OPO,
    "spo": SPO,
    "reinforce_plus_plus": ReinforcePlusPlus,
    "reinforce": Reinforce,
    "remax": ReMax,
}


def algorithm_class(name: str) -> type[Algorithm]:
    """Return an algorithm by its name, or your own class by ``module:Class``.

    Raises:
        ValueError: there is no such algorithm, the object is not one, or it has invalid attributes.
    """
    if name in ALGORITHMS:
        return _checked(ALGORITHMS[name])
    if not isinstance(name, str) or ":" not in name:
        near = difflib.get_close_matches(str(name), ALGORITHMS, 1)
        raise ValueError(
            f"algorithm must be one of {', '.join(ALGORITHMS)}, or module:Class for one of your own, got {name!r}"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )
    found = import_object(name)
    if not (isinstance(found, type) and issubclass(found, Algorithm)):
        raise ValueError(f"algorithm {name!r} is {found!r}; name a subclass of sppo.Algorithm")
    return _checked(found)


def readers_of(setting: str) -> list[str]:
    """Return the names of the algorithms that read a setting that not all read; empty for one that all do."""
    return [name for name, kind in ALGORITHMS.items() if setting in kind.reads]


def _checked(found: type[Algorithm]) -> type[Algorithm]:
    if found.critic not in (None, "prompt", "probe", "token"):
        raise ValueError(f"{found.__name__}.critic must be 'prompt', 'probe', 'token' or None, got {found.critic!r}")
    if found.defaults.keys() != Algorithm.defaults.keys():
        raise ValueError(
            f"{found.__name__}.defaults must have the keys {', '.join(Algorithm.defaults)}, got "
            f"{', '.join(found.defaults)}; write Algorithm.defaults | {{...}}, and give other settings to SPPOConfig"
        )
    return found
