"""Host code of the operations with an LM head, as in test_cuda_host.py: products, launches, waits and memory."""

import math
import warnings

import pytest
import torch

pytest.importorskip("triton")

from cuda_arguments import DTYPES, IGNORED, OPS, linear, linear_backward, linear_policy, new_support
from fake_cuda import FakeCUDA

from sppo_kernels.ops import policy_loss
from sppo_kernels.ops.linear_logprobs import auto_mode, sparse
from sppo_kernels.ops.linear_logprobs.matmul import row_stride
from sppo_kernels.ops.linear_logprobs.output import ForwardOutput


@pytest.fixture
def cuda(monkeypatch):
    auto_mode.reset_defaults()
    with FakeCUDA(monkeypatch).active() as cuda:
        yield cuda
    auto_mode.reset_defaults()


LINEAR = {
    "bf16": (torch.bfloat16, {}),
    "fp16": (torch.float16, {"bias": True}),
    "fp32": (torch.float32, {"rank": 8}),
    "bias and adapter": (torch.bfloat16, {"bias": True, "rank": 8}),
    "softcap": (torch.float16, {"softcap": 30.0, "bias": True, "rank": 8, "per_token": True}),
    "vocabulary of 512": (torch.bfloat16, {"vocab": 512, "rank": 4}),
}


def expect(cuda, shape):
    """Expect these arguments of every kernel: vocabulary, softcap and ignored label.

    Selection and backward run on tokens with a loss, and ignore none.
    """
    softcap = shape.get("softcap", 0.0)
    vocab = shape.get("vocab", 50257)
    cuda.launches.sizes = {
        "V": vocab,
        "softcap": softcap,
        "HAS_SOFTCAP": softcap > 0,
        "selective_logprobs_fwd_kernel.ignore_index": lambda given: (
            IGNORED if given["maxima_ptr"] is None else sparse.NO_IGNORE_INDEX
        ),
        "selective_logprobs_bwd_kernel.ignore_index": sparse.NO_IGNORE_INDEX,
        "linear_logprobs_scaled_rows_kernel.V": lambda given: 0 if given["weight_ptr"] is None else vocab,
    }


def rows_of(cuda, kernel, output=None):
    """Count the rows of all launches of a kernel, or of those that write ``output``."""
    made = cuda.launches.of(kernel)
    return sum(launch.rows for launch in made if output is None or launch.arguments[output] is not None)


def assert_products_are_mixed(cuda, dtype, own=()):
    """Check that the factors are not converted and the results are float32.

    With bfloat16 factors the products of the shapes ``own`` are complete gradients of a weight: theirs are bfloat16.
    """
    assert cuda.products.made
    assert {product.dtype for product in cuda.products.made} == {dtype}
    others = [product for product in cuda.products.made if product.out_dtype != torch.float32]
    assert sorted(product.shape for product in others) == (sorted(own) if dtype == torch.bfloat16 else [])
    assert {(product.out_dtype, product.added) for product in others} <= {(dtype, False)}


@pytest.mark.parametrize(("dtype", "shape"), LINEAR.values(), ids=LINEAR)
def test_recompute(cuda, dtype, shape):
    """500 of 600 tokens are unmasked and 450 have gradients: two blocks of logit gradients, eight chunks of logits."""
    arguments = linear(cuda, dtype, **shape)
    expect(cuda, shape)
    cuda.reads.counts.extend([500])
    results = cuda.run(OPS["linear_logprobs"], **arguments)
    output = ForwardOutput(*results)
    assert len(output.tokens) == 500
    assert len(output.cached_probs) == len(output.sparse_index) == 0
    assert cuda.launches.names() == {"selective_logprobs_fwd_kernel"}
    assert rows_of(cuda, "selective_logprobs_fwd_kernel") == 500
    assert rows_of(cuda, "selective_logprobs_fwd_kernel", "prob_ptr") == 0
    assert rows_of(cuda, "selective_logprobs_fwd_kernel", "maxima_ptr") == 0
    cuda.kinds.append((450, 0, 0))
    cuda.run(OPS["linear_logprobs_backward"], **linear_backward(cuda, arguments, results))
    assert rows_of(cuda, "selective_logprobs_bwd_kernel") == 450
    assert_products_are_mixed(cuda, dtype)


