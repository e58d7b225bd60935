"""Algorithms: responses per prompt, critic, advantage and policy loss.

    name        critic   advantage of a response                    ratio           mean over                responses
    sppo        prompt   R - V(prompt)                              token           sequences of token means 1
    ppo         token    GAE over V(prompt + tokens), whitened      token           tokens                   1
    grpo                 (R - group mean) / group std               token           sequences of token means 8
    dr_grpo              R - group mean                             token           sequences of token sums  8
    rloo                 R - mean of the group's others             sequence_sum    sequences                4
    gspo                 (R - group mean) / group std               sequence_mean   sequences                8
    remax                R - R of the greedy response               token           sequences of token sums  1
    reinforce            R - constant, running or prompt's mean     token           sequences of token sums  1

Everything else is shared: rollouts, rewards, packing, gradient clipping, optimizer. The last three columns are defaults
that settings override. docs/algorithms.md has the formulas and shows how to add an algorithm.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from sppo._utils import import_object
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
    """The B completions of a rollout, of all processes, as an algorithm sees them.

    Attributes:
        rewards: float32 ``[B]``.
        group_ids: int64 ``[B]``; completions that were sampled together for one prompt share a number.
        prompts: B names; a prompt has the same name in every rollout.
        lengths: int64 ``[B]``, numbers of response tokens.
        mean_reward: mean reward of all earlier rollouts, or of this one if it is the first.
        values: float32, predicted before the update; None without a critic. Of a prompt critic ``[B]``, P(success); of
            a token critic ``[B, T]``, the value before each response token, 0 after the last.
        greedy_rewards: float32 ``[B]``, reward of the greedy response to each prompt, if the algorithm needs it.
    """

    rewards: Tensor
    group_ids: Tensor
    prompts: Sequence[str]
    lengths: Tensor
    mean_reward: float
    values: Tensor | None = None
    greedy_rewards: Tensor | None = None


class Algorithm:
    """Base class of algorithms; a subclass overrides :meth:`advantages` and whatever else it changes.

    Attributes:
        critic: ``"prompt"``, ``"token"`` or None.
        uses_groups: whether a response is compared with others to its prompt, so that ``num_generations`` must be at
            least 2.
        needs_greedy_baseline: whether each prompt is also answered greedily, which costs one more response per prompt.
        defaults: values of the ``SPPOConfig`` fields that are None.
        state: JSON values, by name, that persist from rollout to rollout and are saved in checkpoints.
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

    def advantages(self, batch: RolloutBatch) -> Tensor:
        """Compute the advantages of a rollout.

        Called once per rollout, in order, with the same batch on every process.

        Returns:
            float32 ``[B]``, one per response, or ``[B, T]``, one per response token.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method advantages(batch)")

    def returns(self, batch: RolloutBatch) -> Tensor:
        """Compute the targets of a token critic, float32 ``[B, T]``; called after :meth:`advantages`."""
        raise NotImplementedError(f"{type(self).__name__} has a token critic and no method returns(batch)")

    def loss_arguments(self) -> dict[str, Any]:
        """Return keyword arguments of :func:`sppo_kernels.policy_loss`."""
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
        """Return the divisor of an update's summed policy loss.

        Args:
            sequences, tokens: numbers of responses and of response tokens in the update, on all processes.
        """
        return tokens if self.args.ratio_level == "token" and self.args.aggregation == "token-mean" else sequences


class SPPO(Algorithm):
    """Sequence-Level PPO (arXiv 2604.08865): ``A = R - V(prompt)``, the same for each token of the response."""

    critic = "prompt"
    defaults = Algorithm.defaults | {"dual_clip": 3.0}

    def advantages(self, batch: RolloutBatch) -> Tensor:
        """See :class:`Algorithm`."""
        assert batch.values is not None
        return batch.rewards - batch.values


class PPO(Algorithm):
    """Token-level PPO (arXiv 1707.06347): a value before each token, GAE (arXiv 1506.02438), whitened advantages.

    The reward comes with the last token. The critic's target is ``advantage + value``; its loss is half the squared
    error of the prediction, or of the prediction clipped to ``cliprange_value`` around the old one; the larger counts.
    """

    critic = "token"
    defaults = Algorithm.defaults | {"aggregation": "token-mean"}

    def advantages(self, batch: RolloutBatch) -> Tensor:
        """See :class:`Algorithm`."""
        return whiten(self._gae(batch)[0], _mask(batch))

    def returns(self, batch: RolloutBatch) -> Tensor:
        """See :class:`Algorithm`."""
        return self._gae(batch)[1]

    def _gae(self, batch: RolloutBatch) -> tuple[Tensor, Tensor]:
        assert batch.values is not None
        rewards = torch.zeros_like(batch.values)
        rewards[torch.arange(len(rewards)), batch.lengths - 1] = batch.rewards
        return gae(rewards, batch.values, _mask(batch), gamma=self.args.gamma, lam=self.args.lam)


class GRPO(Algorithm):
    """Group Relative Policy Optimization (arXiv 2402.03300): ``A = (R - group mean) / (group std + 1e-6)``."""

    uses_groups = True
    defaults = Algorithm.defaults | {"num_generations": 8}

    def advantages(self, batch: RolloutBatch) -> Tensor:
        """See :class:`Algorithm`."""
        return group_advantages(batch.rewards, batch.group_ids, estimator="grpo")


class DrGRPO(Algorithm):
    """GRPO Done Right (arXiv 2503.20783): ``A = R - group mean``, no division by a response's own length."""

    uses_groups = True
    defaults = Algorithm.defaults | {"num_generations": 8, "aggregation": "seq-mean-token-sum"}

    def advantages(self, batch: RolloutBatch) -> Tensor:
        """See :class:`Algorithm`."""
        return group_advantages(batch.rewards, batch.group_ids, estimator="dr_grpo")

    def normalizer(self, sequences: int, tokens: int) -> float:
        """See :class:`Algorithm`; for a sum over tokens the divisor includes the maximum length, a constant."""
        count = super().normalizer(sequences, tokens)
        sums = self.args.ratio_level == "token" and self.args.aggregation == "seq-mean-token-sum"
        return count * self.args.max_completion_length if sums else count


