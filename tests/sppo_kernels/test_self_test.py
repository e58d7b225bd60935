"""python -m sppo_kernels: versions, and a self-test that finds a wrong operation."""

import pytest
import torch

import sppo_kernels
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
    output = capsys.readouterr().out
    assert "gae                  RuntimeError: no such kernel" in output
    assert "failed: gae (" in output  # and the others ran


def test_the_gradient_of_another_token_is_found(monkeypatch):
    def linear_logprobs(hidden, weight, labels, backend):
        out = sppo_kernels.linear_logprobs(hidden, weight, labels, backend=backend)
        upstream_of_the_first = lambda gradient: gradient[:1].expand_as(gradient)
        out.logprobs.register_hook(upstream_of_the_first)
        return out

    monkeypatch.setattr(_self_test, "linear_logprobs", linear_logprobs)
    assert dict(_self_test.errors(torch.device("cpu"), "torch"))["linear_logprobs"] > 0.1


def test_an_interpreter_that_cannot_run_is_reported_below_the_versions(monkeypatch, capsys):
    def pick_backend(backend, tensor):
        raise ImportError("needs another numpy")

    monkeypatch.setattr(__main__, "pick_backend", pick_backend)
    assert __main__.main() == 1
    output = capsys.readouterr().out
    assert output.index("torch ") < output.index("failed: needs another numpy")
