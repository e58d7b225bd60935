"""Tests of the row passes: rows split over programs, large logits, and the probabilities kept for backward."""

import pytest
import torch
from against_float64 import BACKENDS, DEVICE, assert_close_to_float64, randint, randn

from sppo_kernels import reference, selective_logprobs
from sppo_kernels.ops.row_passes import ROW_PASSES, CachedRows, RowResults
from sppo_kernels.ops.row_passes.triton import GroupMaxima, shared

MINUS_INF = float("-inf")
IGNORED = -100


@pytest.fixture
def split_rows(monkeypatch):
    """Give each program at most one block of 2,048 columns."""
    monkeypatch.setattr(shared, "_COLUMNS_PER_PROGRAM", 1500)


def difficult_rows(vocab):
    """Rows whose first or last block has no finite logit, with labels in different blocks, and an ignored row."""
    logits = randn(5, vocab, scale=3)
    logits[1, :2048], logits[2, -1] = MINUS_INF, 60.0
    logits[3, 2048:] = MINUS_INF
    return logits.requires_grad_(), torch.tensor([0, vocab - 1, 2047, 5, IGNORED], device=DEVICE)


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("vocab", [2049, 4500, 6144])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_split_over_programs_agree_with_float64(split_rows, backend, vocab, softcap):
    logits, labels = difficult_rows(vocab)
    tensors = {"logits": logits, "labels": labels}
    settings = {"softcap": softcap, "temperature": 0.7}
    if softcap is not None:  # a capped -inf is finite
        logits.data.clamp_(min=-1e30)
    assert_close_to_float64(selective_logprobs, reference.selective_logprobs, backend, tensors, **settings)


def test_the_split_depends_on_the_vocabulary_alone(split_rows):
    logits, labels = difficult_rows(4500)
    both = selective_logprobs(logits, labels, backend="triton")
    one = selective_logprobs(logits[1:2], labels[1:2], backend="triton")
    for x, y in zip(one, both, strict=True):
        assert torch.equal(x, y[1:2])


def test_columns_of_transposed_logits_may_be_more_than_2_to_the_31_apart():
    """The storage is not touched, except where the six logits are. Only compiled code would count in 32 bits."""
    stride = (1 << 30) + 8
    far = torch.empty(2 * stride + 2, dtype=torch.bfloat16, device=DEVICE).as_strided((2, 3), (1, stride))
    near = randn(2, 3, dtype=torch.bfloat16)
    far.copy_(near)
    assert [shared.is_far(x) for x in (far, near)] == [True, False]
    labels = torch.tensor([2, 0], device=DEVICE)
    results = []
    for x in (far, near):
        out = RowResults.empty(2, x.device)
        given = {"logits": x[None], "labels": labels, "temperature": torch.ones(2, device=DEVICE), "softcap": 0.0}
        ROW_PASSES["triton"].forward(**given, ignore_index=IGNORED, out=out)
        grads = torch.empty(1, 2, 3, device=DEVICE)
        ROW_PASSES["triton"].backward(
            **given,
            grad_logprobs=torch.ones(2, device=DEVICE),
            grad_entropy=torch.ones(2, device=DEVICE),
            entropy=out.entropy,
            row_stats=out.row_stats,
            ignore_index=IGNORED,
            grad_logits=grads,
        )
        results.append((*out, grads))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.6, 1.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits_lose_no_accuracy(backend, temperature):
    """Logits near 10,000 are multiples of 1/1024; divided by 0.6 before the subtraction they would be off by 5e-4."""
    logits, labels = 1e4 + randn(4, 3000, scale=3), randint(0, 3000, 4)
    got = selective_logprobs(logits, labels, temperature=temperature, backend=backend)
    want = reference.selective_logprobs(logits.double(), labels, temperature=temperature)
    for x, y in zip(got, want, strict=True):
        assert (x.double() - y).abs().amax() < 4e-6


def label_likely(vocab):
    return randn(3, vocab) + 12.0 * torch.nn.functional.one_hot(torch.arange(3) % vocab, vocab).to(DEVICE)


def label_impossible(vocab):
    """The label is 100 nats below the largest logit, too far for its logit to be the base."""
    return randn(3, vocab) - 100.0 * torch.nn.functional.one_hot(torch.arange(3) % vocab, vocab).to(DEVICE)


def uniform(vocab):
    return torch.zeros(3, vocab, device=DEVICE)


def with_impossible_tokens(vocab):
    logits = randn(3, vocab)
    logits[:, 3:] = MINUS_INF
    return logits


ROWS = [label_likely, label_impossible, uniform, with_impossible_tokens]


