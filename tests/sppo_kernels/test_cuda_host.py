"""Host code for CUDA without a device: bodies of operations run on fake tensors, and their launches are checked."""

import warnings

import pytest
import torch

pytest.importorskip("triton")

from fake_cuda import FakeCUDA, registered_operations

from sppo_kernels.ops import policy_loss
from sppo_kernels.ops.linear_logprobs import auto_mode, sparse
from sppo_kernels.ops.linear_logprobs.matmul import row_stride
from sppo_kernels.ops.linear_logprobs.output import ForwardOutput
from sppo_kernels.ops.policy_loss.settings import Settings

OPS = registered_operations()
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
IGNORED = -100


@pytest.fixture
def cuda(monkeypatch):
    auto_mode.reset_defaults()
    with FakeCUDA(monkeypatch).active() as cuda:
        yield cuda
    auto_mode.reset_defaults()


def new_labels(cuda, n):
    return cuda.new(n, dtype=torch.int64)


def new_temperature(cuda, n, per_token=False):
    return cuda.new(n) if per_token else cuda.new(1).expand(n)


# Operations without an LM head


def selective_inputs(cuda, dtype, batch=3, length=700, vocab=50257):
    """Make labels and non-contiguous logits: those of all tokens but the last of each row."""
    logits = cuda.new(batch, length + 1, vocab, dtype=dtype)[:, :-1]
    return logits, new_labels(cuda, batch * length)


def selective(cuda, dtype):
    logits, labels = selective_inputs(cuda, dtype)
    tensors = {"logits": logits, "labels": labels, "temperature": new_temperature(cuda, len(labels))}
    return {**tensors, "softcap": 0.0, "ignore_index": IGNORED, "backend": "triton"}


def selective_backward(cuda, dtype):
    logits, labels = selective_inputs(cuda, dtype)
    n = len(labels)
    return {
        "grad_logprobs": cuda.new(1).expand(n),
        "grad_entropy": cuda.new(n),
        "logits": logits,
        "labels": labels,
        "temperature": new_temperature(cuda, n, True),
        "entropy": cuda.new(n),
        "row_stats": cuda.new(2, n),
        "softcap": 30.0,
        "ignore_index": IGNORED,
        "backend": "triton",
    }


def policy(cuda, dtype, n=10_000, sequences=7, per_token=False, optional=False, normalizer=False, **settings):
    """Make arguments of policy_loss, with the optional tensors if ``optional``."""
    new_optional = lambda: cuda.new(n) if optional else None
    defaults = Settings(
        ratio_level="token",
        clip_low=0.2,
        clip_high=0.2,
        dual_clip=None,
        aggregation="token-mean",
        kl_coef=0.0,
        kl_estimator="k3",
        rollout_correction="none",
        rollout_cap=2.0,
    )
    return {
        "logprobs": cuda.new(n, dtype=dtype),
        "old_logprobs": cuda.new(n),
        "advantages": cuda.new(n if per_token else sequences),
        "mask": cuda.new(n, dtype=torch.bool) if optional else None,
        "cu_seqlens": cuda.new(sequences + 1, dtype=torch.int32),
        "normalizer": cuda.new() if normalizer else None,
        "ref_logprobs": new_optional(),
        "rollout_logprobs": new_optional(),
        "per_token": per_token,
        **defaults._replace(**settings)._asdict(),
        "backend": "triton",
    }


def prompt_values(cuda, dtype, prompts=5, length=300, width=1000, packed=False):
    """Make arguments with non-contiguous hidden states: every other row."""
    hidden = cuda.new(1 if packed else prompts, 2 * length, width, dtype=dtype)[:, ::2]
    return {
        "hidden": hidden,
        "weight": cuda.new(width, dtype=dtype),
        "bias": cuda.new(1, dtype=dtype),
        "last_index": cuda.new(prompts, dtype=torch.int64),
        "backend": "triton",
    }


def prompt_value_loss(cuda, dtype, **shape):
    inputs = prompt_values(cuda, dtype, **shape)
    return {**inputs, "outcomes": cuda.new(len(inputs["last_index"])), "normalizer": cuda.new()}


