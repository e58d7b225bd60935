"""Tests of resolving and scoring: options, columns, weights, and finding the samples on which a reward fails."""

import asyncio
import inspect
import math
import re
import time

import pytest
from reward_batches import COMPLETIONS, PROMPTS, score_batch, spec
from worker_rewards import length, misbehave

from sppo._utils import import_object
from sppo.rewards import BUILTIN, resolve, score
from sppo.rewards.scoring import BUILTIN_OPTIONS


def test_functions_and_names_give_the_same_scores():
    async def slow_length(prompts, completions, **columns):
        await asyncio.sleep(0.01)
        return length(prompts, completions)

    for reward in (length, slow_length, spec("length"), resolve(spec("length"))):
        scores = score_batch(reward)
        assert scores.rewards == [1.0, 2.0, 3.0]
        assert scores.failures == []
        assert list(scores.means.values()) == [2.0]


def test_functions_receive_the_columns_they_name():
    def by_name(completions, answer):
        return [float(c == a) for c, a in zip(completions, answer, strict=True)]

    columns = {"answer": ["a", "x", "ccc"], "other": [1, 2, 3], "n": [1, 2, 3]}
    assert score_batch(by_name, columns).rewards == [1.0, 0.0, 1.0]
    assert score_batch(spec("sees"), {"good": [1, 2, 3], "bad": [object()] * 3}).rewards == [1.0] * 3


def test_rewards_are_summed_with_weights():
    scores = score([length, length], PROMPTS, COMPLETIONS, {}, weights=[1.0, 0.5])
    assert scores.rewards == [1.5, 3.0, 4.5]
    assert scores.means == {"length_1": 2.0, "length_2": 2.0}
    assert score([length], PROMPTS, COMPLETIONS, {}, names=["size"]).means == {"size": 2.0}


def test_full_rewards_with_weights_summing_to_one_give_one():
    ones = [lambda prompts, completions: [1.0] * len(completions)] * 3
    assert score(ones, ["p"], ["c"], {}, weights=[0.7, 0.2, 0.1]).rewards == [1.0]


def test_metrics_are_mean_and_std_of_scored_samples():
    scores = score([length, lambda completions: [None] * 3], PROMPTS, COMPLETIONS, {})
    assert scores.metrics() == {"rewards/length": 2.0, "rewards/length/std": 1.0}
    assert score([length], ["p"], ["bb"], {}).metrics() == {"rewards/length": 2.0, "rewards/length/std": 0.0}


def test_rewards_of_all_kinds_combine():
    async def short(completion):
        await asyncio.sleep(0)
        return float(len(completion) < 3)

    scores = score(
        [spec("length"), "exact", short], PROMPTS, COMPLETIONS, {"answer": ["a", "b", "c"]}, weights=[1, 2, 4]
    )
    assert scores.rewards == [1 + 2 + 4, 2 + 0 + 4, 3 + 0 + 0]
    assert scores.means == {"length": 2.0, "exact": pytest.approx(1 / 3), "short": pytest.approx(2 / 3)}


def test_an_empty_batch_has_no_rewards():
    scores = score([length, "exact"], [], [], {"answer": []})
    assert scores.rewards == []
    assert all(math.isnan(mean) for mean in scores.means.values())


# Options


def test_options_in_the_name_reach_the_function():
    reward = resolve("numeric?tolerance=0.1")
    assert score([reward], ["p"], ["1.05"], {"answer": ["1"]}).rewards == [1.0]
    assert score(["numeric"], ["p"], ["1.05"], {"answer": ["1"]}).rewards == [0.0]


def test_an_option_overrides_a_column_of_the_same_name():
    columns = {"answer": ["1"], "tolerance": [0.0], "seconds": ["soon"]}
    for reward, expected in (
        ("numeric", 0.0),
        ("numeric?tolerance=0.1", 1.0),
        ("math", 0.0),
        ("math?tolerance=0.1", 1.0),
    ):
        scores = score([reward], ["p"], ["1.05"], columns)
        assert (scores.rewards, scores.failures) == ([expected], [])
    assert score([spec("misbehave") + "?how=fine"], ["p"], ["bb"], {"how": ["raise"]}).rewards == [1.0]


