"""Requirements and side effects of importing the package, each tested in its own Python process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def python(code: str) -> None:
    """Run ``code`` without Triton's interpreter and check that its assertions hold."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    completed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False, timeout=300
    )
    assert completed.returncode == 0, completed.stderr


@pytest.mark.slow
def test_torch_backend_works_without_triton_and_transformers():
    """On macOS and Windows the torch backend works; requesting the other one raises an error that names the package."""
    python("""
import sys

for name in ("triton", "transformers", "accelerate", "datasets"):
    sys.modules[name] = None  # importing it raises ImportError

import torch
import sppo_kernels

logits, labels = torch.randn(3, 5, requires_grad=True), torch.tensor([0, 4, -100])
sppo_kernels.selective_logprobs(logits, labels).logprobs.sum().backward()
old, mask = torch.zeros(2, 3), torch.ones(2, 3)
sppo_kernels.policy_loss(old, old, torch.ones(2), mask=mask)
sppo_kernels.prompt_value_logits(torch.randn(4, 3), torch.randn(3), torch.tensor([3]))
sppo_kernels.linear_logprobs(torch.randn(3, 2), torch.randn(5, 2), labels)
sppo_kernels.gae(old, old, mask)
sppo_kernels.whiten(old, mask)
sppo_kernels.group_advantages(old[0], torch.zeros(3).long())
try:
    sppo_kernels.selective_logprobs(logits, labels, backend="triton")
except ImportError as error:
    assert "pip install triton" in str(error), error
else:
    raise AssertionError("no error")
""")


@pytest.mark.slow
def test_importing_again_registers_again():
    """As notebooks and test runners do that remove modules."""
    python("""
import importlib
import sys

import torch
import sppo_kernels

for name in [name for name in sys.modules if name.split(".")[0] == "sppo_kernels"]:
    del sys.modules[name]
import sppo_kernels
from sppo_kernels import _registration

importlib.reload(_registration)
logits = torch.randn(3, 5, requires_grad=True)
sppo_kernels.selective_logprobs(logits, torch.tensor([0, 4, -100])).logprobs.sum().backward()
""")


@pytest.mark.slow
def test_triton_on_cpu_requires_its_interpreter():
    """Importing initializes no GPU and loads no dependency of the trainer; the error names the remedy."""
    python("""
import sys

import torch
import sppo_kernels

assert not torch.cuda.is_initialized()
assert not {"transformers", "accelerate", "datasets", "sppo"} & sys.modules.keys()
assert sppo_kernels.whiten(torch.randn(3), torch.ones(3)).shape == (3,)
try:
    sppo_kernels.whiten(torch.randn(3), torch.ones(3), backend="triton")
except ValueError as error:
    assert "got one on cpu" in str(error) and "TRITON_INTERPRET=1" in str(error), error
else:
    raise AssertionError("no error")
""")


@pytest.mark.slow
def test_importing_integrations_has_no_side_effects():
    """With TRL loaded, importing the integrations loads no other trainer and leaves TRL unpatched."""
    python("""
import sys

import trl.trainer.utils as trl_utils

before, modules = dict(vars(trl_utils)), set(sys.modules)

import sppo_kernels
from sppo_kernels.integrations import openrlhf, trl, verl

assert {name.split(".")[0] for name in set(sys.modules) - modules} <= {"sppo_kernels", "triton", "torch"} | set(
    sys.stdlib_module_names
), set(sys.modules) - modules
assert vars(trl_utils) == before
""")
