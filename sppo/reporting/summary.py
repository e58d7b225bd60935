"""What a run came to: a short table, a picture of its learning and ``summary.json``.

All totals come from the trainer's state, which checkpoints carry along: those of a resumed run cover all of its parts.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sppo._utils import SUMMARY_FILE, atomic_write
from sppo.reporting.plots import draw

if TYPE_CHECKING:
    from sppo import SPPOTrainer

PICTURE = "learning_curve.png"


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
        trainer: after ``train()``.
        before, after: what ``trainer.evaluate()`` gave then; empty without held-out prompts.
        recipe: what the run was started from, with its overrides, for the commands to try next.
        evaluation: what ``sppo eval`` is to be told, for the same.

    Returns:
        The path of ``summary.json``. It is written last: where it is, the run is finished.
    """
    folder = Path(str(trainer.args.output_dir))
    summary = summarize(trainer, before, after)
    with atomic_write(folder / PICTURE) as staged:
        draw({folder.name: [{**before, "step": 0}, *trainer.state.log_history]}).savefig(staged, dpi=150)
    with atomic_write(folder / SUMMARY_FILE) as staged:
        staged.write_text(json.dumps(summary, indent=1) + "\n")
    print(_table(summary))
    print(f"\n{folder / PICTURE} shows how it learned, {folder / SUMMARY_FILE} has these numbers.\n")
    print(_what_next(recipe, evaluation, folder, trainer.args.seed))
    return folder / SUMMARY_FILE


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


def _what_next(recipe: str, evaluation: str, folder: Path, seed: int) -> str:
    sppo = "sppo" if shutil.which("sppo") else sys.argv[0]  # an environment that is not activated
    return (
        "What to try next:\n"
        f"  {sppo} eval {evaluation} --temperature 0     each held-out answer, greedy\n"
        f"  {sppo} train {recipe} --seed {seed + 1} --output_dir {folder}-{seed + 1}     the same with other samples\n"
        f"  {sppo} train --help     a model and prompts of your own"
    )
