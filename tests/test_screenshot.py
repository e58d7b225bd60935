"""The picture of the console: small, without files of other sites, and made of a screen by docs/dev/screenshot.py."""

import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("rich")

DOCS = Path(__file__).parent.parent / "docs"


def load():
    spec = importlib.util.spec_from_file_location("screenshot", DOCS / "dev/screenshot.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(picture):
    text = picture.read_text()
    assert len(text) < 200_000
    assert "@font-face" not in text
    assert "<image" not in text
    return text


def test_the_picture_in_the_docs_shows_the_command():
    text = check(DOCS / "images/console.svg")
    assert load().COMMAND.replace(" ", "&#160;") in text
    assert "update&#160;32/40" in text


def test_a_screen_is_drawn_with_its_colors(tmp_path, monkeypatch):
    script = load()
    monkeypatch.setattr(script, "screen_at", lambda text: f"plain\n\x1b[38;2;1;2;3m{text}\x1b[0m\n")
    monkeypatch.setattr(sys, "argv", ["screenshot.py", "--update", "7", "--output", str(tmp_path / "new/a.svg")])
    script.main()
    text = check(tmp_path / "new/a.svg")
    assert "plain" in text
    assert "update&#160;7/" in text
    assert "#010203" in text
