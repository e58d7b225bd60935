"""Updates in one process of several, with responses that depend only on the prompt; see test_fsdp.py.

python ranks_run.py RANK WORLD OUT PORT '{"name": {"algorithm": "sppo", "sharding": "fsdp2", ...}, ...}'
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from peft import LoraConfig
from tiny_models import char_tokenizer, tiny_model

from sppo import SPPOConfig, SPPOTrainer
from sppo.models.fsdp import full_tensor
from sppo.models.lora import add_adapter, trainable
from sppo.rollout import Sample
from sppo_kernels import Support

PROMPTS = [f"{a}+{b}=" for a in range(4) for b in range(2)]
SECOND_HALF = ("2", "3")  # first digits of the prompts that rank 1 of 2 has


class Recited:
    """An engine with fixed responses of one to nine tokens; greedy responses are each prompt's first.

    Args:
        lost: first digits of the prompts whose responses are cut off.
        truncates: whether responses have supports, of one to five tokens.
    """

    def __init__(self, tokenizer: Any, lost: tuple[str, ...] = (), truncates: bool = False) -> None:
        self.tokenizer, self.lost, self.truncates = tokenizer, lost, truncates

    def generate(self, prompts: list[str], *, temperature: float, **_: Any) -> list[Sample]:
        made: list[Sample] = []
        for i, prompt in enumerate(prompts):
            a, b, n = int(prompt[0]), int(prompt[2]), i % 2 if temperature else 0
            response = [12 + (a * 7 + b * 3 + n + t) % 10 for t in range((a + b + n) % 9)] + [1]
            ids = self.tokenizer(prompt)["input_ids"]
            truncated = prompt.startswith(self.lost) if self.lost else False
            support = None
            if self.truncates:
                support = Support.of([[(token + 3 * k) % 27 for k in range(1 + token % 5)] for token in response])
            made.append(Sample(prompt, self.tokenizer.decode(response), ids, response, truncated, support=support))
        return made


def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [float((len(text) + int(prompt[2])) % 3 == 0) for prompt, text in zip(prompts, completions, strict=True)]


def reward_equal_on_rank_1(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    own = reward(prompts, completions)
    return [1.0 if prompt.startswith(SECOND_HALF) else r for prompt, r in zip(prompts, own, strict=True)]


def make(
    out: Path,
    world: int,
    *,
    sharding: str = "ddp",
    prompts: int = len(PROMPTS),
    held_out: int = 3,
    lost: bool = False,
    equal: bool = False,
    lora: bool = False,
    trained_lora: bool = False,
    sampled: bool = False,
    **settings: Any,
) -> SPPOTrainer:
    """Make a trainer, one in each process; with ``sampled`` the policy generates, independently in each process."""
    args = {
        "output_dir": str(out),
        "use_cpu": True,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2 // world,
        "num_iterations": 2,
        "num_generations": 2,
        "max_steps": 2,
        "max_completion_length": 6,
        "learning_rate": 1.0,
        "critic_learning_rate": 1.0,
        "optim": "sgd",
        "max_grad_norm": 1e9,
        "critic_max_grad_norm": 1e9,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "shuffle_dataset": False,
        "mask_truncated_completions": lost,
    }
    tokenizer, model = char_tokenizer(), tiny_model()
    for parameter in model.parameters():
        parameter.data *= 0.5
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights="gaussian")
    torch.manual_seed(0)  # of the adapter's weights
    if trained_lora:
        add_adapter(model, adapter)
        for weight in trainable(model).values():
            weight.data.normal_(std=0.1)
    trainer = SPPOTrainer(
        model,
        reward_equal_on_rank_1 if equal else reward,
        args=SPPOConfig(**(args | settings)),
        train_dataset=datasets.Dataset.from_dict({"prompt": PROMPTS[:prompts]}),
        eval_dataset=datasets.Dataset.from_dict({"prompt": PROMPTS[:held_out]}),
        processing_class=tokenizer,
        rollout_engine=None if sampled else Recited(tokenizer, SECOND_HALF if lost else (), "top_k" in settings),
        peft_config=adapter if lora else None,
    )
    if sharding == "fsdp2" and world > 1:
        use_fsdp2(trainer)
    return trainer


def use_fsdp2(trainer: SPPOTrainer) -> None:
    """Do what ``fsdp=True`` does on a GPU; on a CPU accelerate silently uses DDP instead."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type="FULL_STATE_DICT"
    )
    trainer.accelerator.state.distributed_type = DistributedType.FSDP
    trainer.accelerator.state.fsdp_plugin = plugin
    trainer.is_fsdp_enabled = True


def run(out: Path, world: int, *, resumes: bool = False, **settings: Any) -> dict[str, Any]:
    """Return the weights, log and evaluation of a run; with ``resumes``, one interrupted after the first update."""
    if resumes:
        first = make(out, world, save_strategy="steps", save_steps=1, **(settings | {"max_steps": 1}))
        first.train()
        settings |= {"save_strategy": "steps", "save_steps": 1}
    trainer = make(out, world, **settings)
    trainer.train(resume_from_checkpoint=resumes)
    trainer.save_model()
    evaluation = trainer.evaluate()
    weights = {name: full_tensor(weight).clone() for name, weight in trainer.actor_critic.state_dict().items()}
    log = [entry for entry in trainer.state.log_history if "policy_loss" in entry]
    return {"weights": weights, "log": log, "evaluation": evaluation}


if __name__ == "__main__":
    rank, world, out, port = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    if world > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "ACCELERATE_USE_CPU": "true",
        }
    torch.set_num_threads(1)
    results = {name: run(out / name, world, **settings) for name, settings in json.loads(sys.argv[5]).items()}
    if rank == 0:
        torch.save(results, out / "result.pt")
