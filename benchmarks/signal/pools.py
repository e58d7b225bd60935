"""Pools of responses: a fixed policy's answers to some prompts, several to each, with their rewards."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Pool(NamedTuple):
    """G responses to each of M prompts.

    Attributes:
        prompts: token ids of the M prompts.
        responses: token ids of the responses, ``responses[m][g]``; they end with the end of the sequence, if reached.
        rewards: float32 ``[M, G]``.
        greedy_rewards: float32 ``[M]``, rewards of the greedy responses.
    """

    prompts: list[list[int]]
    responses: list[list[list[int]]]
    rewards: Tensor
    greedy_rewards: Tensor

    @property
    def mean_length(self) -> float:
        """Mean number of tokens of a response."""
        lengths = [len(response) for group in self.responses for response in group]
        return sum(lengths) / len(lengths)

    @property
    def longest(self) -> int:
        """Number of tokens of the longest response."""
        return max(len(response) for group in self.responses for response in group)

    def tokens(self, prompt: int) -> Tensor:
        """Return int64 ``[G, L]``, a prompt followed by each of its responses, padded with token 0 on the right."""
        rows = [self.prompts[prompt] + response for response in self.responses[prompt]]
        padded = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for row, filled in zip(rows, padded, strict=True):
            filled[: len(row)] = torch.tensor(row)
        return padded

    def mask(self, prompt: int) -> Tensor:
        """Return float32 ``[G, T]``, 1 for the tokens of a prompt's responses and 0 for padding."""
        lengths = torch.tensor([len(response) for response in self.responses[prompt]])
        return (torch.arange(int(lengths.max())) < lengths[:, None]).float()

    def padded(self, of_prompts: Iterable[Tensor], length: int | None = None) -> Tensor:
        """Stack tensors ``[G, t]`` of each prompt to ``[M, G, T]``, with zeros after the longest response.

        Args:
            of_prompts: one tensor per prompt.
            length: T; None for that of the longest response.
        """
        length = self.longest if length is None else length
        return torch.stack([torch.nn.functional.pad(each, (0, length - each.shape[1])) for each in of_prompts])
