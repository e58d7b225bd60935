"""Tests of linear_policy_loss against float64 and its two component operations, and of its FLOPs and memory."""

import logging
from itertools import cycle, pairwise, product

import pytest
import torch
from against_float64 import BACKENDS, DEVICE, DTYPES, randint, randn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from sppo_kernels import PolicyLossOutput, linear_logprobs, linear_policy_loss, policy_loss, reference
from sppo_kernels.ops.linear_logprobs import auto_mode
from sppo_kernels.ops.linear_logprobs.matmul import row_stride
from sppo_kernels.ops.linear_policy_loss import op as module
from sppo_kernels.ops.policy_loss import AGGREGATIONS, RATIO_LEVELS, ROLLOUT_CORRECTIONS

IGNORED = -100
MODES = ["recompute", "cache", "sparse"]
LENGTHS = (3, 0, 1, 9, 4)
SMALL_CHUNKS = {"chunk_bytes": 1}  # 256 tokens per block, the minimum


@pytest.fixture(autouse=True)
def _no_history():
    auto_mode.reset_defaults()


def batch(
    lengths=LENGTHS, width=8, vocab=41, dtype=torch.float32, spread=1.0, drift=0.3, per_token=False, extras=False
):
    """Return arguments by name, with old log-probabilities that differ by ``drift`` so that some ratios are clipped."""
    n = sum(lengths)
    given = {
        "hidden": randn(n, width, dtype=dtype, scale=spread, grad=True),
        "weight": randn(vocab, width, dtype=dtype, scale=width**-0.5, grad=True),
        "labels": randint(0, vocab, n),
        "advantages": randn(n if per_token else len(lengths)),
        "cu_seqlens": torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int(),
    }
    given["labels"][2::5] = IGNORED
    with torch.no_grad():
        exact = reference.linear_logprobs(given["hidden"], given["weight"], given["labels"])
    shift = torch.repeat_interleave(randn(len(lengths)), torch.tensor(lengths, device=DEVICE, dtype=torch.long))
    given["old_logprobs"] = exact.logprobs + drift * (randn(n) + shift)
    if extras:
        given["mask"] = torch.arange(n, device=DEVICE) % 7 != 3
        given["bias"] = randn(vocab, dtype=dtype, grad=True)
        given["adapter"] = (randn(n, 2, dtype=dtype, grad=True), randn(vocab, 2, dtype=dtype, grad=True))
        given["ref_logprobs"] = given["old_logprobs"] + 0.1 * randn(n)
        given["rollout_logprobs"] = given["old_logprobs"] + 0.1 * randn(n)
    return given


def leaves_of(given):
    """Return the tensors that require a gradient."""
    tensors = [given["hidden"], given["weight"], given.get("bias"), *given.get("adapter", ())]
    return [x for x in tensors if x is not None and x.requires_grad]


def composition(hidden, weight, labels, old_logprobs, advantages, *, mask=None, **settings):
    """Compute the loss with linear_logprobs followed by policy_loss."""
    logprob_names = ("bias", "adapter", "temperature", "softcap", "backward", "chunk_bytes", "logits_budget_bytes")
    logprob_names += ("mass_tolerance", "max_entries", "backend")
    logprob_settings = {name: value for name, value in settings.items() if name in logprob_names}
    loss_settings = {name: value for name, value in settings.items() if name not in logprob_names or name == "backend"}
    loss_mask = (labels != IGNORED) & (True if mask is None else mask)
    logprobs = linear_logprobs(hidden, weight, torch.where(loss_mask, labels, IGNORED), **logprob_settings).logprobs
    return policy_loss(logprobs, old_logprobs, advantages, mask=loss_mask, **loss_settings)


