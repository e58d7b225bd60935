"""Tests of the console's lines: columns, headers, evaluations, and progress with and without a terminal."""

import io
import sys
from types import SimpleNamespace

import pytest

from sppo.reporting import lines as lines_module
from sppo.reporting.lines import LineConsole

STEP = {
    "loss": 0.5,
    "reward": 0.25,
    "response_length": 42.4,
    "truncated": 0.031,
    "entropy": 1.234,
    "clip_fraction": 0.02,
    "seconds/rollout": 2.0,
    "seconds/update": 2.0,
}
CRITIC = {"brier": 0.18, "brier_baseline": 0.25}
EVALUATION = {
    "eval_success_rate": 0.25,
    "eval_reward": 0.3,
    "eval_response_length": 12.3,
    "eval_truncated": 0.5,
}


class Run:
    """A trainer's state, whose log entries a console prints."""

    def __init__(self, console, total=300):
        self.console = console
        self.state = SimpleNamespace(max_steps=total, global_step=0, log_history=[])

    def begin(self):
        self.console.on_train_begin(None, self.state, None)
        return self

    def log(self, entry, step):
        self.state.log_history.append({**entry, "step": step})
        self.console.on_log(None, self.state, None)


@pytest.fixture
def run():
    return Run(LineConsole(in_place=False)).begin()


def table(text):
    """Return the header and the rows of a text, as words."""
    return [line.split() for line in text.splitlines()]


def test_a_line_has_the_columns_of_the_run(run, capsys):
    run.log(STEP, 1)
    run.log(STEP | {"reward": 0.5}, 2)
    header, first, second = table(capsys.readouterr().out)
    assert header == ["update", "reward", "change", "tokens", "cut", "entr.", "clip", "s/upd", "roll%", "left"]
    assert " ".join(first) == "1/300 0.250 +0.000 42 3% 1.234 2% 4.00 50% 19m"
    assert second[:3] == ["2/300", "0.500", "+0.139"]  # (0.8 * 0.25 + 0.5) / 1.8 - 0.25


def test_columns_are_added_when_their_metric_appears(run, capsys):
    run.log(EVALUATION, 0)
    run.log(STEP | CRITIC | {"kl": 0.00123}, 1)
    run.log({name: value for name, value in STEP.items() if name != "reward"}, 2)
    _, header, first, second = table(capsys.readouterr().out)
    assert header == [
        "update",
        "reward",
        "change",
        "eval",
        "tokens",
        "cut",
        "entr.",
        "kl",
        "clip",
        "brier/base",
        "s/upd",
        "roll%",
        "left",
    ]
    assert first[3] == "0.300"
    assert first[7] == "0.0012"
    assert first[9] == ".180/.250"
    assert second[:4] == ["2/300", "-", "-", "0.300"]


def test_lines_are_aligned_and_fit_80_columns(run, capsys):
    run.log(EVALUATION, 0)
    run.log(STEP | CRITIC, 99)
    header, line = capsys.readouterr().out.splitlines()[1:]
    assert len(header) == len(line) <= 80
    assert all(line[header.index(name) + len(name) - 1] != " " for name in ("update", "reward", "s/upd", "left"))


def test_the_header_is_repeated_every_20_lines(run, capsys):
    for step in range(1, 42):
        run.log(STEP, step)
    lines = capsys.readouterr().out.splitlines()
    assert [i for i, line in enumerate(lines) if "reward" in line] == [0, 21, 42]


def test_an_entry_may_cover_several_updates(run, capsys):
    run.log(STEP, 5)
    run.log(STEP | {"seconds/evaluate": 6.0}, 10)
    _, first, second = table(capsys.readouterr().out)
    assert first[-3:] == ["0.80", "50%", "3m56s"]
    assert second[-3:] == ["0.80", "50%", "6m46s"]  # 290 updates of 1.4 seconds: the time left includes evaluations


def test_evaluations_have_a_line(run, capsys):
    run.log(EVALUATION, 0)
    run.log({name.replace("eval", "eval_math"): value for name, value in EVALUATION.items()}, 7)
    run.log({"train_runtime": 99.0}, 7)
    assert capsys.readouterr().out.splitlines() == [
        "evaluation before training: reward 0.300, 25.0% solved, 12 tokens, 50% cut off",
        "evaluation of math after update 7: reward 0.300, 25.0% solved, 12 tokens, 50% cut off",
        "7 updates finished; training took 1m39s",
    ]


def test_the_score_is_the_mean_over_sets_of_held_out_prompts(run, capsys):
    for name, reward in (("a", 0.2), ("b", 0.4), ("a", 0.6)):
        run.log({f"eval_{name}{key.removeprefix('eval')}": reward for key in EVALUATION}, 1)
    run.log({"test_reward": 9.0} | {key.replace("eval", "test"): 9.0 for key in EVALUATION}, 1)
    run.log(STEP, 1)
    assert run.console.history.held_out == pytest.approx([0.2, 0.3, 0.5])
    assert table(capsys.readouterr().out)[-1][3] == "0.500"


def test_a_resumed_run_continues_its_history(capsys):
    run = Run(LineConsole(in_place=False))
    run.state.log_history = [STEP | {"reward": 0.0, "step": step, "seconds/update": 99.0} for step in range(1, 9)]
    run.state.global_step = 8
    run.begin()
    run.log(STEP, 9)
    _, line = table(capsys.readouterr().out)
    assert line[0] == "9/300"
    assert line[2] != "+0.000"
    assert line[-1] == "19m"  # 291 updates of 4 seconds


def test_without_a_terminal_progress_is_rare(run, capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(lines_module.time, "monotonic", lambda: now[0])
    run.console.phase("rollout")
    for i in range(100):
        now[0] += 1.0
        run.console.progress(i + 1, 256)
    run.console.phase("update")
    assert capsys.readouterr().out.splitlines() == [
        "sampling 30/256, 30 s",
        "sampling 60/256, 1m00s",
        "sampling 90/256, 1m30s",
    ]


def test_on_a_terminal_progress_is_overwritten(capsys):
    console = LineConsole(in_place=True)
    console.phase("evaluate")
    console.progress(50, 500)
    console.print("a line")
    out = capsys.readouterr().out
    assert "evaluating 50/500, 0 s\r" in out
    assert "\x1b" not in out
    screen = [""]
    for part in out.split("\r"):  # each part overwrites what is there
        *complete, last = part.split("\n")
        screen = [*(line.rstrip() for line in complete), last] if complete else [part + screen[-1][len(part) :]]
    assert screen[0] == "a line"


def test_an_interrupted_rollout_leaves_nothing_in_its_line(capsys):
    console = LineConsole(in_place=True)

    def interrupted():
        with console.shown():
            console.phase("rollout")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert capsys.readouterr().out.endswith(" " * len("sampling, 0 s") + "\r")


def test_a_narrow_terminal_leaves_out_columns(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdout", Terminal())
    headers = {}
    for width in (40, 80, 140):
        monkeypatch.setenv("COLUMNS", str(width))
        run = Run(LineConsole(in_place=False)).begin()
        run.log(EVALUATION, 0)
        run.log(STEP | CRITIC | {"kl": 0.1}, 1)
        headers[width] = sys.stdout.getvalue().splitlines()[-2]
        assert len(headers[width]) <= width
    assert headers[40].split() == ["update", "reward", "eval", "tokens", "left"]
    assert "roll%" not in headers[80]
    assert "kl" in headers[80].split()
    assert "clip  brier" in headers[140]
