"""Two processes make the update that one makes of the same samples: loss, normalisation, advantages. Real processes."""

from pathlib import Path

import pytest
import torch
from processes import run_ranks

HERE = Path(__file__).parent


def updated(out, world, *settings):
    """Run ``ranks_run.py`` in ``world`` processes; what the first one saved."""
    out.mkdir()
    return run_ranks(HERE / "ranks_run.py", world, out, *settings)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ["algorithm=sppo", "ratio_level=sequence_mean"],
        ["algorithm=ppo", "max_tokens_per_micro_batch=20"],
    ],
    ids=lambda settings: settings[0],
)
def test_two_processes_make_the_update_of_one(tmp_path, settings):
    one, two = (updated(tmp_path / str(world), world, *settings) for world in (1, 2))
    assert one["weights"].keys() == two["weights"].keys()
    for name, weight in one["weights"].items():
        torch.testing.assert_close(
            two["weights"][name], weight, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    for ours, theirs in zip(two["log"], one["log"], strict=True):
        names = ["policy_loss", "policy_grad_norm", "ratio_mean", "ratio_max", "clip_fraction", "entropy"]
        assert {n: ours[n] for n in names} == pytest.approx({n: theirs[n] for n in names}, rel=1e-3, abs=1e-5)
    first = ("reward", "advantage", "advantage_std", "generated_tokens", "value", "brier")
    assert {n: two["log"][0][n] for n in first} == pytest.approx({n: one["log"][0][n] for n in first}, rel=1e-5)
    assert one["log"][1]["ratio_max"] > 1.01  # the policy has moved