def double(given):
    """Return the arguments in float64."""
    cast = lambda x: x.detach().double().requires_grad_(x.requires_grad)
    floats = {name: cast(x) for name, x in given.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
    adapter = {"adapter": tuple(map(cast, given["adapter"]))} if "adapter" in given else {}
    return {**given, **floats, **adapter}


def results(op, given, **settings):
    """Return the output and the gradients of ``leaves_of(given)``."""
    per_token = {"return_per_token": True} if op is linear_policy_loss else {}
    out = op(**given, **per_token, **settings)
    return out, torch.autograd.grad(out.loss, leaves_of(given))


def relative(x, y):
    return float((x.double() - y).norm() / y.norm().clamp(min=1e-30))


def check(given, backend, mode, **settings):
    """Check that the result is as close to float64 as the composition of both operations, and almost equal to it."""
    got, grads = results(linear_policy_loss, given, backend=backend, backward=mode, **settings)
    composed, composed_grads = results(composition, given, backend=backend, backward=mode, **settings)
    mode_names = ("chunk_bytes", "logits_budget_bytes", "mass_tolerance", "max_entries")
    plain = {name: value for name, value in settings.items() if name not in mode_names}
    exact, exact_grads = results(reference.linear_policy_loss, double(given), **plain)
    eps = torch.finfo(given["hidden"].dtype).eps
    torch.testing.assert_close(got.loss, composed.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.loss.double(), exact.loss, rtol=1e-4, atol=1e-5)
    for name, metric in composed.metrics.items():
        torch.testing.assert_close(got.metrics[name], metric, rtol=1e-5, atol=1e-6, msg=name)
    torch.testing.assert_close(got.metrics["entropy"].double(), exact.metrics["entropy"], rtol=1e-4, atol=1e-5)
    for x, y, z, leaf in zip(grads, composed_grads, exact_grads, leaves_of(given), strict=True):
        assert x.dtype == leaf.dtype
        assert relative(x, z) <= 2 * relative(y, z) + 8 * eps
    return got


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ratio_level", RATIO_LEVELS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_agrees_with_the_two_operations_and_with_float64(backend, ratio_level, mode):
    """Aggregations, corrections, dual clip, KL, advantages per sequence or token, mask, bias and adapter."""
    cases = list(product((False, True), AGGREGATIONS, (None, *ROLLOUT_CORRECTIONS)))
    if backend == "triton" and DEVICE == "cpu":  # interpreted: each option once, not all combinations
        cases = list(zip(cycle((False, True)), cycle(AGGREGATIONS), (None, *ROLLOUT_CORRECTIONS), strict=False))
    for per_token, aggregation, correction in cases:
        given = batch(per_token=per_token, extras=True)
        settings = {
            "ratio_level": ratio_level, "aggregation": aggregation, "dual_clip": 1.5, "kl_coef": 0.1,
            "rollout_correction": correction, "rollout_cap": 1.1, "softcap": 5.0, "temperature": 0.7, "normalizer": 7.0,
            "mass_tolerance": 1e-7, "max_entries": 32,
        }  # fmt: skip
        check(given, backend, mode, **settings)


@pytest.mark.parametrize("backend", BACKENDS)
def test_cispo_and_weights_masked_on_both_sides(backend):
    settings = {"rollout_correction": "token_mask", "rollout_floor": 0.9, "rollout_cap": 1.1, "clip_high": 0.05}
    for per_token in (False, True):
        check(batch(per_token=per_token, extras=True), backend, "cache", objective="cispo", **settings)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ratio_level", RATIO_LEVELS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_several_blocks(small_blocks, backend, ratio_level, dtype):
    """Sequences that share a block and one longer than a block, with all, some or no logit gradients cached."""
    given = batch(lengths=(7, 8, 0, 24, 2, 6), dtype=dtype)
    some = 9 * row_stride(41) * dtype.itemsize
    budgets = [("cache", some)] + [("cache", None), ("recompute", None)] * (backend == "torch" or DEVICE == "cuda")
    settings = {"ratio_level": ratio_level, "clip_low": 0.05, "clip_high": 0.05}
    for mode, budget in budgets:
        out = check(given, backend, mode, logits_budget_bytes=budget, **settings)
    assert 0 < out.metrics["clip_fraction"] < 1


def passes(given, **settings):
    """Return the output and the passes over tokens with a loss, counted by the profiler and the FLOP counter."""
    run = lambda: results(linear_policy_loss, given, backend="torch", **settings)
    with FlopCounterMode(display=False) as counter:
        run()
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as profiler:
        out, _ = run()
    seen = sum(event.flops for event in profiler.events() if event.name in ("aten::mm", "aten::addmm"))
    assert counter.get_total_flops() == seen
    return out, seen / (2 * int((given["labels"] != IGNORED).sum()) * given["weight"].numel())


@pytest.mark.parametrize("ratio_level", RATIO_LEVELS)
@pytest.mark.parametrize(("mode", "backward_passes"), [("cache", 2), ("auto", 2), ("recompute", 3)])
def test_clipped_tokens_and_sequences_cost_only_the_forward(ratio_level, mode, backward_passes):
    given = batch(lengths=(100, 120, 0, 300, 5, 90), drift=0.0)
    given["old_logprobs"][120:] -= 1.0  # the ratio is e
    given["advantages"].abs_()
    out, found = passes(given, backward=mode, ratio_level=ratio_level, **SMALL_CHUNKS)
    loss_mask = given["labels"] != IGNORED
    clipped = loss_mask.clone()
    clipped[:120] = False
    if ratio_level != "token":  # the second sequence is clipped too, because most of its tokens have moved
        clipped[100:] = loss_mask[100:]
    assert found == pytest.approx(1 + backward_passes * (1 - float(clipped.sum() / loss_mask.sum())), abs=0.01)
    assert out.metrics["clip_fraction"] > 0.5


@pytest.mark.slow
def test_peaked_distributions_take_one_pass():
    given = batch(lengths=(100, 300), width=64, vocab=3000, spread=400.0, drift=0.0)
    _, found = passes(given, backward="sparse", **SMALL_CHUNKS)
    assert found == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("ratio_level", RATIO_LEVELS)
def test_allocates_at_most_one_block(ratio_level):
    given = batch(lengths=[200] * 10, vocab=64)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        results(linear_policy_loss, given, backend="torch", backward="cache", ratio_level=ratio_level, **SMALL_CHUNKS)
    sizes = [event.nbytes() for event in prof.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert max(sizes) <= 4 * 256 * 64


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("ratio_level", RATIO_LEVELS)
def test_no_tokens_with_a_loss_give_zero(backend, ratio_level):
    for lengths in ((4, 3), (0, 0), ()):
        given = batch(lengths=lengths)
        given["labels"].fill_(IGNORED)
        out, grads = results(linear_policy_loss, given, backend=backend, ratio_level=ratio_level)
        assert out.loss == 0
        assert out.metrics["ratio_mean"] == 1
        assert out.metrics["entropy"] == 0
        assert not any(grad.count_nonzero() for grad in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_of_tokens_without_a_loss_are_ignored(backend):
    given = batch(extras=True)
    given["hidden"].data[2::5] = float("nan")
    for name in ("old_logprobs", "ref_logprobs", "rollout_logprobs"):
        given[name][2::5] = float("nan")
    out, grads = results(linear_policy_loss, given, backend=backend, kl_coef=0.1, rollout_correction="sequence_mask")
    assert out.loss.isfinite()
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[0][2::5].count_nonzero()
    assert not out.logprobs[2::5].count_nonzero()


@pytest.mark.parametrize("backend", BACKENDS)
def test_per_token_results_equal_linear_logprobs(backend):
    """Per-token results and certificate are detached and equal those of linear_logprobs to the bit."""
    given = batch(spread=30.0)
    settings = {"backend": backend, "backward": "sparse"}
    out = linear_policy_loss(**given, **settings, return_per_token=True)
    arguments = given["hidden"], given["weight"], given["labels"]
    want = linear_logprobs(*arguments, **settings, return_certificate=True)
    assert torch.equal(out.logprobs, want.logprobs)
    assert torch.equal(out.entropy, want.entropy)
    assert torch.equal(out.certificate.num_entries, want.certificate.num_entries)
    assert not any(x.requires_grad for x in (out.logprobs, out.entropy, *out.certificate))
    cached = linear_policy_loss(**given, backend=backend, backward="cache", return_per_token=True)
    assert cached.certificate.cached_share == 1
    assert type(linear_policy_loss(**given)) is PolicyLossOutput


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_inputs_get_no_gradient_and_no_cache(backend):
    given = batch()
    given["weight"].requires_grad_(False)
    _, (dh,) = results(linear_policy_loss, given, backend=backend)
    given["weight"].requires_grad_()
    _, (want, _) = results(linear_policy_loss, given, backend=backend)
    torch.testing.assert_close(dh, want)
    with torch.no_grad():
        out = linear_policy_loss(**given, backend=backend, backward="cache", return_per_token=True)
    assert not out.loss.requires_grad
    assert out.certificate.cached_share == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_gradients_with_a_loss_scale(backend):
    """Unscaled gradients of a mean over this many tokens would underflow before the loss scale is applied."""
    given = batch(lengths=(40, 40), dtype=torch.float16)
    scale = 2.0**14
    out = linear_policy_loss(**given, backend=backend, normalizer=1e6)
    grads = torch.autograd.grad(out.loss * scale, leaves_of(given))
    _, exact = results(reference.linear_policy_loss, double(given), normalizer=1e6)
    for x, y in zip(grads, exact, strict=True):
        assert relative(x, y * scale) < 5e-3


@pytest.mark.parametrize("mode", ["cache", "recompute"])
@pytest.mark.parametrize("advantages", [[0.0, 1.0], [1.0, 0.0], [1e-4, 1.0]])
def test_float16_block_of_zero_gradients_before_another(advantages, mode):
    """Zeros must not set the scale of later blocks. With a loss on four of five tokens, each sequence is a block."""
    given = batch(lengths=(320, 320), dtype=torch.float16, vocab=64)
    given["advantages"] = torch.tensor(advantages, device=DEVICE)
    settings = {"normalizer": 1e9, "backward": mode, **SMALL_CHUNKS}
    grads = torch.autograd.grad(linear_policy_loss(**given, **settings).loss * 2.0**30, leaves_of(given))
    _, exact = results(reference.linear_policy_loss, double(given), normalizer=1e9)
    for x, y in zip(grads, exact, strict=True):
        assert relative(x, y * 2.0**30) < 3e-3


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_masked_labels_are_ignored_in_any_integer_dtype(backend):
    given = batch()
    want, _ = results(linear_policy_loss, {**given, "mask": given["labels"] != IGNORED}, backend=backend)
    labels = torch.where(given["labels"] == IGNORED, 200, given["labels"])
    mask = given["labels"] != IGNORED
    got, _ = results(linear_policy_loss, {**given, "labels": labels.to(torch.uint8), "mask": mask}, backend=backend)
    assert torch.equal(got.loss, want.loss)


def test_float32_bias_of_a_bfloat16_head_has_float32_gradient():
    given = {**batch(dtype=torch.bfloat16), "bias": randn(41, grad=True)}
    _, (*_, got) = results(linear_policy_loss, given)
    _, (*_, want) = results(composition, given)
    assert relative(got, want.double()) < 1e-4
    assert not torch.equal(got, got.bfloat16().float())


def test_entropy_gradients_of_linear_logprobs_do_not_affect_it():
    given = batch()
    out = linear_logprobs(given["hidden"], given["weight"], given["labels"])
    with pytest.warns(UserWarning, match="for nothing"):
        (out.logprobs.sum() + out.entropy.sum()).backward()
    assert linear_policy_loss(**given, return_per_token=True).certificate.cached_share == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_twice_scaled_and_into_a_tied_weight(backend):
    given = batch()
    out = linear_policy_loss(**given, backend=backend)
    leaves = leaves_of(given)
    once = torch.autograd.grad(out.loss, leaves, retain_graph=True)
    twice = torch.autograd.grad(3 * out.loss + given["weight"].sum(), leaves)
    torch.testing.assert_close(twice[0], 3 * once[0])
    torch.testing.assert_close(twice[1], 3 * once[1] + 1)
    out = linear_policy_loss(**given, backend=backend)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(out.loss, leaves, create_graph=True)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ratio_level", RATIO_LEVELS)
def test_same_bits_every_run(backend, ratio_level):
    given = batch(lengths=(100, 0, 200, 30) if backend == "torch" else (5, 0, 9), spread=10.0)
    for mode in MODES:
        settings = {"backend": backend, "backward": mode, "ratio_level": ratio_level, "max_entries": 16, **SMALL_CHUNKS}
        (first, grads), (second, second_grads) = (results(linear_policy_loss, given, **settings) for _ in range(2))
        assert torch.equal(first.loss, second.loss)
        assert all(torch.equal(x, y) for x, y in zip(grads, second_grads, strict=True))


def test_micro_batches_add_up_to_the_update():
    """With the normalizer of the update, gradients of micro-batches add up to those of the full batch."""
    lengths = (30, 50, 20)
    given = batch(lengths=lengths)
    tokens = int((given["labels"] != IGNORED).sum())
    full, (_, want) = results(linear_policy_loss, given)
    total, loss, ends = 0, 0, [0, 30, 80, 100]
    for i, (first, last) in enumerate(pairwise(ends)):
        rows = slice(first, last)
        part = {name: given[name][rows] for name in ("hidden", "labels", "old_logprobs")}
        part |= {"advantages": given["advantages"][i : i + 1], "cu_seqlens": torch.tensor([0, last - first]).int()}
        out = linear_policy_loss(**part, weight=given["weight"], normalizer=tokens)
        total = total + torch.autograd.grad(out.loss, given["weight"])[0]
        loss = loss + out.loss
    torch.testing.assert_close(total, want, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss, full.loss)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_rounds_inputs_and_not_logits(dtype):
    given = batch()
    with torch.autocast(DEVICE, dtype=dtype):
        out = linear_policy_loss(**given, return_per_token=True)
        expected = linear_policy_loss(**given, backend="reference", return_per_token=True)
    torch.testing.assert_close(out.logprobs, expected.logprobs, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(out.loss, leaves_of(given))
    rounded = {**given, **{name: given[name].detach().to(dtype).requires_grad_() for name in ("hidden", "weight")}}
    want, want_grads = results(linear_policy_loss, rounded)
    assert torch.equal(out.loss, want.loss)
    for x, y in zip(grads, want_grads, strict=True):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, y.float(), rtol=1e-2, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("backward", [*MODES, "auto"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_graph_breaks(backend, backward):
    torch.compiler.reset()
    given = batch()
    leaves = leaves_of(given)

    def loss(**given):
        out = linear_policy_loss(**given, backend=backend, backward=backward, ratio_level="sequence_mean")
        return 2 * out.loss, out.metrics["entropy"]

    compiled, entropy = torch.compile(loss, fullgraph=True, backend="aot_eager")(**given)
    eager, entropy_eager = loss(**given)
    torch.testing.assert_close((compiled, entropy), (eager, entropy_eager))
    for x, y in zip(torch.autograd.grad(compiled, leaves), torch.autograd.grad(eager, leaves), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fake_tensors(backend, dtype):
    given = batch(dtype=dtype)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = {name: mode.from_tensor(x) for name, x in given.items()}
        out = linear_policy_loss(**fake, backend=backend)
        assert out.loss.shape == ()
        out.loss.backward()
        for name in ("hidden", "weight"):
            assert (fake[name].grad.shape, fake[name].grad.dtype) == (given[name].shape, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needs", [[True, True, True, True, True], [True, False, False, True, False]])
def test_registration_passes_opcheck(backend, needs):
    given = batch(extras=True)
    u, b = given["adapter"]
    pairs = [given["hidden"].detach(), u.detach()], [given["weight"].detach(), b.detach()]
    names = ("old_logprobs", "advantages", "mask", "cu_seqlens", "normalizer", "ref_logprobs", "rollout_logprobs")
    temperature = torch.ones_like(given["old_logprobs"])
    tensors = *pairs, given["bias"].detach(), given["labels"], temperature, None, None, *map(given.get, names)
    settings = {
        "softcap": 2.0,
        "ignore_index": IGNORED,
        "backward": "cache",
        "auto_key": "",
        "logits_budget_bytes": None,
        "chunk_bytes": 1000,
        "mass_tolerance": 1e-4,
        "max_entries": 8,
        "projection": "vendor",
        "group": "",
        "backend": backend,
        "needs": needs,
        "per_token": False,
        "objective": "clip",
        "ratio_level": "sequence_mean",
        "clip_low": 0.2,
        "clip_high": 0.2,
        "dual_clip": None,
        "aggregation": "token-mean",
        "kl_coef": 0.1,
        "kl_estimator": "k3",
        "rollout_correction": "none",
        "rollout_floor": 0.0,
        "rollout_cap": 2.0,
    }
    operation = module.linear_policy_loss
    torch.library.opcheck(operation.overload, tensors, settings, test_utils=("test_schema", "test_faketensor"))


def test_debug_log_reports_mode_and_blocks(caplog):
    given = batch(lengths=(100, 120, 300))
    with caplog.at_level(logging.DEBUG, logger="sppo_kernels"):
        linear_policy_loss(**given, ratio_level="sequence_mean", backward="cache", **SMALL_CHUNKS)
    assert caplog.messages[0] == "416 of 520 tokens have a loss, in 2 blocks (cache)"


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"hidden": torch.zeros(1, 17, 8)}, ValueError, r"hidden must be \[N, H\], packed.*got shape \(1, 17, 8\)"),
        ({"labels": torch.full((17,), 41)}, ValueError, r"labels must be in \[0, 41\)"),
        ({"old_logprobs": torch.zeros(16)}, ValueError, r"old_logprobs must be of shape \(17,\)"),
        ({"old_logprobs": None}, TypeError, "old_logprobs must be a torch.Tensor, got None"),
        ({"advantages": torch.zeros(4)}, ValueError, r"advantages must be of shape \(5,\), one per sequence"),
        ({"cu_seqlens": None}, TypeError, "cu_seqlens must be a torch.Tensor, got None"),
        ({"cu_seqlens": torch.tensor([0, 3])}, ValueError, "cu_seqlens must be int32"),
        ({"cu_seqlens": torch.tensor([0, 3, 3, 4, 13, 16]).int()}, ValueError, "rising from 0 to .* tokens, 17"),
        ({"mask": torch.ones(16)}, ValueError, r"mask must be of shape \(17,\)"),
        ({"ratio_level": "word"}, ValueError, "ratio_level must be one of"),
        ({"kl_coef": 0.1}, ValueError, "ref_logprobs must be given when kl_coef is not 0"),
        ({"normalizer": 0}, ValueError, "normalizer must be greater than 0"),
        ({"backward": "magic"}, ValueError, "backward must be one of"),
        ({"temperature": 0.0}, ValueError, "temperature must be greater than 0"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_errors_name_the_invalid_argument(backend, bad, error, message):
    given = {name: x.cpu() for name, x in batch().items()}
    with pytest.raises(error, match=message):
        linear_policy_loss(**{**given, "backend": backend, **bad})