def cached_rows(backend, logits, labels, *, dtype=torch.float32, temperature=1.0, softcap=0.0, after=False):
    """Fill CachedRows in the forward pass, or after it from the row statistics."""
    tau = torch.full(labels.shape, temperature, device=DEVICE)
    cached = CachedRows(logits.new_full(logits.shape, 7.0, dtype=dtype), torch.empty(2, len(labels), device=DEVICE))
    given = {"logits": logits[None], "labels": labels, "temperature": tau, "softcap": softcap}
    row = RowResults.empty(len(labels), logits.device)
    ROW_PASSES[backend].forward(**given, ignore_index=IGNORED, out=row, cached=None if after else cached)
    if after:
        ROW_PASSES[backend].cache(**given, row_stats=row.row_stats, cached=cached)
    return row, cached


def logit_gradients(cached, labels):
    """The gradient of the log-probabilities with respect to the logits, times the temperature, in float64."""
    grads = -cached.factors[0, :, None].double() * cached.probs.double()
    inside = labels < cached.probs.shape[1]
    grads[inside, labels[inside]] += cached.factors[1, inside].double()
    return grads


@pytest.mark.parametrize("after", [False, True], ids=["in the forward pass", "after it"])
@pytest.mark.parametrize("softcap", [0.0, 20.0])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_cached_rows_give_the_logit_gradients(backend, rows, softcap, after):
    logits, labels = rows(211), torch.arange(3, device=DEVICE)
    if softcap:
        logits.clamp_(min=-1e30)
    _, cached = cached_rows(backend, logits, labels, temperature=0.6, softcap=softcap, after=after)
    double = logits.double().requires_grad_()
    out = reference.selective_logprobs(double, labels, temperature=0.6, softcap=softcap or None)
    (want,) = torch.autograd.grad(out.logprobs.sum(), double)
    torch.testing.assert_close(logit_gradients(cached, labels), 0.6 * want, rtol=3e-5, atol=5e-7)
    assert torch.equal(cached.probs[range(3), labels], torch.zeros(3, device=DEVICE))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_cached_rows_are_in_range_of_half_precision(backend, dtype):
    """Neither factor of a uniform row of a large vocabulary is a subnormal number of float16."""
    smallest = torch.finfo(torch.float16).tiny
    _, cached = cached_rows(backend, torch.zeros(1, 1 << 16, device=DEVICE), torch.tensor([5]).to(DEVICE), dtype=dtype)
    assert cached.probs.float().amax() >= smallest
    assert cached.factors[0].amin() >= (smallest if dtype == torch.float16 else 0)
    row = cached.probs[0].float() * cached.factors[0]
    torch.testing.assert_close(row[6], torch.tensor(2.0**-16, device=DEVICE), rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_label_of_another_rank_has_no_entry(backend):
    logits, labels = randn(3, 50), torch.tensor([50, 3, 50], device=DEVICE)
    _, cached = cached_rows(backend, logits, labels.clamp(max=49), after=True)
    tau = torch.ones(3, device=DEVICE)
    given = {"logits": logits[None], "temperature": tau, "softcap": 0.0}
    row = RowResults.empty(3, logits.device)
    ROW_PASSES[backend].forward(**given, labels=labels.clamp(max=49), ignore_index=IGNORED, out=row)
    ROW_PASSES[backend].cache(**given, labels=labels, row_stats=row.row_stats, cached=cached)
    p = logits.softmax(-1)
    p[1, 3] -= 1
    torch.testing.assert_close(logit_gradients(cached, labels).float(), -p, rtol=1e-5, atol=1e-7)
    assert torch.equal(cached.factors[1, [0, 2]], torch.zeros(2, device=DEVICE))


@pytest.mark.parametrize("vocab", [97, 4500])
def test_what_is_left_for_later_does_not_change_the_bits(split_rows, vocab):
    """Probabilities for backward and maxima for selection come from the same sums as the results alone."""
    logits, labels = randn(3, vocab).contiguous(), randint(0, vocab, 3)
    rows = torch.empty(3, -(-vocab // 64) * 64, device=DEVICE)[:, :vocab].copy_(logits)
    alone, _ = cached_rows("triton", rows, labels, after=True)
    with_cache, _ = cached_rows("triton", rows, labels)
    with_maxima = RowResults.empty(3, logits.device)
    ROW_PASSES["triton"].forward(
        logits=rows[None],
        labels=labels,
        temperature=torch.ones(3, device=DEVICE),
        softcap=0.0,
        ignore_index=IGNORED,
        out=with_maxima,
        group_maxima=GroupMaxima.allocate(rows[None]),
    )
    for x, y, z in zip(alone, with_cache, with_maxima, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x, z)
