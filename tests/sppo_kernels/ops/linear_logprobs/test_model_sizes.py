"""Tests of the error of linear_logprobs at the sizes of real models, compared with that of eager PyTorch.

Eager PyTorch computes logits in the dtype of the inputs and their log_softmax in float32. Errors against float64 are
root mean squares over a complete result, so that no single element determines them.
"""

import pytest
import torch
from against_float64 import BACKENDS, DEVICE
from linear_logprobs_cases import long_tailed, uniform

from sppo_kernels import linear_logprobs, reference


def peaked(n, width, vocab, dtype):
    """Return inputs with one logit about ten above the rest, for half of the tokens that of the label."""
    hidden, weight, labels = uniform(n, width, vocab, dtype)
    likely = torch.where(torch.arange(n, device=DEVICE) % 2 == 0, labels, labels.roll(1))
    return (hidden + 10 * weight[likely]).to(dtype), weight, labels


def tokens(vocab, dtype, distribution):
    """Return a number of tokens for which no single rounding dominates and the test stays short.

    If a model is almost certain, the only significant rounding of float32 is that of 1 - p, once per token.
    """
    if dtype == torch.float32:
        return 128 if distribution is peaked and vocab == 97 else 16
    return {97: 64, 49_152: 6, 151_936: 4}[vocab]


def eager(hidden, weight, labels):
    logp = torch.nn.functional.linear(hidden, weight).float().log_softmax(-1)
    return logp.gather(-1, labels[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def values_and_gradients(op, hidden, weight, labels, **settings):
    """Return outputs, and the gradients of a loss without and with an entropy bonus."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    logprobs, entropy = op(hidden, weight, labels, **settings)
    upstream = torch.linspace(-1, 1, len(labels), device=DEVICE, dtype=logprobs.dtype)
    results = {"logprobs": logprobs.detach(), "entropy": entropy.detach()}
    for name, loss in (("logprobs", logprobs @ upstream), ("both", (logprobs + 0.3 * entropy) @ upstream)):
        grads = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
        results |= {f"d hidden of {name}": grads[0], f"d weight of {name}": grads[1]}
    return results


def error(got, want):
    if want.numel() > 1 << 24:
        got, want = got[:, ::8], want[:, ::8]  # every eighth column of a large weight gradient is a sufficient sample
    return (got.double() - want).square().mean().sqrt().item()


WIDTHS, DISTRIBUTIONS = (64, 576, 1000), (uniform, peaked, long_tailed)
# In bfloat16 each vocabulary has every distribution, except that the largest has only the one for sparse gradients.
CASES = [(width, 97, torch.bfloat16, distribution) for width in WIDTHS for distribution in DISTRIBUTIONS]
CASES += [
    (width, 49_152, torch.bfloat16, distribution) for width, distribution in zip(WIDTHS, DISTRIBUTIONS, strict=True)
]
CASES += [(64, 151_936, torch.bfloat16, peaked)]
CASES += [(width, 97, torch.float32, distribution) for width, distribution in zip(WIDTHS, DISTRIBUTIONS, strict=True)]
CASES += [(64, 49_152, torch.float32, long_tailed)]  # a larger case would only take more memory and time


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:linear_logprobs cached")
@pytest.mark.parametrize(("width", "vocab", "dtype", "distribution"), CASES)
def test_error_is_at_most_one_and_a_half_times_that_of_eager(width, vocab, dtype, distribution):
    given = distribution(tokens(vocab, dtype, distribution), width, vocab, dtype)
    double = (x.double() if x.is_floating_point() else x for x in given)
    exact = values_and_gradients(reference.linear_logprobs, *double)
    allowed = {name: 1.5 * error(x, exact[name]) for name, x in values_and_gradients(eager, *given).items()}
    for backend in BACKENDS:
        for backward in ("recompute", "cache"):
            got = values_and_gradients(linear_logprobs, *given, backend=backend, backward=backward)
            for name, x in got.items():
                assert error(x, exact[name]) <= allowed[name], f"{name}, {backend}, {backward}"


SUPPORT_CASES = [
    (64, 97, torch.bfloat16, uniform),
    (576, 49_152, torch.bfloat16, peaked),
    (1000, 49_152, torch.bfloat16, long_tailed),
    (64, 151_936, torch.bfloat16, peaked),
    (1000, 97, torch.float32, long_tailed),
    (64, 49_152, torch.float32, long_tailed),
]


@pytest.mark.slow
@pytest.mark.parametrize(("width", "vocab", "dtype", "distribution"), SUPPORT_CASES)
def test_error_over_a_support_is_at_most_one_and_a_half_times_that_of_a_masked_softmax(
    width, vocab, dtype, distribution
):
    """Supports of the 20 likeliest tokens and the label."""
    hidden, weight, labels = given = distribution(tokens(vocab, dtype, distribution), width, vocab, dtype)
    logits = hidden.float() @ weight.float().t()
    likeliest = logits.scatter(1, labels[:, None], float("inf")).topk(20).indices
    support = likeliest.flatten(), torch.arange(0, likeliest.numel() + 1, 20, device=DEVICE)
    others = torch.ones_like(logits, dtype=torch.bool).scatter(1, likeliest, False)

    def masked(hidden, weight, labels):
        rows = torch.nn.functional.linear(hidden, weight).float().masked_fill(others, float("-inf"))
        logp = rows.log_softmax(-1)
        p_logp = torch.where(others, 0.0, logp.exp() * logp.masked_fill(others, 0.0))
        return logp.gather(-1, labels[:, None])[:, 0], -p_logp.sum(-1)

    double = (x.double() if x.is_floating_point() else x for x in given)
    exact = values_and_gradients(reference.linear_logprobs, *double, support=support)
    allowed = {name: 1.5 * error(x, exact[name]) for name, x in values_and_gradients(masked, *given).items()}
    for backend in BACKENDS:
        for name, x in values_and_gradients(linear_logprobs, *given, support=support, backend=backend).items():
            assert error(x, exact[name]) <= allowed[name], f"{name}, {backend}"
