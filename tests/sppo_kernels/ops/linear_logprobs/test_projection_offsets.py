"""Tests of the fused projection where the label's logit is far from the log-sum-exp, or is no number.

With the identity as weight, hidden states are logits, and the gradient of hidden is that of the logits.
"""

import itertools

import pytest
import torch
from against_float64 import BACKENDS, DEVICE, randint, randn
from projection_cases import EXACT_ENTRIES, MODES, fused

from sppo_kernels import reference
from sppo_kernels.ops.linear_logprobs import projection

pytestmark = [
    pytest.mark.usefixtures("small_tiles"),
    pytest.mark.filterwarnings("ignore:linear_logprobs cached"),  # some tests differentiate both outputs
]

each_mode = pytest.mark.parametrize(("backend", "backward"), list(itertools.product(BACKENDS, MODES)))
each_backend = pytest.mark.parametrize("backend", BACKENDS)

VOCAB = 70
LOGPROBS = [-1e-6, -0.01, -2.9, -3.1, -5.0, -9.0, -9.9, -10.1, -20.0, -50.0, -80.0, -100.0, -300.0]
NAN, INF = float("nan"), float("inf")


def logits_with(logprobs, dtype=torch.float32, temperature=1.0, offset=0.0):
    """Return logits [N, VOCAB] and labels, with these log-probabilities of the labels but for rounding."""
    want = torch.tensor(logprobs, dtype=torch.float64)
    logits, labels = torch.randn(len(want), VOCAB).double(), torch.randint(VOCAB, (len(want),))
    others = logits.scatter(1, labels[:, None], -INF).logsumexp(1)
    odds = want - torch.log(-torch.expm1(want))
    logits = logits.scatter(1, labels[:, None], (others + odds)[:, None])
    return (temperature * logits + offset).to(DEVICE, dtype), labels.to(DEVICE)


def evaluate(op, logits, labels, *, upstream=("logprobs",), bias=None, **settings):
    """Return log-probabilities, entropies, and the gradient of the logits of the sum of ``upstream``."""
    x = logits.detach().requires_grad_()
    weight = torch.eye(logits.shape[1], dtype=x.dtype, device=DEVICE)
    out = op(hidden=x, weight=weight, labels=labels, bias=bias, **settings)
    (grad,) = torch.autograd.grad(sum(getattr(out, name) for name in upstream).sum(), x)
    return out.logprobs.detach(), out.entropy.detach(), grad


def exact(logits, labels, *, bias=None, temperature=1.0, **settings):
    """Evaluate the reference in float64."""
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.double()
    bias = None if bias is None else bias.double()
    op = reference.linear_logprobs
    return evaluate(op, logits.double(), labels, bias=bias, temperature=temperature, **settings)


