"""Objects that recipes in tests name: a tiny policy, a tiny critic, prompts and a reward."""

from tiny_models import char_tokenizer, tiny_model
from transformers import Qwen2ForSequenceClassification


def policy(seed: int = 0):
    return tiny_model(seed=seed), char_tokenizer()


def critic(seed: int = 1):
    return Qwen2ForSequenceClassification(tiny_model(seed=seed, num_labels=1).config)


def sums(count: int, start: int = 0):
    return [{"prompt": f"{i % 7}+{i % 5}=", "answer": "abcde"[i % 5]} for i in range(start, start + count)]


def letter(prompts, completions, answer):
    return [0.5 * (a in c) + 0.5 * (len(c) < 4) for a, c in zip(answer, completions, strict=True)]
