"""policy_loss against float64, and against the published algorithms written out sequence by sequence."""

import pytest
import torch
from against_float64 import (
    BACKENDS,
    DEVICE,
    DTYPES,
    assert_close_to_float64,
    ragged_shapes,
    randint,
    randn,
)
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from sppo_kernels import policy_loss, reference
from sppo_kernels.ops.policy_loss import METRICS, op
from sppo_kernels.ops.policy_loss.settings import Settings

LEVELS = ["token", "sequence_mean", "sequence_sum"]
AGGREGATIONS = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"]
CORRECTIONS = ["token_truncate", "sequence_truncate", "sequence_mask"]
NAN = float("nan")


def offsets(lengths):
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()


def packed(lengths, dtype=torch.float32, spread=0.3, per_token=False):
    """Sequences whose log-ratios spread over both sides of the clip range."""
    n, old = sum(lengths), randn(sum(lengths)) - 2
    near = lambda: (old + randn(n, scale=spread)).to(dtype)
    return {
        "logprobs": near().requires_grad_(),
        "old_logprobs": old.to(dtype),
        "advantages": randn(n if per_token else len(lengths), dtype=dtype),
        "ref_logprobs": near(),
        "rollout_logprobs": near(),
        "cu_seqlens": offsets(lengths),
    }


def check(backend, tensors, **arguments):
    """The terms of the loss and of its metrics are as large as the log-ratios."""
    term = (tensors["logprobs"] - tensors["old_logprobs"]).abs().mean().item() if tensors["logprobs"].numel() else 0.0
    assert_close_to_float64(policy_loss, reference.policy_loss, backend, tensors, term=term, **arguments)


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
    spread = 0.3 if level == "token" or max(lengths, default=0) < 1100 else 0.02
    tensors = packed(lengths, dtype, spread, per_token)
    if masked:
        tensors["mask"] = randint(0, 2, sum(lengths))
    check(backend, tensors, ratio_level=level, clip_low=0.1, clip_high=0.3, rollout_cap=1.2, **arguments)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_token_beside_forty_thousand(backend, level):
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


# The published algorithms, sequence by sequence, in float64


SEQUENCES = [4, 1, 0, 9, 3]  # one of them is an empty response


def ppo(ratio, advantage, clip_low=0.2, clip_high=0.2):
    """arXiv 1707.06347, equation 7, as a loss."""
    return -torch.min(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)


def dual_clip(ratio, advantage, c=3.0):
    """arXiv 1912.09729, equation 5, as a loss: max(min(r A, clip(r) A), c A) for A < 0."""
    return torch.where(advantage < 0, torch.min(ppo(ratio, advantage), -c * advantage), ppo(ratio, advantage))


def token_mean(losses):
    return torch.cat(losses).sum() / sum(len(x) for x in losses)


def seq_mean_token_mean(losses):
    return sum(x.sum() / len(x) for x in losses) / len(losses)


def seq_mean_token_sum(losses):
    return sum(x.sum() for x in losses) / len(losses)


def ppo_dual_clip_of(aggregate):
    def published(sequences):
        return aggregate([dual_clip((x["new"] - x["old"]).exp(), x["advantage"]) for x in sequences])

    return published


def clip_higher(sequences):
    """DAPO, arXiv 2503.14476: the upper bound is wider than the lower."""
    return token_mean([ppo((x["new"] - x["old"]).exp(), x["advantage"], 0.2, 0.28) for x in sequences])


def gspo(sequences):
    """arXiv 2507.18071, equations 5 and 7."""
    losses = []
    for x in sequences:
        s = ((x["new"] - x["old"]).sum() / len(x["new"])).exp()
        losses.append(ppo(s, x["advantage"][0], 3e-2, 4e-2))
    return sum(losses) / len(losses)


def gspo_token(sequences):
    """arXiv 2507.18071, equations 13 and 14: sg[s] pi / sg[pi], with an advantage a token."""
    losses = []
    for x in sequences:
        s = ((x["new"] - x["old"]).sum() / len(x["new"])).exp().detach()
        s_token = s * x["new"].exp() / x["new"].exp().detach()
        losses.append(ppo(s_token, x["token_advantage"]).mean())
    return sum(losses) / len(losses)


