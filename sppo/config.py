"""Settings of a training run: transformers' TrainingArguments and this trainer's own, named as in TRL if it has them.

``sppo train --help`` shows the ``help`` of each field.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from sppo.algorithms import ALGORITHMS, algorithm_class, readers_of
from sppo.presets import SETTINGS_OF_TRL, preset
from sppo.rollout.generation import VLLM_MODES, check_engine_settings, check_generation_settings
from sppo.rollout.support import is_truncated
from sppo.settings import SPPOSettings
from sppo_kernels.ops.policy_loss import AGGREGATIONS, RATIO_LEVELS, ROLLOUT_CORRECTIONS

BASELINES = ("running_mean", "prompt_mean")
_PUSHES_CHECKPOINTS = (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)


@dataclass
class SPPOConfig(SPPOSettings, TrainingArguments):
    """Arguments of :class:`sppo.SPPOTrainer`, in addition to those of ``transformers.TrainingArguments``.

    A rollout has ``per_device_train_batch_size * steps_per_generation`` completions on each process. The trainer learns
    from them in ``num_iterations * steps_per_generation / gradient_accumulation_steps`` updates. Micro-batches are
    balanced by tokens, so ``per_device_train_batch_size`` is their mean number of sequences. An epoch is rounded up to
    complete rollouts.

    Differences from ``TrainingArguments``: every update is logged, the learning rate is constant by default, and the
    trainer itself restores the position in the data (``ignore_data_skip`` is always True).
    """

    def __new__(cls, *args: Any, **settings: Any) -> SPPOConfig:
        """Name the replacement of a setting of TRL that has another name here.

        Raises:
            TypeError: there is such a setting.
        """
        for name in settings:
            if name in SETTINGS_OF_TRL:
                raise TypeError(f"{cls.__name__} has no setting {name!r}: {SETTINGS_OF_TRL[name]}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if self.bf16 and not torch.accelerator.is_available():
            self.use_cpu = True  # without an accelerator, transformers requires use_cpu for bf16
        if self.metric_for_best_model is None and (self.load_best_model_at_end or self.save_strategy == "best"):
            self.metric_for_best_model, self.greater_is_better = "reward", True  # there is no evaluation loss
        super().__post_init__()
        self.ignore_data_skip = True
        if self.steps_per_generation is None:
            self.steps_per_generation = self.gradient_accumulation_steps
        if self.critic_weight_decay is None:
            self.critic_weight_decay = self.weight_decay
        if self.use_vllm:
            self.rollout_engine = "vllm"
        if isinstance(self.scale_rewards, bool):
            self.scale_rewards = "group" if self.scale_rewards else "none"
        if self.entropy_coef and self.logprobs_backward == "cache":
            self.logprobs_backward = "recompute"  # entropies with gradients need the logits
        self._apply_defaults(algorithm_class(self.algorithm).defaults)
        self._check_choices()
        self._check_ranges()
        self._check_shapes()
        self._check_readers()
        check_generation_settings(self)
        check_engine_settings(self)

    def _apply_defaults(self, defaults: dict[str, Any]) -> None:
        if self.epsilon is not None and self.epsilon_high is None and self.algorithm not in ("dapo", "cispo"):
            self.epsilon_high = self.epsilon  # those two have an upper bound of their own
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.epsilon_high is None:
            self.epsilon_high = self.epsilon

    @classmethod
    def paper(cls, size: str = "1.5b", **overrides: Any) -> SPPOConfig:
        """Return the published settings (arXiv 2604.08865, appendix E and the released implementation).

        They put one sequence in a micro-batch and are for one process: on ``n`` processes divide both
        ``gradient_accumulation_steps`` and ``steps_per_generation`` by n.

        Args:
            size: ``"1.5b"`` (256 prompts per rollout, 2 updates), ``"7b"`` or ``"7b-small-critic"`` (512 prompts, 16
                updates). The last two have the same settings: pass the 1.5B model as ``critic=`` of the trainer for
                the small critic.
            **overrides: values of any field, for example ``output_dir``.

        Raises:
            ValueError: an unknown size, or an invalid override.
        """
        return cls(**preset(size, overrides))

    @property
    def rollout_size(self) -> int:
        """Completions per rollout on one process."""
        assert self.steps_per_generation is not None
        return self.per_device_train_batch_size * self.steps_per_generation

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps per rollout."""
        assert self.steps_per_generation is not None
        return self.num_iterations * self.steps_per_generation // self.gradient_accumulation_steps

    @property
    def is_truncated(self) -> bool:
        """Whether top_p, top_k or min_p exclude tokens from sampling."""
        return is_truncated(self.top_p, self.top_k, self.min_p)

    def check_processes(self) -> None:
        """Check that several processes, if launched, train together.

        Raises:
            ValueError: this process has several GPUs, it trains alone although a launcher started several, or a setting
                is for one process only.
        """
        if self.full_disk == "continue" and self.world_size > 1:
            raise ValueError(
                f"full_disk='continue' is for one process, this run has {self.world_size}: the others would wait for "
                "the checkpoint; use full_disk='stop'"
            )
        if self.n_gpu > 1:
            raise ValueError(
                f"{self.n_gpu} GPUs in one process; start with accelerate launch, or make only one GPU visible"
            )
        if (launched := int(os.environ.get("WORLD_SIZE", "1"))) > 1 and self.world_size == 1:
            raise ValueError(
                f"WORLD_SIZE={launched}, but this process trains alone (parallel_mode={self.parallel_mode.value}): on "
                "CPUs set use_cpu=True, on GPUs give each process one"
            )

    def _check_readers(self) -> None:
        """Reject settings that this algorithm does not read, if it is one of this package."""
        if self.algorithm not in ALGORITHMS:
            return
        for each in fields(SPPOSettings):
            readers = readers_of(each.name)
            value = getattr(self, each.name)
            is_off = value == each.default or value is False or value == "none" or (each.default is None and not value)
            if readers and self.algorithm not in readers and not is_off:
                raise ValueError(
                    f"{each.name}={value!r} has no effect with algorithm={self.algorithm!r}; leave it out, or use one "
                    f"of {', '.join(readers)}"
                )

        if algorithm_class(self.algorithm).objective == "cispo":
            for name, allowed in (("ratio_level", (None, "token")), ("dual_clip", (None, math.inf))):
                if (value := getattr(self, name)) not in allowed:
                    raise ValueError(f"{name}={value!r} does not fit algorithm={self.algorithm!r}; leave it None")

    def _check_choices(self) -> None:
        if self.save_dtype == "float16":
            raise ValueError(
                "save_dtype='float16' is not available: weights above 65504 would become infinite and those below 6e-8 "
                "zero; use 'bfloat16', which has the range of float32"
            )
        if self.save_dtype is not None and self.push_to_hub and self.hub_strategy in _PUSHES_CHECKPOINTS:
            raise ValueError(
                f"save_dtype={self.save_dtype!r} does not apply to the checkpoints that hub_strategy="
                f"{HubStrategy(self.hub_strategy).value!r} pushes; use 'every_save' or 'end'"
            )
        choices: dict[str, tuple[str | None, ...]] = {
            "ratio_level": RATIO_LEVELS,
            "aggregation": AGGREGATIONS,
            "logprobs_backward": ("cache", "recompute", "sparse"),
            "logprobs_projection": ("vendor", "fused"),
            "rollout_correction": ("none", *ROLLOUT_CORRECTIONS),
            "scale_rewards": ("group", "batch", "none"),
            "full_disk": ("stop", "continue"),
            "save_dtype": (None, "float32", "bfloat16"),
            "vllm_mode": VLLM_MODES,
            "console": ("auto", "lines", "raw", "none"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {getattr(self, name)!r}")
        is_number = isinstance(self.baseline, int | float) and math.isfinite(self.baseline)
        if not is_number and self.baseline not in BASELINES:
            raise ValueError(f"baseline must be a number, {' or '.join(BASELINES)}, got {self.baseline!r}")
        unavailable = {
            "fp16": "use bf16=True, or neither: log-ratios need more range than float16 with loss scaling has",
            "auto_find_batch_size": "set per_device_train_batch_size: a rollout cannot be divided again halfway",
            "neftune_noise_alpha": "leave it None: noise on the embeddings belongs to supervised training",
            "label_smoothing_factor": "leave it 0: there are no labels to smooth",
            "use_liger_kernel": "leave it False: policy and critic are inside another module, where it does nothing; "
            "call Liger's apply_liger_kernel_to_... before the model is loaded",
        }
        ignores_support = self.is_truncated and not self.replay_sampling_support
        if ignores_support and self.rollout_engine != "hf" and self.rollout_correction.startswith("sequence_"):
            raise ValueError(
                f"rollout_correction={self.rollout_correction!r} with replay_sampling_support=False, top_p="
                f"{self.top_p}, top_k={self.top_k} and min_p={self.min_p}: the excluded probability would shrink the "
                "weight with each token; use replay_sampling_support=True or rollout_correction='token_truncate'"
            )
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(
                f"max_steps must be at least 1, or -1 to count epochs, got {self.max_steps}; to evaluate only, call "
                "evaluate()"
            )
        for name, remedy in unavailable.items():
            if getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r} is not available in this version; {remedy}")
        if plugin := getattr(self, "deepspeed_plugin", None):  # from these settings, or from accelerate's
            self._check_deepspeed(plugin.hf_ds_config)

    def _check_deepspeed(self, config: Any) -> None:
        """Reject settings that do not work with DeepSpeed, which owns weights, gradients and the optimizer step."""
        if config.is_zero3():
            raise ValueError(
                "DeepSpeed: zero_optimization.stage 3 shards weights that are read outside the forward pass; use "
                "stage 2, or fsdp=True"
            )
        for name, setting in (("optimizer", "optim"), ("scheduler", "lr_scheduler_type")):
            if config.get_value(name) is not None:
                raise ValueError(
                    f"DeepSpeed: the {name} in its config has one learning rate for policy and critic; remove it and "
                    f"set {setting}= instead"
                )
        if self.max_tokens_per_micro_batch is not None:
            raise ValueError(
                f"DeepSpeed: max_tokens_per_micro_batch={self.max_tokens_per_micro_batch} adds backward passes that it "
                "does not count; leave it None"
            )

    def _check_ranges(self) -> None:
        at_least_one = (
            "max_completion_length",
            "num_generations",
            "steps_per_generation",
            "num_iterations",
            "per_device_train_batch_size",
            "max_prompt_length",
            "rollout_batch_size",
            "max_tokens_per_micro_batch",
            "reward_workers",
            "dynamic_sampling_rounds",
            "max_turns",
            "vllm_server_port",
        )
        not_negative = (
            "learning_rate",
            "epsilon",
            "epsilon_high",
            "beta",
            "eval_temperature",
            "top_k",
            "critic_warmup_steps",
            "critic_learning_rate",
            "critic_weight_decay",
            "num_completions_to_print",
            "logits_budget_bytes",
            "entropy_coef",
            "rollout_floor",
            "overlong_buffer",
            "vllm_server_timeout",
        )
        positive = (
            "temperature",
            "rollout_cap",
            "reward_timeout",
            "critic_max_grad_norm",
            "max_grad_norm",
            "cliprange_value",
        )
        rules = [(name, lambda x: x >= 1, "at least 1") for name in at_least_one]
        rules += [(name, lambda x: x == int(x), "a whole number") for name in at_least_one]
        rules += [(name, lambda x: x >= 0, "0 or more") for name in not_negative]
        rules += [(name, lambda x: x > 0, "greater than 0 (float('inf') for no limit)") for name in positive]
        rules += [
            ("top_p", lambda x: 0 < x <= 1, "in (0, 1]"),
            ("min_p", lambda x: 0 < x < 1, "in (0, 1)"),
            ("mass_tolerance", lambda x: 0 < x < 1, "in (0, 1)"),
            ("gamma", lambda x: 0 <= x <= 1, "in [0, 1]"),
            ("lam", lambda x: 0 <= x <= 1, "in [0, 1]"),
            ("dual_clip", lambda x: x > 1, "greater than 1 (float('inf') for no bound)"),
        ]
        for name, is_valid, description in rules:
            value = getattr(self, name)
            if value is not None and not isinstance(value, int | float):
                raise ValueError(f"{name} must be a number {description}, got {value!r}")
            if value is not None and (math.isnan(value) or not is_valid(value)):
                raise ValueError(f"{name} must be {description}, got {value}")

        window = self.prompt_value_range
        numbers = isinstance(window, list | tuple) and all(isinstance(each, int | float) for each in window)
        if window is not None and not (numbers and len(window) == 2 and 0 <= window[0] < window[1] <= 1):
            raise ValueError(
                f"prompt_value_range must be two rising numbers in [0, 1], such as [0.1, 0.9], got {window}"
            )
        if window is not None and algorithm_class(self.algorithm).critic != "prompt":
            raise ValueError(
                f"prompt_value_range={window} needs a prompt critic, and algorithm={self.algorithm!r} has none; leave "
                "it out, or use sppo"
            )
        masks = self.rollout_correction.endswith("_mask")
        if self.rollout_floor and not (masks and self.rollout_floor < self.rollout_cap):
            raise ValueError(
                f"rollout_floor={self.rollout_floor} is for rollout_correction token_mask or sequence_mask, and below "
                f"rollout_cap={self.rollout_cap}; got {self.rollout_correction!r}"
            )
        if (self.overlong_buffer or 0) > self.max_completion_length:
            raise ValueError(
                f"overlong_buffer must be at most max_completion_length={self.max_completion_length}, got "
                f"{self.overlong_buffer}"
            )

    def _check_shapes(self) -> None:
        assert self.steps_per_generation is not None
        assert self.num_generations is not None
        if self.steps_per_generation % self.gradient_accumulation_steps:
            raise ValueError(
                f"steps_per_generation must be a multiple of gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps}, got {self.steps_per_generation}"
            )
        if self.rollout_size % self.num_generations:
            raise ValueError(
                "num_generations must divide per_device_train_batch_size * steps_per_generation = "
                f"{self.rollout_size}, got {self.num_generations} (algorithm={self.algorithm!r})"
            )
        if algorithm_class(self.algorithm).uses_groups and self.num_generations < 2:
            raise ValueError(
                f"num_generations must be at least 2 for algorithm={self.algorithm!r}, which compares the responses to "
                f"a prompt, got {self.num_generations}"
            )
        if self.rollout_size * self.world_size < 2:
            raise ValueError(
                "per_device_train_batch_size * steps_per_generation is 1: in a rollout of one completion all outcomes "
                "are equal, so the policy never changes; increase one of the two"
            )
