"""Building, loading and saving of critics, which are ordinary sequence-classification models with one label."""

from __future__ import annotations

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
from sppo.models.probe import ProbeForSequenceClassification  # noqa: F401 - registers it, so that it can be loaded
from sppo.models.quantization import plain_config, quantizer, with_backbone


def build_critic(
    critic: PreTrainedModel | str | Path | None,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    kind: str = "prompt",
) -> PreTrainedModel:
    """Build or load a critic, with a head that has a bias.

    Args:
        critic: None for a copy of the policy's backbone. Otherwise a model with a head ``score`` of one label, or its
            folder (also a run's) or hub name. A head that has a bias, or was trained here, is kept; any other starts at
            zero.
        policy: the policy, whose backbone is copied.
        tokenizer: the policy's tokenizer, whose tokens the critic reads.
        kind: ``"prompt"`` or ``"token"``.

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
        raise ValueError(f"critic was trained as a {was} critic, but the algorithm needs a {kind} critic; use another")
    rows = embedding_rows(critic)
    if rows < len(tokenizer):
        raise ValueError(
            f"critic has {rows} token embeddings and the policy's tokenizer {len(tokenizer)} tokens; "
            "use a critic with the same vocabulary, or call critic.resize_token_embeddings"
        )
    if value_head(critic).bias is None:
        set_head(critic, torch.zeros(1))
        nn.init.zeros_(value_head(critic).weight)
    return critic


def load_critic(folder: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a critic that was saved here, or any sequence classifier with one label.

    Args:
        folder: a run's folder, a checkpoint, or a classifier's folder or hub name.
        dtype: dtype of the weights.

    Raises:
        ValueError: the folder holds no classifier.
    """
    folder = critic_folder(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=dtype)
    _restore_bias(model)
    return model


def critic_folder(folder: str | Path) -> str | Path:
    """Return the critic's folder inside a run's folder or a checkpoint; a classifier's folder or hub name unchanged.

    Raises:
        ValueError: the folder holds another kind of model.
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
    """Move the bias that :func:`save_critic` stored in the configuration back into the head."""
    bias = getattr(critic.config, "score_bias", None)
    if bias is not None and value_head(critic).bias is None:
        set_head(critic, torch.tensor([bias]))


def save_critic(
    critic: PreTrainedModel, folder: str | Path, kind: str, weights: Mapping[str, Tensor] | None = None
) -> None:
    """Save a critic as an ordinary sequence classifier.

    The heads of transformers' classifiers have no bias, so the configuration stores it as ``score_bias``. A prompt
    critic's P(success) is ``sigmoid(logit + config.score_bias)`` if loaded by ``AutoModelForSequenceClassification``,
    and ``sigmoid(logit)`` if loaded by :func:`load_critic`. A token critic's value is the same without the sigmoid.

    Args:
        critic: the classifier.
        folder: where to save it.
        kind: ``"prompt"``, ``"probe"`` or ``"token"``, stored in the configuration as ``critic_kind``.
        weights: unsharded weights without an adapter, by name; None for those of ``critic``.
    """
    weights = critic.state_dict() if weights is None else weights
    critic.config.score_bias = weights["score.bias"].item()
    critic.config.critic_kind, critic.config.dtype = kind, critic.dtype
    critic.config.architectures = [type(critic).__name__]
    plain_config(critic.config).save_pretrained(folder)
    save_torch_state_dict({name: w.contiguous() for name, w in weights.items() if name != "score.bias"}, folder)


def _copy_backbone(policy: PreTrainedModel) -> PreTrainedModel:
    config = plain_config(policy.config)
    config.num_labels = 1
    is_quantized = quantizer(policy) is not None
    if is_quantized and has_adapter(policy):
        raise ValueError(
            "the critic cannot be a copy of a policy that is quantized and has an adapter, which would have to be "
            "merged into quantized weights; pass critic="
        )
    try:
        if is_quantized:
            with torch.device("meta"):
                empty = AutoModelForSequenceClassification.from_config(config, dtype=policy.dtype)
            return with_backbone(empty, policy)
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
        return  # the critic was saved without a tokenizer
    vocabulary = AutoTokenizer.from_pretrained(folder).get_vocab()
    if any(vocabulary.get(token) != i for token, i in tokenizer.get_vocab().items()):
        raise ValueError(f"critic={folder!r} has another tokenizer than the policy; use a critic with the same one")
