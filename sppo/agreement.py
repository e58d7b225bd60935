"""Whether the policy's gradients agree from update to update, before it is moved far.

Where rewards are unrelated to responses, each policy gradient is noise of mean zero, yet Adam, which does not know how
much of a gradient is noise, moves weights by the learning rate at every step: a random walk that destroys a policy. As
long as weights hardly move, gradients that have a signal point the same way again and again and those of noise do not.
So a policy starts at a fiftieth of its learning rate, and

    s_u = cos(gradient_u, Adam's mean of the gradients before)          z = sum_u s_u / sqrt(sum_u s_u^2)

is watched, which for noise is a sum of terms of mean zero over its standard deviation, whatever the model's size. Once
z reaches ``min_agreement`` the policy learns at its full rate, and nothing is watched any more: at that rate successive
gradients answer to each other's steps. The default of 3.5 is reached by noise in about one run of 200.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sppo.models.fsdp import local, sum_over_shards
from sppo.rollout.stream import Progress

UNTRUSTED_RATE = 0.02
"""Share of the learning rate until the gradients have agreed."""

_LEAST = 4  # cosines: two that happen to be alike have no spread to judge them by


def watch(progress: Progress, optimizer: Optimizer, parameters: Iterable[nn.Parameter], min_agreement: float) -> None:
    """Take in the gradients of ``parameters`` before a step; sets ``progress.trusted`` once they have agreed.

    An optimizer that is none of Adam's kin, or does not keep its mean of gradients as ``exp_avg``, is trusted at once.
    """
    if "betas" not in optimizer.defaults:
        progress.trusted = True
        return
    pairs = [(p.grad, optimizer.state.get(p, {})) for p in parameters if p.grad is not None]
    if not pairs or any(not state for _, state in pairs):
        return  # the first step
    if any("exp_avg" not in state for _, state in pairs):
        progress.trusted = True
        return
    cosine = _cosine([(gradient.float(), state["exp_avg"].float()) for gradient, state in pairs])
    progress.agreement += cosine
    progress.agreement_squares += cosine**2
    progress.cosines += 1
    progress.trusted = progress.cosines >= _LEAST and standard_errors(progress) >= min_agreement


def standard_errors(progress: Progress) -> float:
    """By how many standard errors the gradients agree, 0 without any."""
    return progress.agreement / progress.agreement_squares**0.5 if progress.agreement_squares else 0.0


def _cosine(pairs: list[tuple[Tensor, Tensor]]) -> float:
    mine = [(local(a), local(b)) for a, b in pairs]
    parts = torch.stack([torch.stack([(a * b).sum(), a.square().sum(), b.square().sum()]) for a, b in mine])
    dot, a, b = sum_over_shards(parts.double().sum(0), of=pairs[0][0]).tolist()
    return dot / (a * b) ** 0.5 if a and b else 0.0
