"""Registration of suites: a module of ``benchmarks`` is a command, and is imported only when it is chosen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import benchmarks
from benchmarks import report
from benchmarks.__main__ import main
from benchmarks.harness import suite
from benchmarks.harness.suite import Suite

ROOT = Path(benchmarks.__file__).parents[1]
BLOCKED = ("datasets", "trl", "matplotlib", "accelerate", "transformers")
# None in sys.modules makes an import of that name fail, as if it were not installed.
WITHOUT_TRAINER = f"import sys; sys.modules |= dict.fromkeys({BLOCKED})\n"
KERNEL_SUITES = ("gpu", "kernels", "tune", "compile", "traffic", "memory", "flops", "roofline")

NEW_SUITE = '''"""Count the letters of a word.

More about it.
"""

from benchmarks.harness import results
from benchmarks.harness.suite import Suite


def add_arguments(parser):
    parser.add_argument("--word", default="abc")
    results.add_out(parser)


def run(args):
    results.write(args.out / "letters.json", "letters", rows=[{"letters": len(args.word)}])
    return 0


def chart(rows):
    return results.Chart("letters", [("word", row["letters"]) for row in rows])


SUITE = Suite(
    add_arguments,
    run,
    tables={"letters": results.table_of("letters", {"letters": lambda row: row["letters"]})},
    draw=results.draw_bars(chart),
    figures={"again": results.draw_bars(chart)},
    needs="a word",
)
'''


@pytest.fixture
def new_suite(tmp_path, monkeypatch):
    """A module in a folder that is part of the package for as long as the test lasts."""
    folder = tmp_path / "more"
    folder.mkdir()
    (folder / "letters.py").write_text(NEW_SUITE)
    monkeypatch.setattr(benchmarks, "__path__", [*benchmarks.__path__, str(folder)])
    report.tables.cache_clear()
    yield
    report.tables.cache_clear()
    sys.modules.pop("benchmarks.letters", None)


def test_one_new_module_is_a_command_a_table_a_chart_and_a_line_in_the_docs(new_suite, tmp_path, capsys):
    main([])
    assert "letters" in suite.names()
    assert "Count the letters of a word." in capsys.readouterr().out
    pages = tmp_path / "pages"
    results_folder = pages / "benchmarks/results/cpu"
    (pages / "docs").mkdir(parents=True)
    (pages / "README.md").write_text("<!-- table: letters cpu -->\n<!-- end -->\n")
    (pages / "docs/new.md").write_text("<!-- table: suites -->\n<!-- end -->\n")
    assert main(["letters", "--word", "five5", "--out", str(results_folder)]) == 0
    assert main(["report", "--out", str(pages)]) == 0
    assert "| letters |\n|---|\n| 5 |" in (pages / "README.md").read_text()
    assert "| `letters` | Count the letters of a word | a word |" in (pages / "docs/new.md").read_text()
    assert {chart.name for chart in results_folder.glob("*.svg")} == {"letters.svg", "letters-again.svg"}


def test_listing_the_suites_imports_none_of_them():
    program = "import sys; from benchmarks.__main__ import main; main([]); assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert all(f"\n    {name}" in done.stdout for name in suite.names())


def test_names_are_printed_one_per_line(capsys):
    assert main(["--list"]) == 0
    assert capsys.readouterr().out.split() == suite.names()


@pytest.mark.parametrize("name", suite.names())
def test_every_module_declares_a_suite_and_has_a_one_line_summary(name):
    assert isinstance(suite.load(name), Suite)
    assert suite.docstring(name) == sys.modules[f"benchmarks.{name}"].__doc__.strip()
    assert suite.summary(name).endswith(".")


@pytest.mark.slow
def test_kernel_suites_import_nothing_of_the_trainer():
    program = f"{WITHOUT_TRAINER}from benchmarks.harness import suite\nfor name in {KERNEL_SUITES}: suite.load(name)"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_an_unknown_suite_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["no-such-suite"])
    assert "no-such-suite" in capsys.readouterr().err
