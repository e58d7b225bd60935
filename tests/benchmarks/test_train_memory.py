"""The memory of a training step: fake tensors take what real ones do, kinds add up, and sizes are those of hand."""

from __future__ import annotations

import json
from itertools import chain

import pytest
import torch
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn.functional import scaled_dot_product_attention

pytest.importorskip("triton")

from transformers import Qwen2Config

from benchmarks import train_memory
from benchmarks.__main__ import main
from benchmarks.harness.allocations import GIB
from benchmarks.harness.library_seams import on_cuda_without_kernels
from benchmarks.report import RESULTS
from benchmarks.train_memory import failures_of, measure, surroundings
from benchmarks.train_memory.cases import (
    MODELS,
    SMALL_CRITIC,
    TOKEN_CRITIC,
    WITHOUT_CRITIC,
    Case,
    samples_of,
    settings,
)
from benchmarks.train_memory.step import KINDS, OWNERS, Step, StepAllocations, build
from benchmarks.train_memory.surroundings import eager_logprobs, on_cuda, processes, shard, tracked_kinds
from sppo.rollout.batching import make_micro_batches

if not surroundings.measurable():
    pytest.skip("the suite needs torch 2.11 or newer", allow_module_level=True)


def tiny(hidden: int) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )


TINY = {"large": tiny(64), "small": tiny(32)}
SHORT = {
    "max_prompt_length": 64,
    "max_completion_length": 512,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 8,
}


@pytest.fixture(scope="module")
def rows():
    """Of each case, with our operations and without."""
    cases = [
        Case("sppo", "large", "small", 1),
        Case("ppo", "large", "large", 1),
        Case("sppo", "large", "small", 4),
        Case("ppo", "large", "large", 4),
    ]
    return {case: measure(case, settings(case, **SHORT), TINY) for case in cases}


