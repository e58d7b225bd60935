"""Tests of the fused projection against float64: errors are at most those of the vendor's product."""

import itertools

import pytest
import torch
from against_float64 import BACKENDS, DEVICE, DTYPES, ragged_shapes, randint, randn
from hypothesis import given
from hypothesis import strategies as st
from linear_logprobs_cases import multiply_adds
from projection_cases import DISTRIBUTIONS, IGNORED, MODES, check, fused, inputs, use_tiles

from sppo_kernels.ops.linear_logprobs import lm_head

pytestmark = pytest.mark.filterwarnings("ignore:linear_logprobs cached")  # most tests differentiate both outputs

each_mode = pytest.mark.parametrize(("backend", "backward"), list(itertools.product(BACKENDS, MODES)))


@pytest.fixture(scope="module", autouse=True)
def _small_tiles_of_the_module():
    """As ``small_tiles``, for hypothesis: the examples of a test share its fixtures."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_tiles(monkeypatch)
        yield


@each_mode
@ragged_shapes
@given(
    n=st.integers(0, 18),
    width=st.sampled_from([1, 16, 33, 64]),
    vocab=st.sampled_from([1, 8, 63, 64, 97, 150]),
    distribution=st.sampled_from(sorted(DISTRIBUTIONS)),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    temperature=st.sampled_from([0.6, 1.0]),
    softcap=st.sampled_from([None, 1.5]),
    ignored=st.integers(0, 6),
    rank=st.sampled_from([0, 3]),
    upstream=st.sampled_from([None, ["logprobs"]]),
)
def test_agrees_with_float64(
    backend, backward, n, width, vocab, distribution, dtype, bias, temperature, softcap, ignored, rank, upstream
):
    tensors = inputs(n, width, vocab, dtype, distribution=distribution, bias=bias, ignored=ignored, rank=rank)
    check(backend, tensors, backward=backward, upstream=upstream, temperature=temperature, softcap=softcap)


@pytest.mark.parametrize(
    ("width", "distribution", "dtype"),
    [(33, "long-tailed", torch.float32), (576, "peaked", torch.bfloat16), (1000, "uniform", torch.float16)],
)
@each_mode
def test_widths_of_real_models(monkeypatch, backend, backward, width, distribution, dtype):
    use_tiles(monkeypatch, tokens=16, columns=128, depth=256)
    check(backend, inputs(7, width, 97, dtype, distribution=distribution), backward=backward, temperature=0.8)


@pytest.mark.parametrize(
    ("distribution", "dtype"),
    [("peaked", torch.float16), ("uniform", torch.bfloat16), ("long-tailed", torch.float32)],
)
@each_mode
def test_many_tiles_of_columns(monkeypatch, backend, backward, distribution, dtype):
    """1537 columns: seven tiles, the last of which has one column."""
    use_tiles(monkeypatch, tokens=16, columns=256, depth=64)
    check(backend, inputs(6, 64, 1537, dtype, distribution=distribution, bias=True), backward=backward)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("distribution", "dtype"),
    # The interpreter is slow: there, each distribution has a dtype of its own.
    list(itertools.product(DISTRIBUTIONS, DTYPES) if DEVICE == "cuda" else zip(DISTRIBUTIONS, DTYPES, strict=True)),
)
@each_mode
def test_vocabulary_of_a_real_model(monkeypatch, backend, backward, distribution, dtype):
    use_tiles(monkeypatch, tokens=16, columns=2048, depth=64)
    check(backend, inputs(5, 64, 49_152, dtype, distribution=distribution, ignored=1), backward=backward)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_tiles_of_a_gpu(monkeypatch, backend, dtype):
    """Tiles of 64 or 128 rows and columns."""
    use_tiles(monkeypatch, tokens=64 if dtype == torch.float32 else 128, columns=128, depth=64)
    check(backend, inputs(130, 33, 150, dtype, bias=True, rank=3), softcap=4.0)


@pytest.mark.parametrize("softcap", [None, 3.0])
@each_mode
def test_temperature_per_token(backend, backward, softcap):
    tensors = {**inputs(20, 16, 97, ignored=1), "temperature": 0.2 + torch.rand(20).to(DEVICE)}
    check(backend, tensors, backward=backward, softcap=softcap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_mode
def test_gradient_of_the_entropy_only(backend, backward, dtype):
    check(backend, inputs(9, 16, 97, dtype), backward=backward, upstream=["entropy"], temperature=0.7)


@pytest.mark.parametrize("frozen", [("hidden",), ("weight", "bias"), ("weight", "bias", "u"), ("b",)])
@each_mode
def test_frozen_inputs_get_no_gradient(backend, backward, frozen):
    tensors = inputs(5, 16, 70, bias=True, rank=2, frozen=frozen)
    check(backend, tensors, backward=backward, upstream=["logprobs"])
    fused(**tensors, backend=backend, backward=backward).logprobs.sum().backward()
    for name in ("hidden", "weight", "bias", "u", "b"):
        assert (tensors[name].grad is None) == (name in frozen)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("upstream", [None, ["logprobs"]], ids=["entropies", "logprobs"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_recomputes_in_blocks_of_columns(monkeypatch, backend, upstream, dtype):
    """Five blocks of the vocabulary, the last one narrower, for all six tokens at once."""
    monkeypatch.setattr(lm_head, "_LEAST_COLUMNS", 64)
    widths, original = [], lm_head.LMHead._fused

    def recorded(self, batch, hiddens=None, columns=slice(None)):
        widths.append(columns.stop and columns.stop - columns.start)
        return original(self, batch, hiddens, columns)

    monkeypatch.setattr(lm_head.LMHead, "_fused", recorded)
    tensors = inputs(7, 9, 300, dtype, bias=True, ignored=1, rank=3)
    tensors["labels"][1:5] = torch.tensor([0, 63, 64, 299], device=DEVICE)
    size = 4 * 6 * (4 + dtype.itemsize) * 64
    monkeypatch.setattr(lm_head.LMHead, "_columns_per_block", _columns_for(size))
    check(backend, tensors, upstream=upstream, temperature=0.6, softcap=4.0)
    assert widths == [None, 64, 64, 64, 64, 44]


def _columns_for(chunk_bytes):
    """Return ``LMHead._columns_per_block`` for another ``chunk_bytes``, which the reference does not take."""
    original = lm_head.LMHead._columns_per_block

    def columns_per_block(self, num_tokens, *, needs_weights):
        self.chunk_bytes = chunk_bytes
        return original(self, num_tokens, needs_weights=needs_weights)

    return columns_per_block


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_mode
def test_many_blocks_of_tokens(monkeypatch, small_blocks, backend, backward, dtype):
    """Blocks of 16 tokens forward and backward, the last one shorter."""
    monkeypatch.setattr(lm_head, "fused_block_size", lambda *args: 16)
    monkeypatch.setattr(lm_head.LMHead, "_columns_per_block", lambda *args, **kwargs: 0)
    tensors = inputs(40, 9, 70, dtype, distribution="peaked", bias=True, ignored=3)
    check(backend, tensors, backward=backward, upstream=["logprobs"], temperature=0.6, softcap=4.0)


@each_mode
def test_any_layout(backend, backward):
    """Rows and columns with strides, and tensors that begin at any element."""
    labels = randint(0, 70, 3, 2).t()
    for hidden in (randn(3, 2, 6).transpose(0, 1), randn(2, 3, 12)[..., ::2], randn(37)[1:].view(2, 3, 6)):
        for weight in (randn(6, 70).t(), randn(70, 12)[:, ::2], randn(421)[1:].view(70, 6)):
            bias = randn(140)[::2].requires_grad_()
            tensors = {"hidden": hidden.requires_grad_(), "weight": weight.requires_grad_(), "labels": labels}
            check(backend, {**tensors, "bias": bias}, backward=backward)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_misaligned_rows_of_half_precision(backend, dtype):
    """Rows of 2 and 14 bytes' distance from a multiple of 16, which tensor descriptors cannot address."""
    labels = randint(0, 70, 5)
    for hidden, weight in (
        (randn(5, 24, dtype=dtype)[:, 1:18], randn(70, 17, dtype=dtype, scale=0.3)),
        (randn(24, 5, dtype=dtype).t(), randn(24, 140, dtype=dtype, scale=0.3)[:, ::2].t()),
        (randn(5 * 8 + 7, dtype=dtype)[7:].view(5, 8), randn(70, 8, dtype=dtype, scale=0.3)),
    ):
        tensors = {"hidden": hidden.requires_grad_(), "weight": weight.requires_grad_(), "labels": labels}
        check(backend, tensors, backward="cache")


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_too_far_apart_for_32_bits(monkeypatch, backend):
    """The last rows of a tile begin more than 2**31 elements after its first. Nothing else is touched of 4.3 GB."""
    use_tiles(monkeypatch, tokens=128, columns=128)
    far = torch.empty(66 << 25, dtype=torch.float16, device=DEVICE).as_strided((66, 8), (1 << 25, 1))
    near, labels = randn(66, 8, dtype=torch.float16), randint(0, 66, 66)
    far.copy_(near)
    want = fused(near, near, labels, backend=backend).logprobs
    assert torch.equal(fused(far, near, labels, backend=backend).logprobs, want)
    assert torch.equal(fused(near, far, labels, backend=backend).logprobs, want)


