"""Rewards: what they accept, and that a bad one costs its samples and never the run or its time."""

import asyncio
import contextlib
import inspect
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import worker_rewards
from worker_rewards import length, misbehave

from sppo._utils import import_object
from sppo.rewards import BUILTIN, resolve, score
from sppo.rewards import builtin as rewards
from sppo.rewards.limits import Worker
from sppo.rewards.scoring import BUILTIN_OPTIONS

PROMPTS = ["one", "two", "three"]
COMPLETIONS = ["a", "bb", "ccc"]


def here(name):
    return f"{worker_rewards.__file__}:{name}"


def run(reward, columns=None, **kwargs):
    return score([reward], PROMPTS, COMPLETIONS, columns or {}, **kwargs)


# What a reward may be


def test_function_async_function_name_and_path_give_the_same():
    async def slow_length(prompts, completions, **columns):
        await asyncio.sleep(0.01)
        return length(prompts, completions)

    for reward in (length, slow_length, here("length"), resolve(here("length"))):
        scores = run(reward)
        assert scores.rewards == [1.0, 2.0, 3.0]
        assert scores.failures == []
        assert list(scores.means.values()) == [2.0]


@pytest.mark.parametrize("ones", [np.ones(3), torch.ones(3), [True, 1, np.float32(1)], (1, 1, 1)])
def test_any_list_of_numbers(ones):
    assert run(lambda prompts, completions, **columns: ones).rewards == [1.0, 1.0, 1.0]


def test_columns_go_to_functions_that_take_them():
    def by_name(completions, answer):
        return [float(c == a) for c, a in zip(completions, answer, strict=True)]

    columns = {"answer": ["a", "x", "ccc"], "other": [1, 2, 3], "n": [1, 2, 3]}
    assert run(by_name, columns).rewards == [1.0, 0.0, 1.0]
    assert run(here("sees"), {"good": [1, 2, 3], "bad": [object()] * 3}).rewards == [1.0] * 3


def test_weighted_sum_and_names():
    scores = score([length, length], PROMPTS, COMPLETIONS, {}, weights=[1.0, 0.5])
    assert scores.rewards == [1.5, 3.0, 4.5]
    assert scores.means == {"length_1": 2.0, "length_2": 2.0}
    assert score([length], PROMPTS, COMPLETIONS, {}, names=["size"]).means == {"size": 2.0}


def test_metrics_are_mean_and_deviation_of_what_was_graded():
    scores = score([length, lambda completions: [None] * 3], PROMPTS, COMPLETIONS, {})
    assert scores.metrics() == {"rewards/length": 2.0, "rewards/length/std": 1.0}
    assert score([length], ["p"], ["bb"], {}).metrics() == {"rewards/length": 2.0, "rewards/length/std": 0.0}


def test_rewards_of_all_kinds_compose():
    async def short(completion):
        await asyncio.sleep(0)
        return float(len(completion) < 3)

    scores = score(
        [here("length"), "exact", short], PROMPTS, COMPLETIONS, {"answer": ["a", "b", "c"]}, weights=[1, 2, 4]
    )
    assert scores.rewards == [1 + 2 + 4, 2 + 0 + 4, 3 + 0 + 0]
    assert scores.means == {"length": 2.0, "exact": pytest.approx(1 / 3), "short": pytest.approx(2 / 3)}


# One by one


def is_answer(prompt, completion, answer):
    """Called once a sample; of the columns it gets those that it names, each a single value."""
    if completion == "bb":
        raise KeyError("no such thing")
    return float((prompt, completion) == answer)


class Judge:
    async def __call__(self, completion, **columns):
        await asyncio.sleep(0.2)
        if completion == "bb":
            sys.exit("no")
        return float(completion == columns["answer"][1])


@pytest.mark.parametrize("judge", [is_answer, Judge()])
def test_one_by_one(judge):
    answers = [("one", "a"), ("two", "bb"), ("three", "c")]
    start = time.monotonic()
    scores = run(judge, {"answer": answers, "completion": ["of the dataset"] * 3})
    assert time.monotonic() - start < 0.5, "async calls wait side by side, and one that raises costs no second round"
    assert scores.rewards == [1.0, None, 0.0]
    (failure,) = scores.failures
    assert re.search(
        r"raised (KeyError: 'no such thing'|SystemExit: no) \(test_scoring.py:\d+\); prompt: 'two'", failure
    )


