"""Tests of how the commands that a run suggests call this program."""

import shutil
import sys

import pytest

from sppo.cli.train import program


@pytest.mark.parametrize(
    ("argv0", "found", "expected"),
    [
        ("/usr/bin/sppo", {"sppo": "/usr/bin/sppo"}, "sppo"),
        ("/my env/bin/sppo", {}, "'/my env/bin/sppo'"),
        ("/src/sppo/cli/__main__.py", {"python": "PYTHON", "sppo": "/usr/bin/sppo"}, "python -m sppo.cli"),
        ("/src/sppo/cli/__main__.py", {"python": "/usr/bin/python"}, "PYTHON -m sppo.cli"),
        ("/src/sppo/cli/__main__.py", {}, "PYTHON -m sppo.cli"),
    ],
)
def test_suggested_commands_call_the_program_as_the_user_did(monkeypatch, argv0, found, expected):
    monkeypatch.setattr(sys, "argv", [argv0, "train"])
    monkeypatch.setattr(sys, "executable", "PYTHON")
    monkeypatch.setattr(shutil, "which", found.get)
    assert program() == expected
