"""What a run came to: a short table, a picture of its learning and ``summary.json``.

All totals come from the trainer's state, which checkpoints carry along: those of a resumed run cover all of its parts.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from sppo import SPPOTrainer

SUMMARY = "summary.json"
PICTURE = "learning_curve.png"

_TRAINED = "C0"
_HELD_OUT = "C3"
_BASELINE = "0.5"
_SMOOTHING = 0.8


def write_report(
    trainer: SPPOTrainer, before: Mapping[str, float], after: Mapping[str, float], *, recipe: str = "RECIPE"
) -> Path:
    """Print the table, and write ``learning_curve.png`` and ``summary.json`` into the run's ``output_dir``.

    Args:
        trainer: after ``train()``.
        before, after: what ``trainer.evaluate()`` gave then; empty without held-out prompts.
        recipe: what the run was started from, with its overrides, for the commands to try next.

    Returns:
        The path of ``summary.json``. It is written last: where it is, the run is finished.
    """
    folder = Path(str(trainer.args.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    summary = summarize(trainer, before, after)
    draw(trainer.state.log_history, before, after).savefig(folder / PICTURE, dpi=150)
    staged = folder / f".{SUMMARY}"
    staged.write_text(json.dumps(summary, indent=1) + "\n")
    os.replace(staged, folder / SUMMARY)
    print(_table(summary))
    print(f"\n{folder / PICTURE} shows how it learned, {folder / SUMMARY} has these numbers.\n")
    print(_what_next(recipe, folder, trainer.args.seed))
    return folder / SUMMARY


def summarize(trainer: SPPOTrainer, before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, Any]:
    """The run in numbers.

    Returns:
        ``algorithm``; ``accuracy_before``, ``accuracy_after``: share of held-out prompts answered with full reward,
        None without such prompts; ``reward_before``, ``reward_after``: their mean reward; ``updates``;
        ``generated_tokens`` of all rollouts; ``seconds`` of training, and ``seconds_by_phase``, with the evaluations
        and checkpoints in its course, up to the last update that was logged.
    """
    phases: dict[str, float] = {}
    for entry in trainer.state.log_history:
        for name, value in entry.items():
            if name.startswith("seconds/"):
                phase = name.removeprefix("seconds/")
                phases[phase] = phases.get(phase, 0.0) + value
    return {
        "algorithm": trainer.args.algorithm,
        "accuracy_before": before.get("eval_success_rate"),
        "accuracy_after": after.get("eval_success_rate"),
        "reward_before": before.get("eval_reward"),
        "reward_after": after.get("eval_reward"),
        "updates": trainer.state.global_step,
        "generated_tokens": trainer.experience.progress.generated_tokens,
        "seconds": round(sum(phases.values()), 2),
        "seconds_by_phase": {name: round(value, 2) for name, value in phases.items()},
    }


def draw(log: Sequence[Mapping[str, float]], before: Mapping[str, float], after: Mapping[str, float]) -> Figure:
    """Reward of the rollouts and on held-out prompts, and the critic's Brier score, against generated tokens.

    Args:
        log: the trainer's ``state.log_history``.
        before, after: evaluations outside of it, drawn at the beginning and the end.
    """
    figure = Figure(figsize=(7, 6), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True, height_ratios=[3, 2])

    _draw_series(top, log, "reward", _TRAINED, "rollouts")
    end = max((entry.get("total_generated_tokens", 0) for entry in log), default=0)
    evaluations = [(0, before), *_evaluations(log), (end, after)]
    points = [(at, metrics["eval_reward"]) for at, metrics in evaluations if "eval_reward" in metrics]
    if points:
        top.plot(*zip(*points, strict=True), "o--", color=_HELD_OUT, label="held-out prompts")
    top.set(ylabel="mean reward", ylim=(-0.02, 1.02))

    _draw_series(bottom, log, "brier", _TRAINED, "critic")
    _draw_series(bottom, log, "brier_baseline", _BASELINE, "mean success rate so far")
    bottom.set(ylabel="Brier score (lower is better)", xlabel="generated tokens")
    bottom.set_ylim(bottom=0)
    bottom.xaxis.set_major_formatter(lambda value, _: _short(value))
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def _draw_series(axes: Axes, log: Sequence[Mapping[str, float]], name: str, color: str, label: str) -> None:
    """Each value of a metric faintly, and their running mean; an update without a new rollout has none."""
    entries = [entry for entry in log if name in entry and "total_generated_tokens" in entry]
    tokens, values = ([entry[key] for entry in entries] for key in ("total_generated_tokens", name))
    axes.plot(tokens, values, color=color, alpha=0.25, linewidth=1)
    axes.plot(tokens, _smooth(values), color=color, label=label)


def _smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving mean without the bias of its beginning."""
    total = weight = 0.0
    means = []
    for value in values:
        total, weight = _SMOOTHING * total + value, _SMOOTHING * weight + 1
        means.append(total / weight)
    return means


def _evaluations(log: Sequence[Mapping[str, float]]) -> list[tuple[float, Mapping[str, float]]]:
    """Evaluations in the course of training, each with the tokens generated until then."""
    found, tokens = [], 0.0
    for entry in log:
        tokens = entry.get("total_generated_tokens", tokens)
        if "eval_reward" in entry:
            found.append((tokens, entry))
    return found


def _table(summary: Mapping[str, Any]) -> str:
    phases = sorted(summary["seconds_by_phase"].items(), key=lambda phase: -phase[1])
    rows = [
        ("accuracy", _change(summary["accuracy_before"], summary["accuracy_after"])),
        ("mean reward", _change(summary["reward_before"], summary["reward_after"])),
        ("updates", f"{summary['updates']:,}"),
        ("generated tokens", f"{summary['generated_tokens']:,}"),
        ("seconds of training", f"{summary['seconds']:.1f}"),
        *((f"  {name}", f"{seconds:.1f}") for name, seconds in phases),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(["", *(f"{name:<{width}}  {value}" for name, value in rows if value)])


def _change(before: float | None, after: float | None) -> str:
    if before is None and after is None:
        return ""
    return " -> ".join("?" if value is None else f"{value:.3f}" for value in (before, after)) + "  (held-out prompts)"


def _short(tokens: float) -> str:
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if abs(tokens) >= size:
            return f"{tokens / size:g}{unit}"
    return f"{tokens:g}"


def _what_next(recipe: str, folder: Path, seed: int) -> str:
    sppo = "sppo" if shutil.which("sppo") else sys.argv[0]  # an environment that is not activated
    return (
        "What to try next:\n"
        f"  {sppo} eval {recipe} --output_dir {folder} --temperature 0     each held-out answer, greedy\n"
        f"  {sppo} train {recipe} --seed {seed + 1} --output_dir {folder}-{seed + 1}     the same with other samples\n"
        f"  {sppo} train --help     a model and prompts of your own"
    )