@each_mode
def test_strided_labels_and_temperatures(backend, backward):
    tensors = inputs(6, 5, 70)
    tensors |= {"labels": randint(0, 70, 12)[::2], "temperature": torch.tensor([0.5, 9.0] * 6, device=DEVICE)[::2]}
    check(backend, tensors, backward=backward)


@pytest.mark.parametrize("shape", [(), (1,), (2, 2, 2), (0,), (2, 0)])
@each_mode
def test_any_number_of_tokens(backend, backward, shape):
    tensors = {"hidden": randn(*shape, 5, grad=True), "weight": randn(11, 5, grad=True)}
    check(backend, {**tensors, "labels": randint(0, 11, *shape)}, backward=backward)


@each_mode
def test_all_tokens_ignored(backend, backward):
    tensors = inputs(5, 6, 29, bias=True, ignored=5, rank=2)
    out = fused(**tensors, backend=backend, backward=backward)
    (out.logprobs.sum() + out.entropy.sum()).backward()
    for x in (*out, *(tensors[name].grad for name in ("hidden", "weight", "bias", "u", "b"))):
        assert torch.equal(x, torch.zeros_like(x))
    assert multiply_adds(lambda: fused(**tensors, backend="torch")) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_tokens_are_exactly_zero(backend):
    tensors = inputs(5, 6, 29, bias=True)
    tensors["labels"][1:4] = IGNORED
    with torch.no_grad():
        tensors["hidden"][1:4] = float("nan")
    out = fused(**tensors, backend=backend)
    (out.logprobs.sum() + out.entropy.sum()).backward()
    for x in (*out, tensors["hidden"].grad):
        assert torch.equal(x[1:4], torch.zeros_like(x[1:4]))
        assert (x[[0, 4]] != 0).all()
    for name in ("weight", "bias"):
        assert tensors[name].grad.isfinite().all()
