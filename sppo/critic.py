"""Critics: ordinary sequence-classification models with one label, read at the prompt's end or before each token."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, cast

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sppo.adapters import has_adapter, merged_weights
from sppo.attention import NAME, Packed, pack, packed_hidden, use_attention
from sppo.rollout.engine import Sample
from sppo.sharding import full
from sppo_kernels import prompt_value_logits, prompt_value_loss

_TOKENS_AT_ONCE = 2**15


class Critic(Protocol):
    """What a sequence classifier predicts, and how it learns to.

    Attributes:
        model: the classifier.
    """

    model: PreTrainedModel

    def set_prior(self, total: float, count: int) -> None:
        """Start an untrained head at a constant, the mean of ``count`` rewards; a trained head stays."""

    def values(self, samples: Sequence[Sample]) -> list[Tensor]:
        """Predictions for each sample: 0-d, or ``[T]`` for its T response tokens; float32 on the CPU."""

    def loss(self, batch: dict[str, Tensor], max_length: int, normalizer: float) -> Tensor:
        """The share of a micro-batch of :mod:`sppo.micro_batches` in the update's loss, 0-d."""


class PromptCritic:
    """Reads the prompt alone and predicts P(success), by binary cross-entropy (SPPO, arXiv 2604.08865)."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def set_prior(self, total: float, count: int) -> None:
        """See :class:`Critic`. One success and one failure are added: no finite logit is certain."""
        _set_constant(self.model, math.log((total + 1) / (count - total + 1)))

    def values(self, samples: Sequence[Sample]) -> list[Tensor]:
        """See :class:`Critic`; 0-d each."""
        return list(torch.tensor(prompt_values(self.model, [s.prompt_ids for s in samples])).unbind())

    def loss(self, batch: dict[str, Tensor], max_length: int, normalizer: float) -> Tensor:
        """See :class:`Critic`; ``normalizer``: samples of the update."""
        packed = Packed(batch["prompt_ids"], batch["prompt_position_ids"], batch["prompt_cu_seqlens"])
        return prompt_value_loss(
            packed_hidden(self.model, packed, max_length),
            head(self.model).weight,
            batch["last_index"],
            batch["outcomes"],
            bias=head(self.model).bias,
            normalizer=normalizer,
        ).loss


class TokenCritic:
    """Predicts the return before each response token, by half the clipped squared error (PPO, arXiv 1707.06347).

    Args:
        model: the classifier.
        cliprange: see :func:`clipped_value_loss`.
    """

    def __init__(self, model: PreTrainedModel, cliprange: float) -> None:
        self.model = model
        self.cliprange = cliprange

    def set_prior(self, total: float, count: int) -> None:
        """See :class:`Critic`."""
        _set_constant(self.model, total / count)

    @torch.no_grad()
    def values(self, samples: Sequence[Sample]) -> list[Tensor]:
        """See :class:`Critic`; ``[T]`` each."""
        sequences = [s.prompt_ids + s.response_ids[:-1] for s in samples]
        read = lambda hidden, s: self._read(hidden, torch.arange(len(s.prompt_ids) - 1, len(hidden)))
        return [read(*pair).cpu() for pair in zip(_packed_states(self.model, sequences), samples, strict=True)]

    def loss(self, batch: dict[str, Tensor], max_length: int, normalizer: float) -> Tensor:
        """See :class:`Critic`; ``normalizer``: response tokens of the update."""
        packed = Packed(batch["input_ids"], batch["position_ids"], batch["cu_seqlens"])
        values = self._read(packed_hidden(self.model, packed, max_length), batch["response_index"])
        return clipped_value_loss(values, batch["values"], batch["returns"], self.cliprange).sum() / normalizer

    def _read(self, hidden: Tensor, index: Tensor) -> Tensor:
        value_head = head(self.model)
        return prompt_value_logits(hidden, value_head.weight, index.to(hidden.device), bias=value_head.bias)


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, cliprange: float) -> Tensor:
    """PPO's loss of each value: ``max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2) / 2``.

    Source: the implementation of PPO (arXiv 1707.06347) in OpenAI baselines, which TRL and verl follow.
    """
    clipped = torch.clamp(values, old_values - cliprange, old_values + cliprange)
    return torch.maximum((values - returns).square(), (clipped - returns).square()) / 2


class Calibration(NamedTuple):
    """How good predictions of outcomes are: see :func:`calibration`."""

    brier: float
    brier_baseline: float
    explained_variance: float
    expected_calibration_error: float


def calibration(values: Tensor, outcomes: Tensor, baseline: float, bins: int = 10) -> Calibration:
    """Compare predictions ``[B]`` with outcomes ``[B]``, B at least 1.

    Args:
        values: predicted; for the calibration error, those outside [0, 1] count into the outer bins.
        outcomes: what came.
        baseline: the constant prediction that explained variance is measured against.
        bins: of equal width over [0, 1].

    Returns:
        ``brier``: mean squared error; ``brier_baseline``: that of the constant;
        ``explained_variance``: ``1 - brier / brier_baseline``, 0 where the constant makes no error either;
        ``expected_calibration_error``: the mean over bins of ``|mean value - mean outcome|``, weighted by how many
        values lie in each (Naeini, Cooper, Hauskrecht 2015).
    """
    brier = (values - outcomes).square().mean().item()
    constant = (baseline - outcomes).square().mean().item()
    place = (values * bins).long().clamp(0, bins - 1)
    gaps = torch.zeros(bins).index_add(0, place, values - outcomes)
    return Calibration(
        brier, constant, 1 - brier / constant if constant else 0.0, gaps.abs().sum().item() / len(values)
    )


def build_critic(
    critic: PreTrainedModel | str | Path | None,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    kind: str = "prompt",
) -> PreTrainedModel:
    """Make the critic that the user asked for, with a head that has a bias.

    Args:
        critic: None for a copy of the policy's backbone; or a model, or a folder (of a run, too) or hub name of one,
            with a head ``score`` of one label. A head that was trained here, or has a bias, is kept; another starts
            at zero.
        policy: the policy, which lends its backbone.
        tokenizer: the policy's; the critic reads its tokens.
        kind: what it is to be, ``"prompt"`` or ``"token"``.

    Raises:
        ValueError: the critic has no such head, too few embeddings, another tokenizer, or was trained as another kind.
    """
    if critic is None:
        critic = _copy_backbone(policy)
    elif isinstance(critic, (str, Path)):
        critic = critic_folder(critic)
        _check_tokenizer(str(critic), tokenizer)
        critic = load_critic(critic, policy.dtype)
    _restore_bias(critic)
    if (was := getattr(critic.config, "critic_kind", kind)) != kind:
        raise ValueError(f"critic was trained as a {was} critic, and the algorithm needs a {kind} critic; take another")
    rows = embedding_rows(critic)
    if rows < len(tokenizer):
        raise ValueError(
            f"critic has {rows} token embeddings and the policy's tokenizer {len(tokenizer)} tokens; "
            "take a critic of the same vocabulary, or call critic.resize_token_embeddings"
        )
    if head(critic).bias is None:
        set_head(critic, torch.zeros(1))
        nn.init.zeros_(head(critic).weight)
    return critic


def head(critic: PreTrainedModel) -> nn.Linear:
    """The layer that reads the value off a hidden state."""
    layer = getattr(critic, "score", None)
    if not isinstance(layer, nn.Linear) or layer.out_features != 1:
        raise ValueError(
            f"critic={type(critic).__name__} needs a linear head named 'score' with one label; load it with "
            "AutoModelForSequenceClassification.from_pretrained(..., num_labels=1)"
        )
    return layer


def embedding_rows(model: PreTrainedModel) -> int:
    """How many tokens a model knows."""
    return cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0]


def load_critic(folder: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A critic that was saved here, or any sequence classifier with one label.

    Args:
        folder: a run's folder, a checkpoint, a classifier's folder or hub name.
        dtype: of its weights.

    Raises:
        ValueError: the folder holds no classifier.
    """
    folder = critic_folder(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=dtype)
    _restore_bias(model)
    return model


