"""The sampling support: the tokens that top_k, top_p and min_p kept for each response token.

    log p(label) = logit(label) - logsumexp of the logits of the kept tokens

A sampler that truncates draws from this distribution. Trained on the distribution over the whole vocabulary instead,
every importance ratio is biased (arXiv 2512.02556, section 3.1).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.utils import logging

from sppo.rollout.engine import Sample
from sppo.settings import SPPOSettings

logger = logging.get_logger(__name__)


class Support(NamedTuple):
    """Token ids that a sampler kept: ``token_ids[offsets[t]:offsets[t + 1]]`` for response token ``t``.

    ``token_ids`` is int32 ``[M]``, ``offsets`` int64 ``[T + 1]``. An empty range stands for the whole vocabulary.
    """

    token_ids: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, kept: Sequence[Sequence[int]]) -> Support:
        """Make the support from one list of token ids per response token; an empty list for one without a cut."""
        ids = [token for tokens in kept for token in tokens]
        return cls(torch.tensor(ids, dtype=torch.int32), _offsets(torch.tensor([len(tokens) for tokens in kept])))


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
            offsets = _offsets(counts[steps])
            shift = (starts[steps] - offsets[:-1]).repeat_interleave(counts[steps])
            supports.append(Support(token_ids[torch.arange(len(shift)) + shift], offsets))
        return supports


def take_supports(samples: Sequence[Sample], engine: str, args: SPPOSettings, vocab_size: int) -> None:
    """Check the supports that an engine returned, or drop them if they are not to be used.

    Args:
        samples: sampled completions. Each gets its support as integer tensors on the CPU, whatever holds it.
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
        support, problem = _read(sample.support)
        if support is not None:
            problem = _problem(support, sample.response_ids, vocab_size)
        if problem:
            raise ValueError(f"rollout engine {engine}: the support of sample {i} {problem}; see sppo.Sample")
        sample.support = support


def _reject_sequence_weights(samples: Sequence[Sample], engine: str, args: SPPOSettings) -> None:
    """Raise ValueError where log-probabilities over different sets of tokens would be summed over a sequence."""
    if args.rollout_correction.startswith("sequence_") and any(sample.logprobs is not None for sample in samples):
        raise ValueError(
            f"rollout_correction={args.rollout_correction!r} with top_p={args.top_p}, top_k={args.top_k}, min_p="
            f"{args.min_p}: rollout engine {engine} returned log-probabilities, and no support is used, so the "
            "excluded probability would shrink the weight with each token; return Sample.support with "
            "replay_sampling_support=True, or use rollout_correction='token_truncate'"
        )


def _read(value: Any) -> tuple[Support | None, str | None]:
    """Return a support as int32 and int64 tensors on the CPU, or None and what is wrong with it."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        return (
            None,
            f"is {type(value).__name__} and must be a pair (token_ids, offsets); sppo.Support.of makes one of lists",
        )
    try:
        ids, offsets = (torch.as_tensor(x, device="cpu") for x in value)
    except (TypeError, ValueError) as error:
        return None, f"must be a pair (token_ids, offsets) of integers ({error})"
    for name, x in (("token_ids", ids), ("offsets", offsets)):
        if x.numel() and (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool):
            return None, f"has {name} of {x.dtype}, which must be integers"
    return Support(ids.int(), offsets.long()), None


def _problem(support: Support, response_ids: Sequence[int], vocab_size: int) -> str | None:
    """Say what is wrong with a support, or return None."""
    ids, offsets, num_tokens = support.token_ids.long(), support.offsets, len(response_ids)
    if ids.ndim != 1 or offsets.shape != (num_tokens + 1,):
        return (
            f"has token_ids of shape {tuple(ids.shape)} and offsets of shape {tuple(offsets.shape)} for {num_tokens} "
            f"tokens, and must have [M] and [{num_tokens + 1}]"
        )
    if offsets[0] != 0 or offsets[-1] != len(ids):
        return f"has offsets from {offsets[0]} to {offsets[-1]}, which must be from 0 to len(token_ids)={len(ids)}"
    counts = offsets.diff()
    if (counts < 0).any():
        t = _first(counts < 0)
        return f"has offsets that fall at token {t}, from {offsets[t]} to {offsets[t + 1]}"
    if not len(ids):
        return None
    token = torch.arange(num_tokens).repeat_interleave(counts)
    if (outside := (ids < 0) | (ids >= vocab_size)).any():
        return f"has the id {ids[outside][0]} at token {token[_first(outside)]}, outside of [0, {vocab_size})"
    labels = torch.tensor(response_ids, dtype=torch.long)
    has_label = token[ids == labels[token]].bincount(minlength=num_tokens) > 0
    if (lost := (counts > 0) & ~has_label).any():
        t = _first(lost)
        return f"lacks the response token itself, {response_ids[t]}, at token {t}"
    values, order = (token * vocab_size + ids).sort()
    if (twice := values.diff() == 0).any():
        entry = order[_first(twice)]
        return f"has the id {ids[entry]} twice at token {token[entry]}"
    return None


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
        counts = sample.support[1].diff()
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
    supports = [s.support for s in samples if s.support is not None]
    if not supports:
        return {}
    assert len(supports) == len(samples)
    return {
        "support_ids": torch.cat([ids for ids, _ in supports]),
        "support_offsets": _offsets(torch.cat([offsets.diff() for _, offsets in supports])),
    }


def share_outside(batch: Mapping[str, Tensor]) -> Tensor:
    """Return the share of a micro-batch's response tokens that are not in their own support, 0-d.

    Their log-probability would be minus infinity. None can be, as long as supports follow their tokens.
    """
    ids, offsets, labels = batch["support_ids"], batch["support_offsets"], batch["response_ids"]
    token = torch.searchsorted(offsets[1:], torch.arange(len(ids), device=ids.device), right=True)
    is_inside = (offsets.diff() == 0).index_fill(0, token[ids == labels[token]], True)
    return 1 - is_inside.float().mean()


def _offsets(counts: Tensor) -> Tensor:
    """Return where each range begins, and where the last one ends."""
    return torch.cat([torch.zeros(1, dtype=torch.long), counts.long().cumsum(0)])


def _first(mask: Tensor) -> int:
    return int(mask.int().argmax())
