"""One update in one process of several, with responses that depend on the prompt alone; see test_ranks.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import datasets
import torch
from tiny_models import char_tokenizer, tiny_model

from sppo import SPPOConfig, SPPOTrainer
from sppo.rollout import Sample


class Recited:
    """Responses of one to nine tokens, always the same to a prompt's n-th completion."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def generate(self, prompts: list[str], **_: Any) -> list[Sample]:
        made: list[Sample] = []
        for i, prompt in enumerate(prompts):
            a, b = int(prompt[0]), int(prompt[2])
            response = [12 + (a * 7 + b * 3 + i % 2 + t) % 10 for t in range((a + b + i % 2) % 9)] + [1]
            ids = self.tokenizer(prompt)["input_ids"]
            made.append(Sample(prompt, self.tokenizer.decode(response), ids, response, truncated=False))
        return made


def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [float((len(text) + int(prompt[2])) % 3 == 0) for prompt, text in zip(prompts, completions, strict=True)]


def run(out: Path, world: int, settings: dict[str, Any]) -> None:
    """Two updates on the same 16 completions, however many processes share them; the weights go to ``out``."""
    torch.set_num_threads(1)
    tokenizer = char_tokenizer()
    args = SPPOConfig(
        output_dir=str(out),
        use_cpu=True,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2 // world,
        num_iterations=2,
        num_generations=2,
        max_steps=2,
        learning_rate=1.0,
        critic_learning_rate=1.0,
        optim="sgd",
        min_agreement=0,
        max_grad_norm=1e9,
        critic_max_grad_norm=1e9,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        shuffle_dataset=False,
        **settings,
    )
    prompts = [f"{a}+{b}=" for a in range(4) for b in range(2)]
    model = tiny_model()
    for parameter in model.parameters():
        parameter.data *= 0.5
    trainer = SPPOTrainer(
        model,
        reward,
        args=args,
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        rollout_engine=Recited(tokenizer),
    )
    trainer.train()
    if trainer.is_world_process_zero():
        log = [entry for entry in trainer.state.log_history if "policy_loss" in entry]
        torch.save({"weights": trainer._pair.state_dict(), "log": log}, out / "result.pt")


if __name__ == "__main__":
    rank, world, out, port = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}  # fmt: skip
    settings: dict[str, Any] = dict(pair.split("=") for pair in sys.argv[5:])
    run(out, world, {name: int(value) if value.isdecimal() else value for name, value in settings.items()})