def bandit(sequences):
    """One action a prompt: the ratio of whole responses, arXiv 2604.08865."""
    losses = [ppo((x["new"].sum() - x["old"].sum()).exp(), x["advantage"][0], 0.5, 0.5) for x in sequences]
    return sum(losses) / len(losses)


def sppo(sequences):
    """arXiv 2604.08865 as published: outcome minus value to each token, token ratio, dual clip 3, token mean."""
    total, count = 0.0, 0
    for x in sequences:
        for new, old in zip(x["new"], x["old"], strict=True):
            total = total + dual_clip((new - old).exp(), x["advantage"][0])
            count += 1
    return total / count


def grpo(sequences):
    """arXiv 2402.03300, equations 3 and 4."""
    losses = []
    for x in sequences:
        kl = (x["ref"] - x["new"]).exp() - (x["ref"] - x["new"]) - 1
        losses.append((ppo((x["new"] - x["old"]).exp(), x["advantage"]) + 0.04 * kl).sum() / len(x["new"]))
    return sum(losses) / len(losses)


def kl_penalty(kl):
    def published(sequences):
        return token_mean([ppo((x["new"] - x["old"]).exp(), x["advantage"]) + 0.3 * kl(x) for x in sequences])

    return published


def k1(x):
    return x["new"] - x["ref"]


def k2(x):
    return (x["new"] - x["ref"]) ** 2 / 2


def corrected(weight, aggregate=token_mean):
    """Importance weights between the engine that sampled and the trainer, constants in the gradient."""

    def published(sequences):
        return aggregate([weight(x) * ppo((x["new"] - x["old"]).exp(), x["advantage"]) for x in sequences])

    return published


def token_truncate(x):
    return (x["old"] - x["rollout"]).exp().clamp(max=1.1)


def sequence_truncate(x):
    return min((x["old"] - x["rollout"]).sum().exp().item(), 1.1)


def sequence_mask(x):
    weight = (x["old"] - x["rollout"]).sum().exp().item()
    return weight if weight <= 1.1 else 0.0


PUBLISHED = [
    pytest.param(ppo_dual_clip_of(token_mean), {"dual_clip": 3.0}, id="ppo-token-mean"),
    pytest.param(
        ppo_dual_clip_of(seq_mean_token_mean),
        {"dual_clip": 3.0, "aggregation": "seq-mean-token-mean"},
        id="ppo-seq-mean-token-mean",
    ),
    pytest.param(
        ppo_dual_clip_of(seq_mean_token_sum),
        {"dual_clip": 3.0, "aggregation": "seq-mean-token-sum"},
        id="ppo-seq-mean-token-sum",
    ),
    pytest.param(clip_higher, {"clip_high": 0.28}, id="dapo"),
    pytest.param(gspo, {"ratio_level": "sequence_mean", "clip_low": 3e-2, "clip_high": 4e-2}, id="gspo"),
    pytest.param(gspo_token, {"ratio_level": "sequence_mean", "advantages": "token_advantage"}, id="gspo-token"),
    pytest.param(bandit, {"ratio_level": "sequence_sum", "clip_low": 0.5, "clip_high": 0.5}, id="sequence-sum"),
    pytest.param(sppo, {"dual_clip": 3.0}, id="sppo"),
    pytest.param(grpo, {"kl_coef": 0.04, "aggregation": "seq-mean-token-mean"}, id="grpo"),
    pytest.param(kl_penalty(k1), {"kl_coef": 0.3, "kl_estimator": "k1"}, id="kl-k1"),
    pytest.param(kl_penalty(k2), {"kl_coef": 0.3, "kl_estimator": "k2"}, id="kl-k2"),
    pytest.param(
        corrected(token_truncate), {"rollout_correction": "token_truncate", "rollout_cap": 1.1}, id="token-truncate"
    ),
    pytest.param(
        corrected(sequence_truncate, seq_mean_token_mean),
        {"rollout_correction": "sequence_truncate", "rollout_cap": 1.1, "aggregation": "seq-mean-token-mean"},
        id="sequence-truncate",
    ),
    pytest.param(
        corrected(sequence_mask), {"rollout_correction": "sequence_mask", "rollout_cap": 1.1}, id="sequence-mask"
    ),
]