def prompt_value_gradient(cuda, dtype, **shape):
    inputs = prompt_values(cuda, dtype, **shape)
    del inputs["bias"]
    return {**inputs, "grad_logits": cuda.new(1).expand(len(inputs["last_index"]))}


def gae(cuda, dtype, rows=6, length=900):
    tensors = {name: cuda.new(rows, length, dtype=dtype) for name in ("rewards", "values")}
    mask = cuda.new(length, rows, dtype=torch.bool).t()
    return {**tensors, "mask": mask, "gamma": 0.99, "lam": 0.95, "backend": "triton"}


# Operations with an LM head


def lm_head(cuda, dtype, n=600, width=64, vocab=50257, rank=0, bias=False, softcap=0.0, per_token=False):
    """Make hidden states, weights, bias, labels, temperature and softcap."""
    new = lambda *shape: cuda.new(*shape, dtype=dtype)
    hiddens, weights = [new(n, width)], [new(vocab, width)]
    if rank:
        hiddens.append(new(n, rank))
        weights.append(new(vocab, rank))
    return {
        "hiddens": hiddens,
        "weights": weights,
        "bias": new(vocab) if bias else None,
        "labels": new_labels(cuda, n),
        "temperature": new_temperature(cuda, n, per_token),
        "softcap": softcap,
    }


def linear(cuda, dtype, backward="recompute", budget=None, chunk_bytes=1, max_entries=64, **shape):
    return {
        **lm_head(cuda, dtype, **shape),
        "ignore_index": IGNORED,
        "backward": backward,
        "auto_key": "",
        "logits_budget_bytes": budget,
        "chunk_bytes": chunk_bytes,
        "mass_tolerance": 1e-4,
        "max_entries": max_entries,
        "group": "",
        "backend": "triton",
    }


def linear_backward(cuda, arguments, results, needs=None):
    """Make arguments of the backward pass from those and the results of a forward pass."""
    forward_only = ("logits_budget_bytes", "mass_tolerance", "max_entries")
    output = ForwardOutput(*results)._asdict()
    for name in ("logprobs", "dropped_mass", "num_entries"):
        del output[name]
    return {
        **{name: x for name, x in arguments.items() if name not in forward_only},
        **output,
        "grad_logprobs": cuda.new(len(arguments["labels"])),
        "grad_entropy": cuda.new(len(arguments["labels"])),
        "needs": needs_of(arguments) if needs is None else needs,
    }


def needs_of(arguments):
    return [True] * (2 * len(arguments["hiddens"])) + [arguments["bias"] is not None]


def linear_backward_arguments(cuda, dtype):
    arguments = linear(cuda, dtype)
    return linear_backward(cuda, arguments, OPS["linear_logprobs"](**arguments))


def linear_policy(cuda, dtype, n=600, sequences=5, backward="cache", **more):
    shape = {key: more.pop(key) for key in ("vocab", "rank", "bias", "softcap", "chunk_bytes") if key in more}
    arguments = linear(cuda, dtype, backward, n=n, **shape)
    loss = policy(cuda, torch.float32, n, sequences, **more)
    del loss["logprobs"]
    return {**arguments, **loss, "needs": needs_of(arguments)}


ARGUMENTS = {
    "gae": gae,
    "group_advantages": lambda cuda, dtype: {
        "rewards": cuda.new(100, dtype=dtype),
        "group_ids": cuda.new(100, dtype=torch.int64),
        "estimator": "grpo",
        "backend": "triton",
    },
    "linear_logprobs": linear,
    "linear_logprobs_backward": linear_backward_arguments,
    "linear_policy_loss": linear_policy,
    "policy_loss": policy,
    "prompt_value_grad_hidden": prompt_value_gradient,
    "prompt_value_grad_weight": prompt_value_gradient,
    "prompt_value_logits": prompt_values,
    "prompt_value_loss": prompt_value_loss,
    "selective_logprobs": selective,
    "selective_logprobs_backward": selective_backward,
    "whiten": lambda cuda, dtype: {
        "x": cuda.new(70, 90, dtype=dtype),
        "mask": cuda.new(90, 70, dtype=torch.bool).t(),
        "backend": "triton",
    },
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sorted(OPS))
def test_every_operation_launches(cuda, name, dtype):
    cuda.run(OPS[name], **ARGUMENTS[name](cuda, dtype))
    assert cuda.launches.made


