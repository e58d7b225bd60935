"""Tests of calls with limits of their own in forked processes."""

import os
import threading
import time
from pathlib import Path

import pytest

from sppo.rewards import processes
from sppo.rewards.processes import EXCEEDED, call_each

LIMITS = {"seconds": 0.5, "memory_mb": 200, "at_once": 2}


def endless():
    """Hold the interpreter in one call into C."""
    return float(9**9**9)


def work(i):
    if i in (2, 9):
        endless()
    if i == 3:
        return float(len("x" * (1 << 30)))
    if i == 4:
        os._exit(1)
    if i == 5:
        raise ValueError("no number")
    if i == 6:
        raise KeyError("name")
    if i == 7:
        return work_recursively(i)
    return i / 2


def work_recursively(i):
    return work_recursively(i + 1) + 1


@pytest.mark.parametrize("at_once", [1, 2, 20])
def test_a_call_that_exceeds_a_limit_costs_only_itself(at_once):
    start = time.monotonic()
    got = call_each(work, 12, **LIMITS | {"at_once": at_once})
    assert got[:5] == [0.0, 0.5, EXCEEDED, EXCEEDED, EXCEEDED]
    assert got[5:] == ["no number", "KeyError: 'name'", EXCEEDED, 4.0, EXCEEDED, 5.0, 5.5]
    assert time.monotonic() - start < 10


def test_no_process_or_file_is_left():
    files, children = len(os.listdir("/proc/self/fd")), Path(f"/proc/self/task/{threading.get_native_id()}/children")
    before = children.read_text()
    call_each(work, 12, **LIMITS)
    assert len(os.listdir("/proc/self/fd")) == files
    assert children.read_text() == before


def test_interrupting_it_ends_its_processes(monkeypatch):
    started = []

    class Recorded(processes._Child):
        def __init__(self, *args):
            super().__init__(*args)
            started.append(self.pid)

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(processes, "_Child", Recorded)
    monkeypatch.setattr(processes.select, "select", interrupt)
    with pytest.raises(KeyboardInterrupt):
        call_each(lambda i: time.sleep(60), 5, **LIMITS)
    assert len(started) == 2
    for pid in started:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_nothing_to_do():
    assert call_each(work, 0, **LIMITS) == []


def test_without_fork_calls_are_made_here(monkeypatch):
    monkeypatch.delattr(os, "fork")
    assert call_each(lambda i: work(i + 5) if i else 1.0, 3, **LIMITS) == [1.0, "KeyError: 'name'", EXCEEDED]
