"""Tests of the mode that backward="auto" chooses, and that the choice changes nothing else."""

import copy
import pickle
import warnings

import pytest
import torch
from against_float64 import BACKENDS, DEVICE, randint, randn
from torch.utils.checkpoint import checkpoint

from sppo_kernels import AutoBackward, linear_logprobs, linear_policy_loss
from sppo_kernels.ops.linear_logprobs import auto_mode, cache
from sppo_kernels.ops.linear_logprobs.matmul import row_stride

VOCAB, MAX_ENTRIES, TOKENS = 100, 8, 64
SETTINGS = {"max_entries": MAX_ENTRIES, "chunk_bytes": 1, "backward": "auto"}  # 64 tokens per chunk (torch: all)


@pytest.fixture(autouse=True)
def _no_history():
    auto_mode.reset_defaults()
    yield
    auto_mode.reset_defaults()


def call(flat, entropy=False, op=linear_logprobs, **settings):
    """Return certificate and gradients if ``flat`` of every four tokens are flat and the others peaked."""
    hidden = 40.0 * torch.eye(VOCAB, device=DEVICE)[torch.arange(TOKENS) % VOCAB]
    hidden[torch.arange(TOKENS, device=DEVICE) % 4 < flat] = 0.0
    leaves = hidden.requires_grad_(), torch.eye(VOCAB, device=DEVICE).requires_grad_()
    labels = torch.arange(1, TOKENS + 1, device=DEVICE) % VOCAB
    given = {**SETTINGS, **settings}
    if op is linear_policy_loss:
        ends = torch.tensor([0, TOKENS], dtype=torch.int32, device=DEVICE)
        old_logprobs, advantages = torch.zeros(TOKENS, device=DEVICE), torch.ones(1, device=DEVICE)
        penalty = {"ref_logprobs": old_logprobs, "kl_coef": 1.0, "kl_estimator": "k1"}
        out = op(*leaves, labels, old_logprobs, advantages, cu_seqlens=ends, return_per_token=True, **penalty, **given)
        loss = out.loss
    else:
        out = op(*leaves, labels, return_certificate=True, **given)
        loss = out.logprobs.sum() + (out.entropy.sum() if entropy else 0.0)
    return out.certificate, torch.autograd.grad(loss, leaves)


@pytest.mark.slow
@pytest.mark.parametrize("op", [linear_logprobs, linear_policy_loss])
@pytest.mark.parametrize("backend", BACKENDS)
def test_uses_sparse_after_a_peaked_call(backend, op):
    first, cached = call(1, op=op, backend=backend)
    assert (first.cached_share, first.sparse_share) == (1, 0)
    second, sparse = call(1, op=op, backend=backend)
    assert (second.cached_share, second.sparse_share) == (0, 0.75)
    for x, y in zip(sparse, cached, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4 * float(y.abs().max()))
    call(4, op=op, backend=backend)  # sparse mode, without any sparse token
    assert call(4, op=op, backend=backend)[0].cached_share == 1


def test_the_mode_does_not_flap():
    """The mode stays the same while between a third and a half of the tokens are dense."""
    auto = AutoBackward()
    sparse = []
    for num_dense in (40, 34, 33, 40, 50, 51, 40, 33):
        auto.record(torch.tensor(num_dense), 100, "")
        sparse.append(auto.use_sparse())
    assert sparse == [False, False, True, True, True, False, False, True]
    assert auto.use_sparse()  # nothing was recorded since


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_probing_changes_no_bits(backend):
    """Probing the selection on a few rows leaves the gradients of all rows unchanged."""
    for flat in (0, 2, 4):
        auto_mode.reset_defaults()
        certificate, probed = call(flat, backend=backend)
        assert certificate.cached_share == 1
        _, plain = call(flat, backend=backend, backward="cache")
        assert all(torch.equal(x, y) for x, y in zip(probed, plain, strict=True))


