"""What every suite writes: JSON, CSV and PNG, whole or not at all, and tables that a terminal can show."""

from __future__ import annotations

import csv
import json
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import endurance
from benchmarks.harness import results

ROWS = [{"a": 1, "b": {"c": 2.5, "d": None}}, {"a": "word, word", "e": 3}]


def test_rows_are_written_as_csv_and_drawn(tmp_path):
    path = tmp_path / "new" / "x.json"
    results.write(path, "suite", results.Chart("ms", [("one", 1.0), ("two", 2.0)], limit=1.5), rows=ROWS)
    report = json.loads(path.read_text())
    assert report["rows"] == ROWS
    assert report["suite"] == "suite"
    assert report["versions"].keys() == {"sppo_kernels", "triton", "torch", "python", "transformers"}
    with path.with_suffix(".csv").open() as file:
        first, second = csv.DictReader(file)
    assert first == {"a": "1", "b.c": "2.5", "b.d": "", "e": ""}
    assert second == {"a": "word, word", "b.c": "", "b.d": "", "e": "3"}
    assert path.with_suffix(".svg").read_bytes().startswith(b"<?xml")
    assert len(list(path.parent.iterdir())) == 3


def test_a_result_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "x.json"
    results.write(path, "suite", rows=ROWS)
    before = path.read_text()

    class Unwritable:
        def __str__(self):
            raise RuntimeError("no such luck")

    with pytest.raises(RuntimeError):
        results.write(path, "suite", rows=[Unwritable()])
    assert path.read_text() == before


def test_without_matplotlib_there_are_results_and_a_word_about_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    results.write(tmp_path / "x.json", "suite", results.Chart("ms", [("one", 1.0)]), rows=ROWS)
    endurance.draw(tmp_path / "y.svg", [{"update": 1, "resident_mb": 1.0, "seconds": 1.0}])
    assert capsys.readouterr().err.count("no chart: matplotlib is not installed") == 2
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".csv"}


def test_columns_of_numbers_stand_to_the_right():
    columns = {"name": lambda row: row["name"], "ms": lambda row: row["ms"]}
    rows = [{"name": "long name", "ms": 1.0}, {"name": "x", "ms": 123.456}, {"name": "none", "ms": None}]
    assert results.table(rows, columns).split("\n") == [
        "name          ms",
        "long name   1.00",
        "x          123.5",
        "none",
    ]
    assert results.markdown(rows, columns).split("\n")[:3] == ["| name | ms |", "|---|---|", "| long name | 1.00 |"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, ""),
        (0.0, "0.000"),
        (0.5, "0.500"),
        (2.345, "2.35"),
        (123.45, "123.5"),
        (4567.8, "4568"),
        (1e-5, "1.0e-05"),
        (3, "3"),
        ("x", "x"),
    ],
)
def test_numbers_are_short(value, shown):
    assert results.cell(value) == shown


PROPERTIES = SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, total_memory=80, L2_cache_size=50, uuid="b-1"
)


@pytest.fixture
def nvidia_smi(monkeypatch, tmp_path):
    """A GPU of these properties, and a nvidia-smi that prints what it is given."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: PROPERTIES)
    monkeypatch.setenv("PATH", str(tmp_path))

    def prints(text, code=0):
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\necho '{text}'\nexit {code}\n")
        program.chmod(0o755)

    return prints


def test_facts_of_the_gpu_are_those_of_the_one_in_use(nvidia_smi):
    nvidia_smi(
        "GPU-a-0, 580.1, 345, 1980, 1593, 2619, 70.1, 700.00, 30, Enabled, Enabled\n"
        "GPU-b-1, 580.1, 1755, 1980, 2619, 2619, 650.5, ERR!, 60, Disabled, [N/A]"
    )
    facts = results.gpu_facts()
    assert facts["multiprocessors"] == 132
    assert facts["l2_bytes"] == 50
    assert (facts["clocks.sm"], facts["clocks.max.sm"], facts["persistence_mode"]) == ("1755", "1980", "Disabled")
    assert not {"ecc.mode.current", "power.limit"} & facts.keys()
    line = results.describe_gpu(facts)
    assert "NVIDIA H100, driver 580.1" in line
    assert "SM 1755 of 1980" in line
    assert "ECC ?" in line


@pytest.mark.parametrize(
    ("text", "code"), [("", 0), ("no devices", 9), ("NVIDIA-SMI has failed", 0), ("\\0377", 0), (None, 0)]
)
def test_facts_without_a_nvidia_smi_are_what_torch_knows(nvidia_smi, text, code):
    if text is not None:
        nvidia_smi(text, code)
    facts = results.gpu_facts()
    assert facts["name"] == "NVIDIA H100"
    assert "driver_version" not in facts
    assert "driver ?" in results.describe_gpu(facts)


def test_there_are_no_facts_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert results.gpu_facts() == {}
