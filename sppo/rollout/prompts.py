"""The order in which a run reads its prompts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from hashlib import blake2b
from typing import Any

import datasets
import torch

from sppo.rollout.engine import ChatPrompt, Prompt, rollout_seed
from sppo.settings import SPPOSettings


class Prompts:
    """An infinite view of the dataset, shuffled in each epoch by the epoch's number and the seed.

    Args:
        dataset: the rows.
        seed: seed of the order.
        shuffle: whether to shuffle.
        encode: returns the tokens of a row's prompt.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        *,
        seed: int,
        shuffle: bool,
        encode: Callable[[dict[str, Any]], list[int]] = lambda row: row["prompt"],
    ) -> None:
        self.dataset = dataset
        self.encode = encode
        self.seed = seed
        self.shuffle = shuffle
        self._epoch = -1
        self._order: list[int] = []

    def take(self, start: int, count: int) -> list[dict[str, Any]]:
        """Return rows ``start`` to ``start + count`` of the infinite view."""
        return [self.dataset[self._index(position)] for position in range(start, start + count)]

    def draw(self, count: int, weights: Callable[[Sequence[str]], list[float]], *, seed: int) -> list[dict[str, Any]]:
        """Draw rows without replacement, or again all of them where there are fewer than ``count``.

        Args:
            count: number of rows.
            weights: returns the weight of each prompt, by its name (:func:`prompt_hash`).
            seed: seed of the draw.
        """
        generator = torch.Generator().manual_seed(seed)
        probabilities = torch.tensor(weights(self._names), dtype=torch.float64)
        drawn: list[int] = []
        while len(drawn) < count:
            n = min(count - len(drawn), len(self.dataset))
            drawn += torch.multinomial(probabilities, n, generator=generator).tolist()
        return [self.dataset[i] for i in drawn]

    @cached_property
    def _names(self) -> list[str]:
        return [prompt_hash(self.encode(row)) for row in self.dataset]

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, len(self.dataset))
        if not self.shuffle:
            return place
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(rollout_seed(self.seed, epoch))
            self._epoch, self._order = epoch, torch.randperm(len(self.dataset), generator=generator).tolist()
        return self._order[place]


def prompt_of(row: Mapping[str, Any], args: SPPOSettings, tools: Sequence[Any] = ()) -> Prompt:
    """Return a row's prompt; chat messages with the arguments of the template that apply to them.

    Args:
        row: the row, whose columns ``chat_template_kwargs`` and ``tools`` (schemas, perhaps as JSON) take precedence.
        args: settings of the run.
        tools: functions that the template describes.
    """
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return prompt
    own = {name: value for name, value in (row.get("chat_template_kwargs") or {}).items() if value is not None}
    settings = {**(args.chat_template_kwargs or {}), **own}
    schemas = row.get("tools")
    if schemas or tools:
        settings["tools"] = json.loads(schemas) if isinstance(schemas, str) else schemas or list(tools)
    return ChatPrompt(prompt, settings) if settings else prompt


def check_template_settings(dataset: datasets.Dataset, args: SPPOSettings, tools: Sequence[Any]) -> None:
    """Check that settings of the chat template have something to act on.

    Raises:
        ValueError: the prompts are text.
    """
    named = {"chat_template_kwargs": args.chat_template_kwargs, "tools": tools}
    for name, value in named.items():
        if value and any(isinstance(prompt, str) for prompt in dataset["prompt"]):
            raise ValueError(
                f"{name} is for the chat template, and the prompts are text; give chat messages (chat: true), or leave "
                f"{name} out"
            )


def prompt_hash(prompt_ids: Sequence[int]) -> str:
    """Return a short name of a prompt's tokens, the same in each rollout and process."""
    return blake2b(repr(list(prompt_ids)).encode(), digest_size=8).hexdigest()
