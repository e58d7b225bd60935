"""The report: the committed pages are what the committed results make of them."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import fields

import pytest

pytest.importorskip("triton")

from benchmarks import report
from benchmarks.__main__ import main
from benchmarks.report import RESULTS, ROOT, pages, render, tables
from sppo.settings import SPPOSettings


@pytest.fixture
def copy(tmp_path):
    """The pages and their results somewhere else."""
    for page in pages(ROOT):
        copied = tmp_path / page.relative_to(ROOT)
        copied.parent.mkdir(exist_ok=True, parents=True)
        shutil.copy(page, copied)
    shutil.copytree(RESULTS, tmp_path / RESULTS.relative_to(ROOT))
    return tmp_path


@pytest.mark.parametrize("page", pages(ROOT), ids=lambda page: str(page.relative_to(ROOT)))
def test_committed_tables_match_the_committed_results(page):
    text = page.read_text()
    assert text == render(text, RESULTS), f"{page} is out of date: run python -m benchmarks report"


def test_every_table_is_in_a_page():
    text = "".join(page.read_text() for page in pages(ROOT))
    without_a_device_yet = {"kernels"}
    assert set(re.findall(r"^<!-- table: (\S+) ", text, re.M)) == set(tables()) - without_a_device_yet


@pytest.mark.slow
def test_an_edited_table_is_found_and_generated_again(copy, capsys, monkeypatch):
    monkeypatch.setattr(report, "draw_charts", lambda folder: None)
    page = copy / "docs/results/tables.md"
    right = page.read_text()
    page.write_text(right.replace("| 0 | 0.404 | 0.939 |", "| 0 | 0.404 | 0.999 |"))
    assert main(["report", "--check", "--out", str(copy)]) == 1
    assert "docs/results/tables.md" in capsys.readouterr().err
    assert "0.999" in page.read_text()
    assert main(["report", "--out", str(copy)]) == 0
    assert page.read_text() == right
    assert main(["report", "--check", "--out", str(copy)]) == 0


def test_a_changed_result_is_found(copy):
    file = copy / "benchmarks/results/cpu/memory.json"
    content = json.loads(file.read_text())
    content["rows"][0]["peak_bytes"] *= 2
    file.write_text(json.dumps(content))
    assert main(["report", "--check", "--out", str(copy)]) == 1


@pytest.mark.slow
def test_charts_are_drawn_of_every_report_that_has_one(copy):
    folder = copy / "benchmarks/results/cpu"
    committed = {chart.stem for chart in folder.glob("*.svg")}
    for chart in folder.glob("*.svg"):
        chart.unlink()
    assert main(["report", "--out", str(copy)]) == 0
    drawn = {chart.stem for chart in folder.glob("*.svg")}
    reports = {file.stem for file in folder.glob("*.json") if "suite" in json.loads(file.read_text())}
    assert drawn == (
        reports
        - {"emulated"}  # counts of what was run: a table says it all
        - {"learn", "learn_smollm2", "signal"}  # several charts instead of one
        | {"learn_smollm2-tokens", "learn_smollm2-seconds"}
        | {f"learn-{question}" for question in ("algorithms", "horizon", "centring", "difficulty", "groups", "updates")}
        | {f"signal-{name}" for name in ("spread", "horizon", "explained", "critics", "ratios", "predictions")}
        | {f"{report}-roofline" for report in reports if report.startswith("compile-")}
    )
    assert committed == drawn
    images = {path.name: path.read_text() for path in (copy / "docs/images").glob("*.svg")}
    assert set(images) == {"overview.svg", "modes.svg", "data-flow.svg"}
    for image in [*images.values(), (folder / "memory.svg").read_text()]:
        assert "prefers-color-scheme: dark" in image
        assert not re.search(r"(fill|stroke): (#1f2328|#000000)", image)  # ink follows the reader's colour scheme


def test_reference_tables_have_every_setting_and_command():
    text = render("<!-- table: settings -->\n<!-- end -->\n<!-- table: commands -->\n<!-- end -->", RESULTS)
    for field in fields(SPPOSettings):
        assert f"| `{field.name}` |" in text
    for command in ("train", "eval", "value", "plot", "compare", "doctor"):
        assert f"### sppo {command}" in text
    assert "| `--x {tokens,updates,seconds}` | x axis (tokens) |" in text


def test_the_table_of_a_gpu_run_compares_across_parts_and_has_claims(tmp_path):
    row = {"operation": "gae", "tokens": 8, "hidden": 1, "vocab": 0, "ignored": 0, "clipped": 0, "logits": "peaked"}
    rows = [
        {**row, "part": part, "provider": provider, "both_ms": ms}
        for part, provider, ms in (
            ("headline", "sppo_kernels", 2.0),
            ("headline", "eager PyTorch", 9.0),
            ("torch-compile", "torch.compile", 3.0),
        )
    ]
    claims = [{"part": "headline", "claim": "fast", "measured": 4.5, "held": True}]
    (tmp_path / "h100").mkdir()
    (tmp_path / "h100/kernels.json").write_text(json.dumps({"suite": "kernels", "rows": rows, "claims": claims}))
    page = render(
        "<!-- table: kernels h100 -->\n<!-- end -->\n<!-- table: kernels-summary h100 -->\nold\n<!-- end -->", tmp_path
    )
    assert "**gae: 8 tokens**" in page
    assert "| sppo_kernels |  |  | 2.00 |" in page
    assert "| fast (headline) |  | 4.50 | held |" in page
    assert "| gae: 8 tokens | sppo_kernels | 2.00 | torch.compile | 3.00 | 9.00 |  |" in page
    assert "old" not in page


def test_what_cannot_be_made_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no table 'none'"):
        render("<!-- table: none cpu -->\n<!-- end -->", RESULTS)
    with pytest.raises(ValueError, match="holds 0 reports of the suite memory"):
        render("<!-- table: memory cpu -->\n<!-- end -->", tmp_path)
    assert report.render("no tables", tmp_path) == "no tables"
