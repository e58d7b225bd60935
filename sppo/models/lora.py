"""LoRA adapters (arXiv 2106.09685) by PEFT: few weights that learn, next to frozen ones.

They are injected into the model in place, so that it keeps its class and attributes. PEFT is imported on use.
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
from transformers.utils import logging

from sppo.models.quantization import plain_weight

logger = logging.get_logger(__name__)

_WEIGHTS = "adapter_model.safetensors"
_NOT_ABOUT_LEARNING = ("inference_mode", "base_model_name_or_path", "task_type", "peft_version", "revision")
_INITIALIZATIONS = (True, False, "gaussian", "orthogonal")
_BASE_LAYER = ".base_layer"
_PREFIX = "base_model.model."  # of names in PEFT's own wrapper


def has_adapter(model: nn.Module) -> bool:
    """Tell whether the model has an adapter."""
    return any(_is_of_adapter(name) for name, _ in model.named_parameters())


def _is_of_adapter(name: str) -> bool:
    return any(part.startswith("lora_") for part in name.split("."))


def add_adapter(model: PreTrainedModel, config: Any, *, also: Iterable[nn.Module] = ()) -> None:
    """Add an adapter to a model in place, and freeze all other weights.

    Args:
        model: a model without an adapter; its weights keep their dtype, the adapter's are float32.
        config: a ``peft.LoraConfig`` whose ``target_modules`` do not include the embeddings.
        also: modules all of whose weights learn too, such as a critic's head.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: the model has an adapter, or the configuration does not fit it.
        TypeError: ``config`` is not a ``LoraConfig``.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if not isinstance(config, LoraConfig):
        raise TypeError(f"peft_config must be a peft.LoraConfig, got {type(config).__name__}")
    if has_adapter(model):
        raise ValueError(
            f"{type(model).__name__} has an adapter; leave peft_config None to train it, or merge it into the model"
        )
    _check_config(config)
    if config.lora_dropout:
        raise ValueError(
            f"peft_config.lora_dropout must be 0, got {config.lora_dropout}: policy and critic are trained without "
            "dropout, so that a ratio differs from 1 only because the weights changed"
        )
    if config.init_lora_weights not in _INITIALIZATIONS:
        raise ValueError(
            f"peft_config.init_lora_weights must be one of {', '.join(map(repr, _INITIALIZATIONS))}, got "
            f"{config.init_lora_weights!r}: others change the frozen weights, which are not saved, or need data"
        )
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
    """Reject settings with which other weights learn, or the adapter cannot be merged into the weights.

    Settings are looked up by name, as PEFT's versions differ in which they have.
    """
    required = {
        "use_dora": False,
        "lora_bias": False,
        "bias": "none",
        "modules_to_save": None,
        "trainable_token_indices": None,
        "target_parameters": None,
        "layer_replication": None,
        "alora_invocation_tokens": None,
        "use_qalora": False,
        "use_bdlora": None,
        "arrow_config": None,
        "kasa_config": None,
        "monteclora_config": None,
        "velora_config": None,
    }
    for name, expected in required.items():
        if (value := getattr(config, name, expected)) != expected:
            raise ValueError(
                f"peft_config.{name} must be {expected!r}, got {value!r}: it cannot be merged into the weights"
            )


def settings_of_adapter(model: nn.Module) -> dict[str, Any] | None:
    """Return the settings of the adapter that affect how it learns; None without an adapter."""
    config = getattr(model, "peft_config", {}).get("default")
    if config is None:
        return None
    found = {name: value for name, value in config.to_dict().items() if name not in _NOT_ABOUT_LEARNING}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in found.items()}


def unwrap_peft(wrapped: Any) -> PreTrainedModel:
    """Take a model, with its adapter, out of PEFT's wrapper.

    Raises:
        ValueError: it does not have exactly one LoRA adapter, under PEFT's default name.
    """
    kinds = {name: type(config).__name__ for name, config in wrapped.peft_config.items()}
    if kinds != {"default": "LoraConfig"}:
        raise ValueError(
            f"model has the adapters {kinds}; pass one with a single LoRA adapter called 'default', as get_peft_model "
            "makes, or pass the base model and peft_config"
        )
    model = wrapped.get_base_model()
    _check_config(wrapped.peft_config["default"])
    model.peft_config = wrapped.peft_config
    return model


def continue_adapter(model: PreTrainedModel) -> None:
    """Make the weights of a model's adapter trainable, in float32, and freeze all others.

    Raises:
        ValueError: an embedding has an adapter.
    """
    config = getattr(model, "peft_config", {}).get("default")
    if config is not None and config.lora_dropout:
        logger.warning(f"the adapter's lora_dropout={config.lora_dropout} is not applied: training has no dropout")
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
    """Load the adapter in a folder into a model, in place.

    An adapter of another model whose shapes happen to fit is not detected.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: its weights do not fit the model's, or it is of a kind that cannot be merged.
    """
    from peft import PeftModel

    try:
        return unwrap_peft(PeftModel.from_pretrained(model, str(folder)))
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"the adapter in {str(folder)!r} does not fit {type(model).__name__}: {error}") from error


def save_adapter(model: PreTrainedModel, weights: Mapping[str, Tensor], folder: str | Path) -> None:
    """Save a model's adapter in PEFT's format, which ``from_pretrained`` of PEFT and of transformers reads.

    Args:
        model: the model with the adapter's configuration.
        weights: unsharded weights of the complete model, by name.
        folder: created if it does not exist.
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
    """Switch a model's adapter off within a context."""
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


def initial_adapter(model: PreTrainedModel) -> dict[str, Tensor] | None:
    """Return a copy of a model's adapter weights by name, or None if it changes nothing, as a new one."""
    adapter = {name: parameter for name, parameter in model.named_parameters() if _is_of_adapter(name)}
    if not any(bool(parameter.any()) for name, parameter in adapter.items() if "lora_B" in name.split(".")):
        return None
    return {name: parameter.detach().clone() for name, parameter in adapter.items()}


@contextmanager
def adapter_as(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Give a model's adapter other weights within a context.

    Args:
        model: a model that is not sharded, or whose weights are gathered.
        weights: by name, as :func:`initial_adapter` returns them.
    """
    adapter = {name: parameter for name, parameter in model.named_parameters() if name in weights}
    before = {name: parameter.detach().clone() for name, parameter in adapter.items()}
    _copy_into(adapter, weights)
    try:
        yield
    finally:
        _copy_into(adapter, before)


@torch.no_grad()
def _copy_into(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that learn, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a model's weights with its adapter merged, under their names without an adapter.

    Quantized weights are yielded as floating-point numbers, and persistent buffers too. The model itself does not
    change. A tied weight is yielded under each of its names.
    """
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, last = name.rpartition(".")
        if _is_of_adapter(name):
            continue
        weight = plain_weight(model.get_submodule(owner), parameter)
        if owner.endswith(_BASE_LAYER) and last == "weight":
            layer: Any = model.get_submodule(owner.removesuffix(_BASE_LAYER))
            change = sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters)
            weight = (weight + change).to(weight.dtype)
        yield _without_adapter(name), weight
    saved = model.state_dict().keys()
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if name in saved:
            yield _without_adapter(name), buffer


def _without_adapter(name: str) -> str:
    return name.replace(f"{_BASE_LAYER}.", ".")
