"""Hooks and fixtures that skip GPU tests without a GPU and make random tensors repeat, in hypothesis' examples too."""

import pytest
import torch
from hypothesis import register_random
from projection_cases import use_tiles

from sppo_kernels.ops.linear_logprobs import auto_mode
from sppo_kernels.ops.linear_logprobs.lm_head import LMHead


class TorchRandom:
    """PyTorch's CPU generator with the interface that hypothesis seeds before each example."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


TORCH_RANDOM = TorchRandom()  # hypothesis keeps a weak reference
register_random(TORCH_RANDOM)


def pytest_configure(config):
    # The interpreter computes with NumPy, which warns about the values in masked lanes: -inf - -inf, 0 * inf, log 0.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _forget_other_tests():
    """What backward="auto" learned from another test's weight of the same shape would change this one's choice."""
    auto_mode.reset_defaults()


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16 tokens instead of at least 256, with 4 tokens per chunk of logits (8 on the PyTorch backend)."""
    monkeypatch.setattr(LMHead, "block_size", lambda self, vocab=None: 16)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 tokens by 64 columns in the fused projection, of which few tokens and columns fill several."""
    use_tiles(monkeypatch)
