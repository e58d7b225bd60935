"""linear_logprobs with backward="auto": the mode it chooses, which is all that it changes."""

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

VOCAB, CAPACITY, TOKENS = 100, 8, 128
SETTINGS = {"max_entries": CAPACITY, "chunk_bytes": 1, "backward": "auto"}  # 64 tokens a chunk (torch: all)


@pytest.fixture(autouse=True)
def _no_history():
    auto_mode.reset_defaults()
    yield
    auto_mode.reset_defaults()


def call(flat, entropy=False, op=linear_logprobs, **settings):
    """Call with ``flat`` of each four tokens flat and the others peaked. Returns certificate and gradients."""
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


@pytest.mark.parametrize("op", [linear_logprobs, linear_policy_loss])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sparse_once_the_previous_call_was_peaked(backend, op):
    first, exact = call(1, op=op, backend=backend)
    assert (first.cached_share, first.sparse_share) == (1, 0)
    second, sparse = call(1, op=op, backend=backend)
    assert (second.cached_share, second.sparse_share) == (0, 0.75)
    for x, y in zip(sparse, exact, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4 * float(y.abs().max()))
    call(4, op=op, backend=backend)  # sparse, without any entries
    assert call(4, op=op, backend=backend)[0].cached_share == 1


def test_the_mode_does_not_flap():
    """Between a third and a half of dense tokens the mode stays the same."""
    seen = AutoBackward()
    modes = []
    for exact in (40, 34, 33, 40, 50, 51, 40, 33):
        seen.record(torch.tensor(exact), 100, "")
        modes.append(seen.use_sparse())
    assert modes == [False, False, True, True, True, False, False, True]
    assert seen.use_sparse()  # nothing new was seen


@pytest.mark.parametrize("backend", BACKENDS)
def test_probing_changes_no_bit(backend):
    """Selection is tried on a copy of a few rows, so no result changes."""
    for flat in (0, 2, 4):
        auto_mode.reset_defaults()
        certificate, probed = call(flat, backend=backend)
        assert certificate.cached_share == 1
        _, plain = call(flat, backend=backend, backward="cache")
        assert all(torch.equal(x, y) for x, y in zip(probed, plain, strict=True))


def test_nothing_is_cached_once_entropies_had_gradients():
    with pytest.warns(UserWarning, match="for nothing"):
        call(0, entropy=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        certificate, _ = call(0, entropy=True)
        assert (certificate.cached_share, certificate.sparse_share) == (0, 0)
        assert call(0)[0].sparse_share == 0
        assert call(0)[0].sparse_share == 1  # the very first call has seen that they are peaked


def test_a_small_vocabulary_is_cached():
    """With so few columns sparse entries save next to nothing."""
    for _ in range(3):
        certificate, _ = call(0, max_entries=64)
        assert (certificate.cached_share, certificate.sparse_share) == (1, 0)


def test_heads_of_other_shapes_do_not_mix():
    for _ in range(2):
        call(0)
    hidden, weight = randn(5, 3).requires_grad_(), randn(VOCAB, 3)
    out = linear_logprobs(hidden, weight, randint(0, VOCAB, 5), return_certificate=True, **SETTINGS)
    assert out.certificate.cached_share == 1


def test_a_recomputed_forward_uses_the_same_mode():
    """The second forward of a checkpointed module caches what the first did; the next call is sparse."""
    hidden = (40.0 * torch.eye(VOCAB, device=DEVICE)).requires_grad_()
    weight, labels = torch.eye(VOCAB, device=DEVICE).requires_grad_(), torch.arange(VOCAB, device=DEVICE)
    certificates = []

    def logprobs(hidden):
        out = linear_logprobs(hidden, weight, labels, return_certificate=True, **SETTINGS)
        certificates.append(out.certificate)
        return out.logprobs

    for _ in range(2):  # a second forward that kept something else would be refused; it ends before it appends
        checkpoint(logprobs, hidden, use_reentrant=False).sum().backward()
    assert [float(x.cached_share) for x in certificates] == [1, 0]
    assert [float(x.sparse_share) for x in certificates] == [0, 1]


def test_scoring_is_not_recorded():
    with torch.no_grad():
        for _ in range(2):
            linear_logprobs(40 * torch.eye(VOCAB), torch.eye(VOCAB), torch.arange(VOCAB), **SETTINGS)
    assert not auto_mode._defaults


def test_an_object_of_the_caller_has_its_own_memory():
    """Calls with the default have no influence on it, nor it on them; without it the defaults stay as they are."""
    mine = AutoBackward()
    for _ in range(2):
        call(0)
    assert call(0)[0].sparse_share == 1
    assert call(0, backward=mine)[0].cached_share == 1
    assert call(0, backward=mine)[0].sparse_share == 1
    mine.reset()
    assert call(0, backward=mine)[0].cached_share == 1
    assert call(0)[0].sparse_share == 1


def test_an_object_that_is_gone_by_backward_records_nothing():
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
