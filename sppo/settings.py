"""Fields of SPPOConfig, in a module without torch and transformers: the command line's help reads them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class SPPOSettings:
    """Settings that :class:`sppo.SPPOConfig` adds to ``transformers.TrainingArguments``, or has other defaults for."""

    learning_rate: float = field(default=1e-6, metadata={"help": "Peak learning rate of the policy."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Schedule of both learning rates."})
    logging_steps: float = field(default=1, metadata={"help": "Updates between two log entries."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Leave False: rewards use the columns."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Replace non-finite losses in the log; costs a device sync per micro-batch."}
    )

    algorithm: str = field(
        default="sppo",
        metadata={
            "help": "Training algorithm: sppo, poise, ppo, grpo, dr_grpo, dapo, cispo, gspo, rloo, opo, spo, "
            "reinforce_plus_plus, reinforce, remax, or module:Class. It gives the settings below that are None their "
            "values."
        },
    )

    # Rollout
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Skip training prompts with more tokens than this. None: no limit."}
    )
    max_completion_length: int = field(default=256, metadata={"help": "Maximum number of tokens per completion."})
    num_generations: int | None = field(
        default=None, metadata={"help": "Completions per prompt. None: the algorithm's."}
    )
    steps_per_generation: int | None = field(
        default=None,
        metadata={"help": "Micro-batches per rollout. None: gradient_accumulation_steps, one update per rollout."},
    )
    num_iterations: int = field(default=1, metadata={"help": "Passes over each rollout."})
    rollout_batch_size: int | None = field(
        default=None, metadata={"help": "Completions per generation batch on each process. None: the complete rollout."}
    )
    max_tokens_per_micro_batch: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of tokens per micro-batch; larger ones are split. A single longer sample is one by "
            "itself. None: no limit."
        },
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature of sampling and of the log-probabilities."})
    top_p: float = field(
        default=1.0,
        metadata={"help": "Sample among the most likely tokens that have this probability together; 1: all."},
    )
    top_k: int = field(default=0, metadata={"help": "Sample among the k most likely tokens; 0: all."})
    min_p: float | None = field(
        default=None,
        metadata={"help": "Sample among tokens with at least this share of the largest probability. None: all."},
    )
    stop_strings: list[str] | None = field(
        default=None,
        metadata={
            "help": "End a response with the token that completes one of these texts, which stays in it. The text "
            "includes special tokens. None: only at end-of-sequence tokens."
        },
    )
    generation_kwargs: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "Further arguments of the engine's sampling: of transformers' GenerationConfig, or of vLLM's "
            "SamplingParams. Those that change the distribution are not part of the log-probabilities."
        },
    )
    replay_sampling_support: bool = field(
        default=True,
        metadata={
            "help": "With top_k, top_p or min_p, compute log-probabilities over the tokens that the sampler kept. "
            "False: over the whole vocabulary, which is another distribution than the one that was sampled."
        },
    )
    chat_template_kwargs: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "Arguments of the chat template, for example {enable_thinking: false}. A column of that name takes "
            "precedence."
        },
    )
    max_turns: int = field(
        default=8, metadata={"help": "Maximum number of turns of the policy, with an environment or tools."}
    )
    shuffle_dataset: bool = field(default=True, metadata={"help": "Shuffle the prompts in each epoch."})
    rollout_engine: str = field(
        default="hf",
        metadata={"help": "Rollout engine: hf, continuous, vllm, or module:Class; see docs/guides/rollouts.md."},
    )
    rollout_engine_kwargs: dict[str, Any] | None = field(
        default=None, metadata={"help": "Arguments of the rollout engine, for example {max_num_seqs: 64} for vllm."}
    )
    use_vllm: bool = field(default=False, metadata={"help": "The same as rollout_engine=vllm."})
    vllm_mode: str = field(
        default="colocate",
        metadata={"help": "vLLM in the training process (colocate), or a server of your own (server)."},
    )
    vllm_enable_sleep_mode: bool = field(
        default=False,
        metadata={"help": "Free the memory of vLLM's weights and cache while learning; for colocate, on a GPU."},
    )
    vllm_server_base_url: str | None = field(
        default=None, metadata={"help": "URL of the vLLM server. None: of vllm_server_host and vllm_server_port."}
    )
    vllm_server_host: str = field(default="127.0.0.1", metadata={"help": "Host of the vLLM server."})
    vllm_server_port: int = field(default=8000, metadata={"help": "Port of the vLLM server."})
    vllm_server_timeout: float = field(
        default=240.0, metadata={"help": "How long to wait at the start for the vLLM server to be up, in seconds."}
    )
    rollout_correction: str = field(
        default="token_truncate",
        metadata={
            "help": "Importance weights of the trainer's probabilities over those of an engine that reports its own: "
            "token_truncate, token_mask (IcePop), sequence_truncate, sequence_mask or none."
        },
    )
    rollout_cap: float = field(
        default=2.0, metadata={"help": "Maximum importance weight; larger ones are truncated or masked."}
    )
    rollout_floor: float = field(
        default=0.0, metadata={"help": "Importance weights below this are masked, with token_mask or sequence_mask."}
    )
    dynamic_sampling: bool | None = field(
        default=None,
        metadata={
            "help": "Sample further prompts in place of those whose completions all have the same reward. None: the "
            "algorithm's, on for dapo."
        },
    )
    dynamic_sampling_rounds: int = field(
        default=10,
        metadata={"help": "Maximum number of generation batches per rollout with dynamic_sampling."},
    )
    prompt_value_range: list[float] | None = field(
        default=None,
        metadata={
            "help": "For sppo: before sampling, skip prompts whose predicted success is outside of this range, such as "
            "[0.1, 0.9]; one in ten of them is kept. None: take every prompt."
        },
    )

    # Reward
    reward_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "Weight of each reward function. None: all 1. With sppo, poise and spo the weighted sum must be in "
            "[0, 1]."
        },
    )
    reward_timeout: float = field(
        default=30.0,
        metadata={
            "help": "Time limit of a reward function per call, in seconds. A batch that fails takes up to three times "
            "as long."
        },
    )
    reward_workers: int = field(
        default=1,
        metadata={
            "help": "Number of processes that call a reward given as module:function, side by side, each with a part "
            "of the batch. Each imports the module. Built-in rewards use all cores with one."
        },
    )
    mask_truncated_completions: bool = field(
        default=False,
        metadata={
            "help": "The policy does not learn from completions without an end-of-sequence token. Their rewards count "
            "in their group and for a prompt critic."
        },
    )

    overlong_buffer: int | None = field(
        default=None,
        metadata={
            "help": "Tokens before max_completion_length over which a penalty of up to 1 is subtracted from the reward "
            "in training. None: the algorithm's, a fifth of max_completion_length for dapo, else 0."
        },
    )

    # Loss
    scale_rewards: str | bool | None = field(
        default=None,
        metadata={
            "help": "What advantages of groups are divided by: the standard deviation of the group, of the batch, or "
            "none. None: the algorithm's."
        },
    )
    center_advantages: bool = field(
        default=False, metadata={"help": "For sppo: subtract the mean advantage of the rollout."}
    )
    standardize_advantages: bool = field(
        default=False,
        metadata={"help": "For sppo: subtract the mean advantage and divide by the standard deviation."},
    )
    entropy_coef: float = field(
        default=0.0, metadata={"help": "Weight of the mean entropy per token, a bonus in the policy loss."}
    )
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
        default=0.0,
        metadata={
            "help": "Weight of the KL to the initial policy; above 0, a frozen copy of it stays in memory, or of its "
            "adapter."
        },
    )
    gamma: float = field(default=1.0, metadata={"help": "Discount per token, for ppo."})
    lam: float = field(default=1.0, metadata={"help": "Lambda of ppo's generalized advantage estimation."})
    baseline: float | str = field(
        default="running_mean", metadata={"help": "Baseline of reinforce: a number, running_mean or prompt_mean."}
    )

    logprobs_backward: str = field(
        default="cache",
        metadata={
            "help": "How backward gets the logits: cache, recompute or sparse, see docs/concepts/linear-logprobs.md. "
            "With entropy_coef, cache becomes recompute. auto is not available: a resumed run would not have the same "
            "bits."
        },
    )
    logprobs_projection: str = field(
        default="vendor",
        metadata={
            "help": "How logits are computed: vendor, or fused, which gives a token the same bits in every batch; see "
            "docs/concepts/linear-logprobs.md. auto is not available: a resumed run would not have the same bits."
        },
    )
    mass_tolerance: float = field(
        default=1e-4,
        metadata={"help": "Probability mass that logprobs_backward='sparse' may omit from a token's gradient."},
    )
    logits_budget_bytes: int = field(
        default=2**30,
        metadata={
            "help": "Memory per micro-batch for cached probabilities; what does not fit is computed twice. A fixed "
            "amount, independent of free memory, so that a resumed run has the same bits."
        },
    )

    # Critic
    critic_learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate of the critic."})
    critic_weight_decay: float | None = field(
        default=None, metadata={"help": "Weight decay of the critic. None: weight_decay."}
    )
    critic_max_grad_norm: float = field(default=1.0, metadata={"help": "Maximum gradient norm of the critic."})
    cliprange_value: float = field(
        default=0.2,
        metadata={"help": "Clip range of ppo's values around those before the update; inf: no clipping."},
    )
    critic_adapter: bool = field(
        default=True,
        metadata={"help": "With peft_config, train the critic as an adapter too; False: train all its weights."},
    )
    critic_warmup_steps: int = field(default=0, metadata={"help": "Initial updates that train only the critic."})

    # Evaluation and log
    eval_temperature: float = field(default=0.0, metadata={"help": "Temperature of evaluate(); 0 is greedy."})
    save_dtype: str | None = field(
        default=None,
        metadata={
            "help": "Dtype of the final model and critic and of what is pushed: float32 or bfloat16. None: that in "
            "which the policy came. Checkpoints keep the precision of training."
        },
    )
    full_disk: str = field(
        default="stop",
        metadata={"help": "If the disk is full: stop with an error, or continue without the checkpoint (one process)."},
    )
    console: str = field(
        default="auto",
        metadata={
            "help": "Console output: auto (a live panel on a terminal with rich installed, else lines), lines, raw "
            "(transformers' progress bar and dicts) or none; see docs/guides/monitoring.md."
        },
    )
    log_completions: bool = field(default=False, metadata={"help": "Print sample completions with each log entry."})
    num_completions_to_print: int = field(default=3, metadata={"help": "Number of sample completions to print."})