@pytest.mark.parametrize(("dtype", "shape"), LINEAR.values(), ids=LINEAR)
def test_recompute_by_columns(cuda, dtype, shape):
    """Logits of 450 tokens are made once, a block of columns at a time, and each block's d weight in one product."""
    arguments = linear(cuda, dtype, chunk_bytes=64 << 20, **shape)
    vocab, rank = shape.get("vocab", 50257), shape.get("rank", 0)
    results = cuda.run(OPS["linear_logprobs"], **arguments)
    cuda.products.made.clear()
    expect(cuda, shape)
    cuda.launches.sizes["selective_logprobs_bwd_kernel.V"] = lambda given: given["V"]
    cuda.kinds.append((450, 0, 0))
    cuda.run(OPS["linear_logprobs_backward"], **linear_backward(cuda, arguments, results))
    launches = cuda.launches.of("selective_logprobs_bwd_kernel")
    columns = [launch.arguments["V"] for launch in launches]
    assert sum(columns) == vocab
    assert (len(columns) > 1) == (vocab > 4096)
    assert {launch.rows for launch in launches} == {450}
    widths = [64, rank] if rank else [64]
    weight_products = [(size, 450, width) for size in columns for width in widths]
    made = [product for product in cuda.products.made if product.shape in weight_products]
    assert sorted(product.shape for product in made) == sorted(weight_products)
    assert not any(product.added for product in made)
    # Logits, d hidden and d weight.
    assert sum(math.prod(product.shape) for product in cuda.products.made) == 3 * 450 * vocab * sum(widths)
    assert_products_are_mixed(cuda, dtype, own=weight_products)


@pytest.mark.parametrize(
    ("backward", "kinds"), [("recompute", (600, 0, 0)), ("cache", (0, 600, 0)), ("sparse", (0, 0, 600))]
)
def test_a_single_product_needs_no_float32_gradient_of_the_weight(cuda, backward, kinds):
    """With blocks of 256 tokens dense d weight has several contributions, which are added in float32."""
    needs_float32 = {}
    for chunk_bytes in (1, 64 << 20):
        arguments = linear(cuda, torch.bfloat16, backward, chunk_bytes=chunk_bytes, width=1024)
        results = cuda.run(OPS["linear_logprobs"], **arguments)
        cuda.kinds.append(kinds)
        if kinds[2] and chunk_bytes == 1:
            cuda.reads.numbers.extend([0, 12_800, 25_600, 38_400])  # bounds of the entries of three blocks
        cuda.allocations.made.clear()
        cuda.run(OPS["linear_logprobs_backward"], **linear_backward(cuda, arguments, results))
        needs_float32[chunk_bytes] = cuda.allocations.largest(torch.float32) >= 4 * 50257 * 1024
    assert needs_float32 == {1: backward != "sparse", 64 << 20: False}


@pytest.mark.parametrize("num_cached", [500, 300], ids=["all", "some"])
@pytest.mark.parametrize(("dtype", "shape"), LINEAR.values(), ids=LINEAR)
def test_cache(cuda, dtype, shape, num_cached):
    """Probabilities of all tokens are cached and read in place, or those of 300, of which 290 are gathered."""
    row = row_stride(shape.get("vocab", 50257)) * dtype.itemsize
    arguments = linear(cuda, dtype, "cache", num_cached * row, **shape)
    expect(cuda, shape)
    cuda.reads.counts.extend([500])
    results = cuda.run(OPS["linear_logprobs"], **arguments)
    output = ForwardOutput(*results)
    assert len(output.cached_probs) == output.cached_factors.shape[1] == num_cached
    assert cuda.launches.names() == {"selective_logprobs_fwd_kernel"}
    assert rows_of(cuda, "selective_logprobs_fwd_kernel") == 500
    assert rows_of(cuda, "selective_logprobs_fwd_kernel", "prob_ptr") == num_cached
    assert rows_of(cuda, "selective_logprobs_fwd_kernel", "factor_ptr") == num_cached
    num_recomputed = 0 if num_cached == 500 else 160
    cuda.kinds.append((num_recomputed, 500 if num_cached == 500 else 290, 0))
    cuda.allocations.made.clear()
    cuda.run(OPS["linear_logprobs_backward"], **linear_backward(cuda, arguments, results))
    assert rows_of(cuda, "selective_logprobs_bwd_kernel") == num_recomputed
    assert (cuda.allocations.largest(dtype) < 128 * row) == (num_cached == 500)
    assert cuda.launches.of("linear_logprobs_scaled_rows_kernel")
    assert cuda.launches.of("linear_logprobs_weighted_rows_kernel")
    assert cuda.launches.of("linear_logprobs_open_rows_kernel")
    assert_products_are_mixed(cuda, dtype)


