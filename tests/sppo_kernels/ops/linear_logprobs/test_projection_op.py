"""Tests of how the fused projection is chosen, and of it under autograd, torch.compile and in linear_policy_loss."""

import itertools

import pytest
import torch
from against_float64 import BACKENDS, DEVICE, randn
from projection_cases import IGNORED, MODES, inputs

from sppo_kernels import linear_logprobs, linear_policy_loss, reference, tuning
from sppo_kernels._backend import HAS_TRITON
from sppo_kernels.ops.linear_logprobs import lm_head
from sppo_kernels.ops.linear_logprobs.projection import choose_projection
from sppo_kernels.ops.linear_logprobs.projection.factors import head_class
from sppo_kernels.tuning import TUNABLES

pytestmark = [
    pytest.mark.usefixtures("small_tiles"),
    pytest.mark.filterwarnings("ignore:linear_logprobs cached"),
]

each_mode = pytest.mark.parametrize(("backend", "backward"), list(itertools.product(BACKENDS, MODES)))
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")


@pytest.fixture
def used(monkeypatch):
    """Return a list that gets a True for each call of the fused projection."""
    calls, original = [], lm_head.LMHead._fused

    def recorded(self, *args):
        calls.append(True)
        return original(self, *args)

    monkeypatch.setattr(lm_head.LMHead, "_fused", recorded)
    return calls


@pytest.fixture
def chosen():
    """Return a function that chooses a tile for a weight, until the end of the test."""
    tunable = TUNABLES["linear_logprobs.projection"]
    yield lambda weight: tunable.choose(head_class(weight), tunable.candidates[1])
    tuning.reset()


@pytest.mark.parametrize("bad", ["cublas", "", None, True])
@pytest.mark.parametrize("op", [linear_logprobs, linear_policy_loss])
def test_an_unknown_projection_is_rejected(op, bad):
    hidden, weight, labels = torch.zeros(2, 3), torch.zeros(5, 3), torch.tensor([0, 4])
    more = {} if op is linear_logprobs else {"cu_seqlens": torch.tensor([0, 2], dtype=torch.int32)}
    others = () if op is linear_logprobs else (torch.zeros(2), torch.zeros(1))
    with pytest.raises(ValueError, match=r"projection must be .*auto.*vendor.*fused.*") as error:
        op(hidden, weight, labels, *others, **more, projection=bad)
    assert str(bad) in str(error.value)


