"""Tests of log-probabilities over the sampler's support, against the float64 masked softmax over all logits."""

import itertools
from unittest import mock

import pytest
import torch
from against_float64 import BACKENDS, DEVICE, DTYPES, assert_close_to_float64, ragged_shapes, randint, randn
from hypothesis import given as examples
from hypothesis import strategies as st
from linear_logprobs_cases import IGNORED, MATMUL_FLOOR, inputs, with_adapter
from supports import random_sizes, support_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from sppo_kernels import linear_logprobs, linear_policy_loss, reference, selective_logprobs
from sppo_kernels import policy_loss as policy_loss_of
from sppo_kernels.ops.linear_logprobs import op as linear_op
from sppo_kernels.ops.linear_logprobs import support as module
from sppo_kernels.ops.linear_logprobs.matmul import row_stride
from sppo_kernels.ops.linear_logprobs.output import ForwardOutput

CHUNKS = {"chunk_bytes": 1}
pytestmark = pytest.mark.filterwarnings("ignore:linear_logprobs cached")  # dense tokens whose entropy has a gradient


def compare(backend, given, support, **settings):
    """Compare values and gradients with float64: errors at most 1.5 times those of the eager masked softmax."""
    op = with_adapter(linear_logprobs)
    assert_close_to_float64(
        lambda *args, **more: op(*args, support=support, **CHUNKS, **more),
        lambda *args, **more: with_adapter(reference.linear_logprobs)(*args, support=support, **more),
        backend,
        given,
        slack=1.5,
        floor=MATMUL_FLOOR,
        **settings,
    )


@examples(
    n=st.integers(1, 40),
    width=st.integers(1, 70),
    vocab=st.sampled_from([2, 7, 97, 300]),
    largest=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
    extras=st.booleans(),
    softcap=st.sampled_from([None, 3.0]),
    seed=st.integers(0, 1000),
)
@ragged_shapes
@pytest.mark.parametrize("backend", BACKENDS)
def test_ragged_supports(backend, n, width, vocab, largest, dtype, extras, softcap, seed):
    """Sizes of 0 (no cut), 1, some and everything; unsorted; with bias, adapter, softcap and ignored tokens."""
    torch.manual_seed(seed)
    given = inputs(n, width, vocab, dtype, bias=extras, ignored=n // 4, rank=2 if extras else 0)
    given["temperature"] = 0.5 + torch.rand(n, device=DEVICE)
    support = support_of(given["labels"], random_sizes(n, min(largest, vocab), vocab), vocab)
    compare(backend, given, support, softcap=softcap)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", ["one", "everything", "no cut"])
def test_uniform_sizes(backend, sizes, dtype):
    given = inputs(6, 33, 50, dtype, bias=True)
    compare(backend, given, support_of(given["labels"], [{"one": 1, "everything": 50, "no cut": 0}[sizes]] * 6, 50))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_wide_supports_take_a_dense_product(backend, dtype, monkeypatch):
    """Wide ones in several chunks and blocks, beside narrow ones, single ones and tokens without a cut."""
    monkeypatch.setattr(module, "WIDE_SHARE", {"torch": 1 / 64, "triton": 1 / 64})
    n, vocab = 330, 200
    given = inputs(n, 8, vocab, dtype, bias=True, ignored=5, rank=2)
    sizes = [0, 1, 2, 3, 4, 50, 200, 30, 77, 199] * 33  # 3 is narrow, 4 is wide
    with mock.patch.object(
        module.SupportHead, "_read_wide", autospec=True, side_effect=module.SupportHead._read_wide
    ) as f:
        compare(backend, given, support_of(given["labels"], sizes, vocab), temperature=0.7, softcap=5.0)
    assert f.call_count == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_few_wide_supports_take_none(backend):
    given = inputs(15, 8, 200)
    support = support_of(given["labels"], [200] * 15, 200)
    with mock.patch.object(module.SupportHead, "_read_wide", side_effect=AssertionError):
        compare(backend, given, support)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("magnitude", [1e2, 1e4])
def test_extreme_logits(backend, magnitude):
    given = inputs(12, 16, 60)
    given["hidden"].data.mul_(magnitude)
    # Logits of this magnitude are rounded, and the entropies of such distributions are far below 1.
    compare(backend, given, support_of(given["labels"], [5] * 12, 60), term=magnitude)


@pytest.mark.parametrize("backend", BACKENDS)
def test_impossible_tokens_in_a_support(backend):
    """A bias of -inf: the token has a probability of 0, and no gradient is NaN."""
    given = inputs(5, 8, 30, bias=True)
    given["labels"].fill_(3)
    given["bias"].data[10:] = float("-inf")
    given["bias"].requires_grad_(False)
    compare(backend, given, support_of(given["labels"], [30, 12, 5, 1, 20], 30))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["transposed", "misaligned", "every other"])
