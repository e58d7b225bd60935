"""Algorithms: how many responses a prompt, which critic, which advantage, which policy loss.

    name        critic   advantage of a response                    ratio           mean over                responses
    sppo        prompt   R - V(prompt)                              token           sequences of token means 1
    ppo         token    GAE over V(prompt + tokens), whitened      token           tokens                   1
    grpo                 (R - group mean) / group std               token           sequences of token means 8
    dr_grpo              R - group mean                             token           sequences of token sums  8
    rloo                 R - mean of the group's others             sequence_sum    sequences                4
    gspo                 (R - group mean) / group std               sequence_mean   sequences                8
    remax                R - R of the greedy response               token           sequences of token sums  1
    reinforce            R - constant, running or prompt's mean     token           sequences of token sums  1

All else is the same for all: rollouts, rewards, packing, clipping of gradients, optimizer. The columns on the right are
only defaults: a setting that is given wins. docs/algorithms.md has the formulas and shows how to add one.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from sppo_kernels import gae, group_advantages, whiten


class AlgorithmSettings(Protocol):
    """The fields of :class:`sppo.SPPOConfig` that algorithms read."""

    epsilon: float | None
    epsilon_high: float | None
    dual_clip: float | None
    ratio_level: str | None
    aggregation: str | None
    beta: float
    gamma: float
    lam: float
    baseline: float | str
    max_completion_length: int


@dataclass
class RolloutBatch:
    """What came of a rollout: B completions of all processes, one after the other.

    Attributes:
        rewards: float32 ``[B]``.
        group_ids: int64 ``[B]``; completions that were sampled together for one prompt share a number.
        prompts: B names; the same prompt has the same name whenever it comes.
        lengths: int64 ``[B]``, response tokens.
        values: float32, from before the update: ``[B]``, P(success), of a prompt critic; ``[B, T]`` of a token critic,
            the value before each response token, with 0 after the last; None without a critic.
        greedy_rewards: float32 ``[B]``, of the greedy response to each prompt, where the algorithm asks for it.
        mean_reward: of all rollouts before this one; of this one where it is the first.
    """

    rewards: Tensor
    group_ids: Tensor
    prompts: Sequence[str]
    lengths: Tensor
    mean_reward: float
    values: Tensor | None = None
    greedy_rewards: Tensor | None = None


class Algorithm:
    """Base class; one of your own overrides :meth:`advantages`, and what else differs from its neighbours.

    Attributes:
        critic: ``"prompt"``, ``"token"`` or None.
        uses_groups: whether a response is judged by others to its prompt, so that ``num_generations`` is at least 2.
        needs_greedy_baseline: whether each prompt is answered greedily too, which costs one more response a prompt.
        defaults: values of the ``SPPOConfig`` fields that were left None.
        state: what it remembers from rollout to rollout, JSON values under text keys; checkpoints carry it.
    """

    critic: ClassVar[str | None] = None
    uses_groups: ClassVar[bool] = False
    needs_greedy_baseline: ClassVar[bool] = False
    defaults: ClassVar[dict[str, Any]] = {
        "num_generations": 1,
        "ratio_level": "token",
        "epsilon": 0.2,
        "epsilon_high": None,
        "dual_clip": float("inf"),
        "aggregation": "seq-mean-token-mean",
    }

    def __init__(self, args: AlgorithmSettings) -> None:
        self.args = args
        self.state: dict[str, Any] = {}

    def advantages(self, outcomes: RolloutBatch) -> Tensor:
        """Called once for each rollout, in their order, with the same on every process.

        Returns:
            float32 ``[B]``, one for all tokens of a response, or ``[B, T]``, one for each.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method advantages(outcomes)")

    def returns(self, outcomes: RolloutBatch) -> Tensor:
        """What a token critic is to predict, float32 ``[B, T]``; called after :meth:`advantages`."""
        raise NotImplementedError(f"{type(self).__name__} has a token critic and no method returns(outcomes)")

    def loss_arguments(self) -> dict[str, Any]:
        """Keyword arguments of :func:`sppo_kernels.policy_loss`."""
        args = self.args
        return {
            "ratio_level": args.ratio_level,
            "clip_low": args.epsilon,
            "clip_high": args.epsilon_high,
            "dual_clip": None if args.dual_clip == float("inf") else args.dual_clip,
            "aggregation": args.aggregation,
            "kl_coef": args.beta,
        }

    def normalizer(self, sequences: int, tokens: int) -> float:
        """What the summed policy loss of an update is divided by, given its counts on all processes."""
        return tokens if self.args.ratio_level == "token" and self.args.aggregation == "token-mean" else sequences


