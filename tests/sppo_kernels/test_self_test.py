"""python -m sppo_kernels: versions, and a self-test that finds a wrong operation."""

import pytest
import torch

from sppo_kernels import __main__, _self_test

OPERATIONS = {
    "linear_logprobs", "linear_policy_loss", "selective_logprobs", "policy_loss", "prompt_value_loss", "gae", "whiten",
    "group_advantages",
}  # fmt: skip


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.slow)])
def test_every_operation_is_compared(backend):
    found = dict(_self_test.errors(torch.device("cpu"), backend))
    assert set(found) == OPERATIONS
    assert max(found.values()) < 1e-5


def test_the_report_names_versions_and_is_good(capsys):
    assert __main__.main() == 0
    output = capsys.readouterr().out
    assert f"torch {torch.__version__}, triton " in output
    assert "all correct" in output


@pytest.mark.parametrize("wrong", [lambda x, **_: 1.01 * x, lambda x, **_: x / 0])
def test_a_wrong_operation_is_named(wrong, monkeypatch, capsys):
    def whiten(x, mask, backend):
        return wrong(x.detach())

    monkeypatch.setattr(_self_test, "whiten", whiten)
    assert __main__.main() == 1
    output = capsys.readouterr().out
    assert "WRONG" in output
    assert "failed: whiten" in output


def test_an_operation_that_raises_is_reported(monkeypatch, capsys):
    def gae(*args, **settings):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(_self_test, "gae", gae)
    assert __main__.main() == 1
    assert "RuntimeError: no such kernel" in capsys.readouterr().out
