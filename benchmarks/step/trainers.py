"""Trainers of a step with the same settings: this project's with each algorithm, and TRL's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback

from benchmarks.harness.resident import ResidentPeak, measurable
from benchmarks.step.prepared import Prepared, odd_end
from sppo import SPPOConfig, SPPOTrainer
from sppo.algorithms import algorithm_class
from sppo.reporting.meter import Gather, Meter

MICRO_BATCH = 8  # sequences


class TrainerVariant(NamedTuple):
    """A trainer with an algorithm."""

    trainer: str
    algorithm: str
    small_critic: bool = False

    @property
    def name(self) -> str:
        """Name in tables."""
        own = f"{self.algorithm}, small critic" if self.small_critic else self.algorithm
        return own if self.trainer == "sppo" else f"{own}, TRL"

    @property
    def critic(self) -> bool:
        """Whether the algorithm has a critic."""
        return algorithm_class(self.algorithm).critic is not None

    @property
    def generations(self) -> int:
        """Responses per prompt, the algorithm's default in this project."""
        return algorithm_class(self.algorithm).defaults["num_generations"]


SPPO = [
    TrainerVariant("sppo", "sppo"),
    TrainerVariant("sppo", "sppo", small_critic=True),
    *(TrainerVariant("sppo", name) for name in ("ppo", "grpo", "rloo", "remax", "reinforce")),
]
TRL = [TrainerVariant("TRL", "grpo"), TrainerVariant("TRL", "rloo")]


def available_variants() -> list[TrainerVariant]:
    """Return the variants whose packages are installed."""
    return SPPO + (TRL if find_spec("trl") else [])


class Step(NamedTuple):
    """An optimizer step, with its rollout if it has one; ``peak_bytes`` is by phase on a GPU, and may be empty."""

    seconds: dict[str, float]
    peak_bytes: dict[str, int]
    response_length: float | None


class Probe(Meter):
    """A meter that keeps each step and, with ``peaks``, its peak memory.

    On a GPU the peak is of the memory that PyTorch has allocated, in each phase. On a CPU it is of the resident memory
    of the process beyond what was resident when the probe was made, in the whole step, under the name "step": malloc
    keeps what is freed in one phase for the next, so that phases do not differ. It is measured only on Linux.
    """

    def __init__(self, peaks: bool = False) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self._measures_allocations = peaks and torch.cuda.is_available()
        self._resident = ResidentPeak() if peaks and not torch.cuda.is_available() and measurable() else None
        self._peaks: dict[str, int] = {}
        self._phase = "update"

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure a phase as :class:`Meter` does; the device finishes its work at both ends."""
        outer = self._turn_to(name)
        with super().phase(name):
            try:
                yield
            finally:
                self._turn_to(outer)

    def read(self, gather: Gather) -> dict[str, float]:
        """Read the step as :class:`Meter` does; the trainers call this after each step."""
        self._turn_to("update")
        if self._resident:
            self._peaks["step"] = self._resident.read()
            self._resident.reset()
        entry = super().read(gather)
        seconds = {name.removeprefix("seconds/"): value for name, value in entry.items() if name.startswith("seconds/")}
        self.steps.append(Step(seconds, dict(self._peaks), entry.get("response_length")))
        self._peaks.clear()
        return entry

    def _turn_to(self, phase: str) -> str:
        """Count allocations from now on for a phase, and return the previous one."""
        before, self._phase = self._phase, phase
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if self._measures_allocations:
            self._peaks[before] = max(self._peaks.get(before, 0), torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()
        return before


def settings_of(
    variant: TrainerVariant, prepared: Prepared, folder: str, updates: int = 1, **changes: Any
) -> dict[str, Any]:
    """Return the settings of a trainer, the same for both kinds. A rollout is divided into ``updates`` updates."""
    count = len(prepared.responses) // updates
    batch = min(MICRO_BATCH, count)
    on_gpu = torch.cuda.is_available()
    return {
        "output_dir": folder,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": count // batch,
        "steps_per_generation": count // batch * updates,
        "num_generations": variant.generations,
        "max_completion_length": max(map(len, prepared.responses)),
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "temperature": 1.0,
        "beta": 0.0,
        "shuffle_dataset": False,
        "gradient_checkpointing": True,
        "bf16": on_gpu,  # autocast: weights and AdamW's moments are float32
        "use_cpu": not on_gpu,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        **changes,
    }


def make_trainer(
    variant: TrainerVariant,
    policy: PreTrainedModel,
    prepared: Prepared,
    settings: dict[str, Any],
    meter: Meter,
    *,
    critic: PreTrainedModel | None = None,
    live: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> Any:
    """Make a trainer of either kind; with ``live`` it generates, otherwise it gets the prepared responses.

    Without ``critic``, an algorithm that has one copies the policy's backbone.
    """
    given = {
        "train_dataset": prepared.dataset,
        "processing_class": prepared.tokenizer,
        "callbacks": list(callbacks),
    }
    trainer: Any
    if variant.trainer == "sppo":
        args = SPPOConfig(**settings, algorithm=variant.algorithm, console="none")
        engine = None if live else prepared
        trainer = SPPOTrainer(policy, odd_end, args=args, critic=critic, rollout_engine=engine, **given)
        trainer.rollouts.meter = trainer.rollouts.sampler.meter = meter
    else:
        from benchmarks.step import trl_trainers

        kind, config = trl_trainers.KINDS[variant.algorithm]
        trainer = kind(policy, odd_end, args=config(**settings), **given)
        trainer.prepared = None if live else prepared
        trainer.remove_callback(PrinterCallback)
    trainer.meter = meter
    return trainer