class SPPO(Algorithm):
    """Sequence-Level PPO (arXiv 2604.08865): ``A = R - V(prompt)``, the same for each token of the response."""

    critic = "prompt"
    defaults = Algorithm.defaults | {"dual_clip": 3.0}

    def advantages(self, outcomes: RolloutBatch) -> Tensor:
        """See :class:`Algorithm`."""
        assert outcomes.values is not None
        return outcomes.rewards - outcomes.values


class PPO(Algorithm):
    """Token-level PPO (arXiv 1707.06347): a value before each token, GAE (arXiv 1506.02438), whitened advantages.

    The reward comes with the last token. The critic learns by half the squared error to ``advantage + value``: the
    worse of the prediction's and that of the prediction clipped to ``cliprange_value`` around the one from before.
    """

    critic = "token"
    defaults = Algorithm.defaults | {"aggregation": "token-mean"}

    def advantages(self, outcomes: RolloutBatch) -> Tensor:
        """See :class:`Algorithm`."""
        return whiten(self._gae(outcomes)[0], _mask(outcomes))

    def returns(self, outcomes: RolloutBatch) -> Tensor:
        """See :class:`Algorithm`."""
        return self._gae(outcomes)[1]

    def _gae(self, outcomes: RolloutBatch) -> tuple[Tensor, Tensor]:
        assert outcomes.values is not None
        rewards = torch.zeros_like(outcomes.values)
        rewards[torch.arange(len(rewards)), outcomes.lengths - 1] = outcomes.rewards
        return gae(rewards, outcomes.values, _mask(outcomes), gamma=self.args.gamma, lam=self.args.lam)


class GRPO(Algorithm):
    """Group Relative Policy Optimization (arXiv 2402.03300): ``A = (R - group mean) / (group std + 1e-6)``."""

    uses_groups = True
    defaults = Algorithm.defaults | {"num_generations": 8}

    def advantages(self, outcomes: RolloutBatch) -> Tensor:
        """See :class:`Algorithm`."""
        return group_advantages(outcomes.rewards, outcomes.group_ids, estimator="grpo")


class DrGRPO(Algorithm):
    """GRPO Done Right (arXiv 2503.20783): ``A = R - group mean``, no division by a response's own length."""

    uses_groups = True
    defaults = Algorithm.defaults | {"num_generations": 8, "aggregation": "seq-mean-token-sum"}

    def advantages(self, outcomes: RolloutBatch) -> Tensor:
        """See :class:`Algorithm`."""
        return group_advantages(outcomes.rewards, outcomes.group_ids, estimator="dr_grpo")

    def normalizer(self, sequences: int, tokens: int) -> float:
        """A sum over tokens is divided by the greatest length besides, a constant."""
        count = super().normalizer(sequences, tokens)
        sums = self.args.ratio_level == "token" and self.args.aggregation == "seq-mean-token-sum"
        return count * self.args.max_completion_length if sums else count


class RLOO(Algorithm):
    """REINFORCE Leave-One-Out (arXiv 2402.14740): ``A = R - mean of the group's others``, the response one action."""

    uses_groups = True
    defaults = Algorithm.defaults | {"num_generations": 4, "ratio_level": "sequence_sum"}

    def advantages(self, outcomes: RolloutBatch) -> Tensor:
        """See :class:`Algorithm`."""
        return group_advantages(outcomes.rewards, outcomes.group_ids, estimator="rloo")


