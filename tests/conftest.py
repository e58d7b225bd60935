"""Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before Triton is imported.

``pytest --hypothesis-profile fast`` tries three examples of each property.
"""

import importlib.util
import os

import interpreter
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

interpreter.patch()

if importlib.util.find_spec("hypothesis"):  # the environments of test-integrations and test-vllm do without
    from hypothesis import settings

    settings.register_profile("fast", max_examples=3)


def pytest_addoption(parser):
    parser.addoption("--moments", type=int, default=1, help="random moments of each fault (test_random_moments.py)")
