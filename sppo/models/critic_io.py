"""Critics made, loaded and saved: ordinary sequence-classification models with one label."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sppo.models.critics import set_head, value_head
from sppo.models.lora import has_adapter, merged_weights
from sppo.models.policy_io import embedding_rows


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
    if value_head(critic).bias is None:
        set_head(critic, torch.zeros(1))
        nn.init.zeros_(value_head(critic).weight)
    return critic


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
    if bias is not None and value_head(critic).bias is None:
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
