"""Settings of a run: transformers' TrainingArguments, TRL's field names where TRL has one, and a few of SPPO's own."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from sppo.algorithms import algorithm_class
from sppo.presets import preset
from sppo_kernels.ops.policy_loss import AGGREGATIONS, RATIO_LEVELS, ROLLOUT_CORRECTIONS

BASELINES = ("running_mean", "prompt_mean")


@dataclass
class SPPOConfig(TrainingArguments):
    """Arguments of :class:`sppo.SPPOTrainer`; those of ``transformers.TrainingArguments`` hold too.

    A rollout makes ``per_device_train_batch_size * steps_per_generation`` completions on each process; they are trained
    on in ``num_iterations * steps_per_generation / gradient_accumulation_steps`` updates. Micro-batches are cut by
    tokens, so ``per_device_train_batch_size`` is their mean number of sequences. An epoch is rounded up to whole
    rollouts.

    Differences from ``TrainingArguments``: every update is logged, the learning rate is constant unless asked
    otherwise, and the place in the data is restored by the trainer itself (``ignore_data_skip`` is always True).
    """

    learning_rate: float = field(default=1e-6, metadata={"help": "Peak learning rate of the policy."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Schedule of both learning rates."})
    logging_steps: float = field(default=1, metadata={"help": "Log every so many updates."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Columns go to the rewards; keep them."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Replace non-finite losses in the log; costs a device sync a micro-batch."}
    )

    algorithm: str = field(
        default="sppo",
        metadata={
            "help": "What turns outcomes into a loss: sppo, ppo, grpo, dr_grpo, rloo, gspo, remax, reinforce, or "
            "module:Class. It gives the settings below that are None."
        },
    )

    # Rollout
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Training prompts with more tokens than this are left out. None: no limit."}
    )
    max_completion_length: int = field(default=256, metadata={"help": "Most tokens a completion may have."})
    num_generations: int | None = field(
        default=None, metadata={"help": "Completions sampled for each prompt. None: the algorithm's."}
    )
    steps_per_generation: int | None = field(
        default=None,
        metadata={"help": "Micro-batches a rollout serves. None: gradient_accumulation_steps, one update a rollout."},
    )
    num_iterations: int = field(default=1, metadata={"help": "Times each rollout is trained on."})
    rollout_batch_size: int | None = field(
        default=None, metadata={"help": "Completions generated at once on a process. None: the whole rollout."}
    )
    max_tokens_per_micro_batch: int | None = field(
        default=None,
        metadata={"help": "Cut micro-batches further, so that none has more tokens. None: cut by number alone."},
    )
    temperature: float = field(default=1.0, metadata={"help": "Of sampling, and of the trained log-probabilities."})
    top_p: float = field(
        default=1.0,
        metadata={"help": "Nucleus sampling. Below 1, samples leave the distribution that is trained."},
    )
    top_k: int = field(default=0, metadata={"help": "Sample among the k likeliest tokens; 0: all. See top_p."})
    shuffle_dataset: bool = field(default=True, metadata={"help": "A new order of the prompts each epoch."})
    rollout_engine: str = field(
        default="hf",
        metadata={"help": "What samples: hf, continuous, vllm, or module:Class; see docs/training.md."},
    )
    rollout_engine_kwargs: dict[str, Any] | None = field(
        default=None, metadata={"help": "Settings of the engine itself, for example {max_num_seqs: 64} of vllm."}
    )
    use_vllm: bool = field(default=False, metadata={"help": "Another way to say rollout_engine=vllm."})
    rollout_correction: str = field(
        default="token_truncate",
        metadata={
            "help": "How the loss weighs tokens by the trainer's probability over that of an engine with its own: "
            "token_truncate, sequence_truncate, sequence_mask or none."
        },
    )
    rollout_cap: float = field(default=2.0, metadata={"help": "Largest such weight."})

    # Reward
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each reward function. None: all 1. The sum must stay in [0, 1]."}
    )
    reward_timeout: float = field(default=30.0, metadata={"help": "Seconds a reward function may take for a rollout."})
    mask_truncated_completions: bool = field(
        default=False, metadata={"help": "Leave completions without an end-of-sequence token out of the update."}
    )

    # Loss
    epsilon: float | None = field(
        default=None, metadata={"help": "Lower clip range of the ratio. None: the algorithm's, for most 0.2."}
    )
    epsilon_high: float | None = field(
        default=None, metadata={"help": "Upper clip range. None: the algorithm's if epsilon is too, else epsilon."}
    )
    dual_clip: float | None = field(
        default=None,
        metadata={
            "help": "Bound on the ratio of negative advantages (arXiv 1912.09729), inf for none. None: the algorithm's."
        },
    )
    ratio_level: str | None = field(
        default=None, metadata={"help": "token, sequence_mean or sequence_sum. None: the algorithm's."}
    )
    aggregation: str | None = field(
        default=None,
        metadata={
            "help": "token-mean, seq-mean-token-mean or seq-mean-token-sum; for token ratios. None: the algorithm's."
        },
    )
    beta: float = field(
        default=0.0, metadata={"help": "Weight of the KL to the initial policy; above 0 a frozen copy of it is kept."}
    )
    gamma: float = field(default=1.0, metadata={"help": "Discount of ppo, a token."})
    lam: float = field(default=1.0, metadata={"help": "Lambda of ppo's generalized advantage estimation."})
    baseline: float | str = field(
        default="running_mean", metadata={"help": "Of reinforce: a number, running_mean or prompt_mean."}
    )

    logprobs_backward: str = field(
        default="cache",
        metadata={
            "help": "cache, recompute or sparse: what backward knows of the logits, see docs/log-probabilities.md. Not "
            "auto, so that a resumed run has the same bits."
        },
    )
    mass_tolerance: float = field(
        default=1e-4,
        metadata={"help": "Probability that logprobs_backward='sparse' may leave out of a token's gradient."},
    )
    logits_budget_bytes: int = field(
        default=2**30,
        metadata={
            "help": "Memory in which a micro-batch keeps the gradient of its log-probabilities by the logits; the rest "
            "is computed twice. A fixed amount, not what is free, so that a resumed run has the same bits."
        },
    )

    # Critic
    critic_learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate of the critic."})
    critic_weight_decay: float | None = field(
        default=None, metadata={"help": "Weight decay of the critic. None: weight_decay."}
    )
    critic_max_grad_norm: float = field(default=1.0, metadata={"help": "Gradient norm the critic is clipped at."})
    cliprange_value: float = field(
        default=0.2,
        metadata={"help": "How far ppo's value may move from the one before the update and still gain; inf: no bound."},
    )
    critic_adapter: bool = field(
        default=True, metadata={"help": "With peft_config the critic learns by an adapter too; False: all its weights."}
    )
    critic_warmup_steps: int = field(default=0, metadata={"help": "First updates in which the critic learns alone."})

    # Evaluation and log
    eval_temperature: float = field(default=0.0, metadata={"help": "Temperature of evaluate(); 0 is greedy."})
    log_completions: bool = field(default=False, metadata={"help": "Print sample completions whenever metrics are."})
    num_completions_to_print: int = field(default=3, metadata={"help": "How many of them."})

    def __post_init__(self) -> None:
        if self.bf16 and not torch.accelerator.is_available():
            self.use_cpu = True  # transformers wants it said; there is nothing else to run on
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
        self._take_defaults(algorithm_class(self.algorithm).defaults)
        self._check_choices()
        self._check_ranges()
        self._check_shapes()

    def _take_defaults(self, defaults: dict[str, Any]) -> None:
        if self.epsilon is not None and self.epsilon_high is None:
            self.epsilon_high = self.epsilon
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.epsilon_high is None:
            self.epsilon_high = self.epsilon

    @classmethod
    def paper(cls, size: str = "1.5b", **overrides: Any) -> SPPOConfig:
        """The published settings (arXiv 2604.08865, appendix E and the released implementation).

        Args:
            size: ``"1.5b"`` (256 prompts in 2 updates a rollout), ``"7b"`` or ``"7b-small-critic"`` (512 in 16), whose
                settings are the same: the small critic is the 1.5B model, as ``critic=`` of the trainer. One sequence
                a micro-batch on one process: on ``n`` processes divide both ``gradient_accumulation_steps`` and
                ``steps_per_generation`` by n.
            **overrides: any field, ``output_dir`` for one.
        """
        return cls(**preset(size, overrides))

    @property
    def rollout_size(self) -> int:
        """Completions a process makes in one rollout."""
        assert self.steps_per_generation is not None
        return self.per_device_train_batch_size * self.steps_per_generation

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps that one rollout serves."""
        assert self.steps_per_generation is not None
        return self.num_iterations * self.steps_per_generation // self.gradient_accumulation_steps

    def check_processes(self) -> None:
        """Check that the process was launched as one of several, if it is.

        Raises:
            ValueError: it has several GPUs, or a launcher started several processes that do not know of each other.
        """
        if self.n_gpu > 1:
            raise ValueError(f"{self.n_gpu} GPUs in one process; start with accelerate launch, or show one GPU only")
        if (launched := int(os.environ.get("WORLD_SIZE", "1"))) > 1 and self.world_size == 1:
            raise ValueError(
                f"WORLD_SIZE={launched}, but this process trains alone (parallel_mode={self.parallel_mode.value}): on "
                "CPUs set use_cpu=True, on GPUs give each process one"
            )

    def _check_choices(self) -> None:
        choices = {
            "ratio_level": RATIO_LEVELS,
            "aggregation": AGGREGATIONS,
            "logprobs_backward": ("cache", "recompute", "sparse"),
            "rollout_correction": ("none", *ROLLOUT_CORRECTIONS),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        is_number = isinstance(self.baseline, int | float) and math.isfinite(self.baseline)
        if not is_number and self.baseline not in BASELINES:
            raise ValueError(f"baseline must be a number, {' or '.join(BASELINES)}, got {self.baseline!r}")
        unavailable = {
            "fp16": "use bf16=True, or neither: log-ratios need more range than a float16 loss scale leaves",
            "auto_find_batch_size": "set per_device_train_batch_size: a rollout cannot be cut again half way",
            "neftune_noise_alpha": "leave it None: noise on the embeddings belongs to supervised training",
            "label_smoothing_factor": "leave it 0: there are no labels to smooth",
        }
        cut = self.top_p < 1 or self.top_k > 0
        if cut and self.rollout_engine != "hf" and self.rollout_correction.startswith("sequence_"):
            raise ValueError(
                f"rollout_correction={self.rollout_correction!r} with top_p={self.top_p} and top_k={self.top_k}: what "
                "is cut off would shrink the weight with each token; use token_truncate, or leave top_p 1 and top_k 0"
            )
        if self.max_steps == 0:
            raise ValueError(
                "max_steps must be at least 1, or -1 to count epochs, got 0; to evaluate only, call evaluate()"
            )
        for name, remedy in unavailable.items():
            if getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r} is not available in this version; {remedy}")
        if plugin := getattr(self, "deepspeed_plugin", None):  # by these settings, or by accelerate's
            self._check_deepspeed(plugin.hf_ds_config)

    def _check_deepspeed(self, config: Any) -> None:
        """What DeepSpeed cannot do for this trainer: it takes weights, gradients and the step away from it."""
        if config.is_zero3():
            raise ValueError(
                "DeepSpeed: zero_optimization.stage 3 spreads weights that are read outside of a forward; use "
                "stage 2, or fsdp=True"
            )
        for name, setting in (("optimizer", "optim"), ("scheduler", "lr_scheduler_type")):
            if config.get_value(name) is not None:
                raise ValueError(
                    f"DeepSpeed: an {name} in its config has one learning rate for policy and critic; leave it out, "
                    f"{setting}= chooses one"
                )
        if self.max_tokens_per_micro_batch is not None:
            raise ValueError(
                f"DeepSpeed: max_tokens_per_micro_batch={self.max_tokens_per_micro_batch} needs backward passes that "
                "it does not count; leave it None"
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
        )
        not_negative = (
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
        rules += [(name, lambda x: x >= 0, "0 or more") for name in not_negative]
        rules += [(name, lambda x: x > 0, "greater than 0 (float('inf') for no limit)") for name in positive]
        rules += [
            ("top_p", lambda x: 0 < x <= 1, "in (0, 1]"),
            ("mass_tolerance", lambda x: 0 < x < 1, "in (0, 1)"),
            ("gamma", lambda x: 0 <= x <= 1, "in [0, 1]"),
            ("lam", lambda x: 0 <= x <= 1, "in [0, 1]"),
            ("dual_clip", lambda x: x > 1, "greater than 1 (float('inf') for no bound)"),
        ]
        for name, holds, wanted in rules:
            value = getattr(self, name)
            if value is not None and not isinstance(value, int | float):
                raise ValueError(f"{name} must be a number {wanted}, got {value!r}")
            if value is not None and (math.isnan(value) or not holds(value)):
                raise ValueError(f"{name} must be {wanted}, got {value}")

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
                "per_device_train_batch_size * steps_per_generation is 1: a rollout of one completion has equal "
                "outcomes, which never move the policy; make one of the two larger"
            )
