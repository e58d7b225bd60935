"""Parts of a checkpoint beyond what transformers saves, and its publication, complete or not at all.

``SPPOTrainer._save_checkpoint`` writes a checkpoint from these parts.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from sppo._utils import suggest
from sppo.config import SPPOConfig
from sppo.models.actor_critic import ActorCritic
from sppo.models.critic_io import load_critic, save_critic
from sppo.models.fsdp import full_state, load_weights
from sppo.models.lora import has_adapter, merged_weights, save_adapter, settings_of_adapter, trainable
from sppo.rollout.records import Progress, Update
from sppo.rollout.stream import RolloutStream

logger = logging.get_logger(__name__)

STAGING = ".staging"
"""Folder next to the checkpoints in which the next one is written; a crash leaves its files there."""

_IDENTITY = "sppo_run.json"
_ROWS = 20_000  # of a dataset, in a run's identity
_LEARNED = "learned.safetensors"
_CRITIC = "critic"
_MEMORY = "critic."  # prefix of what a critic remembers
_SCHEDULE_SETTINGS = (
    "max_steps",
    "num_train_epochs",
    "eval_",
    "per_device_eval_batch_size",
    "do_",
    "metric_for_best_model",
    "greater_is_better",
    "load_best_model_at_end",
    "prediction_loss_only",
    "batch_eval_metrics",
)
_OUTPUT_SETTINGS = (
    "output_dir",
    "logging_",
    "log_",
    "report_to",
    "run_name",
    "project",
    "disable_tqdm",
    "console",
    "num_completions_to_print",
    "save_",
    "push_to_hub",
    "hub_",
    "trackio_",
    "overwrite_",
    "enable_jit_checkpoint",
    "full_disk",
    "include_",
)
_MACHINE_SETTINGS = (
    "use_cpu",
    "local_rank",
    "dataloader_",
    "ddp_",
    "torch_empty_cache_steps",
    "skip_memory_metrics",
    "debug",
    "reward_timeout",
    "reward_workers",
    "accelerator_config",
    "resume_from_checkpoint",
    "vllm_server_",
    "_n_gpu",
)
_MEMORY_SETTINGS = (
    "rollout_batch_size",
    "rollout_engine_kwargs",
    "vllm_enable_sleep_mode",
    "max_tokens_per_micro_batch",
    "logits_budget_bytes",
    "logprobs_backward",
    "logprobs_projection",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "activation_checkpointing",
    "activation_checkpointing_kwargs",
)
"""Settings of how memory is used, with others of which a run may resume if the user says so."""

_MAY_DIFFER = _SCHEDULE_SETTINGS + _OUTPUT_SETTINGS + _MACHINE_SETTINGS
"""Prefixes of the names of settings that may change when a run is resumed."""


def publish(staged: Path, final: Path) -> None:
    """Sync a finished folder to the disk, then rename it atomically."""
    for path in [*staged.rglob("*"), staged]:
        _sync(path)
    if final.exists():  # of an earlier run: move it away, so that the name is free
        os.replace(final, staged.parent / f"replaced-{final.name}")
    os.replace(staged, final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_stream(stream: RolloutStream, folder: Path) -> None:
    """Save a process's position in the run, with the remaining updates of its rollout if it is in the middle of one."""
    midway = stream.progress.updates % stream.args.updates_per_rollout != 0
    updates = stream.updates if midway else []
    tensors = {
        f"{i}.{j}.{name}": tensor
        for i, update in enumerate(updates)
        for j, batch in enumerate(update.micro_batches)
        for name, tensor in batch.items()
    }
    if stream.model.critic is not None:
        tensors |= {f"{_MEMORY}{name}": tensor for name, tensor in stream.model.critic.memory().items()}
    facts = [{k: v for k, v in vars(update).items() if k != "micro_batches"} for update in updates]
    state = {"progress": asdict(stream.progress), "algorithm": stream.algorithm.state, "updates": facts}
    tensor_file, state_file = _stream_files(stream, folder)
    save_file(tensors, tensor_file)
    state_file.write_text(json.dumps(state, indent=1))


def load_stream(stream: RolloutStream, folder: Path) -> None:
    """Restore what :func:`save_stream` saved."""
    tensor_file, state_file = _stream_files(stream, folder)
    state = json.loads(state_file.read_text())
    batches: dict[int, dict[int, dict[str, Any]]] = {}
    memory: dict[str, Any] = {}
    for key, tensor in load_file(tensor_file).items():
        if key.startswith(_MEMORY):
            memory[key.removeprefix(_MEMORY)] = tensor
            continue
        i, j, name = key.split(".", 2)
        batches.setdefault(int(i), {}).setdefault(int(j), {})[name] = tensor
    updates = [
        Update(micro_batches=[batches[i][j] for j in sorted(batches[i])], **facts)
        for i, facts in enumerate(state["updates"])
    ]
    stream.restart(Progress(**state["progress"]), updates, state["algorithm"], memory)