@pytest.mark.parametrize(("dtype", "shape"), LINEAR.values(), ids=LINEAR)
def test_sparse(cuda, dtype, shape):
    """Of 500 tokens, 400 have a sparse gradient, 50 are recomputed, and the others have no gradient."""
    arguments = linear(cuda, dtype, "sparse", **shape)
    expect(cuda, shape)
    cuda.reads.counts.extend([500])
    results = cuda.run(OPS["linear_logprobs"], **arguments)
    output = ForwardOutput(*results)
    assert output.sparse_index.shape == output.sparse_value.shape == (500, 64)
    assert len(output.cached_probs) == 0
    assert cuda.launches.names() == {
        "selective_logprobs_fwd_kernel",
        "linear_logprobs_candidates_kernel",
        "linear_logprobs_select_kernel",
    }
    assert rows_of(cuda, "selective_logprobs_fwd_kernel", "maxima_ptr") == 500
    for kernel in ("candidates", "select"):
        assert sum(launch.grid[0] for launch in cuda.launches.of(f"linear_logprobs_{kernel}_kernel")) == 500
    cuda.kinds.append((50, 0, 400))
    cuda.reads.counts.extend([4000])
    factors = len(arguments["hiddens"])
    cuda.reads.numbers.extend([0, 2000, 4000] * factors)  # bounds of the entries of two blocks of hidden states
    cuda.run(OPS["linear_logprobs_backward"], **linear_backward(cuda, arguments, results))
    assert cuda.launches.of("linear_logprobs_weighted_rows_kernel")
    assert cuda.launches.of("linear_logprobs_open_rows_kernel")
    assert rows_of(cuda, "selective_logprobs_bwd_kernel") == 50
    assert cuda.reads.waits == ["nonzero", "tolist", "nonzero", *["tolist"] * factors]
    assert_products_are_mixed(cuda, dtype)


READS = {
    "recompute": ((600, 0, 0), ["nonzero"], ["nonzero"]),
    "cache": ((0, 600, 0), ["nonzero"], ["tolist"]),
    "sparse": ((0, 0, 600), ["nonzero"], ["tolist", "nonzero"]),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("backward", "expected"), READS.items(), ids=READS)
def test_host_waits_for_the_device(cuda, backward, expected, dtype):
    """Once in each pass, and once more for the number of sparse entries."""
    kinds, in_forward, in_backward = expected
    arguments = linear(cuda, dtype, backward, chunk_bytes=64 << 20, rank=8, bias=True)
    results = cuda.run(OPS["linear_logprobs"], **arguments)
    assert cuda.reads.waits == in_forward
    cuda.reads.waits.clear()
    cuda.kinds.append(kinds)
    cuda.run(OPS["linear_logprobs_backward"], **linear_backward(cuda, arguments, results))
    assert cuda.reads.waits == in_backward


@pytest.mark.parametrize("backward", ["recompute", "cache"])
def test_host_does_not_wait_for_each_block(cuda, backward):
    """500 tokens are two blocks and eight chunks; a part is cached."""
    arguments = linear(cuda, torch.bfloat16, backward, budget=300 * 2 * row_stride(50257), bias=True)
    cuda.reads.counts.extend([500])
    results = cuda.run(OPS["linear_logprobs"], **arguments)
    cuda.kinds.append((200, 280, 0) if backward == "cache" else (480, 0, 0))
    cuda.run(OPS["linear_logprobs_backward"], **linear_backward(cuda, arguments, results))
    assert cuda.reads.waits == ["nonzero", "tolist" if backward == "cache" else "nonzero"]


