"""Quantized base models under LoRA adapters (QLoRA, arXiv 2305.14314), with the weights of bitsandbytes.

The packed weights are frozen; adapters, and the critic's head, learn. Weights of other quantizers are refused by name.
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import is_bitsandbytes_available

from sppo._utils import suggest
from sppo.config import SPPOConfig

_SUPPORTED = "bitsandbytes"
_PACKED = ("Params4bit", "Int8Params")  # classes of bitsandbytes' weights
_MARKS = ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit")
"""Attributes by which transformers and PEFT recognize a quantized model."""


def bitsandbytes_config(settings: Mapping[str, Any]) -> BitsAndBytesConfig:
    """Make transformers' configuration of bitsandbytes from a mapping, as a recipe has it.

    Raises:
        ValueError: an unknown key, another quantizer, or neither 4 nor 8 bits.
        ImportError: bitsandbytes is not installed.
    """
    settings = dict(settings)
    method = settings.pop("quant_method", _SUPPORTED)
    if method != _SUPPORTED:
        raise ValueError(f"quantization_config.quant_method must be {_SUPPORTED!r}, got {method!r}")
    known = [name for name in inspect.signature(BitsAndBytesConfig).parameters if name != "kwargs"]
    for name in settings:
        if name not in known:
            raise ValueError(
                f"quantization_config has no key {name!r}{suggest(name, known)}; it takes {', '.join(known)}"
            )
    if not settings.get("load_in_4bit") and not settings.get("load_in_8bit"):
        raise ValueError(f"quantization_config must have load_in_4bit or load_in_8bit, got {settings!r}")
    if not is_bitsandbytes_available():
        raise ImportError("quantization_config requires bitsandbytes: pip install 'sppo-kernels[quantization]'")
    return BitsAndBytesConfig(**settings)


def _method_of(config: Any) -> str:
    """Return the name of the quantizer in a model's configuration, ``"an unknown quantizer"`` without one."""
    found = getattr(config, "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, Mapping) else getattr(found, "quant_method", None)
    return str(getattr(method, "value", method) or "an unknown quantizer")


def quantizer(model: PreTrainedModel) -> str | None:
    """Return the name of the quantizer whose weights a model has, None for plain weights."""
    if getattr(model, "is_quantized", False):
        return _method_of(model.config)
    if any(_is_packed(parameter) for parameter in model.parameters()):
        return _method_of(model.config)
    return None


def _is_packed(parameter: Tensor) -> bool:
    return type(parameter).__name__ in _PACKED or not parameter.is_floating_point() or parameter.element_size() < 2


def check_quantized(name: str, model: PreTrainedModel, *, has_adapter: bool, args: SPPOConfig) -> None:
    """Check that a model can be trained if its weights are quantized.

    Args:
        name: the argument of the trainer, for errors.
        model: the model, quantized or not.
        has_adapter: whether it learns an adapter.
        args: settings of the run.

    Raises:
        ValueError: it cannot be trained; the message says why and what to do.
    """
    method = quantizer(model)
    if method is None:
        return
    what = f"{name}={type(model).__name__}"
    if method != _SUPPORTED:
        raise ValueError(
            f"{what} has weights quantized by {method}, on which training was not tried here; load it with plain "
            "weights, or with those of bitsandbytes (load_in_4bit, load_in_8bit) and peft_config"
        )
    if not has_adapter:
        raise ValueError(
            f"{what} has quantized weights, which cannot be trained; "
            + ("pass peft_config" if name == "model" else "train it with an adapter (peft_config, critic_adapter=True)")
            + ", or load it without quantization_config"
        )
    if has_outliers(model):
        raise ValueError(
            f"{what} has 8-bit weights with llm_int8_threshold above 0: which columns are outliers depends on all "
            "sequences of a micro-batch, so the probability of a response would too; load it with "
            "llm_int8_threshold=0.0, or in 4 bits"
        )
    if getattr(model.config.quantization_config, "llm_int8_has_fp16_weight", False):
        raise ValueError(f"{what} has llm_int8_has_fp16_weight=True, whose weights are not packed; leave it False")
    for head in (model.get_output_embeddings(), getattr(model, "score", None)):
        if isinstance(head, nn.Module) and any(_is_packed(parameter) for parameter in head.parameters()):
            raise ValueError(
                f"{what} has a quantized head, which is read as one matrix here; name it in llm_int8_skip_modules of "
                "its quantization_config"
            )
    if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true"):
        raise ValueError(f"{what} has quantized weights: sharding them by FSDP was not tried here; train without fsdp")
    if getattr(args, "deepspeed_plugin", None):
        raise ValueError(f"{what} has quantized weights: DeepSpeed was not tried with them; train without it")


def has_outliers(model: PreTrainedModel) -> bool:
    """Tell whether 8-bit layers of a model compute columns with outliers apart, which they choose per batch."""
    config = getattr(model.config, "quantization_config", None)
    return isinstance(config, BitsAndBytesConfig) and config.load_in_8bit and config.llm_int8_threshold > 0


def keep_layout(model: nn.Module) -> None:
    """Switch off that 4-bit layers on a CPU pack their weights again for forwards in evaluation mode.

    These compute in bfloat16, also later in training mode, so that results would depend on what ran before.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.state_dict()  # unpacks a weight that has been packed
            vars(module)["support_avx512bf16_for_cpu"] = False


def plain_weight(module: nn.Module, weight: nn.Parameter) -> Tensor:
    """Return a weight of a module, with its values as floating-point numbers if it is quantized."""
    if type(weight).__name__ not in _PACKED:
        return weight.detach()
    from peft.utils.integrations import dequantize_bnb_weight

    return dequantize_bnb_weight(weight, state=getattr(module, "state", None)).detach()


def plain_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a copy of a model's configuration for :func:`plain_weight`, without the quantization by bitsandbytes."""
    config = copy.deepcopy(config)
    if _method_of(config) == _SUPPORTED:
        del config.quantization_config
    return config


def with_backbone(empty: PreTrainedModel, policy: PreTrainedModel) -> PreTrainedModel:
    """Give a model without weights a copy of the quantized backbone of another one.

    Args:
        empty: classifier on the meta device, whose only other module is the linear layer ``score``.
        policy: quantized model without an adapter.

    Raises:
        ValueError: the backbones are of different classes, or the classifier has other modules.
    """
    prefix = empty.base_model_prefix
    names = {name for name, _ in empty.named_children()}
    if type(empty.base_model) is not type(policy.base_model) or names != {prefix, "score"}:
        raise ValueError(f"{type(empty).__name__} is not a {type(policy.base_model).__name__} with a head")
    setattr(empty, prefix, copy.deepcopy(policy.base_model))
    width = cast(nn.Linear, empty.score).in_features
    empty.score = nn.Linear(width, 1, bias=False, dtype=policy.dtype, device=policy.device)
    empty.config.quantization_config = policy.config.quantization_config
    for name in _MARKS:
        if hasattr(policy, name):
            setattr(empty, name, getattr(policy, name))
    return empty
