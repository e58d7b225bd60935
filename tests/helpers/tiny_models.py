"""Tiny models and a character tokenizer, made without downloads or files."""

from __future__ import annotations

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

ALPHABET = "0123456789abcdefghij+-=? "


def char_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with <pad> (0), <eos> (1) and each character of ALPHABET."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *ALPHABET])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


SIZES = {
    "vocab_size": len(ALPHABET) + 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    "gemma2": (
        Gemma2Config,
        Gemma2ForCausalLM,
        {"head_dim": 8, "sliding_window": 3, "attn_implementation": "eager", "query_pre_attn_scalar": 8},
    ),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, {"head_dim": 8, "sliding_window": 3, "query_pre_attn_scalar": 8}),
}


def tiny_model(family: str = "qwen2", seed: int = 0, **changes):
    """Make a randomly initialized model of a family; the same seed gives the same weights."""
    config_class, model_class, extra = FAMILIES[family]
    config = config_class(**(SIZES | extra | changes))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config)
        for parameter in model.parameters():  # larger than usual, so that a mistake shows
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return model
