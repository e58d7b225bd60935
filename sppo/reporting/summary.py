"""The report of a finished run: a short table, ``learning_curve.png`` and ``summary.json``.

All totals come from the trainer's state, which checkpoints contain, so the totals of a resumed run cover all of it.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sppo._utils import LEARNING_CURVE_FILE, SUMMARY_FILE, atomic_write
from sppo.reporting.plots import draw

if TYPE_CHECKING:
    from sppo import SPPOTrainer


def write_report(
    trainer: SPPOTrainer,
    before: Mapping[str, float],
    after: Mapping[str, float],
    *,
    recipe: str = "RECIPE",
    evaluation: str = "RUN",
) -> Path:
    """Print the table, and write ``learning_curve.png`` and ``summary.json`` into the run's ``output_dir``.

    Args:
        trainer: a trainer after ``train()``.
        before, after: metrics of ``trainer.evaluate()`` before and after training; empty without held-out prompts.
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
    print(_next_steps(recipe, evaluation, folder, trainer.args.seed))
    return folder / SUMMARY_FILE


def summarize(trainer: SPPOTrainer, before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, Any]:
    """Summarize a run in numbers.

    Returns:
        - ``algorithm``
        - ``accuracy_before``, ``accuracy_after``: fraction of held-out prompts answered with full reward; None without
          held-out prompts.
        - ``reward_before``, ``reward_after``: mean reward of the held-out prompts, or None.
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
    return {
        "algorithm": trainer.args.algorithm,
        "accuracy_before": before.get("eval_success_rate"),
        "accuracy_after": after.get("eval_success_rate"),
        "reward_before": before.get("eval_reward"),
        "reward_after": after.get("eval_reward"),
        "updates": trainer.state.global_step,
        "generated_tokens": trainer.rollouts.progress.generated_tokens,
        "seconds": round(sum(phases.values()), 2),
        "seconds_by_phase": {name: round(value, 2) for name, value in phases.items()},
    }


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


def _next_steps(recipe: str, evaluation: str, folder: Path, seed: int) -> str:
    sppo = "sppo" if shutil.which("sppo") else sys.argv[0]  # the environment may not be activated
    return (
        "Next steps:\n"
        f"  {sppo} eval {evaluation} --temperature 0     greedy answers to the held-out prompts\n"
        f"  {sppo} train {recipe} --seed {seed + 1} --output_dir {folder}-{seed + 1}     the same with another seed\n"
        f"  {sppo} train --help     train your own model on your own prompts"
    )
