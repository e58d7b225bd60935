"""The optimizer's hooks."""

import torch

from sppo.optimization import freeze_by_rate


def test_a_rate_of_0_freezes_what_may_not_learn():
    """For DeepSpeed, which runs on no CPU under accelerate: the hooks on an optimizer of torch."""
    parts = {name: torch.nn.Parameter(torch.ones(3)) for name in ("policy", "critic")}
    groups = [{"params": [p], "lr": 0.5, "weight_decay": 0.1, "part": name} for name, p in parts.items()]
    optimizer, learns = torch.optim.AdamW(groups), {"policy": False, "critic": True}
    freeze_by_rate(optimizer, lambda: learns)
    for parameter in parts.values():
        parameter.grad = torch.ones(3)
    optimizer.step()
    assert parts["policy"].tolist() == [1.0] * 3
    assert parts["critic"].tolist() != [1.0] * 3
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]
    assert not any("full_lr" in group for group in optimizer.param_groups)