def as_packed(columns, advantages):
    return {**columns, "advantages": advantages, "cu_seqlens": offsets(SEQUENCES)}


def as_padded(columns, advantages):
    """Padding holds NaN, which must not come through."""
    pad = lambda x: torch.nn.utils.rnn.pad_sequence(list(x.split(SEQUENCES)), batch_first=True, padding_value=NAN)
    if advantages.shape != (len(SEQUENCES),):
        advantages = pad(advantages)
    padded = {name: pad(x) for name, x in columns.items()}
    return {**padded, "advantages": advantages, "mask": ~padded["old_logprobs"].isnan()}


@pytest.mark.parametrize("layout", [as_packed, as_padded])
@pytest.mark.parametrize(("published", "arguments"), PUBLISHED)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_equals_the_published_algorithm(backend, published, arguments, layout):
    n = sum(SEQUENCES)
    old = randn(n) - 2
    columns = {
        "logprobs": (old + randn(n, scale=0.4)).requires_grad_(),
        "old_logprobs": old,
        "ref_logprobs": old + randn(n, scale=0.4),
        "rollout_logprobs": old + randn(n, scale=0.1),
    }
    advantage, token_advantage = torch.tensor([0.7, -1.1, 5.0, -0.4, 0.2], device=DEVICE), randn(n)
    exact = {k: x.detach().double().requires_grad_(k == "logprobs") for k, x in columns.items()}
    sequences = [
        {
            "new": new,
            "old": old,
            "ref": ref,
            "rollout": rollout,
            "advantage": a.double().expand(len(new)),
            "token_advantage": per_token.double(),
        }
        for new, old, ref, rollout, a, per_token in zip(
            *(x.split(SEQUENCES) for x in exact.values()), advantage, token_advantage.split(SEQUENCES), strict=True
        )
        if len(new)
    ]
    want = published(sequences)
    (want_grad,) = torch.autograd.grad(want, exact["logprobs"])

    arguments = dict(arguments)
    chosen = token_advantage if arguments.pop("advantages", "") == "token_advantage" else advantage
    loss = policy_loss(**layout(columns, chosen), **arguments, backend=backend).loss
    (grad,) = torch.autograd.grad(loss, columns["logprobs"])
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(grad.double(), want_grad, rtol=1e-5, atol=1e-7)
    assert (grad != 0).any()


@pytest.mark.parametrize("dual", [None, 3.0])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_gradient_stops_exactly_where_the_loss_is_flat(backend, dual):
    """Ratios on each side of each bound, for both signs of the advantage."""
    ratio = torch.tensor([0.5, 0.79, 0.81, 1.19, 1.21, 2.9, 3.1, 100.0] * 2, device=DEVICE)
    advantages = torch.tensor([2.0] * 8 + [-2.0] * 8, device=DEVICE)
    logprobs = ratio.log().requires_grad_()
    arguments = {"cu_seqlens": offsets([16]), "dual_clip": dual, "normalizer": 1.0, "backend": backend}
    loss = policy_loss(logprobs, torch.zeros(16, device=DEVICE), advantages, **arguments).loss
    loss.backward()
    flat = [4, 5, 6, 7, 8, 9] + ([14, 15] if dual else [])
    want = (-advantages * ratio).index_fill(0, torch.tensor(flat, device=DEVICE), 0.0)
    torch.testing.assert_close(logprobs.grad, want, rtol=1e-6, atol=0.0)


# Metrics


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
    """Eight tokens; the empty sequence counts nowhere."""
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
    """Ratios of the sequences that have tokens: 2, 0.5, 4 and 1."""
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