def test_a_sample_that_raises_asks_for_no_second_round():
    asked = []

    def careless(completion):
        asked.append(completion)
        return 1 / (completion != "bb")

    assert run(careless).rewards == [1.0, None, 1.0]
    assert asked == COMPLETIONS


@pytest.mark.parametrize(
    ("how", "says"), [("fine", None), ("raise", "KeyError"), ("none", "gave no verdict"), ("loop", "took")]
)
def test_one_by_one_in_the_worker(how, says):
    scores = run(here("misbehave_alone") + f"?how={how}", {"size": [1, 2, 3]}, timeout=0.6)
    assert scores.rewards == [1.0, 2.0 if how == "fine" else None, 3.0]
    assert [says in failure for failure in scores.failures] == [True] * (how != "fine")


@pytest.mark.parametrize("wait", [asyncio.sleep, lambda seconds: asyncio.to_thread(time.sleep, seconds)])
@pytest.mark.parametrize("alone", [True, False])
def test_the_limit_on_async_rewards_is_firm(wait, alone):
    async def one(prompt, completion):
        await wait(2 if completion == "bb" else 0)
        return 1.0

    async def batch(prompts, completions):
        return [await one(p, c) for p, c in zip(prompts, completions, strict=True)]

    start = time.monotonic()
    scores = run(one if alone else batch, timeout=0.3)
    assert time.monotonic() - start < 1.9
    assert scores.rewards[:2] == [1.0, None]
    assert "took longer than" in scores.failures[0]


def test_options_in_the_name():
    reward = resolve("numeric?tolerance=0.1")
    assert score([reward], ["p"], ["1.05"], {"answer": ["1"]}).rewards == [1.0]
    assert score(["numeric"], ["p"], ["1.05"], {"answer": ["1"]}).rewards == [0.0]


def test_empty_batch():
    scores = score([length, "exact"], [], [], {"answer": []})
    assert scores.rewards == []
    assert all(math.isnan(mean) for mean in scores.means.values())


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda: resolve("mth"),
            "no reward named 'mth'; did you mean 'math'.*exact, numeric, math, reasoning_gym, unit_tests",
        ),
        (lambda: resolve("no_such_module:f"), "cannot import 'no_such_module:f'.*module:function"),
        (lambda: resolve("os:no_such_function"), "cannot import 'os:no_such_function'"),
        (lambda: resolve("missing.py:f"), "cannot import 'missing.py:f'"),
        (lambda: score([], PROMPTS, COMPLETIONS, {}), "reward_funcs is empty"),
        (lambda: run(length, {"answer": ["1"]}), "'answer' has 1 values for 3 completions"),
        (lambda: run(length, weights=[1, 2]), "'weights' has 2 values for 1 rewards"),
        (lambda: run(length, timeout=0), "timeout must be greater than 0"),
    ],
)
def test_wrong_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_what_is_no_reward():
    with pytest.raises(TypeError, match="got 3"):
        resolve(3)


def test_an_option_wins_over_a_column_of_its_name():
    columns = {"answer": ["1"], "tolerance": [0.0], "seconds": ["soon"]}
    for reward, wanted in (
        ("numeric", 0.0),
        ("numeric?tolerance=0.1", 1.0),
        ("math", 0.0),
        ("math?tolerance=0.1", 1.0),
    ):
        scores = score([reward], ["p"], ["1.05"], columns)
        assert (scores.rewards, scores.failures) == ([wanted], [])
    assert score([here("misbehave") + "?how=fine"], ["p"], ["bb"], {"how": ["raise"]}).rewards == [1.0]


def test_a_column_is_hidden_from_every_option_of_a_built_in():
    signatures = [inspect.signature(import_object(target)).parameters.values() for target in BUILTIN.values()]
    options = {p.name for parameters in signatures for p in parameters if p.default is not p.empty}
    assert options == BUILTIN_OPTIONS


# What may go wrong with one


class Odd:
    """A value whose own methods fail."""

    def item(self):
        raise KeyError("nothing inside")