def test_every_option_of_a_builtin_hides_its_column():
    signatures = [inspect.signature(import_object(target)).parameters.values() for target in BUILTIN.values()]
    options = {p.name for parameters in signatures for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert options - {"entry", "tests"} == BUILTIN_OPTIONS  # those two are columns


# Errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: resolve("mth"),
            "no reward named 'mth'; did you mean 'math'.*exact, numeric, math, reasoning_gym, stdin_stdout, unit_tests",
        ),
        (lambda: resolve("no_such_module:f"), "cannot import 'no_such_module:f'.*module:function"),
        (lambda: resolve("os:no_such_function"), "cannot import 'os:no_such_function'"),
        (lambda: resolve("missing.py:f"), "cannot import 'missing.py:f'"),
        (lambda: score([], PROMPTS, COMPLETIONS, {}), "reward_funcs is empty"),
        (lambda: score_batch(length, {"answer": ["1"]}), "'answer' has 1 values for 3 completions; give one for each"),
        (lambda: score_batch(length, weights=[1, 2]), "'weights' has 2 values for 1 rewards"),
        (lambda: score_batch(length, timeout=0), "timeout must be greater than 0"),
    ],
)
def test_invalid_arguments_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_reward_of_the_wrong_type_raises():
    with pytest.raises(TypeError, match="got 3"):
        resolve(3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", r"raised KeyError: 'no such thing' \(worker_rewards.py:\d+\)"),
        ("short", "returned 0 values for 1 completions"),
        ("loop", r"took longer than \S+ s"),
        ("hang in C", r"took longer than \S+ s"),
        ("exit", r"ended its process \(exit code 3\)"),
    ],
)
def test_a_failed_batch_is_narrowed_down_to_its_sample(how, message):
    start = time.monotonic()
    scores = score_batch(spec("misbehave") + f"?how={how}", timeout=0.6)
    assert time.monotonic() - start < 10
    assert scores.rewards == [1.0, None, 1.0]
    (failure,) = scores.failures
    assert re.search(f"'misbehave' {message}; prompt: 'two'", failure)
    assert score_batch(spec("length")).rewards == [1.0, 2.0, 3.0], "the worker was not restarted"


@pytest.mark.parametrize("how", ["raise", "short", "loop"])
def test_a_failed_batch_is_narrowed_down_in_process(how):
    def closure(prompts, completions, **columns):
        return misbehave(prompts, completions, how=how)

    scores = score_batch(closure, timeout=0.4)
    assert scores.rewards == [1.0, None, 1.0]
    assert len(scores.failures) == 1


@pytest.mark.slow
def test_a_hanging_reward_takes_at_most_three_time_limits():
    def hang(prompts, completions, **columns):
        time.sleep(60)

    start = time.monotonic()
    scores = score([hang], ["p"] * 50, ["c"] * 50, {}, timeout=0.5)
    assert time.monotonic() - start < 3 * 0.5 + 1
    assert scores.rewards == [None] * 50
    assert "was not called" in scores.failures[-1]


def test_slow_samples_cost_no_other_its_reward():
    """16 of 128 hang; the others are called with them, and then by themselves."""
    given = ["hang" if i % 8 == 3 else "word" for i in range(128)]
    for workers in (1, 2):
        start = time.monotonic()
        scores = score([spec("hang_on")], ["p"] * 128, given, {}, timeout=4, workers=workers)
        assert [x is None for x in scores.rewards] == [text == "hang" for text in given]
        assert time.monotonic() - start < 30  # three times the limit, and the time to restart the worker 16 times
        assert len(scores.failures) == 16


def test_a_slow_sample_has_a_second_call():
    scores = score([spec("sleep")], ["p"] * 4, ["0", "0.6", "9", "0"], {}, timeout=2)
    assert scores.rewards == [1.0, 1.0, None, 1.0]


def test_workers_call_parts_of_the_batch_side_by_side():
    pids = score([spec("pid")], ["p"] * 4, ["c"] * 4, {}, workers=2).rewards
    assert pids[0] == pids[1] != pids[2] == pids[3]
    again = score([spec("pid")], ["p"] * 4, ["c"] * 4, {}, workers=2).rewards
    assert again == pids, "the workers were not reused"
    start = time.monotonic()
    assert score([spec("sleep")], ["p"] * 2, ["1", "1"], {}, workers=2).rewards == [1.0, 1.0]
    assert time.monotonic() - start < 1.9
    one = score([spec("pid"), "exact"], ["p"], ["c"], {"answer": ["c"]}, workers=8)
    assert one.failures == []
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        score(["exact"], ["p"], ["c"], {}, workers=0)


def test_only_a_reward_of_weight_zero_may_fail():
    def broken(prompts, completions, **columns):
        raise RuntimeError("down")

    assert score([length, broken], PROMPTS, COMPLETIONS, {}).rewards == [None] * 3
    scores = score([length, broken], PROMPTS, COMPLETIONS, {}, weights=[1.0, 0.0])
    assert scores.rewards == [1.0, 2.0, 3.0]
    assert len(scores.failures) == 3
    assert math.isnan(scores.means["broken"])


def test_long_prompts_are_shortened_in_failures():
    chat = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "why? " * 100}]
    (failure,) = score([lambda prompts, completions: [None]], [chat], ["c"], {}).failures
    assert failure.endswith("...'")
    assert "why? why?" in failure
    assert len(failure) < 200