def critic_folder(folder: str | Path) -> str | Path:
    """Where a run's folder or a checkpoint has its critic; a classifier's own folder and a hub name as they are.

    Raises:
        ValueError: the folder holds another model, a policy for one.
    """
    if Path(folder, "critic", "config.json").is_file():
        return Path(folder, "critic")
    config = Path(folder, "config.json")
    if Path(folder).is_dir() and not (
        config.is_file()
        and any("SequenceClassification" in name for name in json.loads(config.read_text()).get("architectures") or [])
    ):
        raise ValueError(
            f"there is no critic in {str(folder)!r}, nor in a folder 'critic' inside; train one with sppo train, or "
            "name the folder of a sequence classifier"
        )
    return folder


def _restore_bias(critic: PreTrainedModel) -> None:
    """Put the bias that :func:`save_critic` left in the configuration back into the head."""
    bias = getattr(critic.config, "score_bias", None)
    if bias is not None and head(critic).bias is None:
        set_head(critic, torch.tensor([bias]))


def save_critic(
    critic: PreTrainedModel, folder: str | Path, kind: str, weights: Mapping[str, Tensor] | None = None
) -> None:
    """Write a critic as an ordinary sequence classifier, with its own weights or these, whole and without an adapter.

    Transformers' classifiers have no bias in their head, so it goes into the configuration as ``score_bias``:
    P(success) is ``sigmoid(logit + config.score_bias)`` of what ``AutoModelForSequenceClassification`` loads, and
    ``sigmoid(logit)`` of what :func:`load_critic` does. ``critic_kind`` beside it is ``"prompt"``, or ``"token"`` for
    values that no sigmoid is taken of.
    """
    weights = critic.state_dict() if weights is None else weights
    critic.config.score_bias = weights["score.bias"].item()
    critic.config.critic_kind = kind
    critic.config.architectures = [type(critic).__name__]
    critic.config.save_pretrained(folder)
    save_torch_state_dict({name: w.contiguous() for name, w in weights.items() if name != "score.bias"}, folder)


