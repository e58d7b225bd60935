"""Settings of a run that its rollout engine receives, and the checks of ``generation_kwargs``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from transformers.utils import logging

from sppo._utils import suggest
from sppo.settings import SPPOSettings

VLLM_MODES = ("colocate", "server")
_VLLM_SERVER = "sppo.rollout.vllm_server:VLLMServerRollout"

logger = logging.get_logger(__name__)

_BY_TOKENIZER = "it comes from the tokenizer and the model's generation_config.json"
_BY_ENGINE = "the engine sets it itself"
_NO_SEARCH = "the trainer learns from samples of the policy, not from a search; leave it out"

_RESERVED = {
    "temperature": "set temperature=, and eval_temperature= for evaluation",
    "do_sample": "set temperature=; 0 in eval_temperature= is greedy",
    "top_p": "set top_p=",
    "top_k": "set top_k=",
    "min_p": "set min_p=",
    **dict.fromkeys(("max_new_tokens", "max_tokens", "max_length"), "set max_completion_length="),
    **dict.fromkeys(("stop", "stop_strings"), "set stop_strings="),
    **dict.fromkeys(("n", "num_return_sequences"), "set num_generations="),
    "seed": "set seed=; each completion has a seed of its own",
    **dict.fromkeys(
        ("eos_token_id", "stop_token_ids", "pad_token_id", "bos_token_id", "decoder_start_token_id", "ignore_eos"),
        _BY_TOKENIZER,
    ),
    **dict.fromkeys(
        (
            "logprobs",
            "prompt_logprobs",
            "prompt_logprob_token_ids",
            "prompt_logprob_start",
            "logprob_token_ids",
            "flat_logprobs",
            "detokenize",
            "skip_special_tokens",
            "spaces_between_special_tokens",
            "include_stop_str_in_output",
            "output_kind",
            "output_text_buffer_length",
            "return_dict_in_generate",
            "output_scores",
            "output_logits",
            "output_attentions",
            "output_hidden_states",
            "use_cache",
            "transformers_version",
        ),
        _BY_ENGINE,
    ),
    "cache_implementation": "set rollout_engine_kwargs={'cache_implementation': ...}",
    "continuous_batching_config": "set rollout_engine='continuous' and its fields in rollout_engine_kwargs",
    "max_time": "a run must repeat itself with the same bits; set max_completion_length=",
    "token_healing": "it changes the prompt; leave it out",
    **dict.fromkeys(
        (
            "num_beams",
            "num_beam_groups",
            "early_stopping",
            "length_penalty",
            "diversity_penalty",
            "constraints",
            "force_words_ids",
            "penalty_alpha",
            "dola_layers",
            "prompt_lookup_num_tokens",
            "assistant_early_exit",
            "is_assistant",
            "use_mtp",
        ),
        _NO_SEARCH,
    ),
}
"""Arguments of transformers' GenerationConfig and vLLM's SamplingParams that the trainer sets; what to use instead."""

_NEUTRAL = {
    "cache_config",
    "compile_config",
    "disable_compile",
    "max_cache_len",
    "prefill_chunk_size",
    "renormalize_logits",
    "skip_reading_prefix_cache",
}
"""Arguments that do not change which distribution is sampled."""


def check_generation_settings(args: SPPOSettings) -> None:
    """Check ``stop_strings`` and ``generation_kwargs``.

    Raises:
        ValueError: one of them is malformed, or names what another setting sets; the message names it.
    """
    stop_strings = args.stop_strings
    if stop_strings is not None and (
        not isinstance(stop_strings, list | tuple)
        or not stop_strings
        or not all(isinstance(text, str) and text for text in stop_strings)
    ):
        raise ValueError(
            f"stop_strings must be a list of texts that are not empty, or None, got {stop_strings!r}; for one text "
            "write a list with it"
        )
    if args.generation_kwargs is not None and not isinstance(args.generation_kwargs, Mapping):
        raise ValueError(
            f"generation_kwargs must be a dict of arguments by name, or None, got {args.generation_kwargs!r}"
        )
    for name, value in (args.generation_kwargs or {}).items():
        if name in _RESERVED or name.startswith("_"):
            raise ValueError(
                f"generation_kwargs={{{name!r}: {value!r}}} is not for you to set: {_RESERVED.get(name, _BY_ENGINE)}"
            )


def check_engine_settings(args: SPPOSettings) -> None:
    """Check that no setting is for another engine than the one that is selected.

    Raises:
        ValueError: one is; the message names it.
    """
    for name, value in _changed(args, "vllm_"):
        if args.rollout_engine != "vllm":
            raise ValueError(
                f"{name}={value!r} is for rollout_engine='vllm', got rollout_engine={args.rollout_engine!r}"
            )
        if name.startswith("vllm_server_") and args.vllm_mode != "server":
            raise ValueError(f"{name}={value!r} is for vllm_mode='server', got vllm_mode={args.vllm_mode!r}")
    if args.vllm_enable_sleep_mode and args.vllm_mode != "colocate":
        raise ValueError(
            "vllm_enable_sleep_mode=True is for vllm_mode='colocate': a server does not share the memory of the "
            "training process; leave it False"
        )


def _changed(args: SPPOSettings, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield the settings with this prefix that do not have their default values."""
    for name, field in SPPOSettings.__dataclass_fields__.items():
        if name.startswith(prefix) and getattr(args, name) != field.default:
            yield name, getattr(args, name)


