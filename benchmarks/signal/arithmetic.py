"""Sums of different difficulty as a case of the study, answered by SmolLM2-135M-Instruct."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.signal.pools import Pool
from sppo.rewards.builtin import numeric

if TYPE_CHECKING:
    from datasets import Dataset

TEMPERATURE, MOST_TOKENS = 0.7, 16


@torch.no_grad()
def sample_pool(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    responses: int,
    *,
    seed: int = 0,
    batch_size: int = 128,
) -> Pool:
    """Sample ``responses`` responses to each prompt and a greedy one."""
    torch.manual_seed(seed)
    ids = [tokenizer(prompt)["input_ids"] for prompt in dataset["prompt"]]
    sampled = _answers(policy, tokenizer, ids, responses, batch_size)
    greedy = _answers(policy, tokenizer, ids, 0, batch_size)

    def graded(found: list[list[list[int]]]) -> Tensor:
        rows = [(row, text) for row, texts in zip(dataset, found, strict=True) for text in texts]
        texts = [tokenizer.decode(text, skip_special_tokens=True) for _, text in rows]
        rewards = numeric([row["prompt"] for row, _ in rows], texts, answer=[row["answer"] for row, _ in rows])
        return torch.tensor(rewards).reshape(len(found), -1)

    return Pool(ids, sampled, graded(sampled), graded(greedy)[:, 0])


def _answers(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    count: int,
    batch_size: int,
) -> list[list[list[int]]]:
    """Answer each prompt ``count`` times; once and greedily if it is 0."""
    settings = {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0} if count else {"do_sample": False}
    repeats, pad, end = max(1, count), tokenizer.pad_token_id, tokenizer.eos_token_id
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: dict[int, list[list[int]]] = {}
    for start in range(0, len(order), per := max(1, batch_size // repeats)):
        part = order[start : start + per]
        width = max(len(prompts[i]) for i in part)
        rows = policy.generate(
            torch.tensor([[pad] * (width - len(prompts[i])) + prompts[i] for i in part]),
            attention_mask=torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in part]),
            max_new_tokens=MOST_TOKENS,
            num_return_sequences=repeats,
            pad_token_id=pad,
            **settings,
        )[:, width:].tolist()
        ended = [row[: row.index(end) + 1] if end in row else row for row in rows]
        found |= {i: ended[n * repeats : (n + 1) * repeats] for n, i in enumerate(part)}
    return [found[i] for i in range(len(prompts))]