def _stream_files(stream: RolloutStream, folder: Path) -> tuple[Path, Path]:
    rank = stream.process.rank
    return folder / f"experience_{rank}.safetensors", folder / f"experience_{rank}.json"


def save_models(
    model: ActorCritic,
    folder: Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    critic_kind: str | None,
    gathered_weights: Callable[[], AbstractContextManager[None]],
    writes: bool,
    dtype: torch.dtype | None = None,
) -> None:
    """Save policy and critic as ordinary models, each with its tokenizer; all processes must call this.

    Args:
        model: the module that is trained.
        folder: the policy's folder; the critic's is ``critic`` inside. A policy with an adapter is saved as the adapter
            with the exact weights that learn next to it; a critic is saved with its adapter merged.
        tokenizer: tokenizer of both.
        critic_kind: ``"prompt"``, ``"probe"`` or ``"token"``; None without a critic.
        gathered_weights: makes a context in which each process holds all weights.
        writes: whether this process writes the files.
        dtype: of the saved models and of the saved adapter; None for that of the trained ones.
    """
    policy, critic = model.policy, model.critic
    weights = full_state(model)
    critic_weights = _part(weights, "critic.model.")
    if critic is not None and has_adapter(critic):
        with gathered_weights():
            critic_weights = {name: weight.to("cpu", copy=True) for name, weight in merged_weights(critic.model)}
    if not writes:
        return
    policy_weights, critic_weights = _converted(_part(weights, "policy."), dtype), _converted(critic_weights, dtype)
    if has_adapter(policy):
        save_adapter(policy, policy_weights, folder)
        learned = {name: weights[name].contiguous().cpu() for name in trainable(model)}
        save_file(learned, folder / _LEARNED)
    else:
        policy.save_pretrained(folder, state_dict=policy_weights)
        _set_dtype(folder, dtype)
    tokenizer.save_pretrained(folder)
    if critic is not None:
        save_critic(critic.model, folder / _CRITIC, str(critic_kind), critic_weights)
        _set_dtype(folder / _CRITIC, dtype)
        tokenizer.save_pretrained(folder / _CRITIC)


