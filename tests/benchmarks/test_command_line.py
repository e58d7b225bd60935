"""``python -m benchmarks``: suites are imported when they are chosen, so that each needs its own packages alone."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from benchmarks.__main__ import SUITES, docstring, main
from benchmarks.gpu import ROOT

BLOCKED = ("datasets", "trl", "matplotlib", "accelerate", "transformers")
# None in sys.modules makes an import of that name fail, as where it is not installed.
PROGRAM = f"""
import sys
sys.modules |= dict.fromkeys({BLOCKED})
from benchmarks.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def run_with_little(*arguments):
    """The command in a process that has torch, triton and numpy, but nothing of the trainer's."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("suite", ["gpu", "kernels", "tune", "compile", "traffic"])
def test_kernel_suites_start_without_the_packages_of_the_trainer(suite):
    done = run_with_little(suite, "--help")
    assert done.returncode == 0, done.stderr
    assert "--out" in done.stdout


@pytest.mark.slow
def test_kernels_and_tune_run_without_the_packages_of_the_trainer(tmp_path):
    few = "--only", "linear_logprobs", "--without", "torch.compile"
    for command in (("kernels", "--plan", "dry", *few), ("tune", "--quick")):
        done = run_with_little(*command, "--out", tmp_path)
        assert done.returncode == 0, done.stderr
    assert {"kernels-dry.json", "tune.json", "tuning.json"} <= {path.name for path in tmp_path.iterdir()}


def test_the_list_of_suites_imports_none_of_them():
    program = "import sys; from benchmarks.__main__ import main; main([]); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"\n    {name}" in done.stdout for name in SUITES)


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_is_a_module_with_arguments_and_a_run(name):
    module = importlib.import_module(f"benchmarks.{SUITES[name]}")
    assert docstring(SUITES[name]) == (module.__doc__ or "").strip()
    assert callable(module.add_arguments)
    assert callable(module.run)


def test_an_unknown_suite_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["no-such-suite"])
    assert "no-such-suite" in capsys.readouterr().err
