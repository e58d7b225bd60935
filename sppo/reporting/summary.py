"""The report of a finished run: a short table, ``learning_curve.png`` and ``summary.json``.

All totals come from the trainer's state, which checkpoints contain, so the totals of a resumed run cover all of it.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from sppo._utils import LEARNING_CURVE_FILE, SUMMARY_FILE, atomic_write
from sppo.reporting.plots import draw

if TYPE_CHECKING:
    from sppo import SPPOTrainer

_HELP = 'see "When nothing is learned" in docs/guides/monitoring.md'


def write_report(
    trainer: SPPOTrainer,
    before: Mapping[str, float],
    after: Mapping[str, float],
    *,
    program: str = "sppo",
    recipe: str = "RECIPE",
    evaluation: str = "RUN",
) -> Path:
    """Print the table, and write ``learning_curve.png`` and ``summary.json`` into the run's ``output_dir``.

    Args:
        trainer: a trainer after ``train()``.
        before, after: metrics of ``trainer.evaluate()`` before and after training; empty without held-out prompts.
        program: how the ``sppo`` command is called, for the suggested commands.
        recipe: arguments of ``sppo train`` that repeat the run, without ``--seed`` and ``--output_dir``, for the
            suggested commands.
        evaluation: arguments of ``sppo eval`` that evaluate its model, for the suggested commands.

    Returns:
        The path of ``summary.json``. It is written last and thus marks a finished run.
    """
    folder = Path(str(trainer.args.output_dir))
    summary = summarize(trainer, before, after)
    with atomic_write(folder / LEARNING_CURVE_FILE) as staged:
        draw({folder.name: [{**before, "step": 0}, *trainer.state.log_history]}).savefig(staged, dpi=150)
    with atomic_write(folder / SUMMARY_FILE) as staged:
        staged.write_text(json.dumps(summary, indent=1) + "\n")
    print(_table(summary))
    print(f"\nLearning curves: {folder / LEARNING_CURVE_FILE}\nThese numbers: {folder / SUMMARY_FILE}\n")
    print(_next_steps(program, recipe, evaluation, folder, trainer.args.seed))
    return folder / SUMMARY_FILE


def summarize(trainer: SPPOTrainer, before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, Any]:
    """Summarize a run in numbers.

    Returns:
        - ``algorithm``
        - ``accuracy_before``, ``accuracy_after``: fraction of held-out prompts answered with full reward; None without
          held-out prompts.
        - ``reward_before``, ``reward_after``: mean reward of the held-out prompts, or None.
        - ``training_reward_first``, ``training_reward_last``: mean of the logged rewards of training over the first and
          the last quarter of the log entries; None with fewer than two entries.
        - ``updates``: optimizer steps.
        - ``generated_tokens``: tokens of all rollouts.
        - ``seconds``, ``seconds_by_phase``: training time up to the last logged update, including the evaluations and
          checkpoints during training.
    """
    phases: dict[str, float] = {}
    for entry in trainer.state.log_history:
        for name, value in entry.items():
            if name.startswith("seconds/"):
                phase = name.removeprefix("seconds/")
                phases[phase] = phases.get(phase, 0.0) + value
    first, last = _quarters([entry["reward"] for entry in trainer.state.log_history if "reward" in entry])
    return {
        "algorithm": trainer.args.algorithm,
        "accuracy_before": before.get("eval_success_rate"),
        "accuracy_after": after.get("eval_success_rate"),
        "reward_before": before.get("eval_reward"),
        "reward_after": after.get("eval_reward"),
        "training_reward_first": first,
        "training_reward_last": last,
        "updates": trainer.state.global_step,
        "generated_tokens": trainer.rollouts.progress.generated_tokens,
        "seconds": round(sum(phases.values()), 2),
        "seconds_by_phase": {name: round(value, 2) for name, value in phases.items()},
    }


def _quarters(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Compute the means of the first and the last quarter of the values, or None if there are fewer than two."""
    size = max(1, len(values) // 4)
    return (fmean(values[:size]), fmean(values[-size:])) if len(values) > 1 else (None, None)


def _table(summary: Mapping[str, Any]) -> str:
    phases = sorted(summary["seconds_by_phase"].items(), key=lambda phase: -phase[1])
    rows = [
        ("accuracy", _change(summary["accuracy_before"], summary["accuracy_after"], "held-out prompts")),
        ("mean reward", _change(summary["reward_before"], summary["reward_after"], "held-out prompts")),
        (
            "training reward",
            _change(
                summary["training_reward_first"], summary["training_reward_last"], "first and last quarter of the log"
            ),
        ),
        ("updates", f"{summary['updates']:,}"),
        ("generated tokens", f"{summary['generated_tokens']:,}"),
        ("seconds of training", f"{summary['seconds']:.1f}"),
        *((f"  {name}", f"{seconds:.1f}") for name, seconds in phases),
    ]
    width = max(len(name) for name, _ in rows)
    table = "\n".join(["", *(f"{name:<{width}}  {value}" for name, value in rows if value)])
    return f"{table}\n\n{note}" if (note := _failure_to_learn(summary)) else table


def _change(before: float | None, after: float | None, of: str) -> str:
    if before is None and after is None:
        return ""
    return " -> ".join("?" if value is None else f"{value:.3f}" for value in (before, after)) + f"  ({of})"


def _failure_to_learn(summary: Mapping[str, Any]) -> str:
    """Say that the mean reward did not rise, of held-out prompts if there are any, or return an empty text."""
    for source, before, after in (
        ("of held-out prompts", summary["reward_before"], summary["reward_after"]),
        ("of training", summary["training_reward_first"], summary["training_reward_last"]),
    ):
        if before is not None and after is not None:
            return "" if after > before else f"The mean reward {source} did not rise: {_HELP}."
    return f"The log has too few rewards to say whether the mean reward rose: {_HELP}."


def _next_steps(program: str, recipe: str, evaluation: str, folder: Path, seed: int) -> str:
    output, other = (shlex.quote(text) for text in (f"{folder}/eval/greedy.jsonl", f"{folder}-{seed + 1}"))
    return (
        "Next steps:\n"
        "  greedy answers to the held-out prompts:\n"
        f"    {program} eval {evaluation} --temperature 0 --output {output}\n"
        "  the same with another seed, and the comparison:\n"
        f"    {program} train {recipe} --seed {seed + 1} --output_dir {other}\n"
        f"    {program} compare {shlex.quote(str(folder))} {other}\n"
        "  train your own model on your own prompts:\n"
        f"    {program} train --help"
    )
