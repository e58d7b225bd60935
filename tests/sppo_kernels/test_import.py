"""What importing the package requires and does, each case in its own Python process."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def python(code: str) -> None:
    """Run ``code`` without Triton's interpreter; what it asserts must hold."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


def test_without_triton_and_transformers():
    """macOS, Windows: the torch backend serves, and asking for the other one says what to install."""
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


def test_triton_on_a_cpu_without_its_interpreter():
    """Importing touches no GPU and no package of the trainer's; the error names the remedy."""
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


def test_integrations_change_nothing_until_asked():
    """Importing the package with its integrations changes nothing in TRL and imports no other trainer."""
    python("""
import sys

import trl.trainer.utils as theirs

before, modules = dict(vars(theirs)), set(sys.modules)

import sppo_kernels
from sppo_kernels.integrations import openrlhf, trl, verl

assert {name.split(".")[0] for name in set(sys.modules) - modules} <= {"sppo_kernels", "triton", "torch"} | set(
    sys.stdlib_module_names
), set(sys.modules) - modules
assert vars(theirs) == before
""")
