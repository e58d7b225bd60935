"""Inputs, tiles and checks shared by the tests of the fused projection."""

import torch
from against_float64 import DEVICE, FLOOR, assert_close_to_float64, randn
from linear_logprobs_cases import long_tailed, uniform, with_adapter

from sppo_kernels import linear_logprobs, reference
from sppo_kernels._backend import HAS_TRITON
from sppo_kernels.ops.linear_logprobs import projection
from sppo_kernels.ops.linear_logprobs.projection import torch_backend

IGNORED = -100
MODES = ["recompute", "cache", "sparse"]
# With almost no probability left out, the errors of sparse entries are those of rounding.
EXACT_ENTRIES = {"mass_tolerance": 1e-8, "max_entries": 64}

# Both projections add the same float32 terms in other orders, so either may be the more exact one: the largest of some
# hundred errors differs by up to a factor of two. In half precision a logit gradient is rounded before its products. In
# float32 it is not, and the rounding of an exponent shows, which is relative to the label's logit, not to the maximum.
SLACK = {torch.float32: 4.0, torch.float16: 2.0, torch.bfloat16: 2.0}
PROJECTION_FLOOR = {**FLOOR, torch.float16: 4.0, torch.bfloat16: 4.0}


def use_tiles(monkeypatch, *, tokens=16, columns=64, depth=16):
    """Use tiles of this size on both backends for every dtype; on a GPU the Triton backend keeps its own."""
    monkeypatch.setattr(torch_backend, "TOKENS", tokens)
    monkeypatch.setattr(torch_backend, "COLUMNS", columns)
    if HAS_TRITON and DEVICE == "cpu":
        tile = projection.tiling.Tile(tokens, columns, depth, num_warps=4, num_stages=1)
        monkeypatch.setattr(projection.tiling, "tile_of", lambda factors: tile)


def peaked(n, width, vocab, dtype):
    """Return inputs with one logit about ten above the rest, for every other token that of the label."""
    hidden, weight, labels = uniform(n, width, vocab, dtype)
    likely = torch.where(torch.arange(n, device=DEVICE) % 2 == 0, labels, labels.roll(1))
    rows = weight[likely].float()
    return (hidden + 10 * rows / rows.square().sum(1, keepdim=True)).to(dtype), weight, labels


DISTRIBUTIONS = {"peaked": peaked, "uniform": uniform, "long-tailed": long_tailed}


def inputs(n, width, vocab, dtype=torch.float32, *, distribution="uniform", bias=False, ignored=0, rank=0, frozen=()):
    """Return arguments by name, all but the ``frozen`` differentiable; the first ``ignored`` labels are ignored."""
    hidden, weight, labels = DISTRIBUTIONS[distribution](n, width, vocab, dtype)
    labels[:ignored] = IGNORED
    given = {"hidden": hidden, "weight": weight, "labels": labels, "bias": randn(vocab, dtype=dtype) if bias else None}
    if rank:
        given |= {"u": randn(n, rank, dtype=dtype), "b": randn(vocab, rank, dtype=dtype, scale=rank**-0.5)}
    for name, x in given.items():
        if x is not None and x.is_floating_point() and name not in frozen:
            x.requires_grad_()
    return given


def fused(*args, **settings):
    """Call ``linear_logprobs`` with the fused projection, and the adapter's tensors as u and b."""
    return with_adapter(linear_logprobs)(*args, projection="fused", **settings)


def check(backend, tensors, *, backward="recompute", upstream=None, **settings):
    """Check that errors against float64 are at most ``SLACK`` times those of the vendor's product in the same mode.

    The entropy is the difference of two numbers as large as the log-probability of the label, which is at least -10
    where the token is not computed again. So many eps more are allowed, and twice as many in its gradient.

    Args:
        backend: "torch" or "triton".
        tensors: arguments that are tensors, by name.
        backward: the mode of both.
        upstream: names of the outputs with an upstream gradient; None for both.
        settings: other arguments, also of the reference.
    """
    modes = {"backward": backward, **EXACT_ENTRIES}

    def vendor_or_exact(**given):
        if given["hidden"].dtype == torch.float64:
            return with_adapter(reference.linear_logprobs)(**given)
        return with_adapter(linear_logprobs)(**given, **modes, backend=backend, projection="vendor")

    assert_close_to_float64(
        lambda **given: fused(**given, **modes),
        vendor_or_exact,
        backend,
        tensors,
        upstream=upstream,
        slack=SLACK[tensors["hidden"].dtype],
        floor=PROJECTION_FLOOR if upstream == ["logprobs"] else {**PROJECTION_FLOOR, torch.float32: 32.0},
        term=_largest_term(tensors, settings),
        **settings,
    )


def _largest_term(tensors, settings):
    """Return the magnitude of the largest log-probability of a label whose logit is the base of its token's sums."""
    with torch.no_grad():
        logprobs = with_adapter(reference.linear_logprobs)(**tensors, **settings).logprobs
    used = logprobs[logprobs >= projection._LEAST_LOGPROB]
    return used.abs().amax().item() if used.numel() else 0.0