def test_strided_logits_are_not_copied(cuda):
    """The slice [B, T, V] has two leading strides and more than 2^31 logits."""
    logits, labels = selective_inputs(cuda, torch.bfloat16, batch=9, length=5000)
    arguments = {**selective(cuda, torch.bfloat16), "logits": logits, "labels": labels}
    arguments["temperature"] = new_temperature(cuda, 45_000)
    cuda.launches.sizes = {"V": 50257, "T": 5000, "N": 45_000, "softcap": 0.0, "ignore_index": IGNORED}
    cuda.run(OPS["selective_logprobs"], **arguments)
    (launch,) = cuda.launches.made
    assert launch.grid == (45_000,)
    assert launch.arguments["x_ptr"] is logits
    assert launch.arguments["stride_b"] == 5001 * 50257


def test_empty_inputs_launch_nothing(cuda):
    empty, no_labels = cuda.new(0), new_labels(cuda, 0)
    no_logits = {"logits": cuda.new(0, 4, 9), "labels": no_labels, "temperature": new_temperature(cuda, 0)}
    for name, changed in {
        "selective_logprobs": no_logits,
        "linear_logprobs": linear(cuda, torch.bfloat16, n=0),
        "gae": gae(cuda, torch.float32, rows=0),
        "whiten": {"x": empty, "mask": empty.bool()},
        "group_advantages": {"rewards": empty, "group_ids": no_labels},
    }.items():
        cuda.run(OPS[name], **{**ARGUMENTS[name](cuda, torch.float32), **changed})
    assert not cuda.launches.made


LINEAR = {
    "bf16": (torch.bfloat16, {}),
    "fp16": (torch.float16, {"bias": True}),
    "fp32": (torch.float32, {"rank": 8}),
    "bias and adapter": (torch.bfloat16, {"bias": True, "rank": 8}),
    "softcap": (torch.float16, {"softcap": 30.0, "bias": True, "rank": 8, "per_token": True}),
    "vocabulary of 512": (torch.bfloat16, {"vocab": 512, "rank": 4}),
}


def expect(cuda, shape, ignore_index=IGNORED):
    """Expect these arguments of every kernel: vocabulary, softcap and ignored label."""
    softcap = shape.get("softcap", 0.0)
    names = {"V": shape.get("vocab", 50257), "softcap": softcap, "HAS_SOFTCAP": softcap > 0}
    cuda.launches.sizes = {**names, "ignore_index": ignore_index}


def assert_products_are_mixed(cuda, dtype):
    """Check that the factors are not converted and the results are float32."""
    assert cuda.products.made
    assert {product.dtype for product in cuda.products.made} == {dtype}
    assert {product.out_dtype for product in cuda.products.made} == {torch.float32}


@pytest.mark.parametrize(("dtype", "shape"), LINEAR.values(), ids=LINEAR)
def test_recompute(cuda, dtype, shape):
    """500 of 600 tokens are unmasked and 450 have gradients: two blocks of logit gradients, eight chunks of logits."""
    arguments = linear(cuda, dtype, **shape)
    expect(cuda, shape)
    cuda.reads.counts.extend([500])
    results = cuda.run(OPS["linear_logprobs"], **arguments)
    assert results[5].shape[0] == results[6].shape[0] == 0
    assert cuda.launches.names() == {"selective_logprobs_fwd_kernel"}
    assert sum(launch.grid[0] for launch in cuda.launches.made) == 500
    cuda.reads.counts.extend([500, 450])
    cuda.run(OPS["linear_logprobs_backward"], **linear_backward(cuda, arguments, results))
    assert sum(launch.grid[0] for launch in cuda.launches.of("selective_logprobs_bwd_kernel")) == 450
    assert_products_are_mixed(cuda, dtype)


