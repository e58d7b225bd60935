"""linear_logprobs at the widths and vocabularies of real models, against float64, judged by eager PyTorch.

Eager is what one writes without this library: logits in the dtype of the inputs, log_softmax of them in float32. Errors
are root mean squares over a whole result, which a single lucky or unlucky element does not decide.
"""

import pytest
import torch
from against_float64 import BACKENDS, DEVICE, randint, randn

from sppo_kernels import linear_logprobs, reference


def peaked(n, width, vocab, dtype):
    """A model that is nearly sure of its next token, half the time of the label: one logit about ten above the rest."""
    hidden, weight, labels = uniform(n, width, vocab, dtype)
    likely = torch.where(torch.arange(n, device=DEVICE) % 2 == 0, labels, labels.roll(1))
    return (hidden + 10 * weight[likely]).to(dtype), weight, labels


def uniform(n, width, vocab, dtype):
    """Every token about as likely as the others: logits of standard deviation 1."""
    return randn(n, width, dtype=dtype), randn(vocab, width, dtype=dtype, scale=width**-0.5), randint(0, vocab, n)


def long_tailed(n, width, vocab, dtype):
    """A few tokens far ahead and a tail that thins out slowly, as of Zipf's law."""
    hidden, weight, labels = uniform(n, width, vocab, dtype)
    spread = (1 + torch.arange(vocab, device=DEVICE)).float().rsqrt().mul(8)[torch.randperm(vocab)]
    return hidden, (weight.float() * (0.5 + spread[:, None])).to(dtype), labels


def tokens(vocab, dtype, distribution):
    """Return enough tokens that no single rounding decides, and few enough for a short test.

    Where a model is nearly sure, 1 - p is one rounding a token, of which float32 has no other to speak of.
    """
    if dtype == torch.float32:
        return 250 if distribution is peaked and vocab == 97 else 32
    return {97: 64, 49_152: 12, 151_936: 8}[vocab]


def eager(hidden, weight, labels):
    logp = torch.nn.functional.linear(hidden, weight).float().log_softmax(-1)
    return logp.gather(-1, labels[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def values_and_gradients(op, hidden, weight, labels, **settings):
    """Return results and gradients of the log-probabilities, and of both outputs, as with an entropy bonus."""
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
        got, want = got[:, ::8], want[:, ::8]  # every eighth column of a large weight's gradient tells as much
    return (got.double() - want).square().mean().sqrt().item()


WIDTHS, DISTRIBUTIONS = (64, 576, 1000), (uniform, peaked, long_tailed)
# In bfloat16 each vocabulary meets each distribution, the largest only the one that decides sparse gradients.
CASES = [(width, 97, torch.bfloat16, distribution) for width in WIDTHS for distribution in DISTRIBUTIONS]
CASES += [
    (width, 49_152, torch.bfloat16, distribution) for width, distribution in zip(WIDTHS, DISTRIBUTIONS, strict=True)
]
CASES += [(64, 151_936, torch.bfloat16, peaked)]
CASES += [(width, 97, torch.float32, distribution) for width, distribution in zip(WIDTHS, DISTRIBUTIONS, strict=True)]
CASES += [(64, 49_152, torch.float32, long_tailed)]  # larger would be a matter of memory and time alone


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:linear_logprobs cached")
@pytest.mark.parametrize(("width", "vocab", "dtype", "distribution"), CASES)
def test_at_most_one_and_a_half_times_eagers_error(width, vocab, dtype, distribution):
    given = distribution(tokens(vocab, dtype, distribution), width, vocab, dtype)
    double = (x.double() if x.is_floating_point() else x for x in given)
    exact = values_and_gradients(reference.linear_logprobs, *double)
    allowed = {name: 1.5 * error(x, exact[name]) for name, x in values_and_gradients(eager, *given).items()}
    for backend in BACKENDS:
        for backward in ("recompute", "cache"):
            ours = values_and_gradients(linear_logprobs, *given, backend=backend, backward=backward)
            for name, x in ours.items():
                assert error(x, exact[name]) <= allowed[name], f"{name}, {backend}, {backward}"