class OddText(Exception):
    def __str__(self):
        raise RuntimeError("no words")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, "gave no verdict"),
        (float("nan"), "returned nan"),
        (float("inf"), "returned inf"),
        ("1.0", "returned '1.0', not a number"),
        (np.ones(2), "not a number"),
        (1j, "not a number"),
        (10**400, "raised OverflowError"),
        (Odd(), "raised KeyError"),
    ],
)
def test_a_bad_value_costs_its_sample(value, says):
    scores = run(lambda prompts, completions, **columns: [1.0, value, 1.0])
    assert scores.rewards == [1.0, None, 1.0]
    assert list(scores.means.values()) == [1.0]
    (failure,) = scores.failures
    assert says in failure
    assert "prompt: 'two'" in failure
    assert "<lambda>" in failure


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("raise", r"raised KeyError: 'no such thing' \(worker_rewards.py:\d+\)"),
        ("short", "returned 0 values for 1 completions"),
        ("loop", r"took longer than \S+ s"),
        ("hang in C", r"took longer than \S+ s"),
        ("exit", r"ended its process \(exit code 3\)"),
    ],
)
def test_the_culprit_of_a_failed_batch_is_found(how, says):
    start = time.monotonic()
    scores = run(here("misbehave") + f"?how={how}", timeout=0.6)
    assert time.monotonic() - start < 10
    assert scores.rewards == [1.0, None, 1.0]
    (failure,) = scores.failures
    assert re.search(f"'misbehave' {says}; prompt: 'two'", failure)
    assert run(here("length")).rewards == [1.0, 2.0, 3.0], "the worker is back"


@pytest.mark.parametrize(
    ("error", "says"), [(KeyError("k"), "raised KeyError: 'k'"), (OddText(), "raised OddText: a ")]
)
def test_a_generator_that_raises_costs_its_sample(error, says):
    def lazy(prompts, completions, **columns):
        for completion in completions:
            if completion == "bb":
                raise error
            yield 1.0

    scores = run(lazy)
    assert scores.rewards == [1.0, None, 1.0]
    (failure,) = scores.failures
    assert says in failure


@pytest.mark.parametrize("how", ["raise", "short", "loop"])
def test_the_culprit_is_found_in_this_process(how):
    def closure(prompts, completions, **columns):
        return misbehave(prompts, completions, how=how)

    scores = run(closure, timeout=0.4)
    assert scores.rewards == [1.0, None, 1.0]
    assert len(scores.failures) == 1


def test_limits_hold_off_the_main_thread_too():
    def closure(prompts, completions, **columns):
        return misbehave(prompts, completions, how="loop")

    found = []
    thread = threading.Thread(target=lambda: found.append(run(closure, timeout=0.4)))
    thread.start()
    thread.join(10)
    assert found[0].rewards == [1.0, None, 1.0]


def test_functions_that_swallow_exceptions_end_too():
    def stubborn(prompts, completions, **columns):
        while True:
            with contextlib.suppress(Exception):
                time.sleep(60)

    start = time.monotonic()
    assert score([stubborn], ["p"], ["c"], {}, timeout=0.2).rewards == [None]
    assert time.monotonic() - start < 5


def test_a_batch_that_hangs_everywhere_takes_at_most_three_limits():
    def hang(prompts, completions, **columns):
        time.sleep(60)

    start = time.monotonic()
    scores = score([hang], ["p"] * 50, ["c"] * 50, {}, timeout=0.5)
    assert time.monotonic() - start < 3 * 0.5 + 1
    assert scores.rewards == [None] * 50
    assert "was not asked" in scores.failures[-1]


def test_the_worker_is_kept_until_it_is_killed():
    reward = resolve(here("pid"))
    first = run(reward).rewards
    assert run(reward).rewards == first
    assert first[0] != os.getpid()
    run(here("misbehave") + "?how=loop", timeout=0.3)
    assert run(reward).rewards != first


def test_the_worker_ends_with_its_input():
    resolve("exact")
    process = Worker.current().process
    process.stdin.close()
    process.wait(timeout=10)
    assert score(["exact"], ["p"], ["a"], {"answer": ["a"]}).rewards == [1.0]


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel of Linux to end the worker")
def test_the_worker_ends_with_a_killed_trainer_in_the_middle_of_a_call_into_c():
    script = (
        "import sys; from sppo.rewards import resolve, score; from sppo.rewards.limits import Worker\n"
        "reward = resolve(sys.argv[1]); print(Worker.current().process.pid, flush=True)\n"
        "score([reward], ['p'], ['bb'], {})"
    )
    command = [sys.executable, "-c", script, here("misbehave") + "?how=hang in C"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as trainer:
        worker = int(trainer.stdout.readline())
        time.sleep(0.5)  # until the call has begun
        trainer.kill()
    try:
        wait_until(lambda: not runs(worker))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)


