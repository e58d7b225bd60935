"""Two real processes with sharded weights make the same update as one on all samples."""

from pathlib import Path

import pytest
import torch
from plain_loop import PROMPTS, ActorCritic
from processes import run_ranks


@pytest.mark.slow
def test_two_sharded_processes_make_the_update_of_one(tmp_path):
    torch.manual_seed(0)
    model = ActorCritic()
    tokens, labels, old, _ = model.rollout(PROMPTS[:64])
    order = (labels != -100).sum(1).argsort()  # the short ones to one process, the long ones to the other
    old += 0.3 * torch.randn(old.shape)  # ratios on both sides of the clip
    samples = [x[order] for x in (tokens, labels, old, torch.randint(2, (64,)).float())]
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    torch.save({"weights": weights, "samples": samples}, tmp_path / "given.pt")

    model(*samples).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.optim.SGD(model.parameters(), lr=1.0).step()

    result, said = run_ranks(Path(__file__).parents[1] / "helpers/fsdp2_run.py", 2, tmp_path)
    assert norm > 1  # clipped, so the weights alone would not show a gradient of the wrong size
    torch.testing.assert_close(result["norm"], norm, rtol=1e-4, atol=0)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(
            result["weights"][name], weight, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
        assert not torch.equal(weight, weights[name]), name
    assert "held-out prompts" in said[0]
    assert "held-out" not in said[1]
