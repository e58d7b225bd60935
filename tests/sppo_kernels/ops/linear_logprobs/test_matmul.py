"""Tests of matrix products with half-precision factors and float32 results, emulated on a CPU.

PyTorch implements such products only for CUDA; on other devices the factors are converted first. The code that
accumulates the products and selects their dtypes and outputs is the same on all devices.
"""

import pytest
import torch

pytest.importorskip("triton")

from against_float64 import DEVICE, FLOOR, assert_close_to_float64, randint, randn
from fake_cuda import Products

from sppo_kernels import LogprobOutput, _backend, linear_logprobs, reference
from sppo_kernels.ops.linear_logprobs.lm_head import LMHead
from sppo_kernels.ops.linear_logprobs.matmul import Projection, row_stride

pytestmark = [
    pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU all tests use such products"),
    pytest.mark.filterwarnings("ignore:linear_logprobs cached"),  # for tokens whose entropies also have gradients
]
fault = _backend._INTERPRETER_FAULT
BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.skipif(fault != "", reason=fault))]
TOKENS, WIDTH, VOCAB, RANK = 600, 24, 300, 3
FEW_TOKENS, FEW_TOKENS_PER_BLOCK = 86, 36  # for the interpreter
# As in linear_logprobs_cases: the logit gradient is rounded to half precision before it is multiplied.
MATMUL_FLOOR = {**FLOOR, torch.float16: 4.0, torch.bfloat16: 4.0}


@pytest.fixture
def products(monkeypatch):
    """Make all projections mixed on any device, and record their products."""
    mixed = property(lambda self: True, lambda self, value: None)
    monkeypatch.setattr(Projection, "mixed", mixed, raising=False)
    return Products(monkeypatch)


def inputs(n, dtype, bias, adapter, spread):
    given = {
        "hidden": randn(n, WIDTH, dtype=dtype, scale=spread, grad=True),
        "weight": randn(VOCAB, WIDTH, dtype=dtype, scale=WIDTH**-0.5, grad=True),
        "labels": randint(0, VOCAB, n),
    }
    given["labels"][::27] = -100
    if bias:
        given["bias"] = randn(VOCAB, dtype=dtype, grad=True)
    if adapter:
        given["u"] = randn(n, RANK, dtype=dtype, grad=True)
        given["b"] = randn(VOCAB, RANK, dtype=dtype, grad=True)
    return given


PARTIAL = {"backward": "cache", "logits_budget_bytes": row_stride(VOCAB) * 2 * 50}  # 50 tokens are cached
SPARSE = {"backward": "sparse", "max_entries": 32}
CASES = {
    "recompute bf16, entropies": (torch.bfloat16, True, True, None, {"backward": "recompute"}),
    "recompute fp16": (torch.float16, False, False, ["logprobs"], {"backward": "recompute"}),
    "cache fp16": (torch.float16, True, False, ["logprobs"], {"backward": "cache"}),
    "cache bf16": (torch.bfloat16, False, False, ["logprobs"], {"backward": "cache"}),
    "partly cached fp16": (torch.float16, True, True, ["logprobs"], PARTIAL),
    "partly cached bf16, entropies": (torch.bfloat16, False, True, None, PARTIAL),
    "sparse fp16": (torch.float16, True, True, ["logprobs"], SPARSE),
    "sparse bf16": (torch.bfloat16, False, False, ["logprobs"], SPARSE),
    "sparse bf16, entropies": (torch.bfloat16, True, False, None, SPARSE),
}


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "bias", "adapter", "upstream", "settings"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_agrees_with_float64(products, monkeypatch, backend, dtype, bias, adapter, upstream, settings):
    """There are three blocks of logit gradients and ten chunks of logits, the last with one token.

    577 of 600 tokens, or 82 of 86, have a loss. In sparse mode most of them are sparse, but not all.
    """
    n, certificates = TOKENS, []
    if backend == "triton" and not (bias and adapter and settings is PARTIAL):
        n = FEW_TOKENS
        monkeypatch.setattr(LMHead, "block_size", lambda self, vocab=None: FEW_TOKENS_PER_BLOCK)

    def op(*, u=None, b=None, **given):
        adapter = None if u is None else (u, b)
        out = linear_logprobs(**given, adapter=adapter, **settings, chunk_bytes=1, return_certificate=True)
        certificates.append(out.certificate)
        return LogprobOutput(out.logprobs, out.entropy)

    def definition(*, u=None, b=None, **given):
        return reference.linear_logprobs(**given, adapter=None if u is None else (u, b))

    given = inputs(n, dtype, bias, adapter, spread=8.0 if settings["backward"] == "sparse" else 1.0)
    more = {"floor": MATMUL_FLOOR, "upstream": upstream, "temperature": 0.6}
    assert_close_to_float64(op, definition, backend, given, **more)
    assert {product.dtype for product in products.made} == {dtype}
    # Only a single product that makes d weight rounds it at once; a float16 one waits for its scale.
    is_single = n == FEW_TOKENS and settings == {"backward": "cache"} and dtype == torch.bfloat16
    assert {product.out_dtype for product in products.made} == {torch.float32, *([dtype] if is_single else [])}
    if adapter and settings["backward"] == "recompute":
        assert 1 in {product.shape[0] for product in products.made}
    if settings["backward"] == "sparse":
        assert 0.5 < certificates[0].sparse_share < 1