def test_auto_caches_by_free_memory_then_goes_sparse(cuda):
    """The first call caches probabilities in a quarter of the free memory, the second one is sparse."""
    row = row_stride(50257) * 2
    cuda.free = 4 * 200 * row
    arguments = linear(cuda, torch.bfloat16, "auto")
    expect(cuda, {})
    results = cuda.run(OPS["linear_logprobs"], **arguments)
    assert len(ForwardOutput(*results).cached_probs) == 200
    assert cuda.launches.names() == {
        "selective_logprobs_fwd_kernel",
        "linear_logprobs_candidates_kernel",
        "linear_logprobs_select_kernel",
    }
    assert rows_of(cuda, "selective_logprobs_fwd_kernel", "prob_ptr") == 200
    assert cuda.reads.waits == ["nonzero"]
    cuda.kinds.append((400, 200, 0))
    cuda.run(OPS["linear_logprobs_backward"], **linear_backward(cuda, arguments, results))
    assert cuda.reads.waits == ["nonzero", "tolist"]
    cuda.reads.waits.clear()
    # Share of entropies with gradients, and number of tokens without a sparse gradient.
    cuda.reads.numbers.extend([0.0, 0.0])
    results = OPS["linear_logprobs"].function(**arguments)
    assert len(ForwardOutput(*results).sparse_index) == 600
    assert not cuda.reads.numbers
    assert cuda.reads.waits == ["nonzero", "number", "number"]


def test_unused_cached_probabilities_warn(cuda):
    arguments = linear(cuda, torch.bfloat16, "cache")
    results = cuda.run(OPS["linear_logprobs"], **arguments)
    cuda.kinds.append((600, 0, 0))
    with pytest.warns(UserWarning, match="for nothing: the entropies have gradients"):
        cuda.run(OPS["linear_logprobs_backward"], **linear_backward(cuda, arguments, results))


@pytest.mark.parametrize("frozen", range(5))
def test_frozen_inputs_get_no_gradient(cuda, frozen):
    arguments = linear(cuda, torch.bfloat16, "cache", rank=8, bias=True)
    results = cuda.run(OPS["linear_logprobs"], **arguments)
    needs = [i != frozen for i in range(5)]
    for kinds in ((0, 600, 0), (300, 300, 0)):
        cuda.kinds.append(kinds)
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
            cuda.kinds.append((0, 600, 0))
            cuda.run(OPS["linear_logprobs_backward"], **linear_backward(cuda, arguments, results))
    finally:
        torch.set_autocast_enabled("cuda", was_enabled)
    assert_products_are_mixed(cuda, dtype)


SINGLE_ROWS = {
    "chunk of one token": ({"n": 65, "rank": 8}, [(50257, 65, 64), (50257, 65, 8)]),
    "blocks of columns of one token": (
        {"n": 1, "rank": 8, "chunk_bytes": 1 << 20},
        [(columns, 1, width) for columns in (43_648, 50_257 - 43_648) for width in (64, 8)],
    ),
    "vocabulary of one": ({"n": 300, "vocab": 1}, []),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "own"), SINGLE_ROWS.values(), ids=SINGLE_ROWS)
def test_a_single_row_is_not_taken_for_a_bias(cuda, dtype, shape, own):
    """With TunableOp PyTorch rejects it."""
    arguments = linear(cuda, dtype, **shape)
    results = cuda.run(OPS["linear_logprobs"], **arguments)
    cuda.run(OPS["linear_logprobs_backward"], **linear_backward(cuda, arguments, results))
    assert 1 in {product.shape[0] for product in cuda.products.made}
    assert_products_are_mixed(cuda, dtype, own)


