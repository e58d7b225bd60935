"""The console of a training run: which kind it is, and the sample completions on it.

Control characters of a model's output are shown as escapes, because they would reach the terminal.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from sppo.config import SPPOConfig
from sppo.reporting.lines import LineConsole, SilentConsole
from sppo.reporting.text import cut, encodable, excerpt, terminal_width
from sppo.rollout.engine import RolloutEngine, Sample

_PROMPT_LINES = 3
_COMPLETION_LINES = 8
_INDENT = " " * 14


def install_console(
    trainer: Trainer, args: SPPOConfig, given: Sequence[TrainerCallback | type], samples: Callable[[], Sequence[Sample]]
) -> SilentConsole:
    """Replace the console output of transformers by the one that ``args.console`` names.

    Args:
        trainer: a trainer with the callbacks of transformers, the last of which prints.
        args: settings. With ``"auto"``, a callback of transformers for the console among those given replaces ours.
        given: callbacks of the user.
        samples: returns the samples of the last rollout.

    Returns:
        The console. With ``"raw"`` and ``"none"``, and on processes other than the first, it is silent.
    """
    prints = [each for each in given if _is_of_transformers(each)]
    if args.console == "raw" or (args.console == "auto" and prints):
        return SilentConsole()
    default = next(each for each in reversed(trainer.callback_handler.callbacks) if _is_of_transformers(each))
    trainer.remove_callback(default)
    if args.console == "none" or args.process_index != 0:
        return SilentConsole()
    console = make_console(args, samples)
    trainer.add_callback(console)
    return console


def _is_of_transformers(callback: TrainerCallback | type) -> bool:
    kinds = {PrinterCallback.__name__, ProgressCallback.__name__, "NotebookProgressCallback"}
    kind = callback if isinstance(callback, type) else type(callback)
    return any(base.__name__ in kinds for base in kind.__mro__)


def make_console(args: SPPOConfig, samples: Callable[[], Sequence[Sample]]) -> LineConsole:
    """Make a panel if ``args`` allow one, and standard output is a terminal that can show it; else lines."""
    is_terminal = sys.stdout.isatty() and not args.disable_tqdm and os.environ.get("TERM") != "dumb"
    if args.console == "auto" and is_terminal and args.world_size == 1 and find_spec("rich") is not None:
        from sppo.reporting.panel import PanelConsole

        return PanelConsole(f"{args.algorithm}  {args.output_dir}", samples)
    return LineConsole(in_place=is_terminal)


def report_progress(engine: RolloutEngine, console: SilentConsole) -> None:
    """Let an engine that can tell how many completions are finished tell the console, unless it tells another one."""
    target: Any = engine
    if getattr(target, "on_progress", console) is None:
        target.on_progress = console.progress


def print_completions(samples: Sequence[Sample], step: int) -> None:
    """Print samples of the last rollout, cut to the width of the terminal and a few lines each."""
    width = max(20, terminal_width() - len(_INDENT))
    for sample in samples:
        reward = "-" if sample.reward is None else f"{sample.reward:.2f}"
        advantage = "-" if sample.advantage is None else f"{sample.advantage.mean():+.2f}"
        lines = [cut(f"  sample of update {step}: reward {reward}, advantage {advantage}", width + len(_INDENT))]
        for name, text, most in (
            ("prompt", as_text(sample.prompt), _PROMPT_LINES),
            ("completion", as_text(sample.completion), _COMPLETION_LINES),
        ):
            first, *more = excerpt(text, width, most)
            lines += [f"  {name:<12}{first}", *(f"{_INDENT}{line}" for line in more)]
        print("\n".join(encodable(line.rstrip()) for line in lines), flush=True)


def as_text(prompt: Any) -> str:
    """Return a prompt or completion as text, with one line per chat message."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
