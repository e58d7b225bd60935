"""Tests of supports that are wrong, empty or not looked at."""

import pytest
import torch
from against_float64 import BACKENDS, DEVICE, randn
from linear_logprobs_cases import IGNORED, inputs

from sppo_kernels import linear_logprobs, selective_logprobs
from sppo_kernels.ops.support_passes import arguments

pytestmark = pytest.mark.filterwarnings("ignore:linear_logprobs cached")

LABELS = torch.tensor([3, 4, IGNORED])
WRONG = {
    "not a pair": (lambda ids, offsets: ids, TypeError, r"support must be a pair of integer tensors .* got Tensor"),
    "three": (lambda ids, offsets: (ids, offsets, ids), TypeError, "support must be a pair .* got 3 elements"),
    "numpy": (
        lambda ids, offsets: (ids.numpy(), offsets),
        TypeError,
        r"token_ids\) must be .*torch.as_tensor.*ndarray",
    ),
    "float ids": (lambda ids, offsets: (ids.float(), offsets), TypeError, r"token_ids\) must be an integer tensor"),
    "bool offsets": (lambda ids, offsets: (ids, offsets.bool()), TypeError, r"offsets\) must be an integer tensor"),
    "ids of two dimensions": (
        lambda ids, offsets: (ids[None], offsets),
        ValueError,
        r"token_ids\) must be of shape \[M\]",
    ),
    "too few offsets": (lambda ids, offsets: (ids, offsets[:-1]), ValueError, r"offsets\) must be of shape \(4,\)"),
    "offsets that start late": (lambda ids, offsets: (ids, offsets + 1), ValueError, "from 0 to 5.*got from 1 to 6"),
    "offsets that end early": (
        lambda ids, offsets: (torch.cat([ids, ids]), offsets),
        ValueError,
        "from 0 to 10.*got from 0 to 5",
    ),
    "offsets that fall": (
        lambda ids, offsets: (ids, torch.tensor([0, 4, 3, 5])),
        ValueError,
        r"must be ascending, got \[4, 3\] at token 1",
    ),
    "label outside": (
        lambda ids, offsets: (torch.tensor([3, 7, 8, 9, 1]), offsets),
        ValueError,
        "label 4 of token 1 is not among the 2 tokens of its support",
    ),
    "id past the vocabulary": (
        lambda ids, offsets: (torch.tensor([3, 20, 4, 9, 1]), offsets),
        ValueError,
        r"in \[0, 20\), got 20 in the support of token 0",
    ),
    "negative id": (
        lambda ids, offsets: (torch.tensor([3, 7, 4, -1, 1]), offsets),
        ValueError,
        r"in \[0, 20\), got -1 in the support of token 1",
    ),
    "twice": (
        lambda ids, offsets: (torch.tensor([3, 7, 4, 4, 1]), offsets),
        ValueError,
        "without repetition, got 4 twice in the support of token 1",
    ),
}


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_without_tokens(backend):
    given = inputs(0, 4, 20)
    nothing = torch.zeros(0, dtype=torch.long, device=DEVICE), torch.zeros(1, dtype=torch.long, device=DEVICE)
    assert linear_logprobs(**given, support=nothing, backend=backend).logprobs.shape == (0,)
    assert selective_logprobs(randn(0, 20), given["labels"], support=nothing, backend=backend).logprobs.shape == (0,)
    with pytest.raises(ValueError, match=r"token_ids\) must be empty without labels, got 2 tokens"):
        linear_logprobs(**given, support=(torch.ones(2, dtype=torch.long, device=DEVICE), nothing[1]), backend=backend)
    given = inputs(3, 4, 20)
    uncut = torch.tensor([], device=DEVICE), torch.zeros(4, dtype=torch.long, device=DEVICE)  # of float32
    torch.testing.assert_close(
        linear_logprobs(**given, support=uncut, backend=backend), linear_logprobs(**given, backend=backend)
    )


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize(("change", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_supports(change, error, message, backend):
    support = change(torch.tensor([3, 7, 4, 9, 1]), torch.tensor([0, 2, 4, 5]))
    if DEVICE != "cpu":
        pytest.skip("values are checked on a CPU")
    hidden, weight = randn(3, 4), randn(20, 4)
    for call in (
        lambda: linear_logprobs(hidden, weight, LABELS, support=support, backend=backend),
        lambda: selective_logprobs(hidden @ weight.t(), LABELS, support=support, backend=backend),
    ):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("backend", BACKENDS)
def test_supports_of_ignored_tokens_are_not_looked_at(backend):
    given = inputs(3, 4, 20)
    given["labels"][:] = torch.tensor([5, IGNORED, 6])
    support = torch.tensor([5, 99, 99, -7, 6, 2], device=DEVICE), torch.tensor([0, 1, 4, 6], device=DEVICE)
    out = linear_logprobs(**given, support=support, backend=backend)
    grads = torch.autograd.grad(out.logprobs.sum(), [given["hidden"], given["weight"]])
    assert out.logprobs[:2].tolist() == [0, 0]
    assert all(x.isfinite().all() for x in (*out, *grads))
    logits = randn(3, 20, grad=True)
    out = selective_logprobs(logits, given["labels"], support=support, backend=backend)
    (grad,) = torch.autograd.grad(out.logprobs.sum(), logits)
    assert out.logprobs[:2].tolist() == [0, 0]
    assert grad[2].nonzero().flatten().tolist() == [2, 6]


@pytest.mark.parametrize("backend", BACKENDS)
def test_unchecked_values_stay_in_bounds(backend, monkeypatch):
    """As on a GPU: a label outside its support is NaN, an id outside the vocabulary is left out."""
    monkeypatch.setattr(arguments, "values_are_checked", lambda x: False)
    given = inputs(4, 4, 20)
    given["labels"][:] = torch.tensor([5, 6, 7, 8])
    ids = torch.tensor([5, 1, 99, -3, 1, 2, 7, 8], device=DEVICE)
    support = ids, torch.tensor([0, 4, 6, 7, 50], device=DEVICE)
    clean = torch.tensor([5, 1, 6, 7, 8], device=DEVICE), torch.tensor([0, 2, 3, 4, 5], device=DEVICE)
    out = linear_logprobs(**given, support=support, backend=backend)
    want = linear_logprobs(**given, support=clean, backend=backend)
    assert out.logprobs[1].isnan()
    for x, y in zip(out, want, strict=True):
        torch.testing.assert_close(x[[0, 2, 3]], y[[0, 2, 3]])
    (dh,) = torch.autograd.grad(out.logprobs[0], given["hidden"])
    (want_dh,) = torch.autograd.grad(want.logprobs[0], given["hidden"])
    torch.testing.assert_close(dh, want_dh)
    falling = ids, torch.tensor([0, 7, 5, -4, 50], device=DEVICE)
    out = linear_logprobs(**given, support=falling, backend=backend)
    torch.autograd.grad(out.logprobs.sum(), given["hidden"])
    torch.testing.assert_close(
        out.logprobs[0],
        linear_logprobs(
            given["hidden"][:1],
            given["weight"],
            given["labels"][:1],
            support=(torch.tensor([5, 1, 1, 2, 7], device=DEVICE), torch.tensor([0, 5], device=DEVICE)),
            backend=backend,
        ).logprobs[0],
    )