def wait_until(condition, seconds=5):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_worker_started_in_a_thread_outlasts_it():
    former = Worker.current().process  # asked for again it may be another, started because this one has died
    former.kill()
    former.wait()
    thread = threading.Thread(target=resolve, args=("exact",))
    thread.start()
    thread.join()
    started = Worker.current().process
    with pytest.raises(subprocess.TimeoutExpired):
        started.wait(timeout=0.3)


def test_only_a_reward_of_weight_zero_is_dispensable():
    def broken(prompts, completions, **columns):
        raise RuntimeError("down")

    assert score([length, broken], PROMPTS, COMPLETIONS, {}).rewards == [None] * 3
    scores = score([length, broken], PROMPTS, COMPLETIONS, {}, weights=[1.0, 0.0])
    assert scores.rewards == [1.0, 2.0, 3.0]
    assert len(scores.failures) == 3
    assert math.isnan(scores.means["broken"])


def test_long_prompts_and_chats_are_shortened_in_reports():
    chat = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "why? " * 100}]
    (failure,) = score([lambda prompts, completions: [None]], [chat], ["c"], {}).failures
    assert failure.endswith("...'")
    assert "why? why?" in failure
    assert len(failure) < 200


# Built in


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{2} and \boxed{3", None),
        ("<think>it is 5", None),
        ("<think>it is 4</think>\n5", "5"),
        ("The final answer is **7**.", "7"),
        ("Answer: $x+1$", "x+1"),
        ("3 + 4 = 7\n#### 7", "7"),
        ("<answer> yes. </answer>", "yes."),
        ("<answer>1</answer> no, <answer>it is <answer>\n2</answer>", "2"),
        ("Answer: \u00a0** 7 **. \u3000", "7"),
        ("First this.\n  42 \n", "42"),
        ([{"role": "assistant", "content": "Answer: 3"}], "3"),
        ("", ""),
    ],
)
def test_final_answer(completion, answer):
    assert rewards.final_answer("question", completion) == answer


def test_a_thought_opened_by_the_prompt_must_end():
    assert rewards.final_answer("question <think>\n", "it is 5") is None
    assert rewards.final_answer("question <think>\n", "it is 4</think>5") == "5"


@pytest.mark.parametrize(
    "text",
    [
        "." * 64000 + "x",
        "x" + " *" * 32000 + "x",
        "1" * 64000,
        "a" * 64000,
        "a b" * 20000,
        "1" + " " * 64000 + "2",
        "<answer>" * 8000,
        "Answer: " * 8000,
        "\\boxed{" * 8000,
        "1,111" * 12000,
        "$" * 64000,
    ],
    ids=lambda text: text[:9],
)
def test_repetition_takes_no_time(text):
    start = time.monotonic()
    for reward in (rewards.exact, rewards.numeric, rewards.math):
        assert reward(["p"], [text], answer=["7"]) == [0.0]
    for pattern in (value for value in vars(rewards).values() if isinstance(value, re.Pattern)):
        pattern.findall(text)
    assert time.monotonic() - start < 2


def test_an_answer_too_long_to_be_one():
    assert rewards.numeric(["p"] * 2, ["0" * 1000 + "7", "0" * 999 + "7"], answer=["7"] * 2) == [0.0, 1.0]
    assert rewards.exact(["p"], ["a" * 2000], answer=["a" * 2000]) == [1.0]


def test_exact():
    completions = ["Answer: 5 ", "50", "", r"\boxed{5}"]
    assert rewards.exact([""] * 4, completions, answer=["5", "5", "5", 5]) == [1, 0, 0, 1]


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("5", "5", True),
        ("500", "5", False),
        ("0.05", "5", False),
        ("-5", "5", False),
        ("5.0001", "5", False),
        ("5.00", 5, True),
        ("1,234,567", "1234567", True),
        ("x = 3/4", "0.75", True),
        (r"\frac{3}{4}", "0.75", True),
        ("3.14159", "3.1416", True),
        ("3.15", "3.1416", False),
        (r"6.02 \times 10^{23}", "6.02e23", True),
        ("1.1e-8", "1e-8", False),
        ("7-5", "5", True),
        ("no idea", "5", False),
        ("Answer: 5 (of 12)\nI had 9 before", "12", True),
        ("12 - 5 = 7 sheep", "... #### 7", True),
        ("<think>5", "5", False),
    ],
)
def test_numeric(completion, answer, right):
    assert rewards.numeric(["p"], [completion], answer=[answer]) == [float(right)]


