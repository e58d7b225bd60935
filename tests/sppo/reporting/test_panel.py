"""Tests of the live panel: what it shows, and that output, errors and Ctrl-C leave the terminal in order."""

import io
import logging
import sys
from pathlib import Path

import pytest
from terminal import draw, run_in_terminal
from tiny_run import DATASET, make

pytest.importorskip("rich")

from rich.console import Console

from sppo.reporting import panel
from sppo.reporting.panel import PanelConsole
from sppo.rollout import Sample

SCRIPT = Path(__file__).parents[2] / "helpers/panel_run.py"
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


def entry(step, **changes):
    return {
        "loss": 0.5,
        "reward": 0.1 * step,
        "response_length": 30.0 + step,
        "truncated": 0.25,
        "entropy": 1.5,
        "brier": 0.2,
        "brier_baseline": 0.25,
        "seconds/rollout": 1.0,
        "step": step,
    } | changes


def console_after(entries, completion="yes"):
    sample = Sample(prompt="2+2=", prompt_ids=[1], completion=completion, response_ids=[2], truncated=False, reward=1.0)
    console = PanelConsole("sppo  runs/mine", lambda: [sample] if entries else [])
    console.history.restart(total=10)
    for each in entries:
        console.history.add(each)
    return console


def drawn(console, width, **settings):
    out = Console(width=width, record=True, file=open("/dev/null", "w", **settings), markup=False)  # noqa: SIM115
    out.print(console.render())
    return out.export_text().splitlines()


@pytest.mark.parametrize("width", [40, 80, 140])
def test_the_panel_fits_the_width(width):
    lines = drawn(console_after([entry(i) for i in range(1, 6)], completion="long " * 100), width)
    assert {len(line) for line in lines} == {min(width - 3, 120)}
    text = "\n".join(lines)
    assert "update 5/10, 5 s left" in text
    assert "brier/base" in text
    assert "sample     reward 1.00: 2+2=" in text
    assert "..." in lines[-2]


def test_a_terminal_that_is_too_narrow_does_not_end_the_run():
    console = console_after([entry(i) for i in range(1, 6)])
    assert all(drawn(console, width) for width in range(1, 30))


def test_curves_of_metrics_that_the_run_lacks_are_left_out():
    without = {name: value for name, value in entry(1).items() if "brier" not in name}
    text = "\n".join(drawn(console_after([without]), 100))
    assert "brier" not in text
    assert "held-out" not in text
    assert "nan" not in text
    assert "updating" in "\n".join(drawn(console_after([]), 100))


def test_a_completion_neither_controls_the_terminal_nor_is_it_markup():
    text = "\n".join(drawn(console_after([entry(1)], completion="[bold]a[/b]\x1b]0;owned\x07"), 100))
    assert "[bold]a[/b]\\x1b]0;owned\\x07" in text


def test_an_ascii_terminal_gets_ascii():
    lines = drawn(console_after([entry(1), entry(2)], completion="€"), 100, encoding="ascii")
    assert all(line.isascii() for line in lines if "sample" not in line)


@pytest.fixture
def terminal(monkeypatch):
    """Return a function that makes the standard streams a file that says that it is a terminal."""
    for name, value in (("COLUMNS", "100"), ("LINES", "40"), ("TERM", "xterm")):
        monkeypatch.setenv(name, value)

    class Terminal(io.StringIO):
        encoding = "utf-8"

        def isatty(self):
            return True

    def enter():  # in the test, because pytest sets the streams at its start
        file = Terminal()
        monkeypatch.setattr(sys, "stdout", file)
        monkeypatch.setattr(sys, "stderr", file)
        return file

    return enter


def test_the_log_is_written_above_the_panel_and_restored(terminal):
    file = terminal()
    handler = logging.StreamHandler(sys.stderr)
    logger = logging.getLogger("test_panel")
    logger.addHandler(handler)
    console = console_after([entry(1)])
    own = sys.stderr
    try:
        with console.shown(), console.shown():
            assert handler.stream is sys.stderr is not own
            logger.warning("[/b] a warning")
            print("[/b] half a line", end="", flush=True)
    finally:
        logger.removeHandler(handler)
    assert handler.stream is own
    assert sys.stderr is own
    screen = draw(file.getvalue())
    assert screen[:2] == ["[/b] a warning", "[/b] half a line"]
    assert [line for line in screen[2:] if line] == []  # nothing was logged, so no panel remains


def test_redraws_leave_every_line_on_the_screen(terminal, monkeypatch):
    """Print while another thread redraws all the time, and while the panel changes its height."""
    monkeypatch.setattr(panel, "_SECONDS_BETWEEN_REFRESHES", 1e-5)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(5):
            file = terminal()
            console = console_after([])
            with console.shown():
                for i in range(60):
                    if i % 3 == 0:
                        console.history.restart(total=i % 2 * 10)
                    elif console.history.total:
                        console.history.add(entry(1))
                    print(f"line {i}")
            lines = [line for line in draw(file.getvalue()) if line.startswith("line")]
            assert lines == [f"line {i}" for i in range(60)]
    finally:
        sys.setswitchinterval(interval)


def test_an_error_restores_the_terminal(terminal):
    file = terminal()
    console = console_after([])

    def fail():
        with console.shown():
            console.history.add(entry(1))
            raise FloatingPointError

    with pytest.raises(FloatingPointError):
        fail()
    output = file.getvalue()
    assert output.count(HIDE) == output.count(SHOW) == 1
    assert output.rindex(SHOW) > output.rindex(HIDE)
    assert "update 1/10" in draw(output)[1]  # the last state remains


def test_a_trainer_without_training_data_evaluates_in_a_panel(terminal, tmp_path):
    file = terminal()
    trainer = make(tmp_path, dataset=None, eval_dataset=DATASET.select(range(3)), disable_tqdm=False)
    assert isinstance(trainer.console, PanelConsole)
    trainer.evaluate()
    assert HIDE in file.getvalue()
    assert [line for line in draw(file.getvalue()) if line] == [
        "evaluation before training: reward 0.000, 0.0% solved, 4 tokens, 100% cut off"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("event", ["none", "interrupt"])
def test_a_run_in_a_terminal(tmp_path, event):
    code, output, screen = run_in_terminal([sys.executable, str(SCRIPT), str(tmp_path), event])
    assert code == (0 if event == "none" else 1)
    assert output.count(HIDE) == output.count(SHOW) == 2
    assert output.rindex(SHOW) > output.rindex(HIDE)
    assert "printed in a child TextIOWrapper" in output
    assert screen[:2] == ["before the run", "PanelConsole"]
    for line in ("printed [/b] in the run", "[transformers] logged in the run"):
        assert screen.count(line) == 1
    assert sum("UserWarning: warned in the run" in line for line in screen) == 1
    updates = [line.split()[0] for line in screen if line.lstrip()[:3] in ("1/3", "2/3", "3/3")]
    assert updates == (["1/3", "2/3", "3/3"] if event == "none" else ["1/3"])
    assert screen[-2:] == ["after the run" if event == "none" else "KeyboardInterrupt", ""]
    assert sum("update 3/3" in line and "finished" in line for line in screen) == (event == "none")
