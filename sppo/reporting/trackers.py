"""Callbacks that write metrics and sample completions during a run, to files and to experiment trackers.

transformers' own callbacks send metrics to trackers (``report_to``). This module adds a file of the metrics, a table of
completions, and one location and one run name for everything logged before, during and after ``train()``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.integrations.integration_utils import default_logdir
from transformers.utils import logging

from sppo._utils import METRICS_FILE, append_line, read_lines, write_lines
from sppo.config import SPPOConfig
from sppo.interruption import is_full_disk
from sppo.reporting.console import as_text, print_completions
from sppo.rollout.engine import Sample

logger = logging.get_logger(__name__)

COMPLETIONS = "completions.jsonl"
_OWN_COLUMNS = ("step", "prompt", "completion", "reward", "advantage")


class MetricsFile(TrainerCallback):
    """Writes each log entry to ``metrics.jsonl``.

    The file starts with the evaluations before training. A trainer that only evaluates writes no file.
    """

    def __init__(self) -> None:
        self._before_training: list[dict[str, Any]] = []
        self._path: Path | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Rewrite the file with the entries before training and, of a resumed run, those up to its checkpoint."""
        if state.is_world_process_zero:
            self._path = Path(args.output_dir, METRICS_FILE)
            if state.global_step > 0:
                self._before_training = [entry for entry in read_lines(self._path) if entry["step"] == 0]
            logged = [entry for entry in state.log_history if entry not in self._before_training]
            write_lines(self._path, [*self._before_training, *logged])
            self._before_training = []

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Append the newest entry."""
        if not state.is_world_process_zero:
            return
        if self._path is None:
            self._before_training.append(state.log_history[-1])
        else:
            self._append(self._path, state.log_history[-1])

    def _append(self, path: Path, entry: dict[str, Any]) -> None:
        """Append an entry; if the disk is full, leave it out and warn once."""
        size = path.stat().st_size if path.exists() else 0
        try:
            append_line(path, entry)
        except OSError as error:
            if not is_full_disk(error):
                raise
            with suppress(OSError):
                os.truncate(path, size)  # the next entry must not follow half of this one
            logger.warning_once(f"{path}: an entry is missing, because the disk is full ({error})")


class SampleCompletions(TrainerCallback):
    """Shows sample completions with each log entry of training.

    They are printed on the console, written to ``completions.jsonl``, and sent as a table to Weights & Biases, trackio
    and TensorBoard.

    Args:
        samples: returns the samples of the last rollout.
        trackers: callbacks of the trainer, including those of trackers.
    """

    def __init__(self, samples: Callable[[], Sequence[Sample]], trackers: Sequence[TrainerCallback]) -> None:
        self._samples = samples
        self._trackers = trackers

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove the completions after a resumed run's checkpoint, and those of an earlier run."""
        if state.is_world_process_zero:
            path = Path(args.output_dir, COMPLETIONS)
            write_lines(path, [row for row in read_lines(path) if row["step"] <= state.global_step])

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Print samples, and send them to the file and the trackers."""
        if "loss" not in logs or not state.is_world_process_zero:
            return
        samples = self._samples()[: args.num_completions_to_print]
        print_completions(samples, state.global_step)
        logged = {name: None for sample in samples for name in sample.logged if name not in _OWN_COLUMNS}
        rows = [
            {
                "step": state.global_step,
                "prompt": as_text(sample.prompt),
                "completion": as_text(sample.completion),
                "reward": sample.reward,
                "advantage": None if sample.advantage is None else sample.advantage.mean().item(),
                **{name: sample.logged.get(name) for name in logged},
            }
            for sample in samples
        ]
        for row in rows:
            append_line(Path(args.output_dir, COMPLETIONS), row)
        if rows:
            for tracker in self._trackers:
                _track(tracker, rows)


class EpochCallback(TrainerCallback):
    """Counts epochs by updates, which is also correct if a run resumes within an epoch."""

    def on_step_end(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        """Set the epoch, and log after the last step."""
        state.epoch = state.global_step / train_dataloader.dataset.updates_per_epoch
        control.should_log |= state.global_step >= state.max_steps  # so that totals include every update


def _track(tracker: TrainerCallback, rows: Sequence[dict[str, Any]]) -> None:
    """Send a table of completions to a tracker's callback."""
    step = rows[0]["step"]
    if isinstance(tracker, TensorBoardCallback) and tracker.tb_writer is not None:
        tracker.tb_writer.add_text("completions", _markdown(rows), step)
    elif isinstance(tracker, WandbCallback):
        import wandb

        table = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        wandb.log({"completions": table, "train/global_step": step})
    elif isinstance(tracker, TrackioCallback):
        import pandas
        import trackio

        trackio.log({"completions": trackio.Table(dataframe=pandas.DataFrame(rows)), "train/global_step": step})


def _markdown(rows: Sequence[dict[str, Any]]) -> str:
    cells = [list(rows[0]), ["---"] * len(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _cell(value: Any) -> str:
    """Format a value for a cell of a Markdown table, escaping what would end the cell or its row."""
    text = f"{value:.3g}" if isinstance(value, float) else str(value)
    for character, escaped in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("\n", "<br>")):
        text = text.replace(character, escaped)
    return text


def name_run(args: SPPOConfig) -> None:
    """Name a tracked run, so that trackio shows what is logged before, during and after training as one run."""
    if args.report_to and args.run_name is None:
        args.run_name = f"{Path(args.output_dir or '.').absolute().name}-{time.strftime('%m%d-%H%M%S')}"


def prepare_trackers(callbacks: Sequence[TrainerCallback], args: SPPOConfig) -> None:
    """Let TensorBoard write to ``output_dir`` before ``train()`` as well.

    Raises:
        ValueError: ``WANDB_LOG_MODEL`` is set; Weights & Biases would save policy and critic as one model.
    """
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = os.path.join(args.output_dir or ".", default_logdir())
        if isinstance(callback, WandbCallback) and callback._log_model.is_enabled:
            raise ValueError(
                f"WANDB_LOG_MODEL={callback._log_model.value!r} is not available: it would save policy and critic as "
                "one model; unset it, and upload output_dir after training with wandb.log_artifact or push_to_hub"
            )
