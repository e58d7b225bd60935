"""A training run in its own process, which can kill itself at a given call; see test_checkpointing.py."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig
from tiny_models import char_tokenizer, tiny_model

import sppo.checkpointing
import sppo.trainer
from sppo.config import SPPOConfig


def reward(prompts, completions, answer, **_):
    return [0.5 * (a in c) + 0.5 * (len(c) < 4) for a, c in zip(answer, completions, strict=True)]


def make_trainer(out: Path, **settings: Any) -> sppo.trainer.SPPOTrainer:
    prompts = [f"{a}+{b}=" for a in range(5) for b in range(7)]
    dataset = datasets.Dataset.from_dict({"prompt": prompts, "answer": list("abcde") * 7})
    defaults: dict[str, Any] = {
        "use_cpu": True,
        "per_device_train_batch_size": 3,
        "max_completion_length": 5,
        "learning_rate": 2e-3,
        "critic_learning_rate": 5e-3,
        "weight_decay": 0.1,
        "max_steps": 8,
        "save_steps": 3,
        "save_total_limit": 2,
        "lr_scheduler_type": "linear",
        "disable_tqdm": True,
        "logging_steps": 100,
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    if settings.pop("lora", False):
        adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        torch.manual_seed(0)  # of the adapter's weights
    else:
        adapter = None
    args = SPPOConfig(output_dir=str(out), **(defaults | settings))
    return sppo.trainer.SPPOTrainer(
        tiny_model(),
        reward,
        args=args,
        train_dataset=dataset,
        eval_dataset=dataset.select(range(4)),
        processing_class=char_tokenizer(),
        peft_config=adapter,
    )


def run(
    out: Path,
    settings: dict[str, Any],
    kill: tuple[str, int] | None = None,
    resume: bool = False,
    number: int = signal.SIGKILL,
) -> None:
    """Train and save into ``out/final``; ``kill`` names a function and the number of its call to send a signal in."""
    torch.set_num_threads(1)
    trainer = make_trainer(out, **settings)
    if kill is not None:
        die_in(trainer, *kill, number=number)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(out / "final"))


def die_in(trainer: sppo.trainer.SPPOTrainer, name: str, call: int, *, number: int) -> None:
    """Send a signal at the end of the given call of a function; SIGKILL in ``publish`` at its beginning."""
    homes: dict[str, Any] = {"publish": sppo.checkpointing, "rotate_checkpoints": sppo.trainer}
    homes["_generate_batch"] = trainer.rollout_engine
    home = homes.get(name, trainer)
    original, calls = getattr(home, name), 0

    def deadly(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        before = calls == call and name == "publish" and number == signal.SIGKILL
        result = None if before else original(*args, **kwargs)
        if calls == call:
            os.kill(os.getpid(), number)
        return result

    setattr(home, name, deadly)
