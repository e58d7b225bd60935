"""Marker ``gpu`` needs a GPU; random tensors are the same on every run, also in hypothesis' examples."""

import interpreter
import pytest
import torch
from hypothesis import register_random

from sppo_kernels.ops.linear_logprobs.lm_head import LMHead


class TorchRandom:
    """torch's CPU generator in the form that hypothesis seeds before each example."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


interpreter.round_to_nearest()

TORCH_RANDOM = TorchRandom()  # hypothesis keeps a weak reference
register_random(TORCH_RANDOM)


def pytest_configure(config):
    # numpy, which the interpreter computes with, warns of what a masked lane holds: -inf - -inf, 0 * inf, log 0.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def _same_random_tensors_every_run():
    torch.manual_seed(0)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16 tokens in place of at least 256: chunks of logits of 4, on the PyTorch backend of 8."""
    monkeypatch.setattr(LMHead, "block_size", lambda self, vocab=None: 16)
