"""Launch configurations: every candidate is correct, and an invalid file changes no choice."""

from __future__ import annotations

import json

import pytest
import torch
from against_float64 import DEVICE, assert_close_to_float64, randint, randn

pytest.importorskip("triton")

import sppo_kernels
from sppo_kernels import reference, tuning
from sppo_kernels.ops.linear_logprobs.projection import tiling
from sppo_kernels.ops.linear_logprobs.projection.factors import Factors, head_class
from sppo_kernels.ops.row_passes.triton.shared import launch_shape
from sppo_kernels.tuning import TUNABLES, Config, shape_class

PROJECTION = "linear_logprobs.projection"
KERNELS = ["selective_logprobs.forward", "selective_logprobs.backward", "policy_loss", PROJECTION]
CANDIDATES = [(name, config) for name in KERNELS for config in TUNABLES[name].candidates]


@pytest.fixture(autouse=True)
def _reset_after_each_test():
    yield
    tuning.reset()


def selective_tensors(vocab=5003):
    return {"logits": randn(3, vocab, scale=3.0, grad=True), "labels": randint(0, vocab, 3)}


def test_these_kernels_are_tunable():
    assert sorted(TUNABLES) == sorted(KERNELS)
    assert all(2 <= len(tunable.candidates) <= 5 for tunable in TUNABLES.values())


def assert_linear_logprobs_are_correct(backward):
    """The probabilities and maxima that the forward pass leaves are laid out by its block."""
    tensors = {
        "hidden": randn(3, 8, scale=10.0, grad=True),
        "weight": randn(9001, 8, grad=True),
        "labels": randint(0, 9001, 3),
    }
    settings = {"backward": backward, "mass_tolerance": 1e-6, "max_entries": 512}
    op = lambda **given: sppo_kernels.linear_logprobs(**given, **settings)
    assert_close_to_float64(op, reference.linear_logprobs, "triton", tensors, upstream=["logprobs"])
    certificate = sppo_kernels.linear_logprobs(
        **tensors, **settings, return_certificate=True, backend="triton"
    ).certificate
    expected = {"cache": certificate.num_entries == -2, "recompute": certificate.num_entries == -1}
    assert expected.get(backward, certificate.num_entries > 0).all()


def assert_the_fused_projection_is_correct():
    """Columns and hidden states end inside a second tile, and tokens too where few programs are launched for each."""
    for backward, tokens in (("recompute", 260), ("cache", 5), ("sparse", 5)):
        tensors = {
            "hidden": randn(tokens, 72, dtype=torch.bfloat16, grad=tokens == 5),
            "weight": randn(137, 72, dtype=torch.bfloat16, scale=0.1, grad=True),
            "labels": randint(0, 137, tokens),
        }
        settings = {"backward": backward, "mass_tolerance": 1e-6, "projection": "fused"}
        op = lambda *, settings=settings, **given: sppo_kernels.linear_logprobs(**given, **settings)
        floor = {torch.float32: 4.0, torch.bfloat16: 4.0}
        assert_close_to_float64(op, reference.linear_logprobs, "triton", tensors, upstream=["logprobs"], floor=floor)


@pytest.mark.parametrize(("name", "config"), CANDIDATES, ids=str)
def test_every_candidate_is_correct(name, config):
    """Rows span several blocks and end inside one."""
    with TUNABLES[name].using(config):
        if name.startswith("selective"):
            assert_close_to_float64(
                sppo_kernels.selective_logprobs, reference.selective_logprobs, "triton", selective_tensors(9001)
            )
            for backward in ("cache", "sparse", "recompute"):
                assert_linear_logprobs_are_correct(backward)
        elif name == PROJECTION:
            assert_the_fused_projection_is_correct()
        else:
            tensors = {"logprobs": randn(1300, grad=True), "old_logprobs": randn(1300), "advantages": randn(2)}
            cu_seqlens = torch.tensor([0, 1, 1300], dtype=torch.int32, device=DEVICE)
            assert_close_to_float64(
                sppo_kernels.policy_loss, reference.policy_loss, "triton", tensors, cu_seqlens=cu_seqlens, term=1.0,
                upstream=["loss"],
            )  # fmt: skip


@pytest.mark.parametrize("name", ["selective_logprobs.forward", "selective_logprobs.backward"])
def test_the_chosen_configuration_is_launched(name):
    rows = torch.empty(1, 2, 5003)
    tunable = TUNABLES[name]
    assert launch_shape(tunable, rows) == {"BLOCK": 2048, "num_warps": 8}
    tunable.choose(shape_class(5003, 4), Config(1024, 4))
    assert launch_shape(tunable, rows) == {"BLOCK": 1024, "num_warps": 4}
    assert launch_shape(tunable, rows.bfloat16()) == {"BLOCK": 2048, "num_warps": 8}
    assert launch_shape(tunable, rows[..., :4096]) == {"BLOCK": 2048, "num_warps": 8}
    other = tunable.candidates[-1]
    with tunable.using(other):
        assert launch_shape(tunable, rows)["BLOCK"] == other.block == 4096
    assert launch_shape(tunable, rows)["BLOCK"] == 1024
    tuning.reset()
    assert launch_shape(tunable, rows)["BLOCK"] == 2048


def tile(weight, **options):
    """The tile for an output embedding, and a hidden state beside it."""
    given = {"hiddens": [weight[:1]], "weights": [weight], "bias": None, "softcap": 0.0, **options}
    return tiling.tile_of(Factors(**given))


