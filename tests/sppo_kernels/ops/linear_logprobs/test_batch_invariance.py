"""projection="fused": a token's log-probability and entropy have the same bits in every batch, chunk and mode."""

import numpy as np
import pytest
import torch
from against_float64 import BACKENDS, DEVICE, DTYPES
from linear_logprobs_cases import IGNORED, inputs, row_bytes

from sppo_kernels import linear_logprobs

N = {"torch": 300, "triton": 140}  # more than a tile of tokens


def score(given, index=slice(None), **settings):
    """Log-probabilities and entropies [2, n] of some tokens, in one call."""
    tokens = {name: given[name][index] for name in ("hidden", "labels", "temperature") if name in given}
    others = {"adapter": (given["u"][index], given["b"])} if "u" in given else {}
    out = linear_logprobs(**tokens, weight=given["weight"], bias=given["bias"], **others, **settings)
    return torch.stack([out.logprobs, out.entropy]).detach()


@pytest.fixture(autouse=True)
def _same_products_of_all_rows(monkeypatch):
    """Let Triton's interpreter multiply each row of a tile alike, as a GPU does; NumPy's BLAS does not."""
    if DEVICE == "cpu":
        from triton.runtime import interpreter

        def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
            product = np.einsum("ik,kj->ij", a.data, b.data, dtype=d.data.dtype)
            return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture(params=BACKENDS)
def settings(request):
    return {"projection": "fused", "backend": request.param}


@pytest.fixture(params=DTYPES, ids=str)
def given(request, settings):
    """Tokens of which some are so unlikely that they are computed twice."""
    n = N[settings["backend"]]
    given = inputs(n, 40, 150, request.param, bias=True, rank=4)
    with torch.no_grad():
        given["hidden"][::3] *= 8
        given["temperature"] = torch.linspace(0.5, 1.5, n, device=DEVICE)
    return given


def test_alone_in_chunks_and_in_another_order(given, settings):
    with torch.no_grad():
        full = score(given, **settings)
        n = full.shape[1]
        assert full[0].min() < -16  # those computed twice
        for i in (0, 1, 100, n - 1):
            assert torch.equal(score(given, slice(i, i + 1), **settings), full[:, i : i + 1])
        chunks = [score(given, slice(i, i + 90), **settings) for i in range(0, n, 90)]
        assert torch.equal(torch.cat(chunks, 1), full)
        order = torch.arange(n - 1, -1, -1, device=DEVICE)
        assert torch.equal(score(given, order, **settings), full[:, order])


def test_beside_ignored_tokens(given, settings):
    labels = given["labels"].clone()
    labels[::2] = IGNORED
    with torch.no_grad():
        some, full = score({**given, "labels": labels}, **settings), score(given, **settings)
    assert torch.equal(some[:, 1::2], full[:, 1::2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hidden_states_that_begin_anywhere(settings, dtype):
    """A view of others has rows that are not aligned; the same tokens beside ignored ones are copied."""
    given = inputs(N[settings["backend"]], 40, 150, dtype)
    wide = torch.zeros(len(given["hidden"]), 43, dtype=dtype, device=DEVICE)
    with torch.no_grad():
        views = wide[:, 1:41], wide.as_strided(wide.shape, (1, len(wide)))[:, :40]
        want = score(given, **settings)
        for view in views:
            view.copy_(given["hidden"])
            assert torch.equal(score({**given, "hidden": view}, **settings), want)


@pytest.mark.parametrize("backward", ["recompute", "cache", "sparse"])
def test_scoring_and_training(given, settings, backward):
    with torch.no_grad():
        scored = score(given, **settings)
    budget = {"logits_budget_bytes": row_bytes(150, 2) * 100} if backward == "cache" else {}  # for some of the tokens
    assert torch.equal(score(given, backward=backward, **budget, **settings), scored)
