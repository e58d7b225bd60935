"""What rewards receive from the trainer and log in return, in this process and in the worker process."""

import re

import pytest
import worker_rewards
from reward_batches import COMPLETIONS, PROMPTS, score_batch, spec
from transformers import TrainerState

from sppo.rewards import score
from sppo.rewards.log import RewardLog
from sppo.rewards.worker import RewardError, call

TOKENS = {
    "completion_ids": [[5], [6, 6], [7, 7, 7]],
    "completion_lengths": [1, 2, 3],
    "truncated": [False, False, True],
}
BOTH = pytest.mark.parametrize("where", ["function", "worker"])


def reward(name, where):
    return getattr(worker_rewards, name) if where == "function" else spec(name)


@BOTH
def test_a_reward_sees_tokens_and_state_and_logs(where):
    scores = score_batch(reward("logs", where), TOKENS, trainer_state=TrainerState(global_step=7))
    assert scores.rewards == [7.0, 7.0, 7.5]
    assert scores.log.means() == {"mean length": 2.0}
    assert scores.metrics()["custom/mean length"] == 2.0
    assert [scores.log.of_sample(i) for i in range(3)] == [{"first token": n} for n in (5, 6, 7)]


@BOTH
def test_a_reward_of_one_sample_logs_single_values(where):
    scores = score_batch(reward("logs_of_one", where), TOKENS)
    assert scores.log.means() == {"length": 2.0}
    assert [scores.log.of_sample(i)["tokens"] for i in range(3)] == TOKENS["completion_ids"]


def test_parts_of_a_batch_log_at_their_place():
    scores = score_batch(spec("logs"), TOKENS, workers=2, trainer_state=TrainerState())
    assert [scores.log.of_sample(i)["first token"] for i in range(3)] == [5, 6, 7]


@BOTH
def test_a_call_that_fails_logs_nothing(where):
    scores = score_batch(reward("fails_after_logging", where))
    assert scores.rewards == [1.0, None, 1.0]
    assert scores.log.metrics == [("calls", 1.0)] * 2


def test_only_functions_that_name_them_see_what_a_trainer_adds_without_one():
    def sees(completions, **columns):
        assert set(columns) == expected
        return [1.0] * len(completions)

    expected = {"prompts", *TOKENS}
    assert score_batch(sees, TOKENS).failures == []
    expected |= {"trainer_state", "log_metric", "log_extra"}
    scores = score_batch(lambda **given: sees(**given), TOKENS, trainer_state=TrainerState())
    assert scores.failures == []


def test_the_worker_gets_no_log_history():
    state = TrainerState(global_step=3, log_history=[{"loss": 1.0}])
    assert score_batch(spec("has_no_history"), TOKENS, trainer_state=state).failures == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            lambda completions, log_metric: log_metric("x", "a"),
            "log_metric: the value of 'x' must be a number, got 'a'",
        ),
        (lambda completions, log_metric: log_metric("x", float("nan")), "log_metric: the value of 'x' must be finite"),
        (lambda completions, log_extra: log_extra("x", [1]), "column 'x' has 1 values for 3 samples"),
        (lambda completions, no_such: [1.0], "needs 'no_such': give it as an option of the reward's name, or as a col"),
    ],
)
def test_wrong_use_is_a_failure_with_the_reason(wrong, message):
    with pytest.raises(RewardError, match=re.escape(message)):
        call(wrong, {}, PROMPTS, COMPLETIONS, TOKENS)


def test_columns_that_json_cannot_represent_are_logged_as_text():
    log = RewardLog(1)
    log.log_extra("set", [{1}])
    log.log_extra("keys", [{(1, 2): 3}])
    assert RewardLog.from_json(1, log.to_json()).of_sample(0) == {"set": "{1}", "keys": "{(1, 2): 3}"}


def test_a_reward_that_returns_none_does_not_apply_to_the_sample():
    def of(letters):
        return lambda completions: [1.0 if c[0] in letters else None for c in completions]

    scores = score([of("ab"), of("a")], COMPLETIONS, COMPLETIONS, {})
    assert scores.rewards == [2.0, 1.0, None]
    assert scores.failures == ["each reward returned None; prompt: 'ccc'"]
    assert score([of("ab"), of("a")], COMPLETIONS, COMPLETIONS, {}, weights=[1, 0]).rewards == [1.0, 1.0, None]
