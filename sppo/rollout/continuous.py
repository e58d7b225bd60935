"""transformers' continuous batching: a finished sequence is replaced by the next one, and the cache is paged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from sppo.rollout.engine import Prompt, Sample, encode, make_samples, until_end
from sppo.rollout.hf import HFRollout


class ContinuousRollout(HFRollout):
    """Samples from the trained model itself, and returns the log-probabilities it sampled with.

    Args:
        policy, tokenizer, max_completion_length, top_p, top_k: see :class:`sppo.HFRollout`.
        settings: arguments of ``transformers.generation.ContinuousBatchingConfig``, such as ``max_batch_tokens``.
            Without a GPU ``num_blocks`` defaults to 64, because transformers derives it from the memory of a GPU.
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
        super().__init__(policy, tokenizer, max_completion_length=max_completion_length, top_p=top_p, top_k=top_k)
        ContinuousBatchingConfig(**settings)  # raises now if it has no such setting
        self.settings = settings

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], *, seed: int, temperature: float, batch_size: int) -> list[Sample]:
        """See :class:`sppo.RolloutEngine`.

        Raises:
            RuntimeError: the engine failed on a prompt.
        """
        encoded = [encode(prompt, self.tokenizer) for prompt in prompts]
        generation = self._settings(temperature)
        with self.sampling(seed, generation):
            outputs = self._run(encoded, generation, seed, batch_size)
        responses = [until_end(output.generated_tokens, self.eos_ids) for output in outputs]
        logprobs = [output.logprobs[: len(response)] for output, response in zip(outputs, responses, strict=True)]
        return make_samples(prompts, encoded, responses, self.tokenizer, self.eos_ids, logprobs)

    def _run(self, encoded: list[list[int]], generation: GenerationConfig, seed: int, batch_size: int) -> list[Any]:
        on_gpu = self.policy.device.type == "cuda"
        own: dict[str, Any] = {"return_logprobs": True, "seed": seed % 2**31, "max_requests_per_batch": batch_size}
        if not on_gpu:
            own |= {"num_blocks": 64, "max_batch_tokens": 1024, "use_cuda_graph": False}
        config = ContinuousBatchingConfig(**{**own, **self.settings})
        outputs = cast(Any, self.policy).generate_batch(
            encoded, generation_config=generation, continuous_batching_config=config, progress_bar=False
        )
        found = list(outputs.values())
        if failed := [output.error for output in found if output.error]:
            raise RuntimeError(f"continuous batching failed on {len(failed)} of {len(encoded)} prompts: {failed[0]}")
        if len(found) < len(encoded):
            raise RuntimeError(f"continuous batching answered {len(found)} of {len(encoded)} prompts; see the log")
        return found
