"""Tests of the Triton backend of policy_loss with blocks so small that sequences cross them."""

import pytest
import torch
from against_float64 import DEVICE, ragged_shapes, randint
from hypothesis import given
from hypothesis import strategies as st
from policy_loss_cases import AGGREGATIONS, CORRECTIONS, LEVELS, check, offsets, packed

from sppo_kernels import policy_loss
from sppo_kernels.tuning import TUNABLES, Config

kernels = pytest.importorskip("sppo_kernels.ops.policy_loss.triton")

BLOCK = 16


@pytest.fixture(autouse=True)
def _blocks_of_16_tokens(monkeypatch):
    monkeypatch.setattr(TUNABLES["policy_loss"], "default", Config(BLOCK, 1))


# Empty, shorter than a block, as long as one or two, one token more or less, and many blocks
LENGTHS = st.integers(0, 3) | st.sampled_from([15, 16, 17, 32, 33, 70])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("level", LEVELS)
@ragged_shapes
@given(
    lengths=st.lists(LENGTHS, min_size=1, max_size=6),
    aggregation=st.sampled_from(AGGREGATIONS),
    dual_clip=st.sampled_from([None, 1.3]),
    kl_coef=st.sampled_from([0.0, 0.1]),
    rollout_correction=st.sampled_from([None, *CORRECTIONS]),
    per_token=st.booleans(),
    normalizer=st.sampled_from([None, 7.0]),
)
def test_agrees_with_float64_across_blocks(level, masked, lengths, per_token, **arguments):
    tensors = packed(lengths, per_token=per_token)
    if masked:
        tensors["mask"] = randint(0, 2, sum(lengths))
    check("triton", tensors, ratio_level=level, clip_low=0.1, clip_high=0.2, rollout_cap=1.2, **arguments)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("level", LEVELS)
def test_one_long_sequence_among_many_short_ones(level, masked):
    lengths = [0, 1, 2, 0, 3] * 4 + [20 * BLOCK + 5] + [0, 0, 1, 3, 2] * 4
    tensors = packed(lengths, spread=0.1)
    if masked:
        tensors["mask"] = randint(0, 2, sum(lengths))
    arguments = {"aggregation": "seq-mean-token-sum", "rollout_correction": "sequence_mask"}
    check("triton", tensors, ratio_level=level, rollout_cap=1.05, **arguments)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("count", [60, 5000 if DEVICE == "cuda" else 300])
def test_many_sequences_in_a_block(level, count):
    lengths = randint(0, 4, count).tolist()
    check("triton", packed(lengths), ratio_level=level, aggregation="seq-mean-token-mean", kl_coef=0.1)


@pytest.mark.parametrize("level", LEVELS)
def test_masked_sequences_are_not_counted(level):
    """A sequence of two blocks, the first of them masked, counts; completely masked and empty sequences do not."""
    lengths = [2 * BLOCK, 2 * BLOCK, 0, 3]
    tensors = packed(lengths, spread=0.02)
    mask = torch.zeros(sum(lengths), dtype=torch.bool, device=tensors["old_logprobs"].device)
    mask[BLOCK : 2 * BLOCK] = True
    mask[-1] = True
    arguments = {"ratio_level": level, "rollout_correction": "sequence_truncate", "aggregation": "seq-mean-token-sum"}
    out = policy_loss(**tensors, mask=mask, **arguments, backend="triton")
    alone = {key: x if key in ("advantages", "cu_seqlens") else x[mask] for key, x in tensors.items()}
    alone |= {"advantages": tensors["advantages"][[0, 3]], "cu_seqlens": offsets([BLOCK, 1])}
    want = policy_loss(**alone, **arguments, backend="torch")
    torch.testing.assert_close(out.loss, want.loss)
    for name, x in out.metrics.items():
        torch.testing.assert_close(x, want.metrics[name], msg=name)


@pytest.mark.parametrize("level", LEVELS)
def test_a_sequence_has_one_ratio_in_all_its_blocks(level):
    """Its gradient without clipping is one number, to the bit; at token level each token has its own."""
    tensors = packed([3, 9 * BLOCK + 1, 2], spread=0.02)
    out = policy_loss(**tensors, ratio_level=level, clip_low=1.0, clip_high=9.0, backend="triton")
    (gradient,) = torch.autograd.grad(out.loss, tensors["logprobs"])
    distinct = gradient[3:-2].unique().numel()
    assert distinct > BLOCK if level == "token" else distinct == 1


@pytest.mark.parametrize("level", LEVELS)
def test_same_bits_every_run(level):
    tensors = packed([40, 0, 1, 3 * BLOCK, 7] * 3)
    arguments = {"ratio_level": level, "kl_coef": 0.1, "rollout_correction": "sequence_truncate", "backend": "triton"}
    mask = randint(0, 2, sum([40, 0, 1, 3 * BLOCK, 7] * 3))
    results = []
    for _ in range(2):
        out = policy_loss(**tensors, mask=mask, **arguments)
        results.append((out.loss, *out.metrics.values(), *torch.autograd.grad(out.loss, tensors["logprobs"])))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(("prefix", "names"), [("S_", "SUMS"), ("P_", "PIECE_SUMS")])
def test_columns_of_sums_match_the_names(prefix, names):
    """Constants and names correspond one to one, in order, and a row holds them all."""
    columns = {name: value.value for name, value in vars(kernels).items() if name.startswith(prefix)}
    assert columns == {prefix + name.upper(): i for i, name in enumerate(getattr(kernels, names))}
    assert len(columns) <= kernels.COLUMNS.value
