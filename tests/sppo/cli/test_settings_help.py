"""Tests of the settings in the help of ``sppo train``."""

import re
from dataclasses import fields

import pytest

from sppo import SPPOConfig
from sppo.cli.settings_help import COMMON, settings_help
from sppo.settings import SPPOSettings

OWN = [each.name for each in fields(SPPOSettings)]


def parts():
    """Return the names of the settings by heading."""
    headings = re.split(r"^(\S.*):$", settings_help(), flags=re.MULTILINE)[1:]
    return {
        heading: re.findall(r"^  --(\w+) ", text, re.MULTILINE)
        for heading, text in zip(headings[::2], headings[1::2], strict=True)
    }


def test_common_settings_come_first_and_each_setting_once():
    first, *others = parts().items()
    assert first == ("Settings that most runs need", list(COMMON))
    assert [name for _, names in others for name in names] == [name for name in OWN if name not in COMMON]


def test_groups_are_those_of_the_settings_module():
    groups = parts()
    assert list(groups)[2:] == ["Rollout", "Reward", "Loss", "Critic", "Evaluation and log"]
    names = ["reward_weights", "reward_timeout", "reward_workers", "mask_truncated_completions", "overlong_buffer"]
    assert groups["Reward"] == names
    assert groups["Critic"][0] == "critic_learning_rate"


def test_defaults_are_those_of_the_configuration():
    config = {each.name: each.default for each in fields(SPPOConfig)}
    written = {name: default for name, (_, default) in COMMON.items() if name not in OWN and name != "output_dir"}
    expected = {name: getattr(config[name], "value", config[name]) for name in written}
    expected["gradient_checkpointing"] = bool(expected["gradient_checkpointing"])  # newer versions: an alias, None
    assert written == expected


@pytest.mark.parametrize("width", ["60", "100", "200"])
def test_lines_fit_the_terminal(monkeypatch, width):
    monkeypatch.setenv("COLUMNS", width)
    lines = settings_help().splitlines()
    assert max(map(len, lines)) <= max(72, int(width) - 1)
    assert "  --save_steps                  Updates between two checkpoints. [500]" in lines
    assert any(re.match(r"  --learning_rate  +Peak learning rate of the policy\.", line) for line in lines)
    assert any(line.startswith("  --bf16 ") for line in lines)
