"""The initial policies: small transformers that have learned the rules, and a rate of random steps."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.learn import digit_walk
from sppo._utils import atomic_write
from sppo.tasks.chain_model import char_tokenizer

SUCCESS: dict[str, tuple[float, ...]] = {
    "even": (0.3,),
    "mixed": (0.9, 0.1),
    "extreme": (0.98, 0.02),
    "graded": (0.98, 0.84, 0.71, 0.57, 0.43, 0.29, 0.16, 0.02),
}
"""Shares of right answers when the policy has learned the slips, each for an equal number of successive rules."""


def tokenizer() -> PreTrainedTokenizerFast:
    return char_tokenizer(digit_walk.ALPHABET)


def slips(difficulty: str, horizon: int) -> dict[str, float]:
    """Return for each rule the rate of random steps that gives the required share of right answers."""
    successes = SUCCESS[difficulty]
    of_rule = {name: successes[i * len(successes) // len(digit_walk.RULES)] for i, name in enumerate(digit_walk.RULES)}
    # One of ten random steps is right by chance.
    return {name: (1 - success ** (1 / horizon)) / 0.9 for name, success in of_rule.items()}


def new_config(hidden_size: int = 64, layers: int = 2) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(digit_walk.ALPHABET) + 2,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )


class Lesson(NamedTuple):
    """Demonstrations to imitate.

    Attributes:
        horizon: steps per demonstration.
        slip: rate of random steps for each rule.
        with_slips: whether random steps are imitated too.
        demonstrations: batch size.
        steps: optimizer steps.
        learning_rate: peak learning rate.
    """

    horizon: int
    slip: dict[str, float]
    with_slips: bool
    demonstrations: int
    steps: int
    learning_rate: float


def lessons(difficulty: str, horizon: int) -> list[Lesson]:
    """Return lessons: short walks for the rules, long ones for their repeated use, and the task's with random steps.

    Random steps that are not imitated keep a long walk from entering a cycle, which could be copied from the context.
    """
    jumps = dict.fromkeys(digit_walk.RULES, 0.2)
    return [
        Lesson(16, jumps, False, demonstrations=128, steps=800, learning_rate=4e-3),
        Lesson(256, jumps, False, demonstrations=16, steps=400, learning_rate=2e-3),
        Lesson(
            horizon, slips(difficulty, horizon), True, demonstrations=8192 // horizon, steps=300, learning_rate=1e-3
        ),
    ]


def imitate(model: LlamaForCausalLM, lesson: Lesson) -> None:
    """Train the model on demonstrations, each seen once."""
    rng, encode, every = random.Random(0), tokenizer(), digit_walk.prompts("train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=lesson.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 30) * (1 - step / lesson.steps)
    )
    what = "slips" if lesson.with_slips else "rules"
    progress = tqdm(range(lesson.steps), desc=f"lesson on {what}, {lesson.horizon} steps", mininterval=1)
    for _ in progress:
        chosen = rng.choices(every, k=lesson.demonstrations)
        made, drawn = zip(
            *(digit_walk.demonstration(p, lesson.horizon, lesson.slip[p[0]], rng) for p in chosen), strict=True
        )
        tokens = torch.tensor(encode([prompt + walk for prompt, walk in zip(chosen, made, strict=True)])["input_ids"])
        labels = tokens[:, 3:]  # the three tokens of the prompt are given
        if not lesson.with_slips:
            labels = labels.masked_fill(torch.tensor(drawn), -100)
        loss = cross_entropy(model(tokens[:, :-1]).logits[:, 2:].flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def make_policy(folder: Path, course: Sequence[Lesson]) -> Path:
    """Train a new model on successive lessons, and save it after each.

    Returns:
        The file of the last one. Its name is a hash of the lessons so far.
    """
    torch.manual_seed(0)
    model = LlamaForCausalLM(new_config())
    taught: list[Any] = [new_config().to_diff_dict()]
    for lesson in course:
        taught.append(lesson)
        file = folder / f"policy-{sha256(json.dumps(taught, sort_keys=True).encode()).hexdigest()[:12]}.safetensors"
        if file.exists():
            model.load_state_dict(load_file(file))
            continue
        imitate(model, lesson)
        with atomic_write(file) as staged:
            save_file(model.state_dict(), staged)
    return file


def load_policy(file: Path) -> LlamaForCausalLM:
    """Load a policy of :func:`make_policy`."""
    model = LlamaForCausalLM(new_config())
    model.load_state_dict(load_file(file))
    return model.eval()


def greedy_accuracy(file: Path, horizon: int) -> float:
    """Return the share of held-out prompts for which greedy decoding is right."""
    model, encode, rows = load_policy(file), tokenizer(), digit_walk.dataset("test", horizon)
    asked = encode(list(rows["prompt"]), return_tensors="pt")["input_ids"]
    answered = model.generate(asked, attention_mask=torch.ones_like(asked), max_new_tokens=horizon, do_sample=False)
    written = encode.batch_decode(answered[:, 3:], skip_special_tokens=True)
    return statistics.fmean(digit_walk.reward(rows["prompt"], written, rows["answer"], rows["steps"]))
