"""How far the policy has moved since it last answered a prompt, for algorithms that forget old outcomes by it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from sppo.algorithms import Algorithm
from sppo.config import SPPOConfig
from sppo.models.actor_critic import policy_logprobs
from sppo.models.packed_attention import PACKED_ATTENTION, use_attention
from sppo.rollout.batching import length, pack_policy_batch
from sppo.rollout.engine import Sample

TRACE_TOKENS = 128
"""Number of tokens at the start of a response that are kept to measure the drift."""

_SEQUENCES_AT_ONCE = 64


def measure_drifts(samples: Sequence[Sample], algorithm: Algorithm, policy: PreTrainedModel, args: SPPOConfig) -> None:
    """Set the drift of each sample's prompt, and the trace of its response.

    Args:
        samples: the samples, modified in place.
        algorithm: has the traces of earlier responses.
        policy: the policy, before the update.
        args: settings of the run.
    """
    earlier = [algorithm.trace(sample.name) for sample in samples]
    seen = [(sample, trace) for sample, trace in zip(samples, earlier, strict=True) if trace is not None]
    responses = [(s.prompt_ids, s.response_ids[:TRACE_TOKENS]) for s in samples]
    responses += [(s.prompt_ids, tokens) for s, (tokens, _) in seen]
    logprobs = _logprobs(responses, policy, args)
    for sample, (_, tokens), now in zip(samples, responses, logprobs, strict=False):
        sample.trace = tokens, now
    for (sample, (_, before)), now in zip(seen, logprobs[len(samples) :], strict=True):
        sample.drift = sum(abs(a - b) for a, b in zip(before, now, strict=True)) / len(now)


def _logprobs(
    responses: Sequence[tuple[list[int], list[int]]], policy: PreTrainedModel, args: SPPOConfig
) -> list[list[float]]:
    """Compute the log-probability of each token of some responses to their prompts, over the whole vocabulary."""
    result: list[list[float]] = []
    for start in range(0, len(responses), _SEQUENCES_AT_ONCE):
        part = [
            Sample(prompt=None, completion=None, prompt_ids=prompt, response_ids=tokens, truncated=False)
            for prompt, tokens in responses[start : start + _SEQUENCES_AT_ONCE]
        ]
        for sample in part:
            sample.advantage = torch.zeros(())
        batch = {name: tensor.to(policy.device) for name, tensor in pack_policy_batch(part).items()}
        with use_attention(policy, PACKED_ATTENTION):
            logprobs, _ = policy_logprobs(
                policy,
                batch,
                temperature=args.temperature,
                max_length=max(map(length, part)),
                projection=args.logprobs_projection,
            )
        result += [part.tolist() for part in logprobs.cpu().split([len(s.response_ids) for s in part])]
    return result
