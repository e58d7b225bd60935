"""Peers: why one cannot run, what each passes to its library, and the signatures of those that are installed."""

from __future__ import annotations

import inspect
import sys
from importlib import import_module
from types import ModuleType

import pytest
import torch
from torch.nn import functional

pytest.importorskip("triton")

from benchmarks.harness import checking, peers
from benchmarks.harness.operations import OPERATIONS
from benchmarks.harness.peers import base, liger, quack, verl
from benchmarks.harness.problem import IGNORE_INDEX, ProblemSize

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SIZE = ProblemSize(24, 128, 200, ignored=0.25, clipped=0.25)
HEAD, NLL, POLICY = "linear_logprobs", "linear_logprobs, mean NLL", "linear_logprobs + policy_loss"
LIGER, LIGER_CUTE = "Liger scaled CE (PyTorch)", "Liger scaled CE (CuTe)"
VERL, QUACK = "verl linear_cross_entropy", "quack linear_cross_entropy"
LIGER_MODULE = "liger_kernel.ops.fused_linear_scaled_cross_entropy"
VERL_MODULE, QUACK_MODULE = "verl.utils.kernel.linear_cross_entropy", "quack.linear_cross_entropy"


def passes(name, build, dtype=torch.float32, size=SIZE):
    """Assert that values and gradients of a peer are within the bounds of the suites."""
    operation = OPERATIONS[name]
    torch.manual_seed(0)
    problem = operation.inputs(size, CPU, dtype)
    truth, allowed = checking.truth_and_tolerance(operation, problem)
    outcome = checking.check(problem, build(CPU), truth, allowed)
    assert outcome["passed"], (outcome, allowed)
    return outcome["errors"].keys()


def reason(name, provider, device):
    """Return why a peer cannot be built."""
    with pytest.raises((peers.Unavailable, ModuleNotFoundError)) as raised:
        peers.PEERS[name][provider](device)
    return peers.explain(raised.value)


def put_module(monkeypatch, name, **contents):
    """Let a module, and the packages that it is in, be importable."""
    parents = name.split(".")[:-1]
    for depth in range(len(parents)):
        monkeypatch.setitem(sys.modules, ".".join(parents[: depth + 1]), ModuleType(parents[depth]))
    module = ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)


def pretend_gpu(monkeypatch, capability):
    """Let peers of a CPU believe in a GPU with some compute capability and all packages."""
    for module in (liger, quack, verl):
        monkeypatch.setattr(module, "needs_gpu", lambda device: None)
    for module in (liger, quack):
        monkeypatch.setattr(module, "cuda_capability", lambda device: capability)
        monkeypatch.setattr(module, "needs_package", lambda distribution, module: None)
    monkeypatch.setattr(quack, "IS_OLD_PYTHON", False)


# Why a peer cannot run


@pytest.mark.parametrize(
    ("name", "provider"),
    [(name, provider) for name in (HEAD, POLICY) for provider in (LIGER_CUTE, VERL)]
    + [(HEAD, "Liger FLCE"), (HEAD, "cut-cross-entropy"), (NLL, QUACK)],
)
def test_a_kernel_needs_a_gpu(name, provider):
    assert reason(name, provider, CPU) == "needs a GPU"


def test_a_missing_package_has_the_name_that_pip_installs():
    base.needs_package("any-package", "triton")
    with pytest.raises(peers.Unavailable, match="any-package is not installed"):
        base.needs_package("any-package", "no_such_module")


def test_one_implementation_of_liger_runs_on_each_gpu(monkeypatch):
    monkeypatch.setattr(liger, "_scaled_cross_entropy", lambda finish: finish)
    pretend_gpu(monkeypatch, (9, 0))
    assert reason(HEAD, LIGER, GPU) == "on this GPU Liger runs its CuTe kernel instead"
    peers.PEERS[HEAD][LIGER_CUTE](GPU)
    for capability in ((8, 0), (10, 0), (0, 0)):  # the last is a GPU of another vendor
        pretend_gpu(monkeypatch, capability)
        assert reason(HEAD, LIGER_CUTE, GPU) == "needs a GPU of compute capability 9.0"
        peers.PEERS[HEAD][LIGER](GPU)


def test_the_cute_kernel_needs_its_compiler(monkeypatch):
    pretend_gpu(monkeypatch, (9, 0))
    monkeypatch.setattr(liger, "needs_package", base.needs_package)
    monkeypatch.setattr(base, "find_spec", lambda module: None)
    assert reason(HEAD, LIGER_CUTE, GPU) == "nvidia-cutlass-dsl is not installed"


def test_quack_needs_a_new_gpu_and_a_new_python(monkeypatch):
    pretend_gpu(monkeypatch, (8, 0))
    assert reason(NLL, QUACK, GPU) == "needs an NVIDIA GPU of compute capability 9.0 or newer"
    pretend_gpu(monkeypatch, (9, 0))
    monkeypatch.setattr(quack, "IS_OLD_PYTHON", True)
    assert reason(NLL, QUACK, GPU) == "needs Python 3.12 or newer"


