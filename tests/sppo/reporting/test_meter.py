"""Tests of the meter: nested phases and failed phases."""

import time
from contextlib import suppress

import pytest
from tiny_run import make

from sppo.reporting.meter import Meter


@pytest.fixture
def clock(monkeypatch):
    """Replace the clock by one that is advanced by hand: ``clock[0] += seconds``."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_nested_phases_are_counted_once(clock):
    meter = Meter()
    for _ in range(2):
        with meter.phase("outer"):
            clock[0] += 1
            with meter.phase("inner"):
                clock[0] += 10
                with meter.phase("innermost"):
                    clock[0] += 100
            with meter.phase("inner"):
                clock[0] += 10
        clock[0] += 1000
    read = meter.read(list)
    seconds = {name.removeprefix("seconds/"): value for name, value in read.items() if name.startswith("seconds/")}
    assert seconds == {"outer": 2, "inner": 40, "innermost": 200, "update": 2000}


def test_a_failed_phase_is_counted(clock):
    meter = Meter()
    with suppress(KeyError), meter.phase("outer"), meter.phase("inner"):
        clock[0] += 1
        raise KeyError
    with meter.phase("outer"):
        clock[0] += 2
    read = meter.read(list)
    assert (read["seconds/inner"], read["seconds/outer"], read["seconds/update"]) == (1, 2, 0)


@pytest.mark.slow
def test_log_probabilities_are_a_phase_of_several_updates(tmp_path):
    trainer = make(tmp_path, steps_per_generation=2, max_steps=4)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry.get("seconds/log-probabilities", 0) > 0 for entry in entries] == [True, False, True, False]
    assert entries[0]["seconds/critic"] > 0
    once = make(tmp_path, max_steps=1)
    once.train()
    assert "seconds/log-probabilities" not in once.state.log_history[0]


def test_phases_are_announced_with_the_one_around_them():
    names = []
    meter = Meter(names.append)
    with meter.phase("evaluate"), meter.phase("rollout"):
        pass
    with pytest.raises(KeyError), meter.phase("reward"):
        raise KeyError
    assert names == ["evaluate", "rollout", "evaluate", "update", "reward", "update"]


def test_names_of_rewards_do_not_make_extremes():
    meter = Meter()
    for value in (1.0, 3.0):
        meter.mean({"custom/len_max": value, "rewards/x_min": value, "ratio_max": value})
    read = meter.read(list)
    assert (read["custom/len_max"], read["rewards/x_min"], read["ratio_max"]) == (2.0, 2.0, 3.0)