def test_right_answers_come_from_the_columns_that_data_has():
    for columns in ({"answer": ["5"]}, {"reward_model": [{"ground_truth": "5"}]}, {"solution": ["5"]}):
        assert rewards.numeric(["p"], ["5"], **columns) == [1.0]
    both = {"solution": ["first 4, then 6"], "reward_model": [{"ground_truth": "5"}]}
    assert rewards.numeric(["p"], ["5"], **both) == [1.0]
    assert "no column 'answer'" in score(["numeric"], ["p"], ["5"], {"label": ["5"]}).failures[0]


@pytest.mark.parametrize("answer", [r"\text{Evelyn}", r"\text{even}", r"\text{(B)}", "A"])
def test_math_knows_words(answer):
    word = re.sub(r"\\text|[{}()]", "", answer)
    assert rewards.math(["p"] * 3, [rf"\boxed{{{x}}}" for x in (answer, word, "odd")], answer=[answer] * 3) == [1, 1, 0]


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        (r"\boxed{0.5}", r"\frac12", True),
        (r"\boxed{x = 5}", "5", True),
        (r"\boxed{1 + x^2}", "x^2+1", True),
        (r"\boxed{4.5 \times 10^{33}}", "4.5e33", True),
        (r"\boxed{0}", "1e-12", False),
        (r"\boxed{0.0000001}", "0.00000012", False),
        (r"\boxed{(2, 4)}", "4", False),
        (r"\boxed{[2, 4)}", "(2, 4)", False),
        ("(2, 4)", "(2, 4)", True),
        ("The sum is 7.", "7", True),
        ("<think> maybe 7", "7", False),
        (r"<think>7</think> \boxed{8}", "7", False),
        (r"\boxed{7", "7", False),
        (r"\boxed{}", "7", False),
        (r"\boxed{\frac{}{}{{}", "7", False),
        ("", "7", False),
    ],
)
def test_math(completion, answer, right):
    assert rewards.math(["p"], [completion], answer=[answer]) == [float(right)]


def test_math_tolerance():
    for completion, right in (("1.61", 1.0), ("1.7", 0.0), ("16.1", 0.0)):
        assert rewards.math(["p"], [completion], answer=["1.6"], tolerance=0.01) == [right]


def test_math_reports_a_ground_truth_it_cannot_read():
    scores = score(["math"], ["p", "q"], ["1", "1"], {"answer": [r"\frac{1", "1"]})
    assert scores.rewards == [None, 1.0]
    assert "cannot read the right answer" in scores.failures[0]


@pytest.mark.parametrize("tolerance", [None, 0.01])
@pytest.mark.parametrize(
    "answer",
    [
        r"9^{9^{9^{9^{9}}}} + \frac{1}{9^{9^{9^{9}}}}",
        "9^{9^{9}}",
        "99999999!",
        r"\binom{99999999}{49999999}",
        "1e99999999",
        "1e" + "9" * 900,
        "1e" + "9" * 5000,
    ],
    ids=lambda answer: str(answer)[:12],
)
def test_an_answer_that_math_verify_cannot_work_out_is_wrong(answer, tolerance):
    start = time.monotonic()
    given = [rf"\boxed{{{answer}}}", r"\boxed{7}"]
    assert rewards.math(["p", "q"], given, answer=["7", "7"], tolerance=tolerance, seconds=1) == [0.0, 1.0]
    assert time.monotonic() - start < 4


def test_reasoning_gym_entries_survive_json():
    entry = {"a": (1, [2, (3,)]), "b": {4: "x", (5, 6): None}, "c": "text"}
    assert json.loads(json.dumps(rewards.pack(entry)), object_hook=rewards._unpack) == entry


def test_weights_that_add_up_to_one_give_one():
    ones = [lambda prompts, completions: [1.0] * len(completions)] * 3
    assert score(ones, ["p"], ["c"], {}, weights=[0.7, 0.2, 0.1]).rewards == [1.0]
