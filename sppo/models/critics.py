"""Critics: ordinary sequence-classification models with one label, read at the prompt's end or before each token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sppo.models.fsdp import full_tensor
from sppo.models.packed_attention import PACKED_ATTENTION, Packed, pack, packed_hidden, use_attention
from sppo.rollout.engine import Sample
from sppo_kernels import prompt_value_logits, prompt_value_loss

_MAX_TOKENS_PER_FORWARD = 2**15  # hidden states of a whole rollout would take gigabytes


class Critic(nn.Module):
    """A sequence classifier with one label that predicts values.

    Args:
        model: the classifier.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model: PreTrainedModel = model

    def set_prior(self, total: float, count: int) -> None:
        """Start an untrained head at a constant, the mean of ``count`` rewards; keep a trained head."""
        raise NotImplementedError

    def values(self, samples: Sequence[Sample]) -> list[Tensor]:
        """Return predictions for each sample: 0-d, or ``[T]`` for its T response tokens; float32 on the CPU."""
        raise NotImplementedError

    def loss(self, batch: dict[str, Tensor], max_length: int, normalizer: float) -> Tensor:
        """Return a micro-batch's share of the update's critic loss, 0-d.

        Args:
            batch: a micro-batch of :mod:`sppo.rollout.batching`.
            max_length: number of tokens of the longest packed sequence, or more.
            normalizer: divisor of the summed loss.
        """
        raise NotImplementedError

    def observe(self, samples: Sequence[Sample], gather: Callable[[list[Any]], list[Any]]) -> None:
        """Learn from the rewards of a rollout outside of the optimizer, after :meth:`values` of the same samples.

        Args:
            samples: this process's samples.
            gather: concatenates the lists of all processes.
        """

    def memory(self) -> dict[str, Tensor]:
        """Return what :meth:`observe` remembers, for a checkpoint."""
        return {}

    def restore(self, memory: dict[str, Tensor]) -> None:
        """Restore what :meth:`memory` returned; an empty dict forgets all."""


class PromptCritic(Critic):
    """Reads only the prompt and predicts P(success); trained with binary cross-entropy (SPPO, arXiv 2604.08865)."""

    def set_prior(self, total: float, count: int) -> None:
        """See :class:`Critic`. One success and one failure are added, so that the logit is finite."""
        _set_constant(self.model, math.log((total + 1) / (count - total + 1)))

    def values(self, samples: Sequence[Sample]) -> list[Tensor]:
        """See :class:`Critic`; 0-d each."""
        return list(torch.tensor(self.prompt_values([s.prompt_ids for s in samples])).unbind())

    def prompt_values(self, prompts: Sequence[Sequence[int]]) -> list[float]:
        """Predict P(success) for each prompt, given its tokens."""
        return prompt_values(self.model, prompts)

    def loss(self, batch: dict[str, Tensor], max_length: int, normalizer: float) -> Tensor:
        """See :class:`Critic`; ``normalizer`` is the number of samples of the update."""
        packed = Packed(batch["prompt_ids"], batch["prompt_position_ids"], batch["prompt_cu_seqlens"])
        return prompt_value_loss(
            packed_hidden(self.model, packed, max_length),
            value_head(self.model).weight,
            batch["last_index"],
            batch["outcomes"],
            bias=value_head(self.model).bias,
            normalizer=normalizer,
        ).loss


class TokenCritic(Critic):
    """Predicts the return before each response token; trained with the clipped value loss (PPO, arXiv 1707.06347).

    Args:
        model: the classifier.
        cliprange: see :func:`clipped_value_loss`.
    """

    def __init__(self, model: PreTrainedModel, cliprange: float) -> None:
        super().__init__(model)
        self.cliprange = cliprange

    def set_prior(self, total: float, count: int) -> None:
        """See :class:`Critic`."""
        _set_constant(self.model, total / count)

    @torch.no_grad()
    def values(self, samples: Sequence[Sample]) -> list[Tensor]:
        """See :class:`Critic`; ``[T]`` each."""
        sequences = [s.prompt_ids + s.response_ids[:-1] for s in samples]
        return [
            self._read(hidden, torch.tensor(s.policy_positions) + len(s.prompt_ids) - 1).cpu()
            for hidden, s in zip(packed_states(self.model, sequences), samples, strict=True)
        ]

    def loss(self, batch: dict[str, Tensor], max_length: int, normalizer: float) -> Tensor:
        """See :class:`Critic`; ``normalizer`` is the number of response tokens of the update."""
        packed = Packed(batch["input_ids"], batch["position_ids"], batch["cu_seqlens"])
        values = self._read(packed_hidden(self.model, packed, max_length), batch["response_index"])
        return clipped_value_loss(values, batch["values"], batch["returns"], self.cliprange).sum() / normalizer

    def _read(self, hidden: Tensor, index: Tensor) -> Tensor:
        head = value_head(self.model)
        return prompt_value_logits(hidden, head.weight, index.to(hidden.device), bias=head.bias)


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, cliprange: float) -> Tensor:
    """Compute PPO's loss of each value: ``max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2) / 2``.

    Source: the implementation of PPO (arXiv 1707.06347) in OpenAI baselines, which TRL and verl follow.

    Args:
        values: v, any shape; differentiated.
        old_values: v_old, values before the update, same shape.
        returns: R, same shape.
        cliprange: c.
    """
    clipped = torch.clamp(values, old_values - cliprange, old_values + cliprange)
    return torch.maximum((values - returns).square(), (clipped - returns).square()) / 2


