"""Adapters: few weights that learn beside a model's own, which stay as they are (LoRA, arXiv 2106.09685, by PEFT).

They are injected into the model in place, so it keeps its class and its attributes. PEFT is imported where it is used.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

_WEIGHTS = "adapter_model.safetensors"
_NOT_OF_LEARNING = ("inference_mode", "base_model_name_or_path", "task_type", "peft_version", "revision")
_PREFIX = "base_model.model."  # where PEFT's own wrapper has the model


def has_adapter(model: nn.Module) -> bool:
    """Whether there is an adapter in the model."""
    return any(_is_of_adapter(name) for name, _ in model.named_parameters())


def _is_of_adapter(name: str) -> bool:
    return any(part.startswith("lora_") for part in name.split("."))


def add_adapter(model: PreTrainedModel, config: Any, *, also: Iterable[nn.Module] = ()) -> None:
    """Put an adapter into a model, in place, and have nothing else learn.

    Args:
        model: without an adapter; its weights keep their dtype, those of the adapter are float32.
        config: a ``peft.LoraConfig``; its ``target_modules`` must leave the embeddings out.
        also: modules that learn besides, with all their weights: a critic's head.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: the model has an adapter, or the configuration does not fit it.
        TypeError: it is no ``LoraConfig``.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if not isinstance(config, LoraConfig):
        raise TypeError(f"peft_config must be a peft.LoraConfig, got {type(config).__name__}")
    if has_adapter(model):
        raise ValueError(
            f"{type(model).__name__} has an adapter; leave peft_config None to train that, or merge it into the model"
        )
    _check_config(config)
    config, also = copy.deepcopy(config), list(also)
    config.base_model_name_or_path = model.config._name_or_path or None
    model.requires_grad_(False)
    try:
        inject_adapter_in_model(config, model)
    except (ValueError, TypeError) as error:
        raise ValueError(f"peft_config does not fit {type(model).__name__}: {error}") from error
    model.peft_config = {"default": config}
    continue_adapter(model)
    for module in also:
        module.float().requires_grad_(True)


def _check_config(config: Any) -> None:
    """ValueError for what would learn beside the factors, or is no sum with the weights: it could not be merged."""
    troubles = {"use_dora": False, "lora_bias": False, "bias": "none", "modules_to_save": None}
    troubles |= {"trainable_token_indices": None}
    for name, only in troubles.items():
        if (value := getattr(config, name, only)) != only:
            raise ValueError(
                f"peft_config.{name} must be {only!r}, got {value!r}: it cannot be merged into the weights"
            )


def settings_of_adapter(model: nn.Module) -> dict[str, Any] | None:
    """The adapter's configuration, as far as it decides how it learns; None without one."""
    config = getattr(model, "peft_config", {}).get("default")
    if config is None:
        return None
    found = {name: value for name, value in config.to_dict().items() if name not in _NOT_OF_LEARNING}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in found.items()}


def unwrap_peft(wrapped: Any) -> PreTrainedModel:
    """The model in PEFT's own wrapper, with the adapter in it.

    Raises:
        ValueError: it has no LoRA adapter, or several, or one of another name than PEFT's default.
    """
    kinds = {name: type(config).__name__ for name, config in wrapped.peft_config.items()}
    if kinds != {"default": "LoraConfig"}:
        raise ValueError(
            f"model has the adapters {kinds}; give one with a single LoRA adapter called 'default', as get_peft_model "
            "makes, or the base model and peft_config"
        )
    model = wrapped.get_base_model()
    _check_config(wrapped.peft_config["default"])
    model.peft_config = wrapped.peft_config
    return model


def continue_adapter(model: PreTrainedModel) -> None:
    """Let the adapter that is in a model learn, in float32, and nothing else.

    Raises:
        ValueError: it stands on an embedding.
    """
    output = model.get_output_embeddings()
    if output is not None and has_adapter(output):
        raise ValueError(
            "peft_config puts an adapter on the output embedding, which the fused log-probabilities read as one "
            "matrix; leave it out of target_modules ('all-linear' does)"
        )
    if has_adapter(model.get_input_embeddings()):
        raise ValueError(
            "peft_config puts an adapter on the input embedding, which may be tied to the output; leave it out of "
            "target_modules"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_is_of_adapter(name))
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def load_adapter(model: PreTrainedModel, folder: str | Path) -> PreTrainedModel:
    """Put the adapter that a folder holds into a model, in place.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: its weights do not fit the model's, or it is of a kind that cannot be merged. An adapter of another
            model whose weights happen to fit is not told apart.
    """
    from peft import PeftModel

    try:
        return unwrap_peft(PeftModel.from_pretrained(model, str(folder)))
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"the adapter in {str(folder)!r} does not fit {type(model).__name__}: {error}") from error


def save_adapter(model: PreTrainedModel, weights: Mapping[str, Tensor], folder: str | Path) -> None:
    """Write a model's adapter in PEFT's format, which ``from_pretrained`` of PEFT and of transformers reads.

    Args:
        model: has the adapter's configuration.
        weights: of the whole model, by name.
        folder: is made if there is none.
    """
    from peft import get_peft_model_state_dict

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.copy(model.peft_config["default"])
    config.inference_mode = True
    config.save_pretrained(folder)
    adapter = get_peft_model_state_dict(model, state_dict=dict(weights), save_embedding_layers=False)
    save_file(
        {_PREFIX + name: w.cpu().contiguous() for name, w in adapter.items()}, folder / _WEIGHTS, {"format": "pt"}
    )


@contextmanager
def adapter_off(model: PreTrainedModel) -> Iterator[None]:
    """Have the model as it was before it had an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter in learning:
            parameter.requires_grad_(True)


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """The weights that learn, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A model's weights under the names they have without an adapter, its adapter added in; the model is left as it is.

    A tied weight comes under each of its names.
    """
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner, adapted, last = name.partition(".base_layer.")
        if _is_of_adapter(name):
            continue
        if not adapted:
            yield name, parameter.detach()
        elif last == "weight":
            layer: Any = model.get_submodule(owner)
            change = sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters)
            yield f"{owner}.weight", (parameter + change).to(parameter.dtype)
        else:
            yield f"{owner}.{last}", parameter.detach()
