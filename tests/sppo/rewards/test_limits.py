"""Tests of time limits, and of the life of the worker process."""

import asyncio
import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
from reward_batches import score_batch, spec
from worker_rewards import misbehave

from sppo.rewards import limits, resolve, score
from sppo.rewards.limits import Worker


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "message"), [("fine", None), ("raise", "KeyError"), ("none", "returned None"), ("loop", "took")]
)
def test_the_worker_calls_rewards_per_sample(how, message):
    scores = score_batch(spec("misbehave_on_sample") + f"?how={how}", {"size": [1, 2, 3]}, timeout=0.6)
    assert scores.rewards == [1.0, 2.0 if how == "fine" else None, 3.0]
    assert [message in failure for failure in scores.failures] == [True] * (how != "fine")


@pytest.mark.slow
@pytest.mark.parametrize("wait", [asyncio.sleep, lambda seconds: asyncio.to_thread(time.sleep, seconds)])
@pytest.mark.parametrize("per_sample", [True, False])
def test_async_rewards_end_at_the_limit(wait, per_sample):
    async def one(prompt, completion):
        await wait(3 if completion == "bb" else 0)
        return 1.0

    async def batch(prompts, completions):
        return [await one(p, c) for p, c in zip(prompts, completions, strict=True)]

    start = time.monotonic()
    scores = score_batch(one if per_sample else batch, timeout=0.6)
    assert time.monotonic() - start < 2.9
    assert scores.rewards[:2] == [1.0, None]
    assert "took longer than" in scores.failures[0]


def test_no_wait_for_threads_is_left_to_the_garbage_collection():
    """There it may run while threading holds a lock that it needs."""

    async def reward(prompts, completions):
        await asyncio.to_thread(time.sleep, 1.5)
        return [1.0] * len(prompts)

    gc.collect()
    gc.disable()
    try:
        assert score_batch(reward, timeout=0.2).rewards == [None] * 3
        coroutines = [found for found in gc.get_objects() if type(found) is types.CoroutineType]
        assert not [found for found in coroutines if found.__name__ == "shutdown_default_executor"]
    finally:
        gc.enable()


def test_limits_apply_outside_the_main_thread():
    def closure(prompts, completions, **columns):
        return misbehave(prompts, completions, how="loop")

    found = []
    thread = threading.Thread(target=lambda: found.append(score_batch(closure, timeout=0.4)))
    thread.start()
    thread.join(10)
    assert found[0].rewards == [1.0, None, 1.0]


def test_functions_that_catch_exceptions_end_at_the_limit():
    def stubborn(prompts, completions, **columns):
        while True:
            with contextlib.suppress(Exception):
                time.sleep(60)

    start = time.monotonic()
    assert score([stubborn], ["p"], ["c"], {}, timeout=0.2).rewards == [None]
    assert time.monotonic() - start < 5


# The worker process


def test_the_worker_is_reused_until_it_is_killed():
    reward = resolve(spec("pid"))
    first = score_batch(reward).rewards
    assert score_batch(reward).rewards == first
    assert first[0] != os.getpid()
    score_batch(spec("misbehave") + "?how=loop", timeout=0.3)
    assert score_batch(reward).rewards != first


def test_the_worker_ends_with_its_standard_input():
    resolve("exact")
    process = Worker.current().process
    process.stdin.close()
    process.wait(timeout=10)
    assert score(["exact"], ["p"], ["a"], {"answer": ["a"]}).rewards == [1.0]


def test_a_worker_that_closed_its_output_and_goes_on_is_killed(monkeypatch):
    monkeypatch.setattr(limits, "EXIT_TIMEOUT", 0.3)
    scores = score([spec("misbehave") + "?how=close"], ["p"], ["bb"], {})
    assert scores.rewards == [None]
    assert "ended its process (exit code -9)" in scores.failures[0]


@pytest.mark.skipif(sys.platform != "linux", reason="only the Linux kernel can end the worker")
def test_a_worker_in_a_c_call_ends_with_its_killed_trainer():
    script = (
        "import sys; from sppo.rewards import resolve, score; from sppo.rewards.limits import Worker\n"
        "reward = resolve(sys.argv[1]); print(Worker.current().process.pid, flush=True)\n"
        "score([reward], ['p'], ['bb'], {})"
    )
    command = [sys.executable, "-c", script, spec("misbehave") + "?how=hang in C"]
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


def test_a_worker_outlives_the_thread_that_started_it():
    previous = Worker.current().process
    previous.kill()
    previous.wait()
    thread = threading.Thread(target=resolve, args=("exact",))
    thread.start()
    thread.join()
    started = Worker.current().process
    with pytest.raises(subprocess.TimeoutExpired):
        started.wait(timeout=0.3)
