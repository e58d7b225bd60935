"""Digit walks as a case of the study: policies of known difficulty, and the value of every prefix.

The task is that of :mod:`benchmarks.learn`. Each step of a walk depends on the two before it, so after a wrong step
the rest is right only by chance, which is neglected.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.learn import digit_walk
from benchmarks.learn.policy import lessons, make_policy, tokenizer
from benchmarks.signal.pools import Pool

PROMPT_TOKENS = 3


class Walk(NamedTuple):
    """A case: ``difficulty`` is one of :data:`benchmarks.learn.policy.SUCCESS`, ``horizon`` the steps of a walk."""

    difficulty: str
    horizon: int

    @property
    def name(self) -> str:
        return f"{self.difficulty}, {self.horizon} steps"

    def policy(self, folder: Path, quick: bool) -> Path:
        """Make the policy, unless it was made before, and return its file."""
        course = lessons(self.difficulty, self.horizon)
        return make_policy(folder, [lesson._replace(steps=3) for lesson in course] if quick else course)


def choose_prompts(count: int) -> list[str]:
    """Choose training prompts, evenly over the rules and deterministically."""
    every = digit_walk.prompts("train")
    return [every[i * len(every) // count] for i in range(count)]


@torch.no_grad()
def sample_pool(policy: LlamaForCausalLM, prompts: list[str], horizon: int, responses: int, seed: int = 0) -> Pool:
    """Sample ``responses`` responses to each prompt at temperature 1, and a greedy one."""
    torch.manual_seed(seed)
    encode = tokenizer()
    ids: Tensor = encode(prompts, return_tensors="pt")["input_ids"]
    answered = [_answers(policy, ids.repeat_interleave(responses, 0), horizon, do_sample=True, temperature=1.0)]
    answered.append(_answers(policy, ids, horizon, do_sample=False))
    rewards = []
    for rows in answered:
        texts = encode.batch_decode(rows, skip_special_tokens=True)
        each = [prompt for prompt in prompts for _ in range(len(rows) // len(prompts))]
        ends = [digit_walk.walk(prompt, horizon)[-2:] for prompt in each]
        rewards.append(torch.tensor(digit_walk.reward(each, texts, ends, [horizon] * len(each))))
    return Pool(
        prompts=ids.tolist(),
        responses=[[_until_end(row) for row in group] for group in answered[0].unflatten(0, (-1, responses)).tolist()],
        rewards=rewards[0].reshape(-1, responses),
        greedy_rewards=rewards[1],
    )


def _answers(policy: LlamaForCausalLM, ids: Tensor, horizon: int, **settings: object) -> Tensor:
    parts = [
        policy.generate(part, attention_mask=torch.ones_like(part), max_new_tokens=horizon, top_k=0, **settings)
        for part in ids.split(512)
    ]
    return torch.cat([torch.nn.functional.pad(part, (0, PROMPT_TOKENS + horizon - part.shape[1])) for part in parts])[
        :, PROMPT_TOKENS:
    ]


def _until_end(row: list[int]) -> list[int]:
    end = tokenizer().eos_token_id
    return row[: row.index(end) + 1] if end in row else row


@torch.no_grad()
def ideal_values(policy: LlamaForCausalLM, pool: Pool, prompts: list[str], horizon: int) -> Tensor:
    """Compute P(success) before each step of each response, float32 ``[M, G, horizon]``; 0 after a wrong step.

    The probability of a right step is the policy's own, averaged over the prompt's responses that are right so far,
    which differ only in how digits are written. Values are products of these probabilities.
    """
    values = torch.zeros(*pool.rewards.shape, horizon)
    encode = tokenizer()
    for m, prompt in enumerate(prompts):
        walk = digit_walk.walk(prompt, horizon)
        spelled = torch.tensor([encode(walk)["input_ids"], encode(walk.translate(_AS_LETTERS))["input_ids"]])
        tokens = torch.nn.functional.pad(pool.tokens(m), (0, horizon))[:, : PROMPT_TOKENS + horizon]
        probabilities = policy(tokens[:, :-1], use_cache=False).logits[:, PROMPT_TOKENS - 1 :].softmax(-1)
        right_step = sum(
            probabilities.gather(2, ids[None, :, None].expand(len(tokens), -1, 1))[..., 0] for ids in spelled
        )
        is_right = (tokens[:, None, PROMPT_TOKENS:] == spelled).any(1)
        so_far = torch.cat([torch.ones(len(tokens), 1, dtype=torch.bool), is_right.cumprod(1).bool()[:, :-1]], 1)
        count = so_far.sum(0)
        # Steps that no response reached while right are taken for as likely as those before them.
        mean = torch.where(so_far, right_step, 0).sum(0) / count.clamp(min=1)
        mean = torch.where(count > 0, mean, mean[count > 0].mean())
        values[m] = torch.where(so_far, mean.flip(0).cumprod(0).flip(0), 0)
    return values


def wrong_steps(pool: Pool, prompts: list[str]) -> Tensor:
    """Count the steps ``[M, G]`` that do not follow from the two before them."""
    decoded = [tokenizer().batch_decode(group, skip_special_tokens=True) for group in pool.responses]
    return torch.tensor(
        [[_wrong_steps(prompt, text) for text in group] for prompt, group in zip(prompts, decoded, strict=True)]
    )


def _wrong_steps(prompt: str, text: str) -> int:
    digits = prompt[1:] + text.translate(_AS_DIGITS)
    states = ((digits[t : t + 2], digits[t + 2]) for t in range(len(digits) - 2))
    return sum(not state.isdigit() or digit_walk.walk(prompt[0] + state, 1) != following for state, following in states)


_AS_LETTERS = str.maketrans(digit_walk.DIGITS, digit_walk.LETTERS)
_AS_DIGITS = str.maketrans(digit_walk.LETTERS, digit_walk.DIGITS)
