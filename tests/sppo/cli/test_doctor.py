"""Tests of ``sppo doctor``: missing, outdated and broken packages, and a wrong kernel."""

import re
import sys
from functools import partial, wraps
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as real_version
from pathlib import Path

import pytest

from sppo.cli import doctor
from sppo.cli.main import main

SETUP = (Path(__file__).parents[3] / "setup.py").read_text()


def set_versions(monkeypatch, **versions):
    """Pretend that packages have these versions, or are missing (None)."""

    def version(name):
        if (pretended := versions.get(name.replace("-", "_"), "real")) is None:
            raise PackageNotFoundError(name)
        return real_version(name) if pretended == "real" else pretended

    monkeypatch.setattr(doctor, "version", version)


def test_all_checks_pass_on_this_machine(capsys):
    assert main(["doctor"]) == 0
    output = capsys.readouterr().out
    for name in ("python", "torch", "device", "precision", "attention", "rollouts", "processes"):
        assert re.search(rf"^  {name} +\S", output, re.M)
    assert re.search(r"fused kernels +8 operations are correct to \de-0[4-9]", output)
    assert "ERROR" not in output


def findings(check):
    return {finding.name: finding for finding in check()}


def test_missing_and_outdated_packages_are_reported(monkeypatch):
    set_versions(monkeypatch, torch="2.9.1+cu128", transformers=None, triton="3.5.0", wandb=None, accelerate="1.10")
    found = findings(doctor.check_packages)
    assert found["torch"] == ("torch", "2.9.1+cu128, older than 2.10: pip install 'torch>=2.10'", "error")
    assert "missing, for models and training: pip install 'transformers>=5.17'" in found["transformers"].text
    assert found["transformers"].severity == "error"
    assert found["triton"].severity == "warning"
    assert found["wandb"] == ("wandb", "missing, for report_to=wandb: pip install wandb", None)
    assert found["accelerate"].severity is None


@pytest.mark.parametrize(("version", "severity"), [((3, 10), "error"), ((3, 11), None), ((3, 14), "warning")])
def test_python_version_is_checked(version, severity, monkeypatch):
    monkeypatch.setattr("sys.version_info", (*version, 0, "final", 0))
    assert findings(doctor.check_packages)["python"].severity == severity


def test_doctor_runs_without_torch(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert doctor.diagnose() == 1
    assert "Training cannot run: see device, fused kernels above." in capsys.readouterr().out


def test_a_failed_check_does_not_stop_the_others(monkeypatch):
    monkeypatch.setattr(doctor, "_attention", lambda *_: 1 / 0)
    found = findings(doctor.check_environment)
    assert found["attention"] == ("attention", "ZeroDivisionError: division by zero", "error")
    assert found["processes"].severity is None


def test_a_wrong_kernel_is_an_error(monkeypatch):
    from sppo_kernels import _self_test, linear_logprobs

    wrong = wraps(linear_logprobs)(partial(linear_logprobs, temperature=1.1))
    monkeypatch.setattr(_self_test, "linear_logprobs", wrong)
    (finding,) = doctor.check_kernels()
    assert finding.severity == "error"
    assert "off by" in finding.text


def test_minimum_versions_match_setup_py():
    for package in (*doctor.REQUIRED, *doctor.OPTIONAL):
        if package.min_version != "0":
            assert f'"{package.name}>={package.min_version}' in SETUP
    oldest, newest = doctor.TESTED_PYTHON
    assert f'python_requires=">={oldest[0]}.{oldest[1]}"' in SETUP
    assert f"Python :: {newest[0]}.{newest[1]}" in SETUP
    assert f"Python :: {newest[0]}.{newest[1] + 1}" not in SETUP