def check_own_engine(args: SPPOSettings) -> None:
    """Check that no setting asks something of an engine that the user made.

    Raises:
        ValueError: a setting would be ignored; the message names it.
    """
    for prefix in ("stop_strings", "generation_kwargs", "rollout_engine_kwargs", "vllm_"):
        for name, value in _changed(args, prefix):
            raise ValueError(
                f"{name}={value!r} is for an engine that the trainer makes, and you pass rollout_engine=: give it to "
                "yours, or name its class as 'module:Class' in the setting rollout_engine"
            )


def check_known(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raise ValueError if ``generation_kwargs`` has a name that the engine does not know.

    Args:
        given: names in ``generation_kwargs``.
        known: names that the engine knows.
        what: the class with these names, for the message.
    """
    for name in given:
        if name not in known:
            raise ValueError(f"generation_kwargs: {what} has no {name!r}{suggest(name, known)}")


def engine_settings(args: SPPOSettings, *, bf16: bool) -> tuple[str, dict[str, Any]]:
    """Return the name of the engine and its own settings.

    Args:
        args: settings of the run.
        bf16: whether the policy computes in bfloat16.
    """
    settings = dict(args.rollout_engine_kwargs or {})
    if args.rollout_engine != "vllm":
        return args.rollout_engine, settings
    if args.vllm_mode == "server":
        base_url = args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}"
        return _VLLM_SERVER, {"base_url": base_url, "timeout": args.vllm_server_timeout, **settings}
    if bf16:
        settings.setdefault("dtype", "bfloat16")  # as the policy computes; its weights are float32
    if args.vllm_enable_sleep_mode:
        settings["enable_sleep_mode"] = True
    return args.rollout_engine, settings


def sampling_settings(args: SPPOSettings) -> dict[str, Any]:
    """Return the arguments that all engines have in common, apart from ``return_support``.

    ``stop_strings`` and ``generation_kwargs`` are among them only if they are set, so that an engine of one's own need
    not have them.
    """
    names = ("max_completion_length", "top_p", "top_k", "min_p")
    set_ones = tuple(name for name in ("stop_strings", "generation_kwargs") if getattr(args, name))
    return {name: getattr(args, name) for name in names + set_ones}


def warn_of_other_distribution(args: SPPOSettings, *, is_truncated: bool) -> None:
    """Warn where log-probabilities are those of another distribution than the one that is sampled."""
    consequence = (
        "Importance ratios and the policy gradient are those of another distribution than the one that was sampled "
        "(arXiv 2512.02556, section 3.1)"
    )
    if is_truncated and not args.replay_sampling_support:
        logger.warning(
            f"replay_sampling_support=False with top_p={args.top_p}, top_k={args.top_k}, min_p={args.min_p}: "
            f"log-probabilities are normalized over the vocabulary. {consequence}; set replay_sampling_support=True"
        )
    if changing := sorted(set(args.generation_kwargs or {}) - _NEUTRAL):
        logger.warning(
            f"generation_kwargs changes how completions are sampled ({', '.join(changing)}), but log-probabilities are "
            f"those of the policy without it. {consequence}; leave it out unless you accept this"
        )