def test_caches_nothing_after_entropy_gradients():
    with pytest.warns(UserWarning, match="for nothing"):
        call(0, entropy=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        certificate, _ = call(0, entropy=True)
        assert (certificate.cached_share, certificate.sparse_share) == (0, 0)
        assert call(0)[0].sparse_share == 0
        assert call(0)[0].sparse_share == 1  # the first call recorded that they are peaked


def test_a_small_vocabulary_uses_the_dense_cache():
    """Sparse gradients save almost nothing with so few columns."""
    for _ in range(3):
        certificate, _ = call(0, max_entries=64)
        assert (certificate.cached_share, certificate.sparse_share) == (1, 0)


def test_weights_of_different_shapes_have_separate_records():
    for _ in range(2):
        call(0)
    hidden, weight = randn(5, 3).requires_grad_(), randn(VOCAB, 3)
    out = linear_logprobs(hidden, weight, randint(0, VOCAB, 5), return_certificate=True, **SETTINGS)
    assert out.certificate.cached_share == 1


def test_a_checkpointed_forward_is_recomputed_in_the_same_mode():
    """The call that records peaked distributions caches dense gradients in both forwards; the next one is sparse."""
    hidden = (40.0 * torch.eye(VOCAB, device=DEVICE)).requires_grad_()
    weight, labels = torch.eye(VOCAB, device=DEVICE).requires_grad_(), torch.arange(VOCAB, device=DEVICE)
    certificates = []

    def logprobs(hidden):
        out = linear_logprobs(hidden, weight, labels, return_certificate=True, **SETTINGS)
        certificates.append(out.certificate)
        return out.logprobs

    for _ in range(2):  # a recomputed forward that saved other tensors would raise; it stops before the append
        checkpoint(logprobs, hidden, use_reentrant=False).sum().backward()
    assert [float(x.cached_share) for x in certificates] == [1, 0]
    assert [float(x.sparse_share) for x in certificates] == [0, 1]


def test_calls_without_gradients_are_not_recorded():
    with torch.no_grad():
        for _ in range(2):
            linear_logprobs(40 * torch.eye(VOCAB), torch.eye(VOCAB), torch.arange(VOCAB), **SETTINGS)
    assert not auto_mode._defaults


def test_an_explicit_object_has_its_own_history():
    """Calls with the default and calls with an explicit object do not affect each other."""
    auto = AutoBackward()
    for _ in range(2):
        call(0)
    assert call(0)[0].sparse_share == 1
    assert call(0, backward=auto)[0].cached_share == 1
    assert call(0, backward=auto)[0].sparse_share == 1
    auto.reset()
    assert call(0, backward=auto)[0].cached_share == 1
    assert call(0)[0].sparse_share == 1


def test_an_object_freed_before_backward_records_nothing():
    hidden = (40.0 * torch.eye(VOCAB, device=DEVICE)).requires_grad_()
    arguments = hidden, torch.eye(VOCAB, device=DEVICE), torch.arange(VOCAB, device=DEVICE)
    out = linear_logprobs(*arguments, **{**SETTINGS, "backward": AutoBackward()})
    out.logprobs.sum().backward()
    assert not auto_mode._defaults


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_a_copy_is_a_memory_of_its_own(copied):
    mine = AutoBackward()
    for _ in range(2):
        call(0, backward=mine)
    other = copied(mine)
    del mine
    assert [call(0, backward=other)[0].sparse_share for _ in range(2)] == [0, 1]


def test_a_recomputed_forward_caches_as_much_when_memory_has_changed(monkeypatch):
    """The default budget depends on free memory, which is less in the second forward of a checkpointed module."""
    hidden = randn(VOCAB, 6).requires_grad_()
    weight, labels = randn(VOCAB, 6), randint(0, VOCAB, VOCAB)
    shares = []

    def logprobs(hidden):
        monkeypatch.setattr(cache, "_AUTO_BUDGET_CPU", (60 - 20 * len(shares)) * row_stride(VOCAB) * 4)
        monkeypatch.setattr(cache, "_free_memory", lambda device: 4 * cache._AUTO_BUDGET_CPU)
        out = linear_logprobs(hidden, weight, labels, **SETTINGS, return_certificate=True)
        shares.append(float(out.certificate.cached_share))
        return out.logprobs

    checkpoint(logprobs, hidden, use_reentrant=False, early_stop=False).sum().backward()
    assert shares == [pytest.approx(0.6)] * 2


def test_two_objects_do_not_share_a_memory():
    first, second = AutoBackward(), AutoBackward()
    for _ in range(2):
        call(0, backward=second)
    assert call(0, backward=first)[0].cached_share == 1
    assert call(0, backward=second)[0].sparse_share == 1


def test_reentrant_checkpointing_remains_in_cache_mode():
    """Every forward that records is a recomputation, which must decide as the first forward did."""
    hidden = (40.0 * torch.eye(VOCAB, device=DEVICE)).requires_grad_()
    weight, labels = torch.eye(VOCAB, device=DEVICE).requires_grad_(), torch.arange(VOCAB, device=DEVICE)
    shares = []

    def logprobs(hidden):
        out = linear_logprobs(hidden, weight, labels, **SETTINGS, return_certificate=True)
        shares.append(float(out.certificate.cached_share))
        return out.logprobs

    for _ in range(3):
        checkpoint(logprobs, hidden, use_reentrant=True).sum().backward()
    assert shares == [0, 1] * 3  # without gradients nothing is cached
