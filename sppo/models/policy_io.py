"""Loading and checking of policies and their tokenizers."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from sppo._utils import ADAPTER_CONFIG
from sppo.config import SPPOConfig
from sppo.models.lora import load_adapter, unwrap_peft
from sppo.models.quantization import bitsandbytes_config, quantizer

logger = logging.get_logger(__name__)

_STORED_DTYPE = "_sppo_stored_dtype"  # attribute of a model that was loaded in float32


def load_policy(model: PreTrainedModel | str) -> PreTrainedModel:
    """Load the policy by its folder or hub name in float32, or check the given model.

    Raises:
        TypeError: the model is not a causal language model.
        ValueError: the model is configured for a loss of its router.
    """
    if isinstance(model, (str, Path)):
        model = from_folder(model)
    if hasattr(model, "get_base_model"):
        model = unwrap_peft(model)
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise TypeError(f"model must be a causal language model of transformers or the name of one, got {type(model)}")
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        raise ValueError(
            "model.config.output_router_logits is True, which asks for the router's load-balancing loss; the loss of "
            "SPPO has no such term. Set it to False to train without"
        )
    return model


def from_folder(model: str | Path, **settings: Any) -> PreTrainedModel:
    """Load a model in float32; from a folder with an adapter, load its base model and add the adapter.

    Args:
        model: folder or hub name.
        settings: arguments of ``from_pretrained``; a mapping as ``quantization_config`` is one of bitsandbytes.

    Raises:
        ValueError: the adapter's base model cannot be loaded, or ``quantization_config`` is invalid.
    """
    if isinstance(quantization := settings.get("quantization_config"), Mapping):
        settings["quantization_config"] = bitsandbytes_config(quantization)
    asked, settings = settings, {"dtype": torch.float32, **settings}
    config = Path(model, ADAPTER_CONFIG)
    if not config.is_file():
        loaded = AutoModelForCausalLM.from_pretrained(model, **settings)
        if "dtype" not in asked:
            shared = ("revision", "subfolder", "token", "trust_remote_code", "cache_dir")
            of_config = {name: value for name, value in asked.items() if name in shared}
            vars(loaded)[_STORED_DTYPE] = AutoConfig.from_pretrained(model, **of_config).dtype
        return loaded
    base = json.loads(config.read_text())["base_model_name_or_path"]
    try:
        loaded = AutoModelForCausalLM.from_pretrained(base, **settings)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{str(model)!r} holds an adapter of the model {base!r}, which cannot be loaded ({error}); "
            "load that model and pass it to sppo.models.lora.load_adapter, or name it with --model"
        ) from error
    return load_adapter(loaded, model)


def ensure_fp32_weights(model: PreTrainedModel, args: SPPOConfig) -> PreTrainedModel:
    """Convert the weights to float32 if ``bf16=True``, so that only computation is in bfloat16.

    Without that setting bfloat16 weights are kept, with a warning that small steps are lost in rounding. float16
    weights are always converted, because Adam's moments of their gradients underflow. A quantized model, which can be
    evaluated without an adapter, is kept.
    """
    if quantizer(model) is not None:
        return model
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
    """Check the policy's tokenizer, or load it, and set its pad token if it has none.

    Raises:
        ValueError: it has no end-of-sequence token, or more tokens than the model.
    """
    if tokenizer is None:
        if not policy.config._name_or_path:
            raise ValueError(
                "processing_class is None and model has no name to load a tokenizer by; pass its tokenizer"
            )
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


def stored_dtype(policy: PreTrainedModel) -> torch.dtype:
    """Return the dtype in which a policy comes: of its files if :func:`from_folder` chose another, else its own."""
    return vars(policy).get(_STORED_DTYPE) or policy.dtype


def embedding_rows(model: PreTrainedModel) -> int:
    """Return the number of rows of a model's input embedding."""
    return cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0]


def frozen_copy(policy: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Return a copy of the policy that does not learn, as the reference of a KL penalty."""
    return copy.deepcopy(policy).eval().requires_grad_(False).to(device)
