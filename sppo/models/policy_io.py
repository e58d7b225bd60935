"""What the trainer is given: models, tokenizers and datasets, checked before anything is computed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from sppo._utils import ADAPTER_CONFIG
from sppo.config import SPPOConfig
from sppo.models.lora import load_adapter, unwrap_peft

logger = logging.get_logger(__name__)


def load_policy(model: PreTrainedModel | str) -> PreTrainedModel:
    """A model, or the one of a folder or hub name, in float32."""
    if isinstance(model, (str, Path)):
        return from_folder(model)
    if hasattr(model, "get_base_model"):
        model = unwrap_peft(model)
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise TypeError(f"model must be a causal language model of transformers or the name of one, got {type(model)}")
    return model


def from_folder(model: str | Path, **settings: Any) -> PreTrainedModel:
    """The model of a folder or hub name, in float32; where a folder holds an adapter, its base model with it.

    Raises:
        ValueError: the adapter's base model cannot be loaded.
    """
    settings = {"dtype": torch.float32, **settings}
    config = Path(model, ADAPTER_CONFIG)
    if not config.is_file():
        return AutoModelForCausalLM.from_pretrained(model, **settings)
    base = json.loads(config.read_text())["base_model_name_or_path"]
    try:
        loaded = AutoModelForCausalLM.from_pretrained(base, **settings)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{str(model)!r} holds an adapter of the model {base!r}, which cannot be loaded ({error}); "
            "load that model and give it to sppo.models.lora.load_adapter, or name it with --model"
        ) from error
    return load_adapter(loaded, model)


def ensure_fp32_weights(model: PreTrainedModel, args: SPPOConfig) -> PreTrainedModel:
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


def embedding_rows(model: PreTrainedModel) -> int:
    """How many tokens a model knows."""
    return cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0]


def frozen_copy(policy: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Return a copy of the policy that does not learn, as the reference of a KL penalty."""
    return copy.deepcopy(policy).eval().requires_grad_(False).to(device)