def set_head(critic: PreTrainedModel, bias: torch.Tensor) -> None:
    """Give the head of ``critic`` a bias, next to the weight it has."""
    old = head(critic)
    new = nn.Linear(old.in_features, 1, dtype=old.weight.dtype, device=old.weight.device)
    with torch.no_grad():
        new.weight.copy_(old.weight)
        new.bias.copy_(bias)
    critic.score = new


@torch.no_grad()
def _set_constant(critic: PreTrainedModel, output: float) -> None:
    if not full(head(critic).weight).any():
        head(critic).bias.fill_(output)


@torch.no_grad()
def prompt_values(critic: PreTrainedModel, prompts: Sequence[list[int]]) -> list[float]:
    """P(success) for each prompt; each distinct prompt is read once, packed without padding."""
    distinct = list(dict.fromkeys(map(tuple, prompts)))
    ends = [hidden[-1].clone() for hidden in _packed_states(critic, distinct)]  # a view would keep all of its chunk
    if not ends:
        return []
    states = torch.stack(ends)
    index = torch.arange(len(states), device=states.device)
    logits = prompt_value_logits(states, head(critic).weight, index, bias=head(critic).bias)
    values = dict(zip(distinct, logits.sigmoid().tolist(), strict=True))
    return [values[tuple(prompt)] for prompt in prompts]


def _packed_states(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    """Last hidden states ``[T, H]`` of each sequence, a chunk of them at a time: a rollout's are gigabytes."""
    for chunk in _chunks(sequences):
        packed = Packed(*(x.to(model.device) for x in pack(chunk)))
        with use_attention(model, NAME):
            states = packed_hidden(model, packed, max(map(len, chunk)))
        yield from states.split([len(sequence) for sequence in chunk])
        del states


def _chunks(sequences: Sequence[Sequence[int]]) -> list[list[Sequence[int]]]:
    """Cut into runs of at most so many tokens (a longer sequence is a run of its own)."""
    chunks: list[list[Sequence[int]]] = []
    room = 0
    for sequence in sequences:
        if len(sequence) > room or not chunks:
            chunks.append([])
            room = _TOKENS_AT_ONCE
        chunks[-1].append(sequence)
        room -= len(sequence)
    return chunks


def _copy_backbone(policy: PreTrainedModel) -> PreTrainedModel:
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    try:
        critic = AutoModelForSequenceClassification.from_config(config, dtype=policy.dtype)
        weights = policy.base_model.state_dict()
        if has_adapter(policy):
            weights = critic.base_model.state_dict() | dict(merged_weights(policy.base_model))
        critic.base_model.load_state_dict(weights)
    except (ValueError, RuntimeError, KeyError) as error:
        raise ValueError(
            f"transformers has no sequence classifier with the backbone of {type(policy).__name__}; "
            "pass critic=, a model of AutoModelForSequenceClassification with num_labels=1"
        ) from error
    return critic.to(policy.device)


def _check_tokenizer(folder: str, tokenizer: PreTrainedTokenizerBase) -> None:
    if Path(folder).is_dir() and not Path(folder, "tokenizer_config.json").exists():
        return  # a critic without a tokenizer of its own
    theirs = AutoTokenizer.from_pretrained(folder).get_vocab()
    if any(theirs.get(token) != i for token, i in tokenizer.get_vocab().items()):
        raise ValueError(f"critic={folder!r} was made with another tokenizer than the policy's; take one of the same")
