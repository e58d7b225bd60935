"""The order of prompts."""

from collections import Counter

import datasets

from sppo.rollout.prompts import Prompts


def test_prompts_are_all_seen_each_epoch_in_a_new_order():
    prompts = Prompts(datasets.Dataset.from_dict({"prompt": list("abcdefg")}), seed=3, shuffle=True)
    taken = [row["prompt"] for row in prompts.take(0, 21)]
    epochs = ["".join(taken[i : i + 7]) for i in (0, 7, 14)]
    assert all(Counter(epoch) == Counter("abcdefg") for epoch in epochs)
    assert len(set(epochs)) == 3
    assert [row["prompt"] for row in prompts.take(5, 9)] == taken[5:14]  # a function of the place alone
    straight = Prompts(prompts.dataset, seed=3, shuffle=False)
    assert "".join(row["prompt"] for row in straight.take(5, 4)) == "fgab"
