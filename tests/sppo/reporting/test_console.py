"""Tests of which console a run has, and of what is printed of a model's output."""

import sys
from types import SimpleNamespace

import pytest
import torch
from tiny_run import DATASET, make
from transformers import PrinterCallback, ProgressCallback

from sppo import HFRollout, checkpointing
from sppo._utils import printable
from sppo.reporting import console
from sppo.reporting.lines import LineConsole, SilentConsole
from sppo.rewards import samples
from sppo.rollout import Sample

TITLE = "\x1b]0;owned\x07"  # sets the title of a terminal


def sample(completion, **changes):
    given = {"prompt": "a\x9b2J", "prompt_ids": [1], "response_ids": [2], "truncated": False} | changes
    return Sample(completion=completion, **given)


def test_control_characters_are_shown():
    assert printable("a\tb\n\x1b[31mred\x7f\x85é") == "a\tb\n\\x1b[31mred\\x7f\\x85é"


def test_completions_do_not_control_the_terminal(capsys):
    console.print_completions([sample(f"yes{TITLE}")], step=3)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\x9b" not in out
    assert "owned" in out


def test_completions_are_cut_to_the_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    chat = [{"role": "assistant", "content": "first\n" + "word " * 1000}]
    console.print_completions([sample(chat, reward=0.5, advantage=torch.tensor([0.1, 0.3])), sample("short")], step=3)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 40
    assert lines[:3] == [
        "  sample of update 3: reward 0.50, ad...",
        "  prompt      a\\x9b2J",
        "  completion  assistant: first",
    ]
    assert lines[10].strip() == "[4,818 more characters]"
    assert lines[11] == "  sample of update 3: reward -, advan..."
    assert len(lines) == 14


def test_failures_of_rewards_do_not_control_the_terminal(monkeypatch):
    logged = []
    monkeypatch.setattr(samples.logger, "warning", lambda message, *args: logged.append(message % args))

    def bad(completions, **columns):
        raise ValueError(completions[0])

    samples.grade([sample(TITLE)], [{}], [bad], weights=None, timeout=5.0)
    assert logged
    assert all("\x1b" not in line for line in logged)
    assert "owned" in logged[0]


# Which console


def kinds(trainer):
    return [type(each) for each in trainer.callback_handler.callbacks if isinstance(each, _SHOWN)]


_SHOWN = (SilentConsole, PrinterCallback, ProgressCallback)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [LineConsole]),
        ({"console": "lines", "disable_tqdm": False}, [LineConsole]),
        ({"console": "raw"}, [PrinterCallback]),
        ({"console": "raw", "disable_tqdm": False}, [ProgressCallback]),
        ({"console": "none"}, []),
    ],
)
def test_the_console_is_the_one_that_the_settings_name(tmp_path, settings, expected):
    assert kinds(make(tmp_path, **settings)) == expected


def test_a_run_may_resume_with_another_console(tmp_path):
    runs = [make(tmp_path, console=setting) for setting in ("raw", "none")]
    first, second = (checkpointing.identity(run.args, run.actor_critic, run.train_dataset, []) for run in runs)
    assert first == second


def test_an_unknown_console_raises(tmp_path):
    with pytest.raises(ValueError, match="console must be one of auto, lines, raw, none, got 'panel'"):
        make(tmp_path, console="panel")


@pytest.mark.parametrize("given", [ProgressCallback, ProgressCallback()])
def test_a_callback_of_the_user_replaces_the_automatic_console(tmp_path, given):
    def consoles(setting):
        trainer = make(tmp_path, console="none")
        trainer.add_callback(given)
        trainer.add_callback(PrinterCallback)  # as transformers does, after those of the user
        args = SimpleNamespace(console=setting, process_index=0, world_size=1, disable_tqdm=True)
        console.install_console(trainer, args, [given], list)
        return kinds(trainer)

    assert consoles("lines") == [ProgressCallback, LineConsole]
    assert consoles("none") == [ProgressCallback]
    assert consoles("auto") == [ProgressCallback, PrinterCallback]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "PanelConsole"),
        ({"console": "lines"}, "LineConsole"),
        ({"disable_tqdm": True}, "LineConsole"),
        ({"world_size": 2}, "LineConsole"),
        ({"TERM": "dumb"}, "LineConsole"),
        ({"rich": None}, "LineConsole"),
        ({"isatty": False}, "LineConsole"),
    ],
)
def test_a_panel_needs_a_terminal_rich_and_one_process(monkeypatch, changes, expected):
    pytest.importorskip("rich")
    settings = {"console": "auto", "disable_tqdm": False, "world_size": 1, "algorithm": "sppo", "output_dir": "a"}
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: changes.get("isatty", True)))
    monkeypatch.setenv("TERM", changes.get("TERM", "xterm"))
    monkeypatch.setattr(console, "find_spec", lambda name: changes.get(name, "found"))
    made = console.make_console(SimpleNamespace(**settings | changes), list)
    assert type(made).__name__ == expected


def test_other_processes_print_nothing(tmp_path, monkeypatch):
    trainer = make(tmp_path, console="none")
    trainer.add_callback(PrinterCallback)
    args = SimpleNamespace(console="lines", process_index=1)
    assert type(console.install_console(trainer, args, [], list)) is SilentConsole
    assert kinds(trainer) == []


class Engine(HFRollout):
    """Reports each completion of a batch."""

    on_progress = None

    def generate(self, prompts, **settings):
        for i in range(len(prompts)):
            self.on_progress(i + 1, len(prompts))
        report, self.on_progress = self.on_progress, None  # the engine itself would report too
        try:
            return super().generate(prompts, **settings)
        finally:
            self.on_progress = report


def test_a_run_prints_each_entry_once_with_the_progress_of_its_rollouts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sppo.reporting.lines._SECONDS_BETWEEN_LINES", 0.0)
    trainer = make(tmp_path, eval_dataset=DATASET.select(range(3)), max_steps=2, rollout_engine=f"{__name__}:Engine")
    trainer.evaluate()
    trainer.train()
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "evaluating" in line] == [f"evaluating {i}/3, 0 s" for i in (1, 2, 3)]
    assert [line for line in lines if "sampling" in line] == 2 * [f"sampling {i}/8, 0 s" for i in range(1, 9)]
    updates = [line.split()[0] for line in lines if line.lstrip().startswith(("1/2", "2/2"))]
    assert updates == ["1/2", "2/2"]
    assert not any("{" in line for line in lines)


def test_an_engine_that_reports_elsewhere_keeps_doing_so():
    engine = SimpleNamespace(on_progress=print)
    console.report_progress(engine, SilentConsole())
    assert engine.on_progress is print
    engine = SimpleNamespace()
    console.report_progress(engine, SilentConsole())
    assert not hasattr(engine, "on_progress")
