"""Tests of atomic writes and JSON Lines files."""

import os
from contextlib import suppress

import pytest

from sppo._utils import atomic_write, read_lines, write_lines


def test_atomic_write_replaces_all_or_nothing(tmp_path):
    path = tmp_path / "folder" / "file"
    with atomic_write(path) as staged:
        staged.write_text("first")
    with suppress(RuntimeError), atomic_write(path) as staged:
        staged.write_text("second")
        raise RuntimeError
    assert path.read_text() == "first"
    assert os.listdir(path.parent) == ["file"]


def test_an_invalid_line_raises(tmp_path):
    path = tmp_path / "log.jsonl"
    write_lines(path, [{"step": 1}])
    path.write_text("{nothing}\n" + path.read_text())
    with pytest.raises(ValueError, match=r"log\.jsonl': line 1 is not JSON .*; delete that line"):
        read_lines(path)
