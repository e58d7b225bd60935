"""The settings in ``sppo train --help``: first those that most runs need, then SPPO's own by group."""

from __future__ import annotations

import inspect
import re
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from sppo.settings import SPPOSettings

_INDENT = 32  # of the help
_FIRST_GROUP = "Settings of transformers with other defaults"

# Written out, because an import of transformers would make --help slow. A test compares the defaults.
COMMON: dict[str, tuple[str, Any]] = {
    "algorithm": ("", None),
    "output_dir": ("Folder of the run; a recipe names its own.", "runs/train"),
    "max_steps": ("Number of updates. -1: num_train_epochs.", -1),
    "num_train_epochs": ("Passes over the training prompts, if max_steps is -1.", 3.0),
    "per_device_train_batch_size": ("Completions per micro-batch on each process.", 8),
    "gradient_accumulation_steps": ("Micro-batches per update.", 1),
    "learning_rate": ("", None),
    "lr_scheduler_type": ("", None),
    "warmup_steps": ("Updates in which the learning rates rise from 0.", 0),
    "bf16": ("Compute in bfloat16; weights that were loaded by name stay float32.", False),
    "gradient_checkpointing": ("Compute activations again in backward, to save memory.", False),
    "seed": ("Seed of the samples, the order of prompts and new weights.", 42),
    "save_strategy": ("When to save a checkpoint: no, steps, epoch or best.", "steps"),
    "save_steps": ("Updates between two checkpoints.", 500),
    "save_total_limit": ("Number of checkpoints to keep. None: all.", None),
    "eval_strategy": ("When to answer the held-out prompts during training: no, steps or epoch.", "no"),
    "eval_steps": ("Updates between two evaluations. None: logging_steps.", None),
    "per_device_eval_batch_size": ("Held-out prompts that are answered at once on each process.", 8),
    "logging_steps": ("", None),
    "report_to": ("Trackers: none, trackio, wandb, tensorboard, or a list of them.", "none"),
    "use_cpu": ("Train on the CPU, also where there is a GPU.", False),
}
"""Help and default of settings of transformers.TrainingArguments; ``("", None)`` for those in SPPOSettings."""


def settings_help() -> str:
    """Describe the settings, by group, at the width of the terminal."""
    own = {each.name: (each.metadata["help"], each.default) for each in fields(SPPOSettings)}
    parts = ["Settings that most runs need:"]
    parts += [_describe(name, *own.get(name, given)) for name, given in COMMON.items()]
    for group, names in _groups():
        remaining = [name for name in names if name not in COMMON]
        parts += [f"\n{group}:", *(_describe(name, *own[name]) for name in remaining)]
    return "\n".join([*parts, "\nAll other settings of transformers.TrainingArguments are accepted too."])


def _groups() -> Iterator[tuple[str, list[str]]]:
    """Yield the comments between the fields of SPPOSettings, each with the names of the fields that follow it."""
    group = _FIRST_GROUP
    names: list[str] = []
    for comment, name in re.findall(r"^    (?:# (.+)|(\w+): )", inspect.getsource(SPPOSettings), re.MULTILINE):
        if comment:
            yield group, names
            group, names = comment, []
        else:
            names.append(name)
    yield group, names


def _describe(name: str, text: str, default: Any) -> str:
    shown = {True: "true", False: "false"}[default] if isinstance(default, bool) else default
    lines = textwrap.wrap(
        f"{text} [{shown}]",
        width=max(72, shutil.get_terminal_size().columns - 1),
        initial_indent=f"  --{name} ".ljust(_INDENT),
        subsequent_indent=" " * _INDENT,
        break_on_hyphens=False,
    )
    return "\n".join(lines)