@pytest.mark.parametrize("num_cached", [1000, 100], ids=["all cached", "100 cached"])
@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("level", policy_loss.RATIO_LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_policy_loss(cuda, dtype, level, optional, num_cached):
    """500 of 600 tokens are unmasked, in three blocks of complete sequences or two of tokens."""
    sizes = [256, 244] if level == "token" else [200, 210, 90]
    if level != "token":
        cuda.reads.numbers.extend([100, 200, 200, 410, 500])
    cuda.reads.counts.extend([500])
    cached = [min(size, num_cached) for size in sizes]
    cuda.kinds.extend((size - part, part, 0) for size, part in zip(sizes, cached, strict=True))
    shape = {"rank": 8, "bias": True, "softcap": 30.0} if optional else {}
    expect(cuda, shape)
    shape["budget"] = num_cached * dtype.itemsize * row_stride(50257)
    cuda.run(OPS["linear_policy_loss"], **linear_policy(cuda, dtype, ratio_level=level, optional=optional, **shape))
    assert len(cuda.launches.of("policy_loss_fwd_bwd_kernel")) == len(sizes) + 1
    assert rows_of(cuda, "selective_logprobs_fwd_kernel") == 500
    assert rows_of(cuda, "selective_logprobs_fwd_kernel", "prob_ptr") == sum(cached)
    assert rows_of(cuda, "selective_logprobs_bwd_kernel") == 500 - sum(cached)
    # For the tokens with a loss, the blocks of complete sequences, and each block's backward pass.
    in_backward = ["tolist" if part < size else "nonzero" for size, part in zip(sizes, cached, strict=True)]
    assert cuda.reads.waits == ["nonzero", *["tolist"] * (level != "token"), *in_backward]
    assert_products_are_mixed(cuda, dtype)


@pytest.mark.parametrize(("dtype", "shape"), LINEAR.values(), ids=LINEAR)
def test_support(cuda, dtype, shape):
    """Of 600 tokens 500 have several entries. No product is made, and the host waits once and twice."""
    arguments = linear(cuda, dtype, chunk_bytes=64 << 20, **shape) | new_support(cuda, 600, 3000)
    cuda.kinds.append((0, 500, 0))
    cuda.launches.sizes = {"V": shape.get("vocab", 50257), "softcap": shape.get("softcap", 0.0)}
    results = cuda.run(OPS["linear_logprobs"], **arguments)
    assert cuda.launches.names() == {"linear_logprobs_entry_logits_kernel", "support_fwd_kernel"}
    assert len(cuda.launches.of("linear_logprobs_entry_logits_kernel")) == len(arguments["hiddens"])
    assert cuda.reads.waits == ["tolist"]
    cuda.reads.waits.clear()
    cuda.kinds.append((0, 450, 0))
    cuda.reads.counts.append(2500)
    cuda.launches.sizes.pop("V")  # a bias is a column of its own
    grads = cuda.run(OPS["linear_logprobs_backward"], **linear_backward(cuda, arguments, results))
    assert [grad.numel() > 0 for grad in grads] == [True] * (2 * len(arguments["hiddens"])) + ["bias" in shape]
    assert cuda.reads.waits == ["tolist", "nonzero"]
    assert not cuda.products.made


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_support_needs_no_float32_gradient_of_the_weight(cuda, dtype):
    """A float16 gradient waits for its scale in float32."""
    vocab, width = 50257, 64
    arguments = linear(cuda, dtype, chunk_bytes=64 << 20) | new_support(cuda, 600, 3000)
    cuda.kinds.append((0, 600, 0))
    results = cuda.run(OPS["linear_logprobs"], **arguments)
    cuda.allocations.made.clear()
    cuda.kinds.append((0, 600, 0))
    cuda.run(OPS["linear_logprobs_backward"], **linear_backward(cuda, arguments, results))
    assert (cuda.allocations.largest(torch.float32) >= 4 * vocab * width) == (dtype != torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_support_beside_other_tokens(cuda, dtype):
    """200 tokens have no support, 100 a narrow and 300 a wide one."""
    arguments = linear(cuda, dtype, "cache", bias=True) | new_support(cuda, 600, 90_000)
    cuda.kinds.append((200, 100, 300))
    cuda.reads.counts.extend([16_000] * 5)  # entries of the wide ones, in five chunks
    cuda.reads.numbers.extend([*range(0, 90_000, 18_000), *range(18_000, 90_001, 18_000)])
    results = cuda.run(OPS["linear_logprobs"], **arguments)
    assert len(ForwardOutput(*results).cached_probs) == 200
    assert rows_of(cuda, "selective_logprobs_fwd_kernel") == 200
    assert_products_are_mixed(cuda, dtype)
    assert cuda.reads.waits == ["tolist", "tolist", *["nonzero"] * 5]


@pytest.mark.parametrize("level", policy_loss.RATIO_LEVELS)
def test_linear_policy_loss_with_support(cuda, level):
    """Coefficients come from one loss, after the log-probabilities of all tokens."""
    arguments = linear_policy(cuda, torch.bfloat16, ratio_level=level, chunk_bytes=64 << 20) | new_support(
        cuda, 600, 3000
    )
    cuda.kinds.extend([(0, 600, 0)] * 2)
    cuda.run(OPS["linear_policy_loss"], **arguments)
    assert len(cuda.launches.of("policy_loss_fwd_bwd_kernel")) == 1
    assert not cuda.products.made