class Calibration(NamedTuple):
    """Quality of predictions of outcomes; see :func:`calibration`."""

    brier: float
    brier_baseline: float
    explained_variance: float
    expected_calibration_error: float


def calibration(values: Tensor, outcomes: Tensor, baseline: float, bins: int = 10) -> Calibration:
    """Compare predictions ``[B]`` with outcomes ``[B]``, B at least 1.

    Args:
        values: predictions; for the calibration error, those outside [0, 1] count in the outer bins.
        outcomes: observed rewards.
        baseline: constant prediction to compare with.
        bins: number of bins of equal width over [0, 1].

    Returns:
        ``brier``: mean squared error of the predictions; ``brier_baseline``: mean squared error of the constant;
        ``explained_variance``: ``1 - brier / brier_baseline``, or 0 if the constant makes no error;
        ``expected_calibration_error``: mean over bins of ``|mean value - mean outcome|``, weighted by the number of
        values in each (Naeini, Cooper, Hauskrecht 2015).
    """
    brier = (values - outcomes).square().mean().item()
    constant = (baseline - outcomes).square().mean().item()
    bin_index = (values * bins).long().clamp(0, bins - 1)
    gaps = torch.zeros(bins).index_add(0, bin_index, values - outcomes)
    return Calibration(
        brier=brier,
        brier_baseline=constant,
        explained_variance=1 - brier / constant if constant else 0.0,
        expected_calibration_error=gaps.abs().sum().item() / len(values),
    )


def value_head(critic: PreTrainedModel) -> nn.Linear:
    """Return the layer that maps a hidden state to a value.

    Raises:
        ValueError: the critic has no such layer.
    """
    layer = getattr(critic, "score", None)
    if not isinstance(layer, nn.Linear) or layer.out_features != 1:
        raise ValueError(
            f"critic={type(critic).__name__} needs a linear head named 'score' with one label; load it with "
            "AutoModelForSequenceClassification.from_pretrained(..., num_labels=1)"
        )
    return layer


def set_head(critic: PreTrainedModel, bias: torch.Tensor) -> None:
    """Replace the head of ``critic`` by one with the same weight and a bias ``[1]``."""
    old = value_head(critic)
    new = nn.Linear(old.in_features, 1, dtype=old.weight.dtype, device=old.weight.device)
    with torch.no_grad():
        new.weight.copy_(old.weight)
        new.bias.copy_(bias)
    critic.score = new


@torch.no_grad()
def _set_constant(critic: PreTrainedModel, output: float) -> None:
    """Make an untrained head, whose weight is zero, predict a constant."""
    if not full_tensor(value_head(critic).weight).any():
        value_head(critic).bias.fill_(output)


@torch.no_grad()
def prompt_values(critic: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> list[float]:
    """Predict P(success) for each prompt; each distinct prompt is read once, packed without padding."""
    distinct = list(dict.fromkeys(map(tuple, prompts)))
    ends = [hidden[-1].clone() for hidden in packed_states(critic, distinct)]  # a view would keep its chunk alive
    if not ends:
        return []
    states = torch.stack(ends)
    index = torch.arange(len(states), device=states.device)
    logits = prompt_value_logits(states, value_head(critic).weight, index, bias=value_head(critic).bias)
    values = dict(zip(distinct, logits.sigmoid().tolist(), strict=True))
    return [values[tuple(prompt)] for prompt in prompts]


def packed_states(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    """Yield the last hidden states ``[T, H]`` of each sequence, computed in chunks to bound the memory."""
    for chunk in _chunks(sequences):
        packed = Packed(*(x.to(model.device) for x in pack(chunk)))
        with use_attention(model, PACKED_ATTENTION):
            states = packed_hidden(model, packed, max(map(len, chunk)))
        yield from states.split([len(sequence) for sequence in chunk])
        del states


def _chunks(sequences: Sequence[Sequence[int]]) -> list[list[Sequence[int]]]:
    """Split into chunks of at most ``_MAX_TOKENS_PER_FORWARD`` tokens; a longer sequence is a chunk of its own."""
    chunks: list[list[Sequence[int]]] = []
    remaining = 0
    for sequence in sequences:
        if len(sequence) > remaining or not chunks:
            chunks.append([])
            remaining = _MAX_TOKENS_PER_FORWARD
        chunks[-1].append(sequence)
        remaining -= len(sequence)
    return chunks