def assert_relative(got, want, rtol, atol=0.0):
    """Check each element; infinities and NaN must be the same."""
    torch.testing.assert_close(got.double(), want, rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.parametrize("softcap", [None, 1000.0])
@pytest.mark.parametrize(("temperature", "offset"), [(1.0, 0.0), (1.0, -90.0), (1e-3, 0.0), (100.0, 0.0)])
@each_mode
def test_log_probabilities_from_0_to_minus_300(backend, backward, temperature, offset, softcap):
    """Relative errors are those of rounding: also of 1 - p where p is nearly 1, and of log p where p underflows."""
    logits, labels = logits_with(LOGPROBS, temperature=temperature, offset=offset)
    settings = {"temperature": temperature, "softcap": softcap}
    want = exact(logits, labels, **settings)
    got = evaluate(fused, logits, labels, backend=backend, backward=backward, **EXACT_ENTRIES, **settings)
    # A logit of magnitude x has an error of x eps, of which the softcap makes a few. An absolute error of the logits
    # is a relative error of 1 - p. A sparse entry may be dropped.
    x = float(logits.abs().max()) / temperature if softcap or offset else 20.0
    rtol = 1e-5 + 4 * 2.0**-23 * x
    assert_relative(got[0], want[0], rtol)
    assert_relative(got[1], want[1], 0.0, 1e-5 + (rtol if softcap or offset else 0.0) * 20)
    assert_relative(got[2] * temperature, want[2] * temperature, 2 * rtol, 1e-8 if backward == "sparse" else 1e-20)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@each_mode
def test_in_half_precision(backend, backward, dtype):
    """Cached probabilities are relative to that of the label, or to 1 where it would be too small."""
    logits, labels = logits_with([-0.01, -2.5, -4.0, -15.0, -17.0, -50.0, -200.0], dtype)
    settings = {"backend": backend, "backward": backward, **EXACT_ENTRIES}
    want, got = exact(logits, labels), evaluate(fused, logits, labels, **settings)
    assert_relative(got[0], want[0], 2e-5)
    assert_relative(got[1], want[1], 0.0, 1e-5)
    assert_relative(got[2], want[2], 2 * torch.finfo(dtype).eps, 1e-7)


@each_backend
def test_gradient_of_the_entropy(backend):
    logits, labels = logits_with(LOGPROBS)
    upstream = {"upstream": ("logprobs", "entropy")}
    got, want = evaluate(fused, logits, labels, backend=backend, **upstream), exact(logits, labels, **upstream)
    assert_relative(got[2], want[2], 1e-5, 4e-6)


@each_mode
def test_which_tokens_are_computed_again(monkeypatch, backend, backward):
    """Those below -10, and about their maximum those whose sums overflow: exp(89) is more than a float32."""
    computed, maxima = [], []
    passes = projection._PASSES[backend]

    def statistics(factors, **given):
        computed.append(len(given["labels"]))
        return passes.statistics(factors, **given)

    def maximum(factors):
        maxima.append(len(factors.hiddens[0]))
        return passes.maximum(factors)

    recorded = passes._replace(statistics=statistics, maximum=maximum)
    monkeypatch.setitem(projection._PASSES, backend, recorded)
    evaluate(fused, *logits_with(LOGPROBS), backend=backend, backward=backward)
    assert computed == [13, 10 if backward == "sparse" else 6]
    assert maxima == [2]
    computed.clear(), maxima.clear()
    evaluate(fused, *logits_with(LOGPROBS[:3]), backend=backend, backward=backward)
    assert (computed, maxima) == ([3], [])


@each_mode
def test_infinite_logits(backend, backward):
    """The label is excluded, or all others are, or all are."""
    logits, labels = randn(4, VOCAB), torch.tensor([3, 5, 3, 69], device=DEVICE)
    few, one, none = (torch.zeros(VOCAB, device=DEVICE) for _ in range(3))
    few[[3, 20, 66]], one[:69], none[:] = -INF, -INF, -INF
    for bias in (few, one):
        want = exact(logits, labels, bias=bias)
        got = evaluate(fused, logits, labels, bias=bias, backend=backend, backward=backward)
        assert_relative(got[0], want[0], 1e-5)
        assert_relative(got[1], want[1], 1e-5, 1e-6)
        assert_relative(got[2], want[2], 1e-5, 1e-4 if backward == "sparse" else 1e-7)
    logprobs, entropy, _ = evaluate(fused, logits, labels, bias=none, backend=backend, backward=backward)
    assert logprobs.isnan().all()
    assert entropy.isnan().all()


@pytest.mark.parametrize("softcap", [None, 30.0])
@each_mode
def test_extreme_temperatures_and_enormous_logits(backend, backward, softcap):
    """Errors are a few eps of the largest logit, divided by the temperature."""
    logits, labels = randn(16, VOCAB), randint(0, VOCAB, 16)
    logits[4:8] *= 1e4
    logits[8:] *= 30
    labels[::2] = logits.argmax(1)[::2]
    temperature = torch.tensor([1e-3, 1e-3, 100.0, 1.0] * 4, device=DEVICE)
    settings = {"temperature": temperature, "softcap": softcap}
    want = exact(logits, labels, **settings)
    got = evaluate(fused, logits, labels, backend=backend, backward=backward, **EXACT_ENTRIES, **settings)
    largest = logits.abs().amax(1).clamp(max=softcap or INF) / temperature
    allowed = 1e-5 + 4 * 2.0**-23 * largest.double()
    for x, y in zip(got[:2], want[:2], strict=True):
        assert ((x - y).abs() <= allowed).all()
    error = ((got[2] - want[2]).abs() * temperature[:, None]).amax(1)
    assert (error <= 2 * allowed).all()


@each_mode
def test_a_token_that_is_no_number_changes_no_other(backend, backward):
    """Results of the others have the same bits, and their gradients are finite."""
    logits, labels = logits_with([-0.1, -1.0, -2.0, -20.0, -100.0, -5.0])
    settings = {"backend": backend, "backward": backward}
    want = evaluate(fused, logits, labels, **settings)
    bad = torch.tensor([1, 4], device=DEVICE)
    good = torch.tensor([0, 2, 3, 5], device=DEVICE)
    logits[bad] = torch.tensor([[NAN], [INF]], device=DEVICE)
    got = evaluate(fused, logits, labels, **settings)
    for x, y in zip(got[:2], want[:2], strict=True):
        assert x[bad].isnan().all()
        assert torch.equal(x[good], y[good])
    assert_relative(got[2][good], want[2][good].double(), 1e-5, 1e-7)


@each_backend
def test_a_label_out_of_range_is_nan(backend):
    """As on an accelerator, where labels are not checked."""
    logits, labels = logits_with([-0.1, -1.0, -2.0])
    factors = projection.Factors([logits], [torch.eye(VOCAB, device=DEVICE)], None, 0.0)
    labels[1] = VOCAB + 3
    ones = torch.ones(3, device=DEVICE)
    head = projection.FusedProjection(factors, labels=labels, temperature=ones, backend=backend, group="")
    out = projection.RowResults.empty(3, logits.device)
    head.forward(out)
    assert out.logprobs.isnan().tolist() == [False, True, False]
