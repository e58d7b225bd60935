"""Tests of text for the console: numbers, durations, sparklines, and text cut to a width."""

import io
import sys

import pytest

from sppo.reporting.text import cells, cut, duration, encodable, excerpt, number, smooth, sparkline


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1m00s"), (41, "41 s"), (560, "9m20s"), (4440, "1h14m"), (183600, "2d03h"), (-1, "0 s")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.12345, "0.123"), (-12.345, "-12.35"), (123.456, "123.5"), (98765.0, "9.88e+04")]
)
def test_numbers(value, text):
    assert number(value) == text
    assert number(abs(value), signed=True).startswith("+")


def test_the_running_mean_starts_at_the_first_value():
    assert smooth([2.0, 3.0]) == [2.0, pytest.approx((0.8 * 2 + 3) / 1.8)]
    assert smooth([]) == []


def test_a_sparkline_spans_the_range_of_the_means():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 0, 7, 7], 2) == "▁█"
    assert sparkline([5, 5], 8) == "▁▁"
    assert sparkline([0, float("nan"), 1], 8, ascii_only=True) == "_#"
    assert sparkline([], 8) == sparkline([float("inf")], 8) == ""


def test_lines_are_cut_by_terminal_cells():
    assert cells("ab日本e\u0301") == 7
    assert cut("abcdef", 6) == "abcdef"
    assert cut("abcdefg", 6) == "abc..."
    assert cut("日本日本", 7) == "日本..."


def test_an_excerpt_says_how_much_is_left_out():
    assert excerpt("a\nbc", 10, 2) == ["a", "bc"]
    assert excerpt("abcdefgh", 3, 2) == ["abc", "def", "[2 more characters]"]
    assert excerpt("ab\n" * 1000, 3, 2) == ["ab", "ab", "[2,994 more characters]"]
    assert excerpt("x" * 5000, 10, 1) == ["x" * 10, "[4,990 more characters]"]


def test_an_excerpt_keeps_to_the_width_with_escapes_tabs_and_wide_characters():
    lines = excerpt("\x1b[31m\t日本語\x07" * 20, 12, 50)
    assert all(0 < cells(line) <= 12 for line in lines)
    assert "".join(lines).replace(" ", "") == "\\x1b[31m日本語\\x07" * 20


def test_text_fits_the_encoding_of_standard_output(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert encodable("5 €") == "5 \\u20ac"