def test_a_cpu_and_gpus_of_other_vendors_have_no_cuda_capability(monkeypatch):
    assert base.cuda_capability(CPU) == (0, 0)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert base.cuda_capability(GPU) == (0, 0)


# What is passed to a library, with a stand-in for its function


@pytest.mark.parametrize("name", [HEAD, POLICY])
def test_verl_gets_only_tokens_with_a_loss(monkeypatch, name):
    def linear_cross_entropy(hidden, weight, labels, temperature=1.0, reduction="none", dist_process_group=None):
        assert isinstance(temperature, float)
        assert (reduction, labels.dtype) == ("none", torch.int64)
        assert hidden.is_contiguous()
        assert len(hidden) == len(labels) < SIZE.tokens
        assert IGNORE_INDEX not in labels
        logp = functional.linear(hidden, weight).float().log_softmax(-1) / temperature
        return logp.gather(1, labels[:, None]).squeeze(1), -(logp.exp() * logp).sum(1)

    pretend_gpu(monkeypatch, (9, 0))
    put_module(monkeypatch, VERL_MODULE, linear_cross_entropy=linear_cross_entropy)
    found = passes(name, peers.PEERS[name][VERL])
    assert found >= {"d hidden", "d weight"}
    assert ("entropy" in found) == (name == HEAD)
    with pytest.raises(peers.Unavailable, match="hidden size that is a multiple of 128"):
        passes(name, peers.PEERS[name][VERL], size=SIZE._replace(hidden=64))


def test_quack_gets_all_tokens_and_the_label_to_ignore(monkeypatch):
    def chunked_linear_cross_entropy(x, weight, target, chunk_size=4096, ignore_index=0, reduction="sum"):
        assert len(x) == SIZE.tokens
        return functional.cross_entropy(
            functional.linear(x, weight).float(), target, ignore_index=ignore_index, reduction=reduction
        )

    pretend_gpu(monkeypatch, (9, 0))
    put_module(monkeypatch, QUACK_MODULE, chunked_linear_cross_entropy=chunked_linear_cross_entropy)
    assert passes(NLL, peers.PEERS[NLL][QUACK]) == {"loss", "d hidden", "d weight"}
    for size in (SIZE._replace(tokens=23), SIZE._replace(hidden=100), SIZE._replace(vocab=201)):
        with pytest.raises(peers.Unavailable, match="in multiples of 8"):
            passes(NLL, peers.PEERS[NLL][QUACK], size=size)


# The installed libraries


@pytest.mark.slow
@pytest.mark.parametrize("name", [HEAD, POLICY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_liger_in_pytorch_is_right_over_several_chunks(name, dtype):
    pytest.importorskip(LIGER_MODULE)
    size = SIZE._replace(tokens=1100)  # a chunk is 512 tokens
    assert passes(name, peers.PEERS[name][LIGER], dtype, size) >= {"d hidden", "d weight"}


def test_liger_has_this_signature_and_runs_pytorch_code_on_a_cpu():
    function = pytest.importorskip(LIGER_MODULE).LigerFusedLinearScaledCrossEntropyFunction
    arguments = ["_input", "weight", "target", "temperature", "ignore_index", "m_tiles_per_cluster", "return_entropy"]
    assert list(inspect.signature(function.apply).parameters)[: len(arguments)] == arguments
    hidden, weight = torch.randn(3, 8, requires_grad=True), torch.randn(5, 8)
    nll, entropy = function.apply(hidden, weight, torch.tensor([1, IGNORE_INDEX, 4]), 1.0, IGNORE_INDEX, 1, True)
    assert "Fallback" in nll.grad_fn.name()
    assert (nll[1], entropy[1]) == (0, 0)


def test_liger_for_hopper_has_the_same_signature():
    pytest.importorskip("cutlass")
    pytest.importorskip("liger_kernel.ops.cutedsl")
    function = import_module("liger_kernel.ops.cutedsl.ops").LigerFusedScaledCrossEntropySM90Function.forward
    frontend = import_module(LIGER_MODULE).LigerFusedLinearScaledCrossEntropyFunction.apply
    _, *arguments = inspect.signature(function).parameters
    assert arguments == list(inspect.signature(frontend).parameters)


def test_verl_has_this_signature():
    module = pytest.importorskip(VERL_MODULE)
    _, *arguments = inspect.signature(module.LinearCrossEntropy.forward).parameters
    assert arguments[:5] == ["hidden", "weight", "labels", "temperature", "reduction"]
    assert module.linear_cross_entropy.__self__ is module.LinearCrossEntropy


@pytest.mark.skipif(quack.IS_OLD_PYTHON, reason="quack needs Python 3.12")
def test_quack_has_this_signature():
    function = pytest.importorskip(QUACK_MODULE).chunked_linear_cross_entropy
    arguments = inspect.signature(function).parameters
    assert list(arguments)[:3] == ["x", "weight", "target"]
    assert {"ignore_index", "reduction"} <= arguments.keys()
    assert arguments["chunk_size"].default == 4096
