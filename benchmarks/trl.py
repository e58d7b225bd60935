"""Seconds and peak memory of an update of TRL's GRPOTrainer with and without the patch.

Trainer, model and prepared responses are the same; the vocabulary has 151,936 tokens. Variants take turns, round by
round, so that a machine shared with others slows all. Peak memory is the most that an update held beyond what existed
before it (weights and the optimizer's state): resident memory of the process on a CPU (Linux), allocated memory on a
GPU. First one update by SGD is made with each variant; the exit code is 1 when gradients differ.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import metadata
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import TrainerCallback

from benchmarks.harness import results
from benchmarks.harness.resident import ResidentPeak
from benchmarks.harness.results import Row
from benchmarks.harness.suite import Suite
from benchmarks.step.models import make_policy, numbers
from benchmarks.step.prepared import KINDS, Prepared, lengths_of
from benchmarks.step.trainers import Probe, TrainerVariant, make_trainer, settings_of
from sppo_kernels.integrations import trl as fused


def only_tokens_with_a_loss() -> AbstractContextManager[Any]:
    """Use TRL's own function as on a GPU; on a CPU TRL projects prompts and padding too."""
    from trl.trainer import utils

    return mock.patch.object(utils, "_use_triton", return_value=True)


ONLY_LOSS = "TRL, only tokens with a loss"
VARIANTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "TRL": nullcontext,
    ONLY_LOSS: only_tokens_with_a_loss,
    "patched": fused.patch,
    'patched, backward="recompute"': lambda: fused.patch(backward="recompute"),
}
VOCAB = 151936
QUICK = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 2048}
SIZES = {
    "cpu": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "vocab_size": VOCAB},
    "cuda": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 4, "vocab_size": VOCAB},
}
MEANS = {"cpu": 24, "cuda": 512}
ATTENTION_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 8192}
TOLERANCES = {"cpu": 1e-4, "cuda": 2e-2}  # of the gradient, which is bfloat16 on a GPU
PROMPTS, RESPONSES = 4, 32
PROMPT = 32  # mean tokens
MIB = 1 << 20


class Peak(TrainerCallback):
    """Records the most memory that each update held beyond what existed before it, in bytes."""

    def __init__(self) -> None:
        self.peaks: list[int] = []
        self._before = 0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            self._resident = ResidentPeak()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        on_gpu = torch.cuda.is_available()
        self.peaks.append(torch.cuda.max_memory_allocated() - self._before if on_gpu else self._resident.read())


def train(
    variant: str, size: dict[str, int], prepared: Prepared, **settings: Any
) -> tuple[Tensor, list[float], list[int]]:
    """Return the change of the weights, and seconds and peak of each update but the first."""
    policy, peak, probe, grpo = make_policy(size, results.this_device()), Peak(), Probe(), TrainerVariant("TRL", "grpo")
    before = torch.cat([p.detach().flatten().clone() for p in policy.parameters()])
    with tempfile.TemporaryDirectory() as folder, VARIANTS[variant]():
        settings = settings_of(grpo, prepared, folder, gradient_checkpointing=False, **settings)
        make_trainer(grpo, policy, prepared, settings, probe, callbacks=[peak]).train()
    moved = torch.cat([p.detach().flatten().cpu() for p in policy.parameters()]) - before.cpu()
    return moved, [sum(step.seconds.values()) for step in probe.steps[1:]], peak.peaks[1:]


def measure(kind: str, size: dict[str, int], lengths: Sequence[int], rounds: int) -> list[Row]:
    """Return a row for each variant, measured in turns of two updates."""
    prepared = Prepared(numbers(size["vocab_size"]), PROMPTS, PROMPT, lengths)
    moved = {
        variant: train(variant, size, prepared, max_steps=1, optim="sgd", learning_rate=1.0)[0] for variant in VARIANTS
    }
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    peaks: dict[str, list[int]] = {variant: [] for variant in VARIANTS}
    for _ in range(rounds):
        for variant in VARIANTS:
            _, times, most = train(variant, size, prepared, max_steps=3)
            seconds[variant] += times
            peaks[variant] += most
    return [
        {
            "variant": variant,
            "responses": kind,
            "tokens": sum(lengths),
            "longest": max(lengths),
            **size,
            "gradient_error": ((moved[variant] - moved["TRL"]).norm() / moved["TRL"].norm()).item(),
            "update_s": statistics.median(seconds[variant]),
            "updates_s": [round(each, 4) for each in seconds[variant]],
            "peak_bytes": max(peaks[variant]),
        }
        for variant in VARIANTS
    ]


def compared(rows: Sequence[Row]) -> list[Row]:
    """Add how many times as fast each variant is as TRL where it projects only tokens with a loss, as on a GPU."""
    seconds = {row["responses"]: row["update_s"] for row in rows if row["variant"] == ONLY_LOSS}
    return [row | {"times": seconds[row["responses"]] / row["update_s"]} for row in rows]


COLUMNS: results.Columns = {
    "GRPOTrainer": lambda row: row["variant"],
    "responses": lambda row: row["responses"],
    "tokens": lambda row: row["tokens"],
    "update, s": lambda row: row["update_s"],
    "times as fast": lambda row: f"{row['times']:.2f}",
    "peak, MiB": lambda row: round(row["peak_bytes"] / MIB),
    "gradient, relative difference": lambda row: row["gradient_error"],
}


def failures_of(rows: Sequence[Row], tolerance: float) -> list[str]:
    """List the variants whose gradients differ from TRL's."""
    return [
        f"{row['variant']}, {row['responses']}: gradients differ by {row['gradient_error']:.1e}"
        for row in rows
        if not row["gradient_error"] <= tolerance
    ]


def chart(rows: Sequence[Row]) -> results.Chart:
    """Chart the peak memory."""
    bars = [(f"{row['variant']}, {row['responses']}", row["peak_bytes"] / MIB) for row in rows]
    return results.Chart("peak memory of an update, MiB", bars)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="a smaller model, one round")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each variant (%(default)s)")
    results.add_out(parser)


def run(args: argparse.Namespace) -> int:
    """Entry of the suite."""
    device = results.this_device()
    size = (QUICK if args.quick else SIZES[device.type]) | ATTENTION_HEADS
    path = args.out / "trl.json"
    rows: list[Row] = []
    for kind in KINDS:
        lengths = lengths_of(kind, RESPONSES, 8 if args.quick else MEANS[device.type])
        rows += measure(kind, size, lengths, 1 if args.quick else args.rounds)
        results.write(
            path,
            "trl",
            chart(rows),
            device=results.device_name(device),
            threads=torch.get_num_threads(),
            trl=metadata.version("trl"),
            quick=args.quick,
            failures=(failures := failures_of(rows, TOLERANCES[device.type])),
            rows=rows,
        )
        print(f"measured {kind} lengths", flush=True)
    return results.conclude(results.table(compared(rows), COLUMNS), failures, path)


SUITE = Suite(
    add_arguments,
    run,
    tables={"trl": lambda folder: results.markdown(compared(results.load(folder, "trl")["rows"]), COLUMNS)},
    draw=results.draw_bars(chart),
    needs="the trainer, trl",
)