# Hard cases


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_micro_batches_add_up(backend, level):
    lengths = [4, 1, 0, 9, 3]
    tensors = packed(lengths)
    arguments = {"ratio_level": level, "kl_coef": 0.1, "dual_clip": 3.0, "backend": backend}
    whole = policy_loss(**tensors, **arguments).loss
    (want,) = torch.autograd.grad(whole, tensors["logprobs"])
    count = 17.0 if level == "token" else 4.0
    parts = []
    for sequences, tokens in ((slice(0, 2), slice(0, 5)), (slice(2, 5), slice(5, 17))):
        part = {k: tensors[k][tokens] for k in ("logprobs", "old_logprobs", "ref_logprobs", "rollout_logprobs")}
        part |= {"advantages": tensors["advantages"][sequences], "cu_seqlens": offsets(lengths[sequences])}
        normalizer = count if not parts else torch.tensor(count, device=DEVICE)
        parts.append(policy_loss(**part, **arguments, normalizer=normalizer).loss)
    (got,) = torch.autograd.grad(sum(parts), tensors["logprobs"])
    torch.testing.assert_close(sum(parts), whole, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dual", [None, 3.0])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_enormous_log_ratios(backend, level, dual):
    """No NaN and no infinity; a bad response far too likely is still pushed away, unless dual clip says not to."""
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
def test_masked_tokens_may_hold_anything(backend, level):
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
def test_without_tokens(backend, level, correction):
    """No sequences, empty ones, all tokens masked: loss, gradient and metrics are 0, ratios 1."""
    nothing = [
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
    for tensors in nothing:
        out = policy_loss(
            **tensors, ratio_level=level, kl_coef=0.1, rollout_correction=correction, dual_clip=3.0, backend=backend
        )
        (grad,) = torch.autograd.grad(out.loss, tensors["logprobs"])
        assert out.loss.item() == 0
        assert torch.equal(grad, torch.zeros_like(grad))
        for name, x in out.metrics.items():
            assert x.item() == (1.0 if name in ("ratio_mean", "ratio_min", "ratio_max") else 0.0), name


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_as_many_tokens_as_sequences_means_an_advantage_a_sequence(backend):
    logprobs = torch.zeros(2, device=DEVICE)
    inputs = {"advantages": torch.tensor([5.0, 7.0], device=DEVICE), "cu_seqlens": offsets([2, 0])}
    assert policy_loss(logprobs, logprobs, **inputs, backend=backend).loss.item() == -5.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_new_logprobs_are_differentiated(backend):
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


@pytest.mark.parametrize("level", LEVELS)
def test_reference_is_its_own_derivative(level):
    """Where the loss is smooth: at token level the reference is the derivative of its own value.

    A sequence ratio with one advantage a sequence is a smooth function too, of all its tokens.
    """
    tensors = packed([3, 0, 2], torch.float64, spread=0.01)
    rest = {k: x for k, x in tensors.items() if k != "logprobs"}
    f = lambda x: reference.policy_loss(x, **rest, ratio_level=level, kl_coef=0.1, clip_low=0.5, clip_high=0.5).loss
    assert torch.autograd.gradcheck(f, tensors["logprobs"])


def op_arguments(backend, tensors, mask=None, normalizer=None, level="token"):
    names = ("logprobs", "old_logprobs", "advantages")
    tensors = (
        *(tensors[k] for k in names),
        mask,
        tensors["cu_seqlens"],
        normalizer,
        tensors["ref_logprobs"],
        tensors["rollout_logprobs"],
    )
    settings = Settings(
        ratio_level=level,
        clip_low=0.2,
        clip_high=0.2,
        dual_clip=3.0,
        aggregation="token-mean",
        kl_coef=0.1,
        kl_estimator="k3",
        rollout_correction="sequence_truncate",
        rollout_cap=2.0,
    )
    return tensors, {**settings._asdict(), "per_token": False, "backend": backend}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_registration(backend, dtype):
    tensors = packed([3, 0, 2], dtype)
    torch.library.opcheck(op.policy_loss, *op_arguments(backend, tensors))
    extra = {"mask": randint(0, 2, 5), "normalizer": torch.tensor(4.0, device=DEVICE)}
    torch.library.opcheck(op.policy_loss, *op_arguments(backend, tensors, **extra, level="sequence_sum"))


@pytest.mark.parametrize("layout", [as_packed, as_padded])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole(backend, layout):
    columns = packed(SEQUENCES)
    advantages = columns.pop("advantages")
    columns.pop("cu_seqlens")
    logprobs = columns["logprobs"]
    rest = {k: x.detach() for k, x in layout(columns, advantages).items()}
    shaped = rest.pop("logprobs").requires_grad_()

    def run(x):
        out = policy_loss(x, **rest, ratio_level="sequence_mean", kl_coef=0.1, normalizer=7.0, backend=backend)
        return out.loss, out.metrics["kl"]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(shaped)
    eager = run(shaped)
    for x, y in zip(compiled, eager, strict=True):
        assert torch.equal(x, y)
    (got,) = torch.autograd.grad(compiled[0], shaped)
    assert torch.equal(got, torch.autograd.grad(eager[0], shaped)[0])
    assert logprobs.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_fake_tensors(backend):
    with FakeTensorMode():
        new = lambda *shape: torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)
        logprobs = new(3, 5).requires_grad_()
        out = policy_loss(logprobs, new(3, 5), new(3), mask=new(3, 5), backend=backend)
        for x in (out.loss, *out.metrics.values()):
            assert (x.shape, x.dtype) == ((), torch.float32)
        out.loss.backward()
        assert (logprobs.grad.shape, logprobs.grad.dtype) == ((3, 5), torch.bfloat16)


X = torch.zeros(2, 3)
PADDED = {"logprobs": X, "old_logprobs": X, "advantages": torch.ones(2)}
PACKED = {
    "logprobs": torch.zeros(5),
    "old_logprobs": torch.zeros(5),
    "advantages": torch.ones(2),
    "cu_seqlens": torch.tensor([0, 2, 5], dtype=torch.int32),
}


def cu(*values, dtype=torch.int32):
    return {"cu_seqlens": torch.tensor(values, dtype=dtype)}


@pytest.mark.parametrize(
    ("base", "bad", "error", "says"),
    [
        (PADDED, {"logprobs": [0.0]}, TypeError, "logprobs must be a torch.Tensor, got list"),
        (PADDED, {"logprobs": X.long()}, TypeError, "logprobs must be a floating-point tensor, got torch.int64"),
        (PADDED, {"logprobs": torch.zeros(3)}, ValueError, r"logprobs must be \[B, T\].*got shape \(3,\)"),
        (PACKED, {"logprobs": X}, ValueError, r"logprobs must be \[N\].*got shape \(2, 3\)"),
        (PADDED, {"old_logprobs": 0.0}, TypeError, "old_logprobs must be a torch.Tensor, got float"),
        (PADDED, {"old_logprobs": torch.zeros(2, 4)}, ValueError, r"old_logprobs must be .*got shape \(2, 4\)"),
        (PADDED, {"old_logprobs": X.to("meta")}, ValueError, "old_logprobs must be on cpu.*got meta"),
        (PADDED, {"advantages": torch.ones(2).int()}, TypeError, "advantages must be a floating.*torch.int32"),
        (PADDED, {"advantages": torch.ones(3)}, ValueError, r"advantages must be .*\(2,\).*\(2, 3\).*got shape \(3,\)"),
        (PACKED, {"advantages": torch.ones(3)}, ValueError, r"advantages must be .*\(2,\).*\(5,\).*got shape \(3,\)"),
        (PADDED, {"mask": [[1]]}, TypeError, "mask must be a torch.Tensor, got list"),
        (PADDED, {"mask": torch.ones(2)}, ValueError, r"mask must be of shape \(2, 3\).*got shape \(2,\)"),
        (PACKED, {"cu_seqlens": [0, 5]}, TypeError, "cu_seqlens must be a torch.Tensor, got list"),
        (PACKED, cu(0.0, 5.0, dtype=torch.float32), TypeError, "cu_seqlens must be an integer tensor.*float32"),
        (PACKED, cu(0, 2, 5, dtype=torch.int64), ValueError, "cu_seqlens must be int32.*got torch.int64"),
        (PACKED, cu(), ValueError, r"cu_seqlens must be int32 of shape \[B \+ 1\], got.*\(0,\)"),
        (PACKED, cu(0, 2, 4), ValueError, r"cu_seqlens must be rising from 0.*5, got \[0, 2, 4\]"),
        (PACKED, cu(1, 2, 5), ValueError, r"cu_seqlens must be rising from 0.*5, got \[1, 2, 5\]"),
        (PACKED, {**cu(0, 4, 2, 5), "advantages": torch.ones(3)}, ValueError, r"cu_seqlens .*got \[0, 4, 2, 5\]"),
        (PADDED, {"ratio_level": "sequence"}, ValueError, "ratio_level must be one of .*'token'.*got 'sequence'"),
        (PADDED, {"aggregation": "mean"}, ValueError, "aggregation must be one of .*'token-mean'.*got 'mean'"),
        (PADDED, {"clip_low": -0.1}, ValueError, "clip_low must be at least 0, got -0.1"),
        (PADDED, {"clip_high": -0.2}, ValueError, "clip_high must be at least 0, got -0.2"),
        (PADDED, {"clip_high": NAN}, ValueError, "clip_high must be at least 0, got nan"),
        (PADDED, {"dual_clip": 1.0}, ValueError, "dual_clip must be greater than 1.*got 1.0"),
        (PADDED, {"normalizer": 0.0}, ValueError, "normalizer must be greater than 0.*got 0.0"),
        (PADDED, {"normalizer": -2}, ValueError, "normalizer must be greater than 0.*got -2"),
        (PADDED, {"normalizer": torch.tensor(0.0)}, ValueError, "normalizer must be greater than 0.*got 0.0"),
        (PADDED, {"normalizer": torch.ones(2)}, ValueError, r"normalizer must be a single number, got shape \(2,\)"),
        (PADDED, {"normalizer": torch.ones((), device="meta")}, ValueError, "normalizer must be on cpu.*got meta"),
        (PADDED, {"kl_coef": 0.1}, ValueError, r"ref_logprobs must be given when kl_coef is not 0 \(it is 0.1\)"),
        (PADDED, {"ref_logprobs": torch.zeros(3)}, ValueError, r"ref_logprobs must be .*got shape \(3,\)"),
        (PADDED, {"kl_estimator": "k4"}, ValueError, "kl_estimator must be one of 'k1', 'k2', 'k3', got 'k4'"),
        (PADDED, {"rollout_correction": "tis"}, ValueError, "rollout_correction must be one of .*got 'tis'"),
        (
            PADDED,
            {"rollout_correction": "token_truncate"},
            ValueError,
            "rollout_logprobs must be given when .*token_tr",
        ),
        (PADDED, {"rollout_logprobs": torch.zeros(3)}, ValueError, r"rollout_logprobs must be .*got shape \(3,\)"),
        (PADDED, {"rollout_cap": 0.0}, ValueError, "rollout_cap must be greater than 0, got 0.0"),
        (PADDED, {"backend": "cuda"}, ValueError, "backend must be one of reference, torch, triton.*got 'cuda'"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_wrong_input_is_named(backend, base, bad, error, says):
    if backend == "triton" and DEVICE == "cuda":
        pytest.skip("the tensors of this table are on the CPU")
    with pytest.raises(error, match=says):
        policy_loss(**{**base, "backend": backend, **bad})


@pytest.mark.gpu
def test_values_are_looked_at_only_when_asked(monkeypatch):
    tensors = packed([2, 3])
    monkeypatch.setenv("SPPO_KERNELS_CHECK", "1")
    with pytest.raises(ValueError, match="cu_seqlens must be rising"):
        policy_loss(**{**tensors, **{"cu_seqlens": offsets([2, 2])}})
    monkeypatch.delenv("SPPO_KERNELS_CHECK")
    policy_loss(**{**tensors, **{"cu_seqlens": offsets([2, 2])}})


@pytest.mark.gpu
def test_one_launch_and_no_host_sync():
    """Packed input: loss, metrics and gradient are one kernel, and the host never waits for it."""
    tensors = packed([700, 0, 1500, 1])
    arguments = {"ratio_level": "sequence_mean", "kl_coef": 0.1, "rollout_correction": "sequence_mask"}
    policy_loss(**tensors, **arguments).loss.backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as prof:
            policy_loss(**tensors, **arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    kernels = [e.name for e in prof.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert sum(name == "policy_loss_fwd_bwd_kernel" for name in kernels) == 1, kernels
    assert len([name for name in kernels if not name.startswith("Mem")]) <= 2, kernels  # ours, and a counter set to 0


@pytest.mark.gpu
@pytest.mark.parametrize("level", LEVELS)
def test_more_sequences_than_a_grid_axis_holds(level):
    check("triton", packed([2] * 70_000), ratio_level=level)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_derivative_is_refused(backend):
    tensors = packed([3, 2])
    out = policy_loss(**tensors, backend=backend)
    with pytest.raises(RuntimeError, match="policy_loss has no second derivative"):
        torch.autograd.grad(out.loss, tensors["logprobs"], create_graph=True)
