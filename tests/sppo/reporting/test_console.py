"""Tests of what is printed of a model's output."""

import importlib.util

import pytest

from sppo._utils import printable
from sppo.reporting import console
from sppo.rewards import samples
from sppo.rollout import Sample

TITLE = "\x1b]0;owned\x07"  # sets the title of a terminal


def sample(completion):
    return Sample(prompt="a\x9b2J", prompt_ids=[1], completion=completion, response_ids=[2], truncated=False)


def test_control_characters_are_shown():
    assert printable("a\tb\n\x1b[31mred\x7f\x85é") == "a\tb\n\\x1b[31mred\\x7f\\x85é"


@pytest.mark.parametrize("has_rich", [True, False])
def test_completions_do_not_control_the_terminal(monkeypatch, capsys, has_rich):
    monkeypatch.setenv("COLUMNS", "200")
    found = importlib.util.find_spec("rich") if has_rich else None
    monkeypatch.setattr(console, "find_spec", lambda name: found)
    console.print_completions([sample(f"yes{TITLE}")], step=3)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\x9b" not in out
    assert "owned" in out


def test_failures_of_rewards_do_not_control_the_terminal(monkeypatch):
    logged = []
    monkeypatch.setattr(samples.logger, "warning", lambda message, *args: logged.append(message % args))

    def bad(completions, **columns):
        raise ValueError(completions[0])

    samples.grade([sample(TITLE)], [{}], [bad], weights=None, timeout=5.0)
    assert logged
    assert all("\x1b" not in line for line in logged)
    assert "owned" in logged[0]
