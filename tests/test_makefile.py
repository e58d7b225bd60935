"""Packages that `make` installs."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("settings", "bounded"), [([], False), (["TORCH=torch==2.11.0"], True), (["TORCH=torch==2.12.1"], False)]
)
def test_numpy_is_bounded_where_tritons_interpreter_requires_it(settings, bounded, tmp_path):
    target = tmp_path / "venv"
    command = ["make", "--dry-run", f"VENV={target}", *settings, f"{target}/ready"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    assert "pip install --quiet torch==" in printed
    assert ("'numpy<2.4'" in printed) == bounded
