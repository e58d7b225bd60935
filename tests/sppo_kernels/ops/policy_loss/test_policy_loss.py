"""Tests of values, gradients and metrics of policy_loss against float64."""

import math

import pytest
import torch
from against_float64 import (
    BACKENDS,
    DEVICE,
    DTYPES,
    ragged_shapes,
    randint,
    randn,
)
from hypothesis import given
from hypothesis import strategies as st
from policy_loss_cases import AGGREGATIONS, CORRECTIONS, LEVELS, NAN, check, offsets, packed

from sppo_kernels import policy_loss
from sppo_kernels.ops.policy_loss import METRICS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("backend", BACKENDS)
@ragged_shapes
@given(
    lengths=st.lists(st.integers(0, 9) | st.just(1100), min_size=0, max_size=5),
    aggregation=st.sampled_from(AGGREGATIONS),
    dual_clip=st.sampled_from([None, 1.3, 3.0]),
    kl_coef=st.sampled_from([0.0, 0.1]),
    kl_estimator=st.sampled_from(["k1", "k2", "k3"]),
    rollout_correction=st.sampled_from([None, *CORRECTIONS]),
    per_token=st.booleans(),
    masked=st.booleans(),
    normalizer=st.sampled_from([None, 7.0]),
)
def test_agrees_with_float64(backend, level, dtype, lengths, per_token, masked, **arguments):
    # A sum over 1,100 tokens is as large as its rounding error allows: exp of it is a ratio or a rollout weight.
    is_summed = level != "token" or str(arguments["rollout_correction"]).startswith("sequence")
    spread = 0.02 if is_summed and max(lengths, default=0) >= 1100 else 0.3
    tensors = packed(lengths, dtype, spread, per_token)
    if masked:
        tensors["mask"] = randint(0, 2, sum(lengths))
    check(backend, tensors, ratio_level=level, clip_low=0.1, clip_high=0.3, rollout_cap=1.2, **arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@ragged_shapes
@given(
    lengths=st.lists(st.integers(0, 9) | st.just(1100), min_size=0, max_size=5),
    aggregation=st.sampled_from(AGGREGATIONS),
    clip_low=st.sampled_from([0.1, math.inf]),
    kl_coef=st.sampled_from([0.0, 0.1]),
    rollout_floor=st.sampled_from([0.0, 0.8]),
    per_token=st.booleans(),
    masked=st.booleans(),
)
def test_cispo_and_masked_weights_agree_with_float64(backend, dtype, lengths, per_token, masked, **arguments):
    tensors = packed(lengths, dtype, per_token=per_token)
    if masked:
        tensors["mask"] = randint(0, 2, sum(lengths))
    settings = {"objective": "cispo", "rollout_correction": "token_mask", "rollout_cap": 1.2, "clip_high": 0.2}
    check(backend, tensors, **settings, **arguments)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_token_next_to_forty_thousand(backend, level):
    tensors = packed([1, 40_000, 0, 3], spread=0.004)
    check(backend, tensors, ratio_level=level, clip_low=0.5, clip_high=0.5, kl_coef=0.1, aggregation=AGGREGATIONS[1])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_padded_in_any_layout(backend, level):
    mask = randint(0, 2, 3, 7)
    tensors = {
        "logprobs": (randn(3, 8) - 2)[:, :-1].requires_grad_(),
        "old_logprobs": (randn(7, 3) - 2).t(),
        "ref_logprobs": (randn(22) - 2)[1:].view(3, 7),
        "rollout_logprobs": (randn(3, 14) - 2)[:, ::2],
        "mask": torch.stack([mask, mask], -1)[..., 0],
    }
    arguments = {"ratio_level": level, "kl_coef": 0.1, "rollout_correction": "token_truncate", "dual_clip": 3.0}
    check(backend, {**tensors, "advantages": randn(6)[::2]}, **arguments)
    check(backend, {**tensors, "advantages": randn(7, 3).t()}, **arguments)
    check(backend, {**tensors, "advantages": randn(1, 1).expand(3, 7)}, **arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_slices_and_mixed_dtypes(backend):
    tensors = packed([3, 0, 4, 1])
    tensors["logprobs"] = randn(17, dtype=torch.bfloat16)[1::2].requires_grad_()
    tensors["mask"] = randint(0, 2, 9)[1:].bool()
    check(backend, tensors, aggregation="seq-mean-token-mean", rollout_correction="sequence_truncate", kl_coef=0.5)


@pytest.mark.parametrize("dual", [None, 3.0])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_gradient_is_zero_exactly_where_the_loss_is_flat(backend, dual):
    """Ratios lie on each side of each bound, for both signs of the advantage."""
    ratio = torch.tensor([0.5, 0.79, 0.81, 1.19, 1.21, 2.9, 3.1, 100.0] * 2, device=DEVICE)
    advantages = torch.tensor([2.0] * 8 + [-2.0] * 8, device=DEVICE)
    logprobs = ratio.log().requires_grad_()
    arguments = {"cu_seqlens": offsets([16]), "dual_clip": dual, "normalizer": 1.0, "backend": backend}
    loss = policy_loss(logprobs, torch.zeros(16, device=DEVICE), advantages, **arguments).loss
    loss.backward()
    flat = [4, 5, 6, 7, 8, 9] + ([14, 15] if dual else [])
    want = (-advantages * ratio).index_fill(0, torch.tensor(flat, device=DEVICE), 0.0)
    torch.testing.assert_close(logprobs.grad, want, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_a_ratio_beyond_float32_counts_as_exp_80(backend, level):
    """Of a bad sample, where nothing is clipped. Float32 has no digits left for 1e10 - 80."""
    logprobs = torch.full((1,), 1e10, device=DEVICE, requires_grad=True)
    inputs = {"old_logprobs": torch.zeros(1, device=DEVICE), "advantages": torch.tensor([-1.0], device=DEVICE)}
    loss = policy_loss(logprobs, **inputs, cu_seqlens=offsets([1]), ratio_level=level, backend=backend).loss
    loss.backward()
    for got in (loss.detach(), logprobs.grad[0]):
        assert got.item() == pytest.approx(math.exp(80), rel=1e-5)


@pytest.mark.parametrize("dual", [float("inf"), 1e39])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_a_dual_clip_beyond_float32_is_none(backend, dual):
    logprobs = torch.tensor([0.5, -0.5, 0.0, 3.0] * 2, device=DEVICE).requires_grad_()
    inputs = {
        "old_logprobs": torch.zeros(8, device=DEVICE),
        "advantages": torch.tensor([1.0] * 4 + [-1.0] * 4, device=DEVICE),
        "cu_seqlens": offsets([8]),
    }
    for dual_clip in (None, dual):
        out = policy_loss(logprobs, **inputs, dual_clip=dual_clip, backend=backend)
        (grad,) = torch.autograd.grad(out.loss, logprobs)
        if dual_clip is None:
            want, want_grad = out, grad
    assert torch.equal(out.loss, want.loss)
    assert torch.equal(grad, want_grad)
    assert out.metrics == want.metrics


@pytest.mark.parametrize("normalizer", [3.0, 60_000.0, 5e-8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_reciprocal_of_a_normalizer_is_not_rounded_to_its_dtype(backend, dtype, normalizer):
    tensors, normalizer = packed([3, 2]), torch.tensor(normalizer, dtype=dtype, device=DEVICE)
    one = policy_loss(**tensors, normalizer=1.0, backend=backend).loss
    got = policy_loss(**tensors, normalizer=normalizer, backend=backend).loss
    assert got.item() == pytest.approx(one.item() / normalizer.item(), rel=1e-6)


def test_forward_mode_derivatives_of_the_reference():
    tensors = packed([3, 2], torch.float64)
    logprobs = tensors.pop("logprobs").detach()
    tensors = {name: x.detach() for name, x in tensors.items()}
    f = lambda x: policy_loss(x, **tensors, kl_coef=0.1, backend="reference").loss
    torch.testing.assert_close(torch.func.jacfwd(f)(logprobs), torch.func.jacrev(f)(logprobs))


def metrics_of(backend, ratios, advantages, lengths, **arguments):
    logprobs = torch.tensor(ratios, device=DEVICE).log()
    inputs = {"old_logprobs": torch.zeros_like(logprobs), "advantages": torch.tensor(advantages, device=DEVICE)}
    out = policy_loss(logprobs, **inputs, cu_seqlens=offsets(lengths), **arguments, backend=backend)
    assert tuple(out.metrics) == METRICS
    for x in out.metrics.values():
        assert (x.shape, x.dtype, x.requires_grad) == ((), torch.float32, False)
    return {name: x.item() for name, x in out.metrics.items()}


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_metrics_at_token_level(backend):
    """There are eight tokens; the empty sequence does not affect any metric."""
    ratios = [0.5, 1.0, 1.5, 1.1, 0.5, 0.9, 4.0, 2.0]
    got = metrics_of(
        backend,
        ratios,
        [1.0, -1.0, 9.0],
        [4, 4, 0],
        dual_clip=3.0,
        ref_logprobs=torch.tensor([0.5, 1.0, 1.5, 1.1, 0.5, 0.9, 4.0, 1.0], device=DEVICE).log(),
        rollout_logprobs=torch.tensor([0.5, 1, 1, 1, 1, 1, 1, 0.25], device=DEVICE).log(),
        rollout_correction="token_truncate",
    )
    log = lambda *xs: torch.tensor(xs, dtype=torch.float64).log().sum().item()
    want = {
        "clip_fraction": 2 / 8,
        "clip_fraction_low": 1 / 8,
        "clip_fraction_high": 1 / 8,
        "dual_clip_fraction": 1 / 8,
        "approx_kl": -log(*ratios) / 8,
        "kl": (0.5 - 1 - log(0.5)) / 8,
        "ratio_mean": sum(ratios) / 8,
        "ratio_min": 0.5,
        "ratio_max": 4.0,
        "rollout_kl": log(0.5, 0.25) / 8,
        "rollout_weight_mean": (2 + 6 + 2) / 8,
    }
    assert got == pytest.approx(want, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_metrics_at_sequence_level(backend):
    """The ratios of the nonempty sequences are 2, 0.5, 4 and 1."""
    got = metrics_of(
        backend,
        [4.0, 1.0, 0.5, 4.0, 4.0, 4.0, 1.0],
        [1.0, -1.0, 9.0, -1.0, 1.0],
        [2, 1, 0, 3, 1],
        ratio_level="sequence_mean",
        dual_clip=3.0,
        rollout_logprobs=torch.tensor([1.0, 0.5, 1, 0.5, 0.25, 2, 1], device=DEVICE).log(),
        rollout_correction="sequence_mask",
    )
    log = lambda *xs: torch.tensor(xs, dtype=torch.float64).log().sum().item()
    want = {
        "clip_fraction": 2 / 4,
        "clip_fraction_low": 1 / 4,
        "clip_fraction_high": 1 / 4,
        "dual_clip_fraction": 1 / 4,
        "approx_kl": -log(4.0, 0.5, 4.0, 4.0, 4.0) / 7,
        "kl": 0.0,
        "ratio_mean": (2 + 0.5 + 4 + 1) / 4,
        "ratio_min": 0.5,
        "ratio_max": 4.0,
        "rollout_kl": log(0.5, 0.5, 0.25, 2.0) / 7,
        "rollout_weight_mean": (2 + 1 + 0 + 1) / 4,
    }
    assert got == pytest.approx(want, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_micro_batches_add_up(backend, level):
    lengths = [4, 1, 0, 9, 3]
    tensors = packed(lengths)
    arguments = {"ratio_level": level, "kl_coef": 0.1, "dual_clip": 3.0, "backend": backend}
    full = policy_loss(**tensors, **arguments).loss
    (want,) = torch.autograd.grad(full, tensors["logprobs"])
    count = 17.0 if level == "token" else 4.0
    parts = []
    for sequences, tokens in ((slice(0, 2), slice(0, 5)), (slice(2, 5), slice(5, 17))):
        part = {k: tensors[k][tokens] for k in ("logprobs", "old_logprobs", "ref_logprobs", "rollout_logprobs")}
        part |= {"advantages": tensors["advantages"][sequences], "cu_seqlens": offsets(lengths[sequences])}
        normalizer = count if not parts else torch.tensor(count, device=DEVICE)
        parts.append(policy_loss(**part, **arguments, normalizer=normalizer).loss)
    (got,) = torch.autograd.grad(sum(parts), tensors["logprobs"])
    torch.testing.assert_close(sum(parts), full, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dual", [None, 3.0])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_enormous_log_ratios(backend, level, dual):
    """Results are finite; a bad response that became far too likely has a gradient unless dual clip removes it."""
    new = torch.tensor([1e4, -1e4, 1e4, -1e4, 0.0, 0.0], device=DEVICE, requires_grad=True)
    old = torch.tensor([0.0, 0.0, 0.0, 0.0, 1e4, -1e4], device=DEVICE)
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0, -1.0], device=DEVICE)
    arguments = {"ratio_level": level, "dual_clip": dual, "backend": backend, "cu_seqlens": offsets([1] * 6)}
    extra = {"ref_logprobs": -old, "kl_coef": 0.1, "rollout_logprobs": new.detach(), "kl_estimator": "k2"}
    for correction in (None, *CORRECTIONS):
        out = policy_loss(new, old, advantages, **arguments, **extra, rollout_correction=correction)
        (grad,) = torch.autograd.grad(out.loss, new)
        for x in (out.loss, grad, *out.metrics.values()):
            assert x.isfinite().all()
    (grad,) = torch.autograd.grad(policy_loss(new, old, advantages, **arguments).loss, new)
    assert grad[[0, 1, 3, 4]].tolist() == [0.0, 0.0, 0.0, 0.0]
    assert bool((grad[[2, 5]] > 1e30).all()) is (dual is None)
    assert bool((grad[[2, 5]] == 0).all()) is (dual is not None)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_values_of_masked_tokens_are_ignored(backend, level):
    tensors = packed([5, 4, 3], per_token=True)
    mask = torch.tensor([1, 0, 1, 1, 0] + [0] * 4 + [1, 1, 0], device=DEVICE)
    arguments = {"ratio_level": level, "kl_coef": 0.1, "dual_clip": 3.0, "aggregation": "seq-mean-token-mean"}
    for correction in (None, *CORRECTIONS):
        clean = policy_loss(**tensors, mask=mask, **arguments, rollout_correction=correction, backend=backend)
        (want,) = torch.autograd.grad(clean.loss, tensors["logprobs"])
        for bad in (NAN, float("inf"), float("-inf")):
            dirty = {k: x if k == "cu_seqlens" else x.detach().masked_fill(mask == 0, bad) for k, x in tensors.items()}
            dirty["logprobs"].requires_grad_()
            out = policy_loss(**dirty, mask=mask, **arguments, rollout_correction=correction, backend=backend)
            (grad,) = torch.autograd.grad(out.loss, dirty["logprobs"])
            assert torch.equal(out.loss, clean.loss)
            assert torch.equal(grad, want)
            for name, x in out.metrics.items():
                assert torch.equal(x, clean.metrics[name]), name
        assert torch.equal(want[mask == 0], torch.zeros_like(want[mask == 0]))


@pytest.mark.parametrize("correction", [None, *CORRECTIONS])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_no_unmasked_tokens_give_zero(backend, level, correction):
    """Loss, gradient and metrics are 0 and ratios 1 if sequences are missing, empty or fully masked."""
    cases = [
        packed([]),
        packed([0, 0]),
        {**packed([2, 3]), "mask": torch.zeros(5, device=DEVICE)},
        *(
            {
                "logprobs": randn(*shape, grad=True),
                "old_logprobs": randn(*shape),
                "advantages": randn(shape[0]),
                "ref_logprobs": randn(*shape),
                "rollout_logprobs": randn(*shape),
                "mask": torch.zeros(shape, device=DEVICE, dtype=torch.bool),
            }
            for shape in ((0, 3), (2, 0), (2, 3))
        ),
    ]
    for tensors in cases:
        out = policy_loss(
            **tensors, ratio_level=level, kl_coef=0.1, rollout_correction=correction, dual_clip=3.0, backend=backend
        )
        (grad,) = torch.autograd.grad(out.loss, tensors["logprobs"])
        assert out.loss.item() == 0
        assert torch.equal(grad, torch.zeros_like(grad))
        for name, x in out.metrics.items():
            assert x.item() == (1.0 if name in ("ratio_mean", "ratio_min", "ratio_max") else 0.0), name


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_ambiguous_advantages_are_per_sequence(backend):
    """With as many tokens as sequences the shape of the advantages does not show which they belong to."""
    logprobs = torch.zeros(2, device=DEVICE)
    inputs = {"advantages": torch.tensor([5.0, 7.0], device=DEVICE), "cu_seqlens": offsets([2, 0])}
    assert policy_loss(logprobs, logprobs, **inputs, backend=backend).loss.item() == -5.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_new_logprobs_get_a_gradient(backend):
    tensors = {k: x if k == "cu_seqlens" else x.detach().requires_grad_() for k, x in packed([3, 2]).items()}
    policy_loss(**tensors, kl_coef=0.1, rollout_correction="token_truncate", backend=backend).loss.backward()
    assert {k for k, x in tensors.items() if x.grad is not None} == {"logprobs"}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_every_run(backend, level):
    if backend == "torch" and DEVICE == "cuda":
        pytest.skip("the torch backend adds up sequences with index_add, which is atomic on CUDA")
    tensors = packed([700, 0, 1500, 1])

    def run():
        out = policy_loss(**tensors, ratio_level=level, rollout_correction="sequence_truncate", backend=backend)
        return out.loss, *out.metrics.values(), *torch.autograd.grad(out.loss, tensors["logprobs"])

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)