def test_layouts(backend, layout):
    n, width, vocab = 9, 24, 40
    make = {
        "transposed": lambda rows: randn(width, rows).t(),
        "misaligned": lambda rows: randn(rows * width + 1)[1:].view(rows, width),
        "every other": lambda rows: randn(2 * rows, 2 * width)[::2, ::2],
    }[layout]
    labels = randint(0, vocab, 2 * n)[::2]
    given = {"hidden": make(n).requires_grad_(), "weight": make(vocab).requires_grad_(), "labels": labels}
    ids, offsets = support_of(labels, random_sizes(n, 6, vocab), vocab)
    strided = ids.repeat_interleave(2)[::2], offsets.repeat_interleave(2)[::2]
    compare(backend, given, strided)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_frozen_inputs(backend, frozen):
    given = inputs(9, 8, 40, bias=True)
    given[frozen].requires_grad_(False)
    compare(backend, given, support_of(given["labels"], random_sizes(9, 6, 40), 40))


@pytest.mark.parametrize("upstream", [("logprobs",), ("entropy",)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_of_one_output(backend, upstream):
    given = inputs(9, 8, 40)
    compare(backend, given, support_of(given["labels"], random_sizes(9, 6, 40), 40), upstream=upstream)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_label_alone_has_log_probability_0(backend):
    """Nothing is read: not even a NaN in its hidden state reaches a result. Nor does one of an ignored token."""
    given = inputs(4, 8, 40, ignored=1)
    support = support_of(given["labels"], [6, 1, 3, 1], 40)
    if backend != "reference":
        given["hidden"].data[[0, 1, 3]] = float("nan")
    out = linear_logprobs(**given, support=support, backend=backend)
    dh, dw = torch.autograd.grad(out.logprobs.sum() + out.entropy.sum(), [given["hidden"], given["weight"]])
    for x in (out.logprobs, out.entropy):
        assert x[[0, 1, 3]].tolist() == [0, 0, 0]
        assert x[2] != 0
    assert not dh[[0, 1, 3]].any()
    assert dw.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_support_of_everything_equals_no_support(backend):
    given = inputs(7, 16, 40)
    every = support_of(given["labels"], [40] * 7, 40)
    for x, y in zip(
        linear_logprobs(**given, support=every, backend=backend), linear_logprobs(**given, backend=backend), strict=True
    ):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_in_every_batch(backend):
    """With narrow supports, results and gradients of hidden states depend neither on other tokens nor on the run."""
    given = inputs(40, 33, 400, torch.bfloat16)
    sizes = random_sizes(40, 12, 12)
    ids, offsets = support_of(given["labels"], [max(1, size) for size in sizes], 400)

    def run(first, last):
        part = {k: x if k == "weight" or x is None else x[first:last] for k, x in given.items()}
        span = offsets[first : last + 1]
        out = linear_logprobs(**part, support=(ids[span[0] : span[-1]], span - span[0]), backend=backend)
        (dh,) = torch.autograd.grad(out.logprobs.sum() + out.entropy.sum(), part["hidden"])
        return [x.detach() for x in (*out, dh)]

    whole, again = run(0, 40), run(0, 40)
    for x, y in zip(whole, again, strict=True):
        assert torch.equal(x, y)
    for first, last in ((0, 1), (7, 30), (30, 40)):
        for x, y in zip(whole, run(first, last), strict=True):
            assert torch.equal(x[first:last], y)


def test_gradient_of_the_weight_has_the_same_bits_in_each_run():
    """Also where hundreds of tokens share a row of the weight."""
    given = inputs(300, 16, 9)
    support = support_of(given["labels"], [4] * 300, 9)
    grads = []
    for _ in range(2):
        out = linear_logprobs(**given, support=support, backend="triton")
        grads += torch.autograd.grad(out.logprobs.sum(), given["weight"])
    assert torch.equal(*grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_certificate_has_the_size_of_the_support(backend):
    given = inputs(5, 8, 40, ignored=1)
    out = linear_logprobs(
        **given, support=support_of(given["labels"], [3, 0, 1, 5, 40], 40), backend=backend, return_certificate=True
    )
    assert out.certificate.num_entries.tolist()[0] == 0
    assert out.certificate.num_entries.tolist()[2:] == [1, 5, 40]
    assert out.certificate.num_entries[1] < 0
    assert not out.certificate.dropped_mass.any()


@pytest.mark.parametrize(
    ("backend", "ratio_level", "extras"),
    [
        (backend, level, extras)
        for backend, level, extras in itertools.product(BACKENDS, ["token", "sequence_mean", "sequence_sum"], [0, 1])
        # The interpreter is slow: there, one level has all options.
        if DEVICE == "cuda" or backend == "torch" or not extras or level == "sequence_mean"
    ],
)
def test_linear_policy_loss(backend, ratio_level, extras):
    """Loss and gradients equal those of linear_logprobs followed by policy_loss; several blocks of dense tokens."""
    n, vocab = 400, 40
    given = inputs(n, 12, vocab, bias=bool(extras), ignored=30, rank=2 if extras else 0)
    sizes = random_sizes(n, 6, vocab) if extras else [3] * n
    support = support_of(given["labels"], sizes, vocab)
    cu_seqlens = torch.tensor([0, 100, 100, 330, n], dtype=torch.int32, device=DEVICE)
    leaves = [x for k, x in given.items() if x is not None and k != "labels"]
    names = {"bias": given["bias"], "adapter": (given["u"], given["b"]) if extras else None}
    tensors = given["hidden"], given["weight"], given["labels"]
    common = {**names, "support": support, "temperature": 0.8, "backend": backend, **CHUNKS}
    advantages = randn(4)
    with torch.no_grad():
        old = linear_logprobs(*tensors, **common).logprobs + 0.1 * randn(n)
    loss = {"cu_seqlens": cu_seqlens, "ratio_level": ratio_level, "normalizer": 3.0}
    got = linear_policy_loss(*tensors, old, advantages, **loss, **common)
    logprobs = linear_logprobs(*tensors, **common).logprobs
    mask = given["labels"] != IGNORED
    want = policy_loss_of(logprobs, old, advantages, mask=mask, **loss, backend=backend)
    torch.testing.assert_close(got.loss, want.loss)
    for x, y in zip(torch.autograd.grad(got.loss, leaves), torch.autograd.grad(want.loss, leaves), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)
    exact = reference.linear_policy_loss(*tensors, old, advantages, **loss, **names, support=support, temperature=0.8)
    torch.testing.assert_close(got.loss, exact.loss, rtol=1e-4, atol=1e-5)


# selective_logprobs


@examples(
    shape=st.sampled_from([(1,), (7,), (2, 5), (3, 1)]),
    vocab=st.sampled_from([2, 7, 97]),
    dtype=st.sampled_from(DTYPES),
    softcap=st.sampled_from([None, 3.0]),
    seed=st.integers(0, 1000),
)
@ragged_shapes
@pytest.mark.parametrize("backend", BACKENDS)
def test_selective_logprobs(backend, shape, vocab, dtype, softcap, seed):
    torch.manual_seed(seed)
    labels = randint(0, vocab, *shape)
    labels.view(-1)[::4] = IGNORED
    support = support_of(labels.view(-1), random_sizes(labels.numel(), min(5, vocab), vocab), vocab)
    if len(shape) == 2:  # every token but the last of each row: not one block of rows
        logits = randn(shape[0], shape[1] + 1, vocab, dtype=dtype, scale=3)[:, :-1].requires_grad_()
    else:
        logits = randn(*shape, vocab, dtype=dtype, scale=3, grad=True)
    assert_close_to_float64(
        lambda *args, **more: selective_logprobs(*args, support=support, **more),
        lambda *args, **more: reference.selective_logprobs(*args, support=support, **more),
        backend,
        {"logits": logits, "labels": labels},
        slack=1.5,
        temperature=0.7,
        softcap=softcap,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_selective_logprobs_do_not_read_other_logits(backend):
    logits = torch.full((2, 10), float("nan"), device=DEVICE)
    logits[0, [2, 5]] = torch.tensor([1.0, 2.0], device=DEVICE)
    support = torch.tensor([5, 2, 3], device=DEVICE), torch.tensor([0, 2, 3], device=DEVICE)
    logits.requires_grad_()
    out = selective_logprobs(logits, torch.tensor([2, 3], device=DEVICE), support=support, backend=backend)
    want = torch.log_softmax(torch.tensor([2.0, 1.0], device=DEVICE), 0)[1]
    torch.testing.assert_close(out.logprobs, torch.stack([want, torch.zeros_like(want)]))
    (grad,) = torch.autograd.grad(out.logprobs[0], logits)
    assert grad.isfinite().all()
    assert grad[0].nonzero().flatten().tolist() == [2, 5]
    assert not grad[1].any()


# Work and memory


class LargestTensor(TorchDispatchMode):
    """Records the elements of the largest tensor that an operator returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        dense = [x.values() if x.layout == torch.sparse_csr else x for x in tensors]
        sizes = [x.untyped_storage().nbytes() // x.itemsize for x in dense]
        self.largest = max([self.largest, *sizes])
        return out


@pytest.mark.parametrize(("size", "largest"), [(5, 3000 * 8), (1000, 400 * 1000)], ids=["narrow", "wide"])
def test_memory_does_not_grow_with_tokens_times_vocabulary(size, largest):
    """The largest tensor is the gradient of the weight, or that of the logits of wide supports.

    Chunks have 128 tokens and blocks 256, both fewer than 400.
    """
    n, width, vocab = 400, 8, 3000
    given = inputs(n, width, vocab)
    ids, offsets = support_of(given["labels"], [size] * n, vocab)
    tensors = {
        "hiddens": [given["hidden"].detach()],
        "weights": [given["weight"].detach()],
        "bias": None,
        "labels": given["labels"],
        "temperature": torch.ones(n, device=DEVICE),
        "support_ids": ids.long(),
        "support_offsets": offsets,
    }
    settings = {"softcap": 0.0, "ignore_index": IGNORED, "backward": "cache", "auto_key": "", "chunk_bytes": 1}
    settings |= {"projection": "vendor", "group": "", "backend": "torch"}
    forward = {"logits_budget_bytes": None, "mass_tolerance": 1e-4, "max_entries": 8}
    with LargestTensor() as mode:  # below the registered operations, which hide what they call
        output = ForwardOutput(*linear_op.linear_logprobs.function(**tensors, **settings, **forward))
        saved = {
            name: x for name, x in output._asdict().items() if name not in ("logprobs", "num_entries", "dropped_mass")
        }
        grads = {"grad_logprobs": randn(n), "grad_entropy": randn(n), "needs": [True, True, False]}
        linear_op.linear_logprobs_backward.function(**tensors, **saved, **settings, **grads)
    assert mode.largest <= max(largest, 256 * row_stride(vocab))


def test_flops_are_those_of_the_support():
    """2 M H forward and twice that backward, whatever V is; tokens without a cut take their passes."""
    given = inputs(30, 8, 50)
    flops = []
    for sizes in ([4] * 30, [4] * 20 + [0] * 10, [1] * 30):
        with FlopCounterMode(display=False) as counter:
            support = support_of(given["labels"], sizes, 50)
            linear_logprobs(**given, support=support, backward="recompute", backend="torch").logprobs.sum().backward()
        flops.append(counter.get_total_flops())
    assert flops == [3 * 2 * 120 * 8, 3 * 2 * 80 * 8 + 4 * 2 * 10 * 8 * 50, 0]


# Registration


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_graph_breaks(backend):
    given = inputs(6, 8, 29, ignored=1)
    support = support_of(given["labels"], [3, 1, 0, 5, 2, 4], 29)

    def loss(hidden, weight, ids, offsets):
        out = linear_logprobs(
            hidden, weight, given["labels"], support=(ids, offsets), backward="recompute", backend=backend
        )
        logits = selective_logprobs(hidden @ weight.t(), given["labels"], support=(ids, offsets), backend=backend)
        return (out.logprobs + 0.1 * out.entropy + logits.logprobs).sum()

    leaves = [given["hidden"], given["weight"]]
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        value = function(*leaves, *support)
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_supports_of_any_length_compile_once(backend):
    """Their number of entries differs in every step."""
    torch.compiler.reset()
    given = inputs(6, 8, 29)
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    def loss(hidden, ids, offsets):
        settings = {"support": (ids, offsets), "backend": backend}
        out = linear_logprobs(hidden, given["weight"], given["labels"], backward="recompute", **settings)
        return out.logprobs.sum() + selective_logprobs(hidden, given["labels"] % 8, **settings).logprobs.sum()

    given["labels"] %= 8
    compiled = torch.compile(loss, fullgraph=True, backend=count)
    for size in range(2, 8):
        ids, offsets = support_of(given["labels"], [size, 1, size, 3, size, 2], 8)
        torch._dynamo.mark_dynamic(ids, 0)
        torch.testing.assert_close(compiled(given["hidden"], ids, offsets), loss(given["hidden"], ids, offsets))
    assert len(graphs) == 1


def test_reference_passes_gradcheck():
    given = inputs(5, 4, 9, torch.float64, bias=True, ignored=1)
    support = support_of(given["labels"], [4, 1, 0, 3, 9], 9)
    f = lambda h, w, b: tuple(
        reference.linear_logprobs(h, w, given["labels"], bias=b, temperature=0.7, softcap=2.0, support=support)
    )
    assert torch.autograd.gradcheck(f, (given["hidden"], given["weight"], given["bias"]))