@pytest.mark.parametrize("num_cached", [500, 300], ids=["all", "some"])
@pytest.mark.parametrize(("dtype", "shape"), LINEAR.values(), ids=LINEAR)
def test_cache(cuda, dtype, shape, num_cached):
    """Logit gradients of all tokens are cached and read in place, or those of 300, of which 290 are gathered."""
    row = row_stride(shape.get("vocab", 50257)) * dtype.itemsize
    arguments = linear(cuda, dtype, "cache", num_cached * row, **shape)
    expect(cuda, shape)
    cuda.reads.counts.extend([500])
    results = cuda.run(OPS["linear_logprobs"], **arguments)
    assert results[5].shape[0] == num_cached
    assert sum(launch.grid[0] for launch in cuda.launches.of("linear_logprobs_logit_grads_kernel")) == num_cached
    cuda.reads.counts.extend([500, num_cached, 0] if num_cached == 500 else [500, 290, 160])
    cuda.run(OPS["linear_logprobs_backward"], **linear_backward(cuda, arguments, results))
    assert bool(cuda.launches.of("selective_logprobs_bwd_kernel")) == (num_cached != 500)
    assert_products_are_mixed(cuda, dtype)


@pytest.mark.parametrize(("dtype", "shape"), LINEAR.values(), ids=LINEAR)
def test_sparse(cuda, dtype, shape):
    """Of 500 tokens, 400 have a sparse gradient, 50 are recomputed, and the others have no gradient."""
    arguments = linear(cuda, dtype, "sparse", **shape)
    expect(cuda, shape, sparse._NO_IGNORE_INDEX)
    cuda.reads.counts.extend([500])
    results = cuda.run(OPS["linear_logprobs"], **arguments)
    assert results[6].shape == results[7].shape == (500, 64)
    assert cuda.launches.names() == {
        "selective_logprobs_fwd_kernel",
        "linear_logprobs_candidates_kernel",
        "linear_logprobs_select_kernel",
    }
    expect(cuda, shape)
    cuda.reads.counts.extend([500, 400, 50, 4000])
    cuda.run(OPS["linear_logprobs_backward"], **linear_backward(cuda, arguments, results))
    assert cuda.launches.of("linear_logprobs_weighted_rows_kernel")
    assert sum(launch.grid[0] for launch in cuda.launches.of("selective_logprobs_bwd_kernel")) == 50
    assert_products_are_mixed(cuda, dtype)


def test_auto_caches_by_free_memory_then_goes_sparse(cuda):
    """The first call caches logit gradients in a quarter of the free memory, the second one is sparse."""
    row = row_stride(50257) * 2
    cuda.free = 4 * 200 * row
    arguments = linear(cuda, torch.bfloat16, "auto")
    expect(cuda, {})
    results = cuda.run(OPS["linear_logprobs"], **arguments)
    assert results[5].shape[0] == 200
    assert cuda.launches.names() == {
        "selective_logprobs_fwd_kernel",
        "linear_logprobs_logit_grads_kernel",
        "linear_logprobs_candidates_kernel",
        "linear_logprobs_select_kernel",
    }
    cuda.run(OPS["linear_logprobs_backward"], **linear_backward(cuda, arguments, results))
    expect(cuda, {}, sparse._NO_IGNORE_INDEX)
    cuda.reads.numbers.extend(
        [0.0, 0.0]
    )  # share of entropies with gradients, number of tokens without a sparse gradient
    results = OPS["linear_logprobs"]._init_fn(**arguments)
    assert results[6].shape[0] == 600
    assert not cuda.reads.numbers


def test_unused_cached_gradients_warn(cuda):
    arguments = linear(cuda, torch.bfloat16, "cache")
    results = cuda.run(OPS["linear_logprobs"], **arguments)
    cuda.reads.counts.extend([600, 0, 600])
    with pytest.warns(UserWarning, match="for nothing: the entropies have gradients"):
        cuda.run(OPS["linear_logprobs_backward"], **linear_backward(cuda, arguments, results))


