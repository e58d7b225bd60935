"""The doctor names what is missing or too old, and works where the rest does not."""

import re
import sys
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as real_version
from pathlib import Path

import pytest

from sppo.cli import doctor
from sppo.cli.main import main

SETUP = (Path(__file__).parents[3] / "setup.py").read_text()


def with_versions(monkeypatch, **changes):
    """Let packages have other versions, or none."""

    def version(name):
        if (found := changes.get(name.replace("-", "_"), "as is")) is None:
            raise PackageNotFoundError(name)
        return real_version(name) if found == "as is" else found

    monkeypatch.setattr(doctor, "version", version)


def test_here(capsys):
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    for name in ("python", "torch", "device", "precision", "attention", "rollouts", "processes"):
        assert re.search(rf"^  {name} +\S", said, re.M)
    assert re.search(r"fused kernels +log-probabilities and gradients are right, to \de-0[4-9]", said)
    assert "ERROR" not in said


def findings(look):
    return {finding.name: finding for finding in look()}


def test_what_is_missing_or_old(monkeypatch):
    with_versions(monkeypatch, torch="2.9.1+cu128", transformers=None, triton="3.5.0", wandb=None, accelerate="1.10")
    found = findings(doctor.installed)
    assert found["torch"] == ("torch", "2.9.1+cu128, older than 2.10: pip install 'torch>=2.10'", "error")
    assert "missing, for models and training: pip install 'transformers>=5.17'" in found["transformers"].text
    assert found["transformers"].trouble == "error"
    assert found["triton"].trouble == "warning"
    assert found["wandb"] == ("wandb", "missing, for report_to=wandb: pip install wandb", None)
    assert found["accelerate"].trouble is None


@pytest.mark.parametrize(("here", "trouble"), [((3, 10), "error"), ((3, 11), None), ((3, 14), "warning")])
def test_python(here, trouble, monkeypatch):
    monkeypatch.setattr("sys.version_info", (*here, 0, "final", 0))
    assert findings(doctor.installed)["python"].trouble == trouble


def test_where_torch_does_not_import(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert doctor.diagnose() == 1
    assert "Training cannot run: see device, fused kernels above." in capsys.readouterr().out


def test_what_fails_is_reported_and_the_rest_still_looked_at(monkeypatch):
    monkeypatch.setattr(doctor, "_attention", lambda *_: 1 / 0)
    found = findings(doctor.used)
    assert found["attention"] == ("attention", "ZeroDivisionError: division by zero", "error")
    assert found["processes"].trouble is None


def test_a_wrong_kernel_is_an_error(monkeypatch):
    import sppo_kernels

    right = sppo_kernels.linear_logprobs
    monkeypatch.setattr(sppo_kernels, "linear_logprobs", lambda *args: right(*args, temperature=1.1))
    (finding,) = doctor.tested()
    assert finding.trouble == "error"
    assert "off by" in finding.text


def test_oldest_versions_are_those_of_the_package():
    for package in (*doctor.REQUIRED, *doctor.OPTIONAL):
        if package.least != "0":
            assert f'"{package.name}>={package.least}' in SETUP
    oldest, newest = doctor.PYTHON
    assert f'python_requires=">={oldest[0]}.{oldest[1]}"' in SETUP
    assert f"Python :: {newest[0]}.{newest[1]}" in SETUP
    assert f"Python :: {newest[0]}.{newest[1] + 1}" not in SETUP