class RLOO(Algorithm):
    """REINFORCE Leave-One-Out (arXiv 2402.14740): ``A = R - mean of the group's others``, per response."""

    uses_groups = True
    defaults = Algorithm.defaults | {"num_generations": 4, "ratio_level": "sequence_sum"}

    def advantages(self, batch: RolloutBatch) -> Tensor:
        """See :class:`Algorithm`."""
        return group_advantages(batch.rewards, batch.group_ids, estimator="rloo")


class GSPO(GRPO):
    """Group Sequence Policy Optimization (arXiv 2507.18071): GRPO's advantage, the length-normalized ratio."""

    defaults = GRPO.defaults | {"ratio_level": "sequence_mean", "epsilon": 3e-4, "epsilon_high": 4e-4}


class ReMax(Algorithm):
    """ReMax (arXiv 2310.10505): ``A = R - R of the greedy response``."""

    needs_greedy_baseline = True
    defaults = Algorithm.defaults | {"aggregation": "seq-mean-token-sum"}

    def advantages(self, batch: RolloutBatch) -> Tensor:
        """See :class:`Algorithm`."""
        assert batch.greedy_rewards is not None
        return batch.rewards - batch.greedy_rewards


class Reinforce(Algorithm):
    """REINFORCE (Williams, 1992) with the setting ``baseline``, for comparison with SPPO's critic.

    A number is a constant baseline; ``"running_mean"`` is the mean reward of all earlier rollouts; ``"prompt_mean"`` is
    the prompt's own mean reward in earlier rollouts, or the running mean if it had none.
    """

    defaults = Algorithm.defaults | {"aggregation": "seq-mean-token-sum"}

    def advantages(self, batch: RolloutBatch) -> Tensor:
        """See :class:`Algorithm`."""
        if self.args.baseline == "prompt_mean":
            return batch.rewards - torch.tensor(self._prompt_means(batch))
        running = self.args.baseline == "running_mean"
        return batch.rewards - (batch.mean_reward if running else float(self.args.baseline))

    def _prompt_means(self, batch: RolloutBatch) -> list[float]:
        """Return each prompt's mean reward in earlier rollouts, and add its new rewards for the next one."""
        seen = [self.state.get(prompt, (0, 0.0)) for prompt in batch.prompts]
        for prompt, reward in zip(batch.prompts, batch.rewards.tolist(), strict=True):
            count, total = self.state.get(prompt, (0, 0.0))
            self.state[prompt] = (count + 1, total + reward)
        return [total / count if count else batch.mean_reward for count, total in seen]


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


def _checked(found: type[Algorithm]) -> type[Algorithm]:
    if found.critic not in (None, "prompt", "token"):
        raise ValueError(f"{found.__name__}.critic must be 'prompt', 'token' or None, got {found.critic!r}")
    if found.defaults.keys() != Algorithm.defaults.keys():
        raise ValueError(
            f"{found.__name__}.defaults must have the keys {', '.join(Algorithm.defaults)}, got "
            f"{', '.join(found.defaults)}; write Algorithm.defaults | {{...}}, and give other settings to SPPOConfig"
        )
    return found


def _mask(batch: RolloutBatch) -> Tensor:
    """Return a mask ``[B, T]`` of the values of response tokens."""
    assert batch.values is not None
    return torch.arange(batch.values.shape[1]) < batch.lengths[:, None]
