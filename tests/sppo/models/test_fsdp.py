"""Two real processes make the same updates as one on the same samples, however these are divided between them."""

import json
from pathlib import Path

import pytest
import torch
from processes import run_ranks
from safetensors.torch import load_file

HELPERS = Path(__file__).parents[2] / "helpers"

# With this epsilon Adam's steps are continuous in the gradients: one of nothing but rounding moves no weight.
ADAM = {"optim": "adamw_torch", "learning_rate": 0.02, "critic_learning_rate": 0.02, "adam_epsilon": 1e-3}
RUNS = {
    "sppo": {"algorithm": "sppo", "ratio_level": "sequence_mean"},
    "ppo": {"algorithm": "ppo", "max_tokens_per_micro_batch": 20},
    "poise": {"algorithm": "poise", "max_steps": 4},
    "fsdp2, poise, resumed": {"sharding": "fsdp2", "algorithm": "poise", "max_steps": 4, "resumes": True, **ADAM},
    "seven prompts, no response left on rank 1": {"prompts": 7, "lost": True},
    "rank 1 has the same reward everywhere": {"equal": True, "beta": 0.1},
    "fsdp2": {"sharding": "fsdp2", "ratio_level": "sequence_mean"},
    "fsdp2, ppo, no response left on rank 1": {"sharding": "fsdp2", "algorithm": "ppo", "lost": True},
    "fsdp2, resumed": {"sharding": "fsdp2", "resumes": True, **ADAM},
    "fsdp2, truncated sampling, no response left on rank 1": {
        "sharding": "fsdp2",
        "top_k": 5,
        "lost": True,
        "beta": 0.1,
    },
    "fsdp2, a trained adapter": {"sharding": "fsdp2", "trained_lora": True, "beta": 0.1, **ADAM},
    "fsdp2, adapters": {"sharding": "fsdp2", "lora": True, "beta": 0.1, "resumes": True, **ADAM},
}

SAMPLED = {
    "fsdp2, sampled": {
        "sharding": "fsdp2",
        "sampled": True,
        "held_out": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
        **ADAM,
    }
}
"""Each process samples by itself, so the results differ from those of one process."""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Results of every run, in one process and in two."""
    found = {}
    for world in (1, 2):
        out = tmp_path_factory.mktemp(f"world{world}")
        runs = RUNS if world == 1 else RUNS | SAMPLED
        found[world] = (out, run_ranks(HELPERS / "ranks_run.py", world, out, json.dumps(runs))[0])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_make_the_updates_of_one(results, name):
    one, two = (results[world][1][name] for world in (1, 2))
    assert one["weights"].keys() == two["weights"].keys()
    for key, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][key], weight, rtol=1e-4, atol=1e-5, msg=lambda m, n=key: f"{n}: {m}")
    for ours, theirs in zip(two["log"], one["log"], strict=True):
        names = ["policy_loss", "policy_grad_norm", "ratio_mean", "ratio_max", "clip_fraction", "entropy"]
        assert {n: ours[n] for n in names} == pytest.approx({n: theirs[n] for n in names}, rel=1e-3, abs=1e-5)
    first = ("reward", "advantage", "advantage_std", "generated_tokens", "value", "brier")
    assert {n: two["log"][0][n] for n in first} == pytest.approx({n: one["log"][0][n] for n in first}, rel=1e-5)
    evaluated = ("eval_reward", "eval_problems", "eval_response_length")
    assert [two["evaluation"][n] for n in evaluated] == pytest.approx([one["evaluation"][n] for n in evaluated])


@pytest.mark.slow
def test_the_policies_moved(results):
    for name, result in results[1][1].items():
        if "resumed" not in name:
            assert result["log"][1]["ratio_max"] > 1.001, name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sppo", "fsdp2", "fsdp2, adapters"])
def test_saved_weights_are_unsharded(results, name):
    (out, _), (sharded, _) = results[1], results[2]
    files = sorted(path.relative_to(out / name) for path in (out / name).rglob("*.safetensors"))
    files = [file for file in files if "experience" not in file.name]
    assert files
    for file in files:
        ours, theirs = load_file(sharded / name / file), load_file(out / name / file)
        assert ours.keys() == theirs.keys(), file
        for key in theirs:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_processes_sample_independently(results):
    """With responses of unequal lengths, one held-out prompt for two processes, and the best of several checkpoints."""
    (run,) = (results[2][1][name] for name in SAMPLED)
    assert len(run["log"]) == 2
    assert run["evaluation"]["eval_problems"] == 1