class GSPO(GRPO):
    """Group Sequence Policy Optimization (arXiv 2507.18071): GRPO's advantage, the length-normalised ratio."""

    defaults = GRPO.defaults | {"ratio_level": "sequence_mean", "epsilon": 3e-4, "epsilon_high": 4e-4}


class ReMax(Algorithm):
    """ReMax (arXiv 2310.10505): ``A = R - R of the greedy response``."""

    needs_greedy_baseline = True
    defaults = Algorithm.defaults | {"aggregation": "seq-mean-token-sum"}

    def advantages(self, outcomes: RolloutBatch) -> Tensor:
        """See :class:`Algorithm`."""
        assert outcomes.greedy_rewards is not None
        return outcomes.rewards - outcomes.greedy_rewards


class Reinforce(Algorithm):
    """REINFORCE (Williams, 1992) with the setting ``baseline``: what SPPO's critic is to be measured against.

    A number is a constant baseline; ``"running_mean"`` is the mean reward of all earlier rollouts; ``"prompt_mean"``
    is the mean reward that the prompt itself had in earlier rollouts, and the running mean where it had none.
    """

    defaults = Algorithm.defaults | {"aggregation": "seq-mean-token-sum"}

    def advantages(self, outcomes: RolloutBatch) -> Tensor:
        """See :class:`Algorithm`."""
        if self.args.baseline == "prompt_mean":
            return outcomes.rewards - torch.tensor(self._prompt_means(outcomes))
        running = self.args.baseline == "running_mean"
        return outcomes.rewards - (outcomes.mean_reward if running else float(self.args.baseline))

    def _prompt_means(self, outcomes: RolloutBatch) -> list[float]:
        """Each prompt's mean until now; its new rewards count from the next rollout on."""
        seen = [self.state.get(prompt, (0, 0.0)) for prompt in outcomes.prompts]
        for prompt, reward in zip(outcomes.prompts, outcomes.rewards.tolist(), strict=True):
            count, total = self.state.get(prompt, (0, 0.0))
            self.state[prompt] = (count + 1, total + reward)
        return [total / count if count else outcomes.mean_reward for count, total in seen]


ALGORITHMS: dict[str, type[Algorithm]] = {
    "sppo": SPPO,
    "ppo": PPO,
    "grpo": GRPO,
    "dr_grpo": DrGRPO,
    "rloo": RLOO,
    "gspo": GSPO,
    "remax": ReMax,
    "reinforce": Reinforce,
}


def algorithm_class(name: str) -> type[Algorithm]:
    """An algorithm by its name, or a class of your own as ``module:Class``.

    Raises:
        ValueError: there is no such algorithm, what was named is none, or its attributes are not as they should be.
    """
    if name in ALGORITHMS:
        return _checked(ALGORITHMS[name])
    if not isinstance(name, str) or ":" not in name:
        near = difflib.get_close_matches(str(name), ALGORITHMS, 1)
        raise ValueError(
            f"algorithm must be one of {', '.join(ALGORITHMS)}, or module:Class for one of your own, got {name!r}"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )
    from sppo._utils import import_object

    found = import_object(name)
    if not (isinstance(found, type) and issubclass(found, Algorithm)):
        raise ValueError(f"algorithm {name!r} is {found!r}; name a subclass of sppo.Algorithm")
    return _checked(found)


def _checked(found: type[Algorithm]) -> type[Algorithm]:
    if found.critic not in (None, "prompt", "token"):
        raise ValueError(f"{found.__name__}.critic must be 'prompt', 'token' or None, got {found.critic!r}")
    if found.defaults.keys() != Algorithm.defaults.keys():
        raise ValueError(
            f"{found.__name__}.defaults must have the keys {', '.join(Algorithm.defaults)}, got "
            f"{', '.join(found.defaults)}; write Algorithm.defaults | {{...}}, and give other settings to SPPOConfig"
        )
    return found


def _mask(outcomes: RolloutBatch) -> Tensor:
    """``[B, T]``, which values are of response tokens."""
    assert outcomes.values is not None
    return torch.arange(outcomes.values.shape[1]) < outcomes.lengths[:, None]
