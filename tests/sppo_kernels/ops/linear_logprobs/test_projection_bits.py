"""Tests that results of the fused projection have the same bits in every batch and mode, and of its memory."""

import numpy as np
import pytest
import torch
from against_float64 import BACKENDS, DEVICE, randint, randn
from projection_cases import IGNORED, MODES, fused, inputs, use_tiles
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from sppo_kernels import linear_logprobs
from sppo_kernels._backend import HAS_TRITON
from sppo_kernels.ops.linear_logprobs import lm_head, projection
from sppo_kernels.ops.linear_logprobs.projection import torch_backend

pytestmark = pytest.mark.filterwarnings("ignore:linear_logprobs cached")


@pytest.fixture
def rows_alike(small_tiles, monkeypatch):
    """Small tiles, and products in Triton's interpreter that treat all rows alike, as a GPU does.

    NumPy's OpenBLAS computes the last rows of a product by another kernel, with other last bits.
    """
    if not HAS_TRITON or DEVICE != "cpu":
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        product = np.einsum("ij,jk->ik", a.data, b.data, dtype=d.data.dtype, optimize=False)
        return TensorHandle(product + d.data, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def mixed(n, width, vocab, dtype=torch.float32, **options):
    """Return inputs of which a third are peaked, a third flat, and a third so peaked that most labels are hopeless."""
    given = inputs(n, width, vocab, dtype, **options)
    scale = torch.tensor([1.0, 4.0, 60.0], device=DEVICE)[torch.arange(n, device=DEVICE) % 3]
    given["hidden"] = (given["hidden"].detach() * scale[:, None]).to(dtype).requires_grad_()
    given["temperature"] = torch.tensor([0.7, 1.0, 1.3, 1.0], device=DEVICE)[torch.arange(n, device=DEVICE) % 4]
    return given


def select(given, index):
    """Return the arguments for some of the tokens."""
    per_token = ("hidden", "labels", "u", "temperature")
    return {name: x[index] if name in per_token and x is not None else x for name, x in given.items()}


def values(given, **settings):
    """Return log-probabilities and entropies, [2, N], without gradients unless a mode is given."""
    with torch.set_grad_enabled("backward" in settings):
        return torch.stack(list(fused(**given, **settings))).detach()


@each_dtype
@each_backend
def test_same_bits_in_every_batch(rows_alike, monkeypatch, backend, dtype):
    """Whatever tokens a token is computed with, at whichever position, and in however many calls and chunks."""
    n = 36
    given = mixed(n, 33, 150, dtype, bias=True, rank=3)
    want = values(given, backend=backend)
    assert (want[0] < -10).any()
    assert ((want[0] < -3) & (want[0] > -10)).any()
    order = torch.randperm(n, device=DEVICE)
    for index in (order, order[:5], order[7:8], slice(3, 28)):
        assert torch.equal(values(select(given, index), backend=backend), want[:, index])
    assert torch.equal(values(given, backend=backend, chunk_bytes=1), want)
    without_loss = torch.zeros(n, dtype=torch.bool, device=DEVICE).index_fill(0, order[:9], True)
    got = values({**given, "labels": given["labels"].masked_fill(without_loss, IGNORED)}, backend=backend)
    assert torch.equal(got[:, ~without_loss], want[:, ~without_loss])
    monkeypatch.setattr(lm_head, "fused_block_size", lambda *args: 17)
    assert torch.equal(values(given, backend=backend), want)


@each_dtype
@each_backend
def test_same_bits_in_every_mode(rows_alike, monkeypatch, backend, dtype):
    """What is kept for backward changes no result: old and new log-probabilities of the same weights are equal."""
    monkeypatch.setattr(projection, "_TOKENS_MULTIPLE", 4)  # several blocks of tokens that are computed again
    given = mixed(20, 33, 150, dtype, bias=True)
    want = values(given, backend=backend)
    row = 192 * dtype.itemsize
    settings = [{"backward": mode} for mode in MODES]
    settings += [{"backward": "cache", "logits_budget_bytes": 7 * row}, {"backward": "auto", "max_entries": 4}]
    settings += [{"backward": "sparse", "max_entries": 3, "mass_tolerance": 0.1}]
    for setting in settings:
        for _ in range(2 if setting["backward"] == "auto" else 1):
            assert torch.equal(values(given, backend=backend, **setting), want), setting


@each_dtype
@each_backend
def test_logit_gradients_have_the_same_bits_in_every_batch(rows_alike, backend, dtype):
    """Those of some tokens, and of some columns. The products after them are the vendor's."""
    n, vocab = 20, 150
    given = mixed(n, 33, vocab, dtype, bias=True)

    def logit_grads(index, columns=slice(None)):
        part = select(given, index)
        factors = projection.Factors([part["hidden"].detach()], [given["weight"].detach()], given["bias"].detach(), 5.0)
        labels, temperature = part["labels"], part["temperature"]
        make = lambda factors, labels: projection.FusedProjection(
            factors, labels=labels, temperature=temperature, backend=backend, group=""
        )
        out = projection.RowResults.empty(len(labels), factors.hiddens[0].device)
        make(factors, labels).forward(out)
        grads = factors.hiddens[0].new_empty(len(labels), vocab)[:, columns]
        make(factors.columns(columns), labels - (columns.start or 0)).gradient(
            row_stats=out.row_stats,
            entropy=out.entropy,
            grad_logprobs=torch.ones_like(out.entropy),
            grad_entropy=torch.full_like(out.entropy, 0.3),
            out=grads,
        )
        return grads

    want = logit_grads(slice(None))
    assert (want != 0).any(1).all()
    order = torch.randperm(n, device=DEVICE)
    for index in (order, order[:5], order[7:8], slice(3, 18)):
        assert torch.equal(logit_grads(index), want[index])
    for columns in (slice(0, 64), slice(64, 128), slice(128, 150)):
        assert torch.equal(logit_grads(slice(None), columns), want[:, columns])


@pytest.mark.slow
@each_dtype
@pytest.mark.parametrize(("width", "vocab"), [(64, 1537), (576, 4096), (1000, 2100)])
def test_same_bits_with_the_tiles_of_a_cpu(width, vocab, dtype):
    """At widths at which BLAS divides a product into several parts, and beyond one tile of tokens."""
    given = mixed(300, width, vocab, dtype)
    want = values(given, backend="torch")
    order = torch.randperm(300)
    for index in (order, order[:5], order[7:8], slice(3, 44), slice(200, 290)):
        assert torch.equal(values(select(given, index), backend="torch"), want[:, index])
    assert torch.equal(values(given, backend="torch", backward="sparse"), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_with_any_number_of_threads(dtype):
    given = mixed(70, 64, 2100, dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            results.append(values(given, backend="torch"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


@pytest.mark.parametrize("backward", MODES)
@each_backend
def test_same_bits_every_run(small_tiles, backend, backward):
    given = mixed(20, 9, 97, bias=True)

    def run():
        out = fused(**given, backend=backend, backward=backward)
        leaves = [given[name] for name in ("hidden", "weight", "bias")]
        return *out, *torch.autograd.grad(out.logprobs.sum() + out.entropy.sum(), leaves)

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def allocations(run):
    """Return the bytes of each allocation in ``run``."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        run()
    return [event.nbytes() for event in prof.profiler.kineto_results.events() if event.name() == "[memory]"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [100, 1100])
def test_no_chunk_of_logits_is_allocated(n, dtype):
    """The largest allocation in scoring is a tile, the hidden states filled up, or some columns of the weight."""
    width, vocab = 64, 6000
    given = mixed(n, width, vocab, dtype)
    assert (torch_backend.TOKENS, torch_backend.COLUMNS) == (256, 2048)
    filled_up = -(-n // 256) * 256
    allowed = 4 * max(256 * 2048, filled_up * width, 2048 * width)
    assert max(allocations(lambda: values(given, backend="torch"))) <= allowed < 4 * n * vocab


def test_recomputes_without_a_chunk_of_logits():
    """In half precision backward allocates the logit gradients of a block, and a float32 copy for the products."""
    given = mixed(700, 8, 3000, torch.bfloat16)
    out = fused(**given, backend="torch", backward="recompute", chunk_bytes=1)
    sizes = allocations(lambda: (out.logprobs.sum() + out.entropy.sum()).backward())
    assert max(sizes) <= 4 * 256 * 3008


@pytest.mark.parametrize("backward", [*MODES, "auto"])
@pytest.mark.parametrize("upstream", ["logprobs", "entropy"])
def test_counts_the_flops_of_the_vendors_product(small_tiles, backward, upstream):
    given = mixed(40, 16, 300, ignored=5)

    def flops(name):
        with FlopCounterMode(display=False) as counter:
            settings = {"backward": backward, "max_entries": 8, "mass_tolerance": 1e-3, "backend": "torch"}
            getattr(linear_logprobs(**given, **settings, projection=name), upstream).sum().backward()
        return counter.get_total_flops()

    assert flops("fused") == flops("vendor") > 0


@each_backend
def test_sums_are_those_of_the_tiles(small_tiles, backend):
    """More tiles than are read at a time."""
    hidden, weight, labels = randn(5, 16), randn(64 * 34, 16), randint(0, 64, 5)
    ones, zeros = torch.ones(5, device=DEVICE), torch.zeros(5, device=DEVICE)

    def sums(columns):
        factors = projection.Factors([hidden], [weight[columns]], None, 0.0)
        given = {"labels": labels - columns.start, "temperature": ones, "base": zeros}
        return projection._PASSES[backend].statistics(factors, **given).sums

    tiles = [sums(slice(first, first + 64)) for first in range(0, 64 * 34, 64)]
    torch.testing.assert_close(sums(slice(0, 64 * 34)), torch.stack(tiles).sum(0), rtol=1e-5, atol=1e-5)


def test_tiles_of_other_sizes_change_only_last_bits(monkeypatch):
    given = mixed(30, 16, 500)
    want = values(given, backend="torch")
    use_tiles(monkeypatch, tokens=8, columns=40)
    torch.testing.assert_close(values(given, backend="torch"), want, rtol=1e-5, atol=2e-5)