def attend(module, query, key, value, attention_mask, *, scaling, **_):
    """One that runs on a CPU too."""
    out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2), None


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "devices"), [("sppo", 1), ("ppo", 4)])
def test_real_tensors_take_the_same(algorithm, devices, monkeypatch):
    """Of every kind, where the log-probabilities are plain PyTorch; and PyTorch's own tracker sees the same peak."""
    monkeypatch.setattr(surroundings, "attention_on_cuda", attend)
    case = Case(algorithm, "large", "small", devices)
    args = settings(case, **SHORT)
    _, fake = measure(case, args, TINY)

    samples = samples_of(args, kind := "token" if algorithm == "ppo" else "prompt")
    with processes(devices) as mesh, on_cuda(), on_cuda_without_kernels(), StepAllocations() as allocations:
        model = build(case, TINY, args.cliprange_value)
        if mesh is not None:
            shard(model, mesh)
        step = Step(allocations, model, args, samples, make_micro_batches(samples[:1], 1, kind)[0])
        with allocations.resizes(), tracked_kinds(allocations, model, eager_logprobs):
            step.start()
            first = allocations.moment()
            step.update()
            real = allocations.peak_by_kind(first)
            tracker = FSDPMemTracker(model, step.optimizer) if mesh is not None else MemTracker()
            tracker.track_external(model, step.optimizer, *step.batch.values())
            with tracker:
                step.update()
    peak = sum(real.values())
    for owner in OWNERS:
        for kind in KINDS:
            assert real.get((owner, kind), 0) == pytest.approx(fake[owner][kind], abs=0.002 * peak)
    assert peak == pytest.approx(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"], rel=0.002)


@pytest.mark.slow
def test_kinds_add_up_to_the_peak(rows):
    for row in chain(*rows.values()):
        assert sum(row[owner][kind] for owner in OWNERS for kind in KINDS) == row["peak_bytes"] > 0
        assert sum(row["before"][owner][kind] for owner in OWNERS for kind in KINDS) == row["before_bytes"] > 0


def test_weights_gradients_and_moments_take_sixteen_bytes_a_weight(rows):
    """A device's share; beside them its rotary frequencies, float32, twice: as they are, and as they were."""
    sizes = {name: 2 * 4096 * c.hidden_size + layer(c) + c.hidden_size for name, c in TINY.items()}
    for (_, _, critic, devices), (row, _) in rows.items():
        buffers = 2 * 4 * TINY["large"].hidden_size // 4 // 2
        assert row["policy"]["parameters"] == 4 * sizes["large"] // devices + buffers
        assert row["policy"]["optimizer"] >= 8 * sizes["large"] // devices
        assert row["policy"]["gradients"] >= 4 * sizes["large"] // devices
        c = TINY[critic]
        of_critic = sizes[critic] - 4096 * c.hidden_size + c.hidden_size  # a head of one row
        assert row["critic"]["optimizer"] == pytest.approx(8 * of_critic / devices, rel=0.01)
        assert row["critic"]["parameters"] == pytest.approx(4 * of_critic / devices, rel=0.01)


def layer(c: Qwen2Config) -> int:
    """Weights of one, by hand: four of attention, three biases, three of the network, two norms."""
    of_keys = c.hidden_size // c.num_attention_heads * c.num_key_value_heads
    attention = 2 * c.hidden_size**2 + 2 * c.hidden_size * of_keys + c.hidden_size + 2 * of_keys
    return attention + 3 * c.hidden_size * c.intermediate_size + 2 * c.hidden_size


@pytest.mark.parametrize("devices", [1, 4])
def test_a_small_critic_takes_less_than_a_token_critic(rows, devices):
    small, token = rows[Case("sppo", "large", "small", devices)], rows[Case("ppo", "large", "large", devices)]
    for ours, theirs in zip(small, token, strict=True):
        assert ours["peak_bytes"] < theirs["peak_bytes"]
        assert sum(ours["critic"].values()) < sum(theirs["critic"].values())


def test_a_step_takes_less_with_our_operations(rows):
    for ours, without in rows.values():
        assert ours["operations"]
        assert not without["operations"]
        assert ours["peak_bytes"] < without["peak_bytes"]
        assert without["policy"]["logits"] >= 2 * 4 * 512 * 4096


@pytest.mark.slow
def test_what_compares_responses_has_steps_of_one_size():
    cases = [Case(algorithm, "small", None, 1) for algorithm in WITHOUT_CRITIC]
    first, *others = [measure(case, settings(case, **SHORT), TINY) for case in cases]
    assert all(other == first for other in others)
    assert not any(first[0]["critic"].values())


def test_the_published_models_are_of_their_size():
    """7,615,616,512 weights and 1,777,088,000: what the model cards of DeepSeek-R1-Distill-Qwen add up to."""
    for name, size in (("7B", 7_615_616_512), ("1.5B", 1_777_088_000)):
        c = MODELS[name]
        assert 2 * c.vocab_size * c.hidden_size + c.num_hidden_layers * layer(c) + c.hidden_size == size


def test_committed_results_hold():
    report = json.loads((RESULTS / "cpu/train_memory.json").read_text())
    found = {(row["model"], row["case"]): row for row in report["rows"] if row["operations"]}
    small, token = (found["7B", case.name] for case in (SMALL_CRITIC, TOKEN_CRITIC))
    assert failures_of(report["rows"]) == report["failures"] == []
    assert token["peak_bytes"] - small["peak_bytes"] >= 0.11 * 80 * GIB
    for row in (small, token):
        assert row["policy"]["parameters"] == pytest.approx(7_615_616_512, rel=1e-4)  # four bytes over four devices
        assert row["policy"]["optimizer"] >= 2 * 7_615_616_512
    of_critic = 1_777_088_000 - MODELS["1.5B"].vocab_size * 1536
    assert small["critic"]["parameters"] == pytest.approx(of_critic, rel=1e-4)


def test_what_does_not_hold_is_said():
    row = {"operations": True, "before_bytes": 1, "model": "7B"}
    small = row | {"case": SMALL_CRITIC.name, "peak_bytes": 40 * GIB}
    token = row | {"case": TOKEN_CRITIC.name, "peak_bytes": 48 * GIB}
    (failure,) = failures_of([small, token])
    assert "10.0 points" in failure
    assert failures_of([small, token | {"peak_bytes": 49 * GIB}]) == []
    (failure,) = failures_of([small, small | {"operations": False, "peak_bytes": 39 * GIB}])
    assert "peak_bytes" in failure


def test_a_run_leaves_a_table_and_a_chart(tmp_path, monkeypatch, capsys, rows):
    monkeypatch.setattr(train_memory, "QUICK", list(rows))
    monkeypatch.setattr(train_memory, "measure", lambda case, *_: rows[case])
    arguments = ["train_memory", "--quick", "--out", str(tmp_path)]
    assert main(arguments) == 0
    assert "sppo, critic small" in capsys.readouterr().out
    assert {file.suffix for file in tmp_path.glob("train_memory.*")} == {".json", ".csv", ".svg"}
    monkeypatch.setattr(train_memory, "failures_of", lambda rows: ["something"])
    assert main(arguments) == 1
    assert "something" in capsys.readouterr().err