@pytest.mark.parametrize("frozen", range(5))
def test_frozen_inputs_get_no_gradient(cuda, frozen):
    arguments = linear(cuda, torch.bfloat16, "cache", rank=8, bias=True)
    results = cuda.run(OPS["linear_logprobs"], **arguments)
    needs = [i != frozen for i in range(5)]
    grads = cuda.run(OPS["linear_logprobs_backward"], **linear_backward(cuda, arguments, results, needs))
    assert [grad.numel() > 0 for grad in grads] == needs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_autocast_does_not_change_products(cuda, dtype):
    arguments = linear(cuda, dtype, "cache", rank=8, bias=True)
    was_enabled = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "User provided device_type of 'cuda'")
            results = cuda.run(OPS["linear_logprobs"], **arguments)
            cuda.run(OPS["linear_logprobs_backward"], **linear_backward(cuda, arguments, results))
    finally:
        torch.set_autocast_enabled("cuda", was_enabled)
    assert_products_are_mixed(cuda, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_single_row_is_not_taken_for_a_bias(cuda, dtype):
    """With TunableOp PyTorch rejects it. The cases: a chunk of one token with an adapter, a vocabulary of one."""
    for shape in ({"n": 65, "rank": 8}, {"n": 300, "vocab": 1}):
        arguments = linear(cuda, dtype, **shape)
        results = cuda.run(OPS["linear_logprobs"], **arguments)
        cuda.run(OPS["linear_logprobs_backward"], **linear_backward(cuda, arguments, results))
    assert 1 in {product.shape[0] for product in cuda.products.made}
    assert_products_are_mixed(cuda, dtype)


POLICIES = [
    {"normalizer": True},
    {"per_token": True, "aggregation": "seq-mean-token-mean"},
    {"optional": True, "dual_clip": 3.0, "kl_coef": 0.1, "aggregation": "seq-mean-token-sum"},
    {"optional": True, "rollout_correction": "sequence_mask", "kl_estimator": "k1"},
]


@pytest.mark.parametrize("settings", POLICIES, ids=range(len(POLICIES)))
@pytest.mark.parametrize("level", policy_loss.RATIO_LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_policy_loss(cuda, dtype, level, settings):
    coefficients = {name: settings.get(name, default) for name, default in (("dual_clip", None), ("kl_coef", 0.0))}
    cuda.launches.sizes = {"B": 7, "BLOCK": 1024, "RATIO_LEVEL": level, **coefficients}
    cuda.run(OPS["policy_loss"], **policy(cuda, dtype, ratio_level=level, **settings))
    *sums, launch = cuda.launches.made
    assert launch.kernel == "policy_loss_fwd_bwd_kernel"
    # 10,000 tokens fill 9 blocks of 1,024; the cuts between 7 sequences make at most 7 more pieces.
    assert launch.grid == (9 + 7,)
    masked_mean = settings.get("optional", False) and settings.get("aggregation", "token-mean") != "token-mean"
    weight_of_sequence = "rollout_correction" in settings
    assert [first.kernel for first in sums] == ["policy_loss_sums_kernel"] * (
        level != "token" or weight_of_sequence or masked_mean
    )
    assert all(first.grid == launch.grid for first in sums)


@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("level", policy_loss.RATIO_LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_policy_loss(cuda, dtype, level, optional):
    """500 of 600 tokens are unmasked, in three blocks of complete sequences or two of tokens; half have gradients."""
    sizes = [256, 244] if level == "token" else [200, 210, 90]
    if level != "token":
        cuda.reads.numbers.extend([100, 200, 200, 410, 500])
    cuda.reads.counts.extend([500] + [x for size in sizes for x in (size // 2, size - size // 2)])
    shape = {"rank": 8, "bias": True, "softcap": 30.0} if optional else {}
    expect(cuda, shape)
    cuda.run(OPS["linear_policy_loss"], **linear_policy(cuda, dtype, ratio_level=level, optional=optional, **shape))
    assert len(cuda.launches.of("policy_loss_fwd_bwd_kernel")) == len(sizes) + 1
    assert sum(launch.grid[0] for launch in cuda.launches.of("linear_logprobs_logit_grads_kernel")) == 500
    assert_products_are_mixed(cuda, dtype)


@pytest.mark.parametrize("packed", [False, True])
def test_prompt_values(cuda, packed):
    cuda.launches.sizes = {"B": 5, "T": 300, "H": 1000}
    for name in ("prompt_value_loss", "prompt_value_grad_hidden", "prompt_value_grad_weight"):
        cuda.run(OPS[name], **ARGUMENTS[name](cuda, torch.bfloat16, packed=packed))
    assert len(cuda.launches.made) == 3