@pytest.mark.parametrize("projection", ["auto", "vendor", "fused"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_auto_is_the_vendors_with_nothing_measured(used, backend, projection):
    given = inputs(3, 8, 40, torch.bfloat16)
    linear_logprobs(**given, backend=backend, projection=projection)
    assert bool(used) == (projection == "fused")
    linear_logprobs(**given, backend=backend)
    assert len(used) == (projection == "fused")


@needs_triton
def test_auto_is_what_was_measured_to_be_faster(used, chosen):
    """On the Triton backend, for the measured shape, and not in float32, of which nothing is measured."""
    given = inputs(3, 8, 40, torch.bfloat16)
    chosen(given["weight"])
    for changes, expected in (
        ({"backend": "triton"}, True),
        ({"backend": "torch"}, False),
        ({"backend": "triton", "projection": "vendor"}, False),
        ({"backend": "triton", "weight": given["weight"].detach()[:32]}, False),
    ):
        settings = {**given, **changes}
        settings["labels"] = given["labels"] % len(settings["weight"])
        linear_logprobs(**settings)
        assert bool(used) == expected, changes
        used.clear()
    single = {name: x.float() if x is not None and x.is_floating_point() else x for name, x in given.items()}
    chosen(single["weight"])
    linear_logprobs(**single, backend="triton")
    assert not used
    assert choose_projection("fused", single["weight"], backend="triton", group="") == "fused"


@needs_triton
def test_auto_in_the_policy_loss_after_loading_a_file(used, chosen, tmp_path):
    given = policy_batch(dtype=torch.bfloat16)
    chosen(given["weight"])
    tuning.save(tmp_path / "tuning.json")
    tuning.reset()
    linear_policy_loss(**given, backend="triton")
    assert not used
    tuning.load(tmp_path / "tuning.json")
    linear_policy_loss(**given, backend="triton")
    assert used


def policy_batch(dtype=torch.float32, **more):
    """Return arguments of ``linear_policy_loss`` by name, with ratios on both sides of the clip range."""
    lengths = (3, 0, 1, 9, 4)
    given = inputs(sum(lengths), 8, 80, dtype, **more)
    given["labels"][2::5] = IGNORED
    exact = reference.linear_logprobs(given["hidden"], given["weight"], given["labels"], bias=given["bias"])
    return {
        **given,
        "old_logprobs": exact.logprobs.detach() + 0.3 * randn(sum(lengths)),
        "advantages": randn(len(lengths)),
        "cu_seqlens": torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int(),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ratio_level", ["token", "sequence_mean"])
@each_mode
def test_policy_loss(monkeypatch, small_blocks, backend, backward, ratio_level, dtype):
    """Loss and gradients, from several blocks, are as close to float64 as those of the vendor's product."""
    monkeypatch.setattr(lm_head, "fused_block_size", lambda *args: 5)
    given = policy_batch(dtype, bias=True)
    settings = {"ratio_level": ratio_level, "temperature": 0.9, "softcap": 5.0}

    def results(op, given, **more):
        leaves = [given[name].detach().requires_grad_() for name in ("hidden", "weight", "bias")]
        loss = op(**{**given, **dict(zip(("hidden", "weight", "bias"), leaves, strict=True))}, **settings, **more).loss
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    double = {name: x.detach().double() if x.is_floating_point() else x for name, x in given.items()}
    want = results(reference.linear_policy_loss, double)
    modes = {"backend": backend, "backward": backward, "mass_tolerance": 1e-8, "max_entries": 64}
    got, vendor = (results(linear_policy_loss, given, **modes, projection=name) for name in ("fused", "vendor"))
    for x, y, z in zip(got, vendor, want, strict=True):
        error = lambda a, z=z: float((a.double() - z).norm())
        assert error(x) <= 2 * error(y) + 8 * torch.finfo(torch.float32).eps * float(z.norm().clamp(min=0.1))


@pytest.mark.parametrize("backward", [*MODES, "auto"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_graph_breaks(used, backend, backward):
    torch.compiler.reset()
    given = inputs(6, 8, 80, bias=True, ignored=2)
    leaves = [given[name] for name in ("hidden", "weight", "bias")]
    settings = {"temperature": 0.6, "backend": backend, "backward": backward, "projection": "fused"}

    def loss(hidden, weight, bias):
        out = linear_logprobs(hidden, weight, given["labels"], bias=bias, **settings)
        return (out.logprobs + 0.1 * out.entropy).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    assert used
    eager = loss(*leaves)
    torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=0)
    for x, y in zip(torch.autograd.grad(compiled, leaves), torch.autograd.grad(eager, leaves), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_auto_backward_learns(backend):
    """The share of tokens that need the dense path is counted in both modes that "auto" changes between."""
    given = inputs(40, 16, 200)
    given["hidden"] = (40 * given["hidden"].detach()).requires_grad_()
    shares = []
    for _ in range(3):
        out = linear_logprobs(**given, max_entries=8, return_certificate=True, backend=backend, projection="fused")
        out.logprobs.sum().backward()
        shares.append((float(out.certificate.cached_share), float(out.certificate.sparse_share) > 0.9))
    assert shares == [(1.0, False), (0.0, True), (0.0, True)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_rounds_inputs_and_not_logits(backend, dtype):
    given = inputs(6, 16, 80, bias=True)
    with torch.autocast(DEVICE, dtype=dtype):
        got = linear_logprobs(**given, backend=backend, projection="fused")
    rounded = {name: x.to(dtype) if x.is_floating_point() else x for name, x in given.items()}
    for x, y in zip(got, linear_logprobs(**rounded, backend=backend, projection="fused"), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_beside_supports(backend):
    """Tokens with a support have their few logits computed, and the others come from the fused projection."""
    given = inputs(6, 16, 80, bias=True)
    given["bias"] = randn(160)[::2].requires_grad_()
    offsets = torch.tensor([0, 0, 3, 3, 3, 6, 6], device=DEVICE)
    ids = torch.cat([(given["labels"][t] + torch.arange(3, device=DEVICE)) % 80 for t in (1, 4)])
    results = []
    for projection in ("fused", "vendor"):
        out = linear_logprobs(**given, support=(ids, offsets), backend=backend, projection=projection)
        leaves = [given[name] for name in ("hidden", "weight", "bias")]
        results.append([*out, *torch.autograd.grad(out.logprobs.sum() + out.entropy.sum(), leaves)])
    want = reference.linear_logprobs(**given, support=(ids, offsets))
    torch.testing.assert_close(results[0][0], want.logprobs, rtol=1e-5, atol=1e-5)
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
