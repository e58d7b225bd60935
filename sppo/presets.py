"""Published settings of SPPO (arXiv 2604.08865, appendix E and the released implementation)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import TrainingArguments

_COMMON: dict[str, Any] = {
    "algorithm": "sppo",
    "optim": "adamw_torch",
    "learning_rate": 1e-6,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 1.0,
    "critic_max_grad_norm": 1.0,
    "critic_weight_decay": 0.01,
    "critic_warmup_steps": 0,
    "per_device_train_batch_size": 1,
    "num_generations": 1,
    "num_iterations": 1,
    "max_completion_length": 8192,
    "temperature": 0.6,
    "eval_temperature": 0.6,
    "epsilon": 0.2,
    "epsilon_high": 0.2,
    "dual_clip": 3.0,
    "ratio_level": "token",
    "aggregation": "seq-mean-token-mean",
    "beta": 0.0,
    "bf16": True,
}
_7B: dict[str, Any] = {
    "gradient_accumulation_steps": 32,
    "steps_per_generation": 512,
    "max_steps": 200 * 16,
    "max_prompt_length": 2048,
    "weight_decay": 0.1,
    "critic_learning_rate": 1e-5,
}
PRESETS: dict[str, dict[str, Any]] = {
    "1.5b": {
        "gradient_accumulation_steps": 128,
        "steps_per_generation": 256,
        "max_steps": 1000 * 2,
        "max_prompt_length": 1024,
        "weight_decay": 0.01,
        "critic_learning_rate": 5e-6,
    },
    "7b": _7B,
    "7b-small-critic": _7B,
}
"""Settings that depend on the size of the model, by its name."""

SETTINGS_OF_TRL = {
    "loss_type": "set algorithm= (grpo, dr_grpo, dapo, cispo), or aggregation= for the mean alone",
    "importance_sampling_level": "set ratio_level='sequence_mean', or algorithm='gspo'",
    "generation_batch_size": "set steps_per_generation=; a rollout has per_device_train_batch_size times as many",
    "vllm_importance_sampling_correction": "set rollout_correction= and rollout_cap=",
    "vllm_importance_sampling_mode": "set rollout_correction= and rollout_cap=",
    "vllm_importance_sampling_cap": "set rollout_cap=",
    "vllm_gpu_memory_utilization": "set rollout_engine_kwargs={'gpu_memory_utilization': ...}",
    "vllm_tensor_parallel_size": "use vllm_mode='server', and give it to the server",
    "max_tool_calling_iterations": "set max_turns=",
    "repetition_penalty": "set generation_kwargs={'repetition_penalty': ...}",
    "cache_implementation": "set rollout_engine_kwargs={'cache_implementation': ...}",
    "model_init_kwargs": "load the model, and pass it to the trainer",
    "disable_dropout": "dropout is always off",
    "num_generations_eval": "use sppo eval --k",
    "sync_ref_model": "not available",
    "top_entropy_quantile": "not available",
}
"""What to set here instead of settings of TRL's GRPOConfig that have another name or do not exist."""

_CHECKPOINTING_NAMES = ("activation_checkpointing", "gradient_checkpointing")  # transformers renamed it


def preset(size: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the published settings with overrides, as arguments of :class:`sppo.SPPOConfig`.

    Raises:
        ValueError: there is no preset of that size.
    """
    if size not in PRESETS:
        raise ValueError(f"size must be one of {', '.join(PRESETS)}, got {size!r}")
    settings = _COMMON | PRESETS[size]
    if not overrides.keys() & set(_CHECKPOINTING_NAMES):
        name = next(name for name in _CHECKPOINTING_NAMES if name in TrainingArguments.__dataclass_fields__)
        settings[name] = True
    return settings | dict(overrides)
