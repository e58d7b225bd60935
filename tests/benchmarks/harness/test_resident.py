"""Peak resident memory: what it counts, and from where."""

import pytest
import torch

from benchmarks.harness.resident import ResidentPeak, measurable

pytestmark = pytest.mark.skipif(not measurable(), reason="not Linux, or without /proc/self/clear_refs")
MIB = 1 << 20
SLACK = 16 * MIB


def test_counts_what_was_held_and_freed():
    peak = ResidentPeak()
    assert peak.read() < SLACK
    torch.ones(64 * MIB // 4)
    assert 64 * MIB <= peak.read() + SLACK < 64 * MIB + 2 * SLACK


def test_does_not_count_what_was_there_before():
    before = torch.ones(64 * MIB // 4)
    peak = ResidentPeak()
    assert peak.read() < SLACK
    assert before.sum() > 0


def test_a_reset_forgets_what_is_freed_and_keeps_what_is_held():
    peak = ResidentPeak()
    torch.ones(128 * MIB // 4)
    held = torch.ones(64 * MIB // 4)
    peak.reset()
    assert 64 * MIB <= peak.read() + SLACK < 64 * MIB + 2 * SLACK
    assert held.sum() > 0
