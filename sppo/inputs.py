"""What the trainer is given: models, tokenizers and datasets, checked before anything is computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from sppo.adapters import CONFIG, load_adapter, the_model_in
from sppo.config import SPPOConfig
from sppo.critic import embedding_rows
from sppo.rollout import encode

logger = logging.get_logger(__name__)


def load_policy(model: PreTrainedModel | str) -> PreTrainedModel:
    """A model, or the one of a folder or hub name, in float32."""
    if isinstance(model, (str, Path)):
        return from_folder(model)
    if hasattr(model, "get_base_model"):
        model = the_model_in(model)
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise TypeError(f"model must be a causal language model of transformers or the name of one, got {type(model)}")
    return model


def from_folder(model: str | Path, **settings: Any) -> PreTrainedModel:
    """The model of a folder or hub name, in float32; where a folder holds an adapter, its base model with it.

    Raises:
        ValueError: the adapter's base model cannot be loaded.
    """
    settings = {"dtype": torch.float32, **settings}
    config = Path(model, CONFIG)
    if not config.is_file():
        return AutoModelForCausalLM.from_pretrained(model, **settings)
    base = json.loads(config.read_text())["base_model_name_or_path"]
    try:
        loaded = AutoModelForCausalLM.from_pretrained(base, **settings)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{str(model)!r} holds an adapter of the model {base!r}, which cannot be loaded ({error}); "
            "load that model and give it to sppo.adapters.load_adapter, or name it with --model"
        ) from error
    return load_adapter(loaded, model)


def with_master_weights(model: PreTrainedModel, args: SPPOConfig) -> PreTrainedModel:
    """A model whose weights are float32 where ``bf16=True``, which then is the precision of computing alone.

    Without that setting bfloat16 weights stay, and it is said that small steps are lost in their rounding. float16
    weights are widened always: Adam's moments of their gradients underflow.
    """
    if model.dtype == torch.bfloat16 and not args.bf16:
        logger.warning(
            f"{type(model).__name__} has bfloat16 weights: steps of less than 1/256 of a weight are lost in "
            "rounding. bf16=True keeps float32 weights and computes in bfloat16"
        )
    elif model.dtype in (torch.bfloat16, torch.float16):
        logger.info(f"{type(model).__name__}: {model.dtype} weights are kept in float32 while they learn")
        return model.float()
    return model


def check_tokenizer(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    """The tokenizer that goes with the policy, with a pad token.

    Raises:
        ValueError: it has no end-of-sequence token, or more tokens than the model.
    """
    if tokenizer is None:
        if not policy.config._name_or_path:
            raise ValueError("processing_class is None and model has no name to load one by; pass its tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(policy.config._name_or_path)
    if tokenizer.eos_token_id is None:
        raise ValueError("processing_class has no eos_token, so completions could not end; set tokenizer.eos_token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows = embedding_rows(policy)
    if len(tokenizer) > rows:
        raise ValueError(
            f"processing_class has {len(tokenizer)} tokens and model {rows} embeddings; "
            "take the model's own tokenizer, or call model.resize_token_embeddings(len(tokenizer))"
        )
    return tokenizer


def check_dataset(name: str, dataset: Any, tokenizer: PreTrainedTokenizerBase) -> datasets.Dataset:
    """The dataset, which must have rows and a column ``prompt`` of text or chat messages; ``name`` is for the error."""
    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(f"{name} must be a datasets.Dataset, got {type(dataset).__name__}")
    if "prompt" not in dataset.column_names:
        raise ValueError(
            f"{name} has no column 'prompt', only {dataset.column_names}; rename the one with the questions"
        )
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty; it needs at least one row")
    for row, prompt in enumerate(dataset["prompt"]):
        if not prompt or not isinstance(prompt, (str, list)):
            raise ValueError(f"{name} row {row}: prompt must be text or a list of chat messages, got {prompt!r}")
        if isinstance(prompt, list) and not tokenizer.chat_template:
            raise ValueError(
                f"{name} row {row}: prompt is a list of chat messages and processing_class has no chat_template; "
                "set tokenizer.chat_template, or make the prompts text"
            )
    return dataset


def short_enough(dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> datasets.Dataset:
    """The rows whose prompts have at most ``limit`` tokens."""
    if limit is None:
        return dataset
    kept = [i for i, prompt in enumerate(dataset["prompt"]) if len(encode(prompt, tokenizer)) <= limit]
    if not kept:
        raise ValueError(f"max_prompt_length={limit} leaves no prompt of {len(dataset)}; raise it")
    if len(kept) < len(dataset):
        logger.warning(
            f"{len(dataset) - len(kept)} of {len(dataset)} prompts are longer than max_prompt_length={limit}"
        )
    return dataset.select(kept)


def named(dataset: Any) -> dict[str, Any]:
    """Datasets by name; one alone has the empty name."""
    return dataset if isinstance(dataset, dict) else {} if dataset is None else {"": dataset}
