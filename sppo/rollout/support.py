"""The sampling support: the tokens that top_k, top_p and min_p kept for each response token.

    log p(label) = logit(label) - logsumexp of the logits of the kept tokens

A sampler that truncates draws from this distribution. Trained on the distribution over the whole vocabulary instead,
every importance ratio is biased (arXiv 2512.02556, section 3.1).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.utils import logging

from sppo.rollout.engine import Sample
from sppo.settings import SPPOSettings
from sppo_kernels.ops.support_passes import Support, offsets_of, read_support

logger = logging.get_logger(__name__)


def is_truncated(top_p: float, top_k: int, min_p: float | None) -> bool:
    """Tell whether these settings exclude tokens from sampling."""
    return top_p < 1 or top_k > 0 or bool(min_p)


class SupportRecorder:
    """Collects what a sampler keeps, step by step, for sequences that begin and end at different steps."""

    def __init__(self) -> None:
        self._sequences: list[Hashable] = []
        self._token_ids: list[Tensor] = []
        self._counts: list[Tensor] = []

    def add(self, sequences: Iterable[Hashable], kept: Tensor) -> None:
        """Record one step. A row of which everything was kept is recorded as an empty range: it was not cut.

        Args:
            sequences: name of the sequence of each row.
            kept: bool ``[rows, V]``, whether the sampler kept each token.
        """
        kept = kept & ~kept.all(1, keepdim=True)
        self._sequences += sequences
        self._token_ids.append(kept.nonzero()[:, 1].to("cpu", torch.int32))
        self._counts.append(kept.sum(1).cpu())

    def supports(self, lengths: Mapping[Hashable, int]) -> list[Support]:
        """Return the support of each sequence.

        Args:
            lengths: number of response tokens by name of the sequence. Steps after these are ignored, as are other
                sequences.

        Raises:
            RuntimeError: fewer steps than tokens were recorded.
        """
        numbers = {name: i for i, name in enumerate(lengths)}
        owners = torch.tensor([numbers.get(name, -1) for name in self._sequences], dtype=torch.long)
        counts = torch.cat([torch.zeros(0, dtype=torch.long), *self._counts])
        token_ids = torch.cat([torch.zeros(0, dtype=torch.int32), *self._token_ids])
        starts = counts.cumsum(0) - counts
        num_steps = (owners + 1).bincount(minlength=len(lengths) + 1).tolist()
        _, *all_steps = owners.argsort(stable=True).split(num_steps)  # by sequence, in the order of sampling
        supports = []
        for (name, length), steps in zip(lengths.items(), all_steps, strict=True):
            if len(steps) < length:
                raise RuntimeError(
                    f"the sampling support of {len(steps)} of {length} tokens of sequence {name!r} was recorded; set "
                    "replay_sampling_support=False to sample without recording it"
                )
            steps = steps[:length]
            offsets = offsets_of(counts[steps])
            shift = (starts[steps] - offsets[:-1]).repeat_interleave(counts[steps])
            supports.append(Support(token_ids[torch.arange(len(shift)) + shift], offsets))
        return supports


def take_supports(samples: Sequence[Sample], engine: str, args: SPPOSettings, vocab_size: int) -> None:
    """Check the supports that an engine returned, or drop them if they are not to be used.

    Args:
        samples: sampled completions. Each gets its support as a ``Support`` on the CPU, in whichever form it is.
        engine: name of the engine, for messages.
        args: settings of the run.
        vocab_size: number of tokens in the vocabulary.

    Raises:
        ValueError: a support does not describe its response, only some samples have one, or their absence does not fit
            the settings.
    """
    is_cut = is_truncated(args.top_p, args.top_k, args.min_p)
    if not args.replay_sampling_support:
        for sample in samples:
            sample.support = None
        if is_cut:
            _reject_sequence_weights(samples, engine, args)
        return
    missing = [i for i, sample in enumerate(samples) if sample.support is None]
    if missing and len(missing) < len(samples):
        raise ValueError(
            f"rollout engine {engine} returned no support for sample {missing[0]} and {len(missing) - 1} others of "
            f"{len(samples)}; return one for all or for none. An empty range in its offsets stands for a token without "
            "truncation"
        )
    if missing and is_cut:
        _reject_sequence_weights(samples, engine, args)
        logger.warning_once(
            f"rollout engine {engine} returned no support: log-probabilities are over the whole vocabulary, although "
            f"samples are from a truncated distribution (top_p={args.top_p}, top_k={args.top_k}, min_p={args.min_p}); "
            "return Sample.support, or set replay_sampling_support=False to accept this"
        )
    for i, sample in enumerate(samples):
        if sample.support is None:
            continue
        name = f"rollout engine {engine}: the support of sample {i}"
        sample.support = read_support(name, sample.support, sample.response_ids, vocab_size)


def _reject_sequence_weights(samples: Sequence[Sample], engine: str, args: SPPOSettings) -> None:
    """Raise ValueError where log-probabilities over different sets of tokens would be summed over a sequence."""
    if args.rollout_correction.startswith("sequence_") and any(sample.logprobs is not None for sample in samples):
        raise ValueError(
            f"rollout_correction={args.rollout_correction!r} with top_p={args.top_p}, top_k={args.top_k}, min_p="
            f"{args.min_p}: rollout engine {engine} returned log-probabilities, and no support is used, so the "
            "excluded probability would shrink the weight with each token; return Sample.support with "
            "replay_sampling_support=True, or use rollout_correction='token_truncate'"
        )


class SupportStats(NamedTuple):
    """Counts over a response: its tokens, all tokens that were kept, and tokens that had no alternative."""

    num_tokens: int
    total: int
    num_single: int

    @classmethod
    def of(cls, sample: Sample, vocab_size: int) -> SupportStats | None:
        """Count; None without a support."""
        if sample.support is None:
            return None
        assert isinstance(sample.support, Support)
        counts = _written(sample.support, sample).sizes()
        return cls(len(counts), int(torch.where(counts == 0, vocab_size, counts).sum()), int((counts == 1).sum()))


def support_metrics(stats: Sequence[SupportStats | None]) -> dict[str, float]:
    """Return the metrics of a rollout's supports, means over response tokens; none without supports."""
    num_tokens = sum(each.num_tokens for each in stats if each is not None)
    if not num_tokens:
        return {}
    return {
        "support_size": sum(each.total for each in stats if each is not None) / num_tokens,
        "support_single_share": sum(each.num_single for each in stats if each is not None) / num_tokens,
    }


def pack_supports(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Concatenate the supports of a micro-batch's samples, all or none of which have one.

    Returns:
        ``support_ids`` and ``support_offsets``, or nothing.
    """
    supports = [_written(s.support, s) for s in samples if isinstance(s.support, Support)]
    if not supports:
        return {}
    assert len(supports) == len(samples)
    ids, offsets = Support.cat(supports)
    return {"support_ids": ids, "support_offsets": offsets}


def _written(support: Support, sample: Sample) -> Support:
    """Return the support of the tokens that the policy wrote."""
    return support if sample.mask is None else support.select(torch.tensor(sample.mask))


def share_outside(batch: Mapping[str, Tensor]) -> Tensor:
    """Return the share of a micro-batch's response tokens that are not in their own support, 0-d.

    Their log-probability would be minus infinity. None can be, as long as supports follow their tokens.
    """
    support = Support(batch["support_ids"], batch["support_offsets"])
    return 1 - support.has_labels(batch["response_ids"]).float().mean()
