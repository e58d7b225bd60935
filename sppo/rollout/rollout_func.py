"""``rollout_func`` as TRL has it: a function of your own that samples, in place of an engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from sppo.rollout.engine import Prompt, Sample

_REQUIRED = ("prompt_ids", "completion_ids")
_OWN = (*_REQUIRED, "logprobs", "env_mask", "sampling_support")


class RolloutFunction:
    """An engine that calls ``rollout_func(prompts, trainer)``.

    It is called with one prompt per completion and returns a dict of lists of that length: ``prompt_ids`` and
    ``completion_ids``; ``logprobs``, floats per token, or None for those of the trainer; and optionally ``env_mask`` (1
    for tokens that the policy wrote), ``sampling_support`` (the token ids that the sampler kept, per token), and more
    columns for the rewards. The random state is set before the call, so that a resumed run samples the same.

    Args:
        function: the function.
        trainer: its second argument.
        tokenizer: the policy's.
        eos: tokens that end a response.
    """

    def __init__(
        self,
        function: Callable[[Sequence[Prompt], Any], dict[str, Any]],
        trainer: Any,
        tokenizer: PreTrainedTokenizerBase,
        eos: set[int],
    ) -> None:
        self.function, self.trainer, self.tokenizer, self.eos = function, trainer, tokenizer, eos

    def generate(self, prompts: Sequence[Prompt], *, seed: int, temperature: float, batch_size: int) -> list[Sample]:
        """See :class:`sppo.RolloutEngine`. The function itself chooses the temperature and the batch size.

        Raises:
            ValueError: the function did not return what it has to.
        """
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            output = self.function(list(prompts), self.trainer)
        missing = [name for name in _REQUIRED if output.get(name) is None]
        if missing:
            raise ValueError(
                f"rollout_func must return a dict with {', '.join(_REQUIRED)}; {', '.join(missing)} is missing"
            )
        columns = {name: values for name, values in output.items() if values is not None}
        for name, values in columns.items():
            if not hasattr(values, "__len__") or len(values) != len(prompts):
                raise ValueError(f"rollout_func: {name} must be a list of {len(prompts)} values, one per prompt")
        texts = self.tokenizer.batch_decode(list(columns["completion_ids"]), skip_special_tokens=True)
        own = {name: columns.pop(name, None) for name in _OWN}
        samples = []
        for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            given: dict[str, Any] = {name: None if values is None else values[i] for name, values in own.items()}
            response_ids = [int(token) for token in given["completion_ids"]]
            if not response_ids:
                raise ValueError(f"rollout_func: completion_ids of sample {i} is empty; give at least one token")
            mask = given["env_mask"]
            if given["logprobs"] is not None and len(given["logprobs"]) != len(response_ids):
                raise ValueError(
                    f"rollout_func: logprobs of sample {i} has {len(given['logprobs'])} values for "
                    f"{len(response_ids)} tokens"
                )
            samples.append(
                Sample(
                    prompt=prompt,
                    completion=text if isinstance(prompt, str) else [{"role": "assistant", "content": text}],
                    prompt_ids=[int(token) for token in given["prompt_ids"]],
                    response_ids=response_ids,
                    truncated=response_ids[-1] not in self.eos,
                    mask=None if mask is None else [bool(written) for written in mask],
                    logprobs=None if given["logprobs"] is None else [_number(value) for value in given["logprobs"]],
                    support=given["sampling_support"],
                    columns={name: values[i] for name, values in columns.items()},
                )
            )
        return samples


def _number(logprob: Any) -> float:
    """Return a log-probability, which some engines give as a list with the sampled token's first."""
    return float(logprob[0] if isinstance(logprob, Sequence) else logprob)


def check_masks(samples: Sequence[Sample], name: str) -> None:
    """Check the masks that an engine returned.

    Raises:
        ValueError: a mask has another length than its response, or no token that the policy wrote.
    """
    for i, sample in enumerate(samples):
        if sample.mask is not None and (len(sample.mask) != len(sample.response_ids) or not any(sample.mask)):
            raise ValueError(
                f"rollout engine {name}: the mask of sample {i} has {len(sample.mask)} values, {sum(sample.mask)} of "
                f"them true, for a response of {len(sample.response_ids)} tokens; give one per token, and at least one "
                "that is true"
            )