def test_the_chosen_tile_of_the_projection_is_launched():
    """Only for output embeddings of the same shape in half precision."""
    tunable, weight = TUNABLES[PROJECTION], torch.empty(137, 72, dtype=torch.bfloat16, device=DEVICE)
    default, other = tile(weight), tunable.candidates[1]
    tunable.choose(head_class(weight), other)
    assert tile(weight) == other != default
    assert tile(weight[:136]) == default
    assert tile(weight.float()).block_n == 64
    with tunable.using(tunable.candidates[2]):
        assert tile(weight) == tile(weight[:136]) == tunable.candidates[2]
    tuning.reset()
    assert tile(weight) == default


def test_a_tile_of_the_projection_leaves_registers_for_options_and_for_rows_that_are_not_aligned():
    """The chosen tile has 128 columns. Alignment is that of the factors, not that of the tokens of one call."""
    weight = torch.empty(137, 72, dtype=torch.bfloat16, device=DEVICE)
    assert tile(weight).block_v == tile(weight, bias=weight[:, 0]).block_v == 128
    for options in ({"softcap": 30.0}, {"hiddens": [weight[:1]] * 2, "weights": [weight, weight]}):
        assert tile(weight, **options).block_v == 64
        assert tile(weight, **options).block_n >= 128
    for unaligned in (weight[:, 1:65], weight.view(-1)[: 137 * 71].view(137, 71), weight.t()):
        assert (tile(unaligned).block_n, tile(unaligned).block_v) == (64, 64)


def test_a_saved_tile_is_loaded(tmp_path):
    """A tile has more numbers than the launch configurations of the other kernels."""
    path, weight = tmp_path / "tuning.json", torch.empty(137, 72, dtype=torch.bfloat16, device=DEVICE)
    TUNABLES[PROJECTION].choose(head_class(weight), TUNABLES[PROJECTION].candidates[1])
    tuning.save(path)
    tuning.reset()
    assert not tiling.is_chosen(weight)
    tuning.load(path)
    assert tiling.is_chosen(weight)
    assert tile(weight) == TUNABLES[PROJECTION].candidates[1]
    assert isinstance(tile(weight), tiling.Tile)


def test_short_rows_get_a_block_that_holds_them():
    rows = torch.empty(1, 2, 97)
    assert launch_shape(TUNABLES["selective_logprobs.forward"], rows) == {"BLOCK": 128, "num_warps": 1}


def test_a_choice_affects_only_its_class_of_shapes():
    tensors = selective_tensors()
    before = sppo_kernels.selective_logprobs(**tensors, backend="triton").logprobs
    TUNABLES["selective_logprobs.forward"].choose(shape_class(9999, 4), Config(1024, 4))  # a different class
    assert torch.equal(before, sppo_kernels.selective_logprobs(**tensors, backend="triton").logprobs)


def test_saved_choices_are_loaded(tmp_path):
    path = tmp_path / "new" / "tuning.json"
    TUNABLES["policy_loss"].choose("64 x 4 bytes", Config(4096, 16))
    tuning.save(path)
    tuning.reset()
    TUNABLES["selective_logprobs.backward"].choose("64 x 4 bytes", Config(1024, 4))
    tuning.load(path)
    assert TUNABLES["policy_loss"].config(33, 4) == Config(4096, 16)
    assert TUNABLES["policy_loss"].config(32, 4) == Config(1024, 4)
    assert TUNABLES["selective_logprobs.backward"].chosen == {}  # the file has no choice for it
    assert [file.name for file in path.parent.iterdir()] == ["tuning.json"]


def save_changed(path, **changes):
    """Save a file with one choice, then overwrite some of its keys."""
    TUNABLES["policy_loss"].choose("64 x 4 bytes", Config(4096, 16))
    tuning.save(path)
    tuning.reset()
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "format 2"),
        ({"choices": {"policy_loss": {}, "no_such_kernel": {}}}, "no_such_kernel"),
        (
            {"choices": {"policy_loss": {"64 x 4 bytes": [4096, 16]}, "selective_logprobs.backward": {"64": [64, 1]}}},
            "candidates",
        ),
        ({"choices": {"policy_loss": {"64 x 4 bytes": [1, 2, 3]}}}, "tuning.json"),
        ({"choices": {"policy_loss": [4096, 16]}}, "tuning.json"),
        ({"choices": None}, "tuning.json"),
        ({"device": "another one"}, "another one"),
    ],
)
def test_an_invalid_file_changes_nothing(tmp_path, changes, message):
    path = tmp_path / "tuning.json"
    save_changed(path, **changes)
    TUNABLES["policy_loss"].choose("128 x 4 bytes", Config(1024, 4))
    with pytest.raises(ValueError, match=r"tuning\.json") as error:
        tuning.load(path)
    assert message in str(error.value)
    assert "benchmarks tune" in str(error.value)
    assert TUNABLES["policy_loss"].chosen == {"128 x 4 bytes": Config(1024, 4)}


def test_other_content_is_rejected(tmp_path):
    path = tmp_path / "tuning.json"
    path.write_text("block = 64")
    with pytest.raises(ValueError, match="benchmarks tune"):
        tuning.load(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="benchmarks tune"):
        tuning.load(path)


def test_another_device_is_accepted_on_request(tmp_path):
    save_changed(tmp_path / "tuning.json", device="another one")
    tuning.load(tmp_path / "tuning.json", any_device=True)
    assert TUNABLES["policy_loss"].config(64, 4) == Config(4096, 16)


def test_only_candidates_are_accepted():
    with pytest.raises(ValueError, match="candidates"):
        TUNABLES["policy_loss"].choose("64 x 4 bytes", Config(64, 1))
    with pytest.raises(ValueError, match="candidates"), TUNABLES["policy_loss"].using(Config(64, 1)):
        pass
