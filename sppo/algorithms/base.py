"""The base class of algorithms, and a rollout as algorithms see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor


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
    scale_rewards: str | bool | None
    center_advantages: bool
    standardize_advantages: bool
    overlong_buffer: int | None
    max_completion_length: int


@dataclass
class RolloutBatch:
    """The B completions of a rollout, of all processes, as an algorithm sees them.

    Attributes:
        rewards: float32 ``[B]``.
        group_ids: int64 ``[B]``; completions that were sampled together for one prompt share a number.
        prompts: B names; a prompt has the same name in every rollout.
        lengths: int64 ``[B]``, numbers of response tokens that the policy wrote.
        mean_reward: mean reward of all earlier rollouts, or of this one if it is the first.
        values: float32, predicted before the update; None without a critic. Of a prompt critic or probe ``[B]``,
            P(success); of a token critic ``[B, T]``, the value before each response token, 0 after the last.
        greedy_rewards: float32 ``[B]``, reward of the greedy response to each prompt, if the algorithm needs it.
        drifts: float32 ``[B]``, mean absolute change of the log-probabilities of the prompt's previous response since
            it was sampled, 0 for the first one, in nats per token; if the algorithm tracks it.
        traces: B pairs of the first tokens of each response and their log-probabilities; if it tracks drifts.
    """

    rewards: Tensor
    group_ids: Tensor
    prompts: Sequence[str]
    lengths: Tensor
    mean_reward: float
    values: Tensor | None = None
    greedy_rewards: Tensor | None = None
    drifts: Tensor | None = None
    traces: Sequence[tuple[list[int], list[float]]] = ()


class Algorithm:
    """Base class of algorithms; a subclass overrides :meth:`advantages` and whatever else it changes.

    Attributes:
        critic: ``"prompt"``, ``"token"``, ``"probe"`` (reads the policy's hidden states of the prompt) or None.
        uses_groups: whether a response is compared with others to its prompt, so that ``num_generations`` must be at
            least 2.
        needs_greedy_baseline: whether each prompt is also answered greedily, which costs one more response per prompt.
        rewards_are_probabilities: whether rewards must be in [0, 1]; always so with a prompt critic.
        tracks_drift: whether the algorithm needs ``drifts`` and ``traces`` of :class:`RolloutBatch`.
        draws_prompts: whether prompts are drawn by :meth:`prompt_weights` rather than in the order of an epoch.
        objective: that of :func:`sppo_kernels.policy_loss`.
        reads: names of settings that only some algorithms read, and this one does.
        defaults: values of the ``SPPOConfig`` fields that are None.
        state: JSON values, by name, that persist from rollout to rollout and are saved in checkpoints.
    """

    critic: ClassVar[str | None] = None
    uses_groups: ClassVar[bool] = False
    needs_greedy_baseline: ClassVar[bool] = False
    rewards_are_probabilities: ClassVar[bool] = False
    tracks_drift: ClassVar[bool] = False
    draws_prompts: ClassVar[bool] = False
    objective: ClassVar[str] = "clip"
    reads: ClassVar[Sequence[str]] = ()
    defaults: ClassVar[dict[str, Any]] = {
        "num_generations": 1,
        "ratio_level": "token",
        "epsilon": 0.2,
        "epsilon_high": None,
        "dual_clip": float("inf"),
        "aggregation": "seq-mean-token-mean",
        "scale_rewards": "none",
        "dynamic_sampling": False,
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

    def prompt_weights(self, prompts: Sequence[str]) -> list[float]:
        """Return how likely each prompt is to be drawn next, relative to the others, by its name."""
        raise NotImplementedError(f"{type(self).__name__} draws prompts and has no method prompt_weights(prompts)")

    def trace(self, prompt: str) -> tuple[list[int], list[float]] | None:
        """Return what ``traces`` had for the prompt's previous response; None if there was none."""
        raise NotImplementedError(f"{type(self).__name__} tracks drifts and has no method trace(prompt)")

    def overlong_buffer(self) -> int:
        """Return over how many tokens before ``max_completion_length`` a penalty grows to 1; 0 for no penalty."""
        return self.args.overlong_buffer or 0

    def loss_arguments(self) -> dict[str, Any]:
        """Return keyword arguments of :func:`sppo_kernels.policy_loss`."""
        args = self.args
        return {
            "objective": self.objective,
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
            sequences: number of responses in the update, on all processes.
            tokens: number of their tokens.
        """
        return tokens if self.args.ratio_level == "token" and self.args.aggregation == "token-mean" else sequences


def standardized(values: Tensor) -> Tensor:
    """Return values ``[B]`` less their mean, over their unbiased standard deviation."""
    centered = values - values.mean()
    return centered / (centered.std() + 1e-8) if len(values) > 1 else centered


def response_mask(batch: RolloutBatch) -> Tensor:
    """Return a mask ``[B, T]`` of the values of response tokens."""
    assert batch.values is not None
    return torch.arange(batch.values.shape[1]) < batch.lengths[:, None]
