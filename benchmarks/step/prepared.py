"""Prepared responses in place of generation, and a cheap reward of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import datasets

from benchmarks.step.models import Vocabulary
from sppo.rollout import Sample
from sppo.rollout.engine import make_samples

KINDS = ("equal", "mixed")


class Prepared:
    """Prompts, and a response for each place in a rollout, the same for every trainer.

    Args:
        vocabulary: of the model.
        prompts: number of prompts.
        prompt: mean tokens per prompt.
        lengths: tokens of each response.
    """

    def __init__(self, vocabulary: Vocabulary, prompts: int, prompt: int, lengths: Sequence[int]) -> None:
        of_prompts, of_responses = random.Random(0), random.Random(1)  # fewer are the first of the same ones
        draw = lambda rng, n: [rng.choice(vocabulary.words) for _ in range(n)]
        around = lambda n: of_prompts.randint(n * 3 // 4, n * 5 // 4)
        self.tokenizer = vocabulary.tokenizer
        texts = self.tokenizer.batch_decode([draw(of_prompts, around(prompt)) for _ in range(prompts)])
        self.dataset = datasets.Dataset.from_dict({"prompt": texts})
        # Alternately wrong and right, so that groups have both and no advantage is 0, which would save work.
        ends = [[vocabulary.digits[i % 2], self.tokenizer.eos_token_id] for i in range(len(lengths))]
        self.responses = [draw(of_responses, n - 2) + end for n, end in zip(lengths, ends, strict=True)]

    def answer(self, count: int, greedy: bool = False) -> list[list[int]]:
        """Return the first ``count`` responses; reversed for greedy ones, so that rewards differ."""
        return self.responses[:count][:: -1 if greedy else 1]

    def generate(self, prompts: Sequence[str], *, temperature: float, **_: Any) -> list[Sample]:
        """Generate as :class:`sppo.RolloutEngine` does."""
        encoded = self.tokenizer(list(prompts))["input_ids"]
        responses = self.answer(len(prompts), greedy=temperature == 0)
        return make_samples(prompts, encoded, responses, self.tokenizer, {self.tokenizer.eos_token_id})


def odd_end(completions: Sequence[str], **_: Any) -> list[float]:
    """Reward completions that end in an odd digit."""
    return [float(text.endswith(tuple("13579"))) for text in completions]


def lengths_of(kind: str, count: int, mean: int) -> list[int]:
    """Return response lengths: all equal, or log-normal as in chains of thought, most short and a few long."""
    rng = random.Random(1)
    if kind == "equal":
        return [mean] * count
    return [max(2, min(8 * mean, round(mean * rng.lognormvariate(-0.5, 1.0)))) for _ in range(count)]
