"""Rewards of length against the published formulas, TRL's implementation, and in training."""

import pytest
from reward_batches import score_batch
from tiny_run import has_a, logged, make
from trl.rewards import get_soft_overlong_punishment

from sppo.rewards import resolve, score


def values(reward, lengths):
    completions = ["c"] * len(lengths)
    scores = score([reward], completions, completions, {"completion_lengths": lengths})
    assert scores.failures == []
    return scores.rewards


def test_overlong_is_the_penalty_of_dapo_as_in_trl():
    lengths = [0, 70, 80, 81, 90, 99, 100, 101, 500]
    published = get_soft_overlong_punishment(100, 20)(completion_ids=[[0] * n for n in lengths])
    assert values("overlong?max_tokens=100&buffer=20", lengths) == pytest.approx(published)
    assert values("overlong?max_tokens=100&buffer=20", [80, 85, 100, 101]) == pytest.approx([0, -0.25, -1, -1])
    assert values("overlong?max_tokens=100&buffer=20&offset=1", [80, 85, 200]) == pytest.approx([1, 0.75, 0])


def test_length_is_the_factor_of_lcpo_max():
    assert values("length?target=1000", [1000, 0, 2000, 5000]) == pytest.approx([0.5, 0.8, 0.2, 0.0])
    assert values("length?target=10&alpha=0.1&delta=0.4", [10, 9, 13, 0]) == pytest.approx([0.4, 0.5, 0.1, 1.0])


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("overlong?max_tokens=10&buffer=11", "buffer must be in [1, max_tokens=10], got 11"),
        ("length?target=0", "target must be at least 1 and alpha greater than 0, got 0 and 0.0003"),
    ],
)
def test_wrong_options_are_named(reward, message):
    failures = score_batch(reward, {"completion_lengths": [1, 2, 3]}).failures
    assert all(message in failure for failure in failures)
    assert len(failures) == 3


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("overlong?max_tokens=10", r"needs buffer: overlong\?buffer=..."),
        ("length", r"needs target: length\?target=..."),
        ("length?targets=3", "has no option 'targets'; did you mean 'target'.*it takes"),
        ("math?tolerence=1", "has no option 'tolerence'; did you mean 'tolerance'"),
    ],
)
def test_options_are_checked_before_training(reward, message):
    with pytest.raises(ValueError, match=message):
        resolve(reward)


def test_they_need_the_numbers_of_tokens():
    assert "needs 'completion_lengths'" in score_batch("length?target=3").failures[0]


@pytest.mark.slow
def test_a_policy_learns_to_be_short(tmp_path):
    settings = {"max_steps": 30, "per_device_train_batch_size": 32, "reward_weights": [0.2, 0.8]}
    trainer = make(tmp_path, [has_a, "overlong?max_tokens=4&buffer=4&offset=1"], **settings)
    trainer.train()
    lengths = logged(trainer, "response_length")
    assert sum(lengths[-5:]) < sum(lengths[:5]) - 5
