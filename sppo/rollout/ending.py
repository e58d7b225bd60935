"""Where a response ends: at an end-of-sequence token, or at the token that completes a stop string."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from sppo.rollout.engine import Prompt, Sample, make_samples, until_end

_REPORT_INTERVAL = 0.5  # seconds between two reports of progress within a batch


class Response(NamedTuple):
    """Tokens of a response, with the one that ends it unless it is truncated."""

    tokens: list[int]
    truncated: bool


class Ending:
    """Finds the end of a response.

    A stop string is searched in the decoded response, special tokens included, and not in the prompt. It may begin and
    end within tokens.

    Args:
        eos_ids: end-of-sequence tokens.
        tokenizer: decodes responses.
        stop_strings: texts that end a response; none by default.
    """

    def __init__(
        self, eos_ids: Collection[int], tokenizer: PreTrainedTokenizerBase, stop_strings: Sequence[str] | None = None
    ) -> None:
        self.eos_ids = set(eos_ids)
        self.tokenizer = tokenizer
        self.stop_strings = tuple(stop_strings or ())
        # A token has at least one byte of text, so that these tokens include any stop string that the last completes.
        self.window = max((len(text.encode()) for text in self.stop_strings), default=0) + 1

    def cut(self, tokens: Sequence[int]) -> Response:
        """Cut sampled tokens after the end of the response."""
        response = until_end(tokens, self.eos_ids)
        if self.has_stop_string(response):
            lengths = range(1, len(response) + 1)
            end = bisect_left(lengths, True, key=lambda length: self.has_stop_string(response[:length]))
            return Response(response[: lengths[end]], truncated=False)
        return Response(response, truncated=response[-1] not in self.eos_ids)

    def has_stop_string(self, tokens: Sequence[int]) -> bool:
        """Tell whether the text of these tokens contains a stop string."""
        if not self.stop_strings:
            return False
        text = cast(str, self.tokenizer.decode(list(tokens)))
        return any(stop in text for stop in self.stop_strings)


def samples_of(
    prompts: Sequence[Prompt],
    encoded: Sequence[list[int]],
    responses: Sequence[Response],
    tokenizer: PreTrainedTokenizerBase,
    logprobs: Sequence[list[float]] | None = None,
    supports: Sequence[tuple[Tensor, Tensor]] | None = None,
) -> list[Sample]:
    """Make samples from prompts, their tokens and the responses."""
    tokens = [response.tokens for response in responses]
    samples = make_samples(prompts, encoded, tokens, tokenizer, set(), logprobs, supports)
    for sample, response in zip(samples, responses, strict=True):
        sample.truncated = response.truncated
    return samples


class StopAtStrings(StoppingCriteria):
    """Ends the rows of a batch that contain a stop string; :meth:`Ending.cut` removes what follows it.

    Args:
        ending: has the stop strings.
        width: number of tokens of the padded prompts.
    """

    _EVERY = 8  # steps between two searches, each of which copies tokens from the device

    def __init__(self, ending: Ending, width: int) -> None:
        self.ending = ending
        self.width = width
        self.done: Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: Any) -> torch.BoolTensor:
        """Return which rows have ended, bool ``[B]``."""
        if self.done is None:
            self.done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        length = input_ids.shape[1] - self.width
        if length % self._EVERY == 0:
            recent = input_ids[:, -min(length, self.ending.window + self._EVERY) :].tolist()
            found = [
                was_done or self.ending.has_stop_string(tokens)
                for was_done, tokens in zip(self.done.tolist(), recent, strict=True)
            ]
            self.done = torch.tensor(found, device=input_ids.device)
        return cast(torch.BoolTensor, self.done)


class ReportProgress(StoppingCriteria):
    """Counts the rows of a batch that have ended, at most every half second: counting waits for the device.

    Args:
        report: called with the number of rows.
        ending: has the end-of-sequence tokens.
        width: number of tokens of the padded prompts.
        stop: the criterion of stop strings, if there are any.
    """

    def __init__(self, report: Callable[[int], None], ending: Ending, width: int, stop: StopAtStrings | None) -> None:
        self.report = report
        self.width = width
        self.stop = stop
        self.eos_ids = sorted(ending.eos_ids)
        self.none: Tensor | None = None
        self.reported = time.monotonic()

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: Any) -> torch.BoolTensor:
        """End no row."""
        if self.none is None:
            self.none = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        if time.monotonic() - self.reported >= _REPORT_INTERVAL:
            eos_ids = torch.tensor(self.eos_ids, device=input_ids.device)
            ended = torch.isin(input_ids[:, self.width :], eos_ids).any(1)
            if self.stop is not None and self.stop.done is not None:
                ended |= self.stop.done
            self.report(int(ended.sum()))
            self.reported = time.monotonic()
        return cast(torch.BoolTensor, self.none)