def _converted(weights: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return weights in a dtype, except for tensors of integers; tied weights still share one tensor."""
    if dtype is None:
        return weights
    found = {id(weight): weight.to(dtype) if weight.is_floating_point() else weight for weight in weights.values()}
    return {name: found[id(weight)] for name, weight in weights.items()}


def _set_dtype(folder: Path, dtype: torch.dtype | None) -> None:
    """Write into a model's configuration which dtype its weights have, if it is not that of the trained ones."""
    if dtype is not None:
        config = json.loads((folder / "config.json").read_text())
        config["dtype"] = str(dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_models(model: ActorCritic, folder: Path) -> None:
    """Load the weights that :func:`save_models` saved into the module that is trained, sharded or not."""
    if has_adapter(model.policy):
        load_weights(model, load_file(folder / _LEARNED), strict=False)
        return
    # Read in float32, so that no weight of a mixed-precision model is rounded on the way.
    policy = type(model.policy).from_pretrained(folder, dtype=torch.float32)
    weights = {f"policy.{name}": weight for name, weight in policy.state_dict().items()}
    if model.critic is not None:
        critic = load_critic(folder / _CRITIC, torch.float32)
        weights |= {f"critic.model.{name}": weight for name, weight in critic.state_dict().items()}
    load_weights(model, weights)


def copy_critic(checkpoint: Path, output_dir: Path) -> None:
    """Copy a checkpoint's critic, if it has one, into the folder that is uploaded."""
    if (checkpoint / _CRITIC).is_dir():
        shutil.copytree(checkpoint / _CRITIC, output_dir / _CRITIC, dirs_exist_ok=True)


def final_dtype(args: SPPOConfig, policy: PreTrainedModel, stored: torch.dtype) -> torch.dtype | None:
    """Return the dtype to save the final model in; None for that of training.

    Args:
        args: settings of the run.
        policy: the policy.
        stored: the dtype in which it came.
    """
    if args.save_dtype is not None:
        return getattr(torch, args.save_dtype)
    return None if has_adapter(policy) else stored


def _part(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def identity(args: SPPOConfig, model: ActorCritic, dataset: datasets.Dataset, rewards: Sequence[Any]) -> dict[str, Any]:
    """Return what a run and a checkpoint must agree on for the run to resume from it."""
    return {
        **{name: value for name, value in args.to_dict().items() if not name.startswith(_MAY_DIFFER)},
        "world_size": args.world_size,
        "model": _digest(_architecture(model.policy.config)),
        "critic": _digest(_architecture(model.critic.model.config)) if model.critic is not None else None,
        "learns": _digest(sorted(trainable(model))),
        "adapter": _digest(settings_of_adapter(model.policy)),
        "dataset": _digest([len(dataset), *_rows(dataset)]),
        "rewards": list(rewards),
    }


def _rows(dataset: datasets.Dataset) -> Iterator[Any]:
    """Yield all rows; of a dataset with more than _ROWS, evenly spaced ones."""
    yield from dataset.select(range(0, len(dataset), max(1, -(-len(dataset) // _ROWS))))


def save_identity(run: dict[str, Any], folder: Path) -> None:
    """Save a run's identity in its checkpoint."""
    (folder / _IDENTITY).write_text(json.dumps(run, indent=1))


def find_checkpoint(output_dir: Path, *, resume: str | bool | None) -> str | None:
    """Find the checkpoint to resume from.

    Args:
        output_dir: folder of the run.
        resume: True for the last complete checkpoint, a folder, or None to start a new run.

    Returns:
        The checkpoint's folder, or None for a new run.

    Raises:
        ValueError: there is no checkpoint to resume from, or there are some and ``resume`` is not set.
    """
    last = get_last_checkpoint(str(output_dir)) if output_dir.is_dir() else None
    if not resume:
        if last is not None:
            raise ValueError(
                f"output_dir={str(output_dir)!r} holds a checkpoint of an earlier run ({os.path.basename(last)}); "
                "pass resume_from_checkpoint=True to resume it, or choose another output_dir"
            )
        return None
    folder = _last_complete(output_dir) if resume is True else str(resume)
    if folder is None or not os.path.isdir(folder):
        raise ValueError(f"resume_from_checkpoint={resume!r}: no checkpoint in {folder or output_dir} to resume from")
    return folder


def _last_complete(output_dir: Path) -> str | None:
    """Return the newest checkpoint of this trainer; folders of other programs are skipped."""
    numbered = [
        (int(path.parent.name.removeprefix("checkpoint-")), str(path.parent))
        for path in output_dir.glob(f"checkpoint-*/{_IDENTITY}")
        if path.parent.name.removeprefix("checkpoint-").isdecimal()
    ]
    return max(numbered)[1] if numbered else None


def check_identity(run: dict[str, Any], folder: str, *, allow_changes: Sequence[str] = ()) -> None:
    """Check that a checkpoint is complete and belongs to this run.

    Args:
        run: the run's identity.
        folder: the checkpoint.
        allow_changes: settings that may differ, of those that affect memory only.

    Raises:
        ValueError: a file is missing, or a setting differs; the message names it.
    """
    for name in allow_changes:
        if name not in _MEMORY_SETTINGS:
            raise ValueError(
                f"allow_changes names {name!r}{suggest(name, _MEMORY_SETTINGS)}; a run can resume with other "
                f"{', '.join(_MEMORY_SETTINGS)}"
            )
    experience = ("experience_0.json", "experience_0.safetensors")
    by_deepspeed = any(Path(folder).glob("global_step*"))
    steps = ("global_step*",) if by_deepspeed else ("optimizer*", "scheduler.pt")
    critic = ("critic/config.json",) if run["critic"] is not None else ()
    for name in (_IDENTITY, "trainer_state.json", *steps, *experience, *critic):
        if not any(Path(folder).glob(name)):
            raise ValueError(
                f"{folder!r} is not a complete SPPOTrainer checkpoint ({name.replace('*', '.pt')} is missing, as after "
                "save_only_model=True); resume from another one, or start a new run with model= this folder"
            )
    saved = json.loads(Path(folder, _IDENTITY).read_text())
    here = json.loads(json.dumps(run))  # tuples as lists, as in the file
    changed = {
        name: f"{name}: {saved[name]!r} there, {here[name]!r} here"
        for name in sorted(saved.keys() & here.keys())  # another version of transformers has additional settings
        if saved[name] != here[name]
    }
    # transformers renamed one setting, and knows both names.
    allowed = {*allow_changes, *(name.replace("gradient_", "activation_") for name in allow_changes)}
    differing = [text for name, text in changed.items() if name not in allowed]
    if differing:
        memory = [name for name in changed if name in _MEMORY_SETTINGS and name not in allowed]
        insist = f"; to change what uses memory, resume with --allow-changes {','.join(memory)}" if memory else ""
        raise ValueError(
            f"{folder!r} is a checkpoint of another run ({'; '.join(differing)}); "
            f"start it with the settings it had, or choose another output_dir{insist}"
        )
    if changed:
        logger.warning(
            f"resuming with other settings ({'; '.join(changed.values())}): results may differ from those of an "
            "uninterrupted run"
        )


def clear_staging(output_dir: Path) -> None:
    """Remove the files that a crash left of an unfinished checkpoint."""
    shutil.rmtree(output_dir / STAGING, ignore_errors=True)


def _architecture(config: Any) -> dict[str, Any]:
    """Return a model's configuration without the fields that loading and saving change."""
    volatile = {"_name_or_path", "transformers_version", "dtype", "use_cache", "architectures"}
    volatile |= {"score_bias", "critic_kind"}
    return {key: value for key, value in config.to_dict().items() if key not in volatile and "token_id" not in key}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
