"""The built-in rewards ``exact``, ``numeric`` and ``math``: 1.0 for a correct final answer, else 0.0.

The final answer of a completion is read after its thinking section: the last ``\\boxed{...}``, else the last
``<answer>...</answer>``, else what follows the last ``####``, ``Answer:`` or ``the answer is``, else the last line. If
``<think>`` or a box is opened and not closed, there is no answer. ``numeric`` and ``math`` also ignore final answers of
more than 1,000 characters, which are degenerate repetition.

The ground truth is the column ``answer`` (in GSM8K's layout, what follows ``####`` in it), else
``reward_model["ground_truth"]``, else ``solution``.
"""

from __future__ import annotations

import math as maths
import re
from collections.abc import Sequence
from typing import Any

from sppo.rewards.processes import EXCEEDED, call_each, num_cores

_MARKER = re.compile(r"(?:####|\b(?:final\s+)?answer\s*(?:is\b|:|=)[:*\s]*)\s*([^\n]*)", re.IGNORECASE)
# Policies repeat themselves for thousands of characters, so no pattern may take time quadratic in the text. The
# patterns below start only where no match can have started earlier (lookbehind) and do not backtrack (++ and *+).
# Possessive groups inside a group are broken before Python 3.11.5; _TAG avoids them, as its repetition ends at a tag.
_TAG = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL | re.IGNORECASE)
_NUMBER = re.compile(
    r"(?:(?<![\w)])[-+])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))(?:\.\d*)?(?:[eE][-+]?\d+)?(?:\s*/\s*\d+)?"
)
_TIMES = re.compile(r"(?<!\s)\s*+\\times\s*+10\^\{?([-+]?\d+)\}?")
# Exponents of up to 4 digits: for larger ones sympy would compute every digit.
_SCIENTIFIC = re.compile(r"(?<![\w.])(\d++\.?\d*+|\.\d++)[eE]([-+]?\d{1,4}+)(?![\w.])|\\times\s*+10\^(\d)(?!\d)")
_BASE = re.compile(r"\d_\{?\(?([-\d.]++)")
_PROSE = re.compile(r"[A-Za-z]{2}\s++[A-Za-z]{2}")
_SPACE = "".join(filter(str.isspace, map(chr, range(0x3001))))  # the characters that \s matches
_MAX_ANSWER_CHARS = 1000


def exact(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """Compare the final answer with the ground truth character by character, ignoring surrounding white space."""
    return [
        float(final_answer(prompt, completion) == str(truth).strip())
        for prompt, completion, truth in zip(prompts, completions, _ground_truths(columns), strict=True)
    ]


def numeric(
    prompts: Sequence[Any], completions: Sequence[Any], *, tolerance: float | None = None, **columns: Any
) -> list[float]:
    """Compare the last number of the final answer with the last number of the ground truth.

    Args:
        prompts: text or chat messages.
        completions: text or chat messages.
        tolerance: maximum relative error; None: 0 for an integer, 1e-4 for other numbers.
        **columns: the columns of the ground truth.

    Raises:
        ValueError: there is no ground truth, or it contains no number.
    """
    return [
        _numeric(prompt, completion, truth, tolerance)
        for prompt, completion, truth in zip(prompts, completions, _ground_truths(columns), strict=True)
    ]


def _numeric(prompt: Any, completion: Any, truth: Any, tolerance: float | None) -> float:
    expected, given = _last_number(str(truth)), _last_number(short_answer(prompt, completion) or "")
    if expected is None:
        raise ValueError(f"the ground truth {truth!r} contains no number")
    if tolerance is None:
        tolerance = 1e-12 if expected.is_integer() else 1e-4
    return float(given is not None and maths.isclose(given, expected, rel_tol=0, abs_tol=tolerance * abs(expected)))


def math(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    *,
    tolerance: float | None = None,
    seconds: float = 2.0,
    memory_mb: int = 1024,
    **columns: Any,
) -> list[float | Exception]:
    """Compare the final answer with the ground truth by math-verify: numbers, expressions, intervals, sets, text.

    An answer that exceeds a limit is wrong, as ``9^{9^{9}}`` is. It costs no other answer its score.

    Args:
        prompts: text or chat messages.
        completions: text or chat messages.
        tolerance: also accept a number with at most this relative error (Minerva's answers need about 0.01).
        seconds: time limit per answer. As many answers are compared at once as this process has cores.
        memory_mb: what the comparison of an answer may allocate, in MiB.
        **columns: the columns of the ground truth.

    Returns:
        1.0 or 0.0 per completion, or the ValueError of a ground truth that math-verify cannot parse.

    Raises:
        ValueError: there is no ground truth.
    """
    import math_verify  # noqa: F401 - before the processes that use it are forked

    samples = list(zip(prompts, completions, _ground_truths(columns), strict=True))

    def grade(i: int) -> float:
        prompt, completion, truth = samples[i]
        return _math(prompt, completion, str(truth), tolerance, maths.ceil(seconds))

    found = call_each(grade, len(samples), seconds=seconds, memory_mb=memory_mb, at_once=num_cores())
    return [0.0 if value == EXCEEDED else value if isinstance(value, float) else ValueError(value) for value in found]


def _math(prompt: Any, completion: Any, truth: str, tolerance: float | None, seconds: int) -> float:
    from math_verify import verify
    from math_verify.errors import TimeoutException
    from math_verify.utils import timeout

    is_complete = truth.count("{") == truth.count("}")  # some datasets cut answers off at the first closing brace
    expected = _parse_math(truth, seconds) if is_complete else []
    if not expected:
        raise ValueError(f"math-verify cannot parse the ground truth {truth!r}")
    answer = short_answer(prompt, completion)
    if not answer:
        return 0.0
    if _base(answer) not in (None, _base(truth) or "10"):  # math-verify reads 204_5 as 204
        return 0.0
    given = _parse_math(answer, seconds)
    magnitude = abs(_value(expected) or 1.0)
    # math-verify rounds to a number of decimals, which makes all small numbers equal: count from the leading digit.
    decimals = max(6, 5 - maths.floor(maths.log10(magnitude)))
    precision = {"float_rounding": decimals, "numeric_precision": max(15, decimals + 6)}
    try:
        equal = verify(expected, given, **precision, timeout_seconds=seconds, raise_on_error=True)
    except Exception:  # sympy failed on the model's answer
        equal = False
    except TimeoutException:  # not a subclass of Exception; an answer such as 9^{9^{9}} is wrong
        return 0.0
    if not equal and tolerance is not None:
        try:
            expected_value, given_value = _value(expected), timeout(seconds)(_value)(given)
        except TimeoutException:
            return 0.0
        if expected_value is not None and given_value is not None:
            equal = abs(expected_value - given_value) <= tolerance * abs(expected_value)
    return float(equal)


def _parse_math(answer: str, seconds: int) -> list[Any]:
    from math_verify import parse
    from math_verify.errors import TimeoutException

    # math-verify reads 1e5 as Euler's number times 5.
    text = _SCIENTIFIC.sub(lambda m: rf"{m[1]}\times 10^{{{int(m[2])}}}" if m[1] else rf"\times 10^{{{m[3]}}}", answer)
    if not _PROSE.search(re.sub(r"\\[a-z]+\{[^{}]*\}", "", text)):
        text = rf"\boxed{{{text}}}"  # without prose, parse all of the answer, not the first number found in it
    try:
        return parse(text, parsing_timeout=seconds, raise_on_error=True)
    except (Exception, TimeoutException):
        return []


def _base(answer: str) -> str | None:
    """Return the base that the last number with one is marked with: ``"5"`` for ``204_{5}``; None without one."""
    bases = _BASE.findall(answer)
    return bases[-1] if bases else None


def _value(parsed: list[Any]) -> float | None:
    """Return the real number that math-verify parsed, or None if the answer is something else."""
    try:
        return float(parsed[0])
    except (TypeError, ValueError, OverflowError, IndexError):
        return None


def final_answer(prompt: Any, completion: Any, *, multiline: bool = False) -> str | None:
    """Extract the final answer of a completion, stripped of white space.

    Args:
        prompt: text or chat messages; may end with ``<think>``.
        completion: text or chat messages.
        multiline: if no answer is marked, return all text after the thinking section, not only its last line.

    Returns:
        The answer, or None if there is none.
    """
    text = text_after_thinking(prompt, completion)
    if text is None:
        return None
    if "\\boxed{" in text:
        return _last_boxed(text)
    if found := _TAG.findall(text):
        return found[-1].strip()
    if found := _MARKER.findall(text):
        return _bare(found[-1])
    return text if multiline or not text else _bare(text.splitlines()[-1])


def text_after_thinking(prompt: Any, completion: Any) -> str | None:
    """Return the text after the thinking section, stripped; None if ``<think>`` was opened and not closed."""
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    if isinstance(prompt, str) and prompt.rstrip().endswith("<think>"):
        text = "<think>" + text
    if text.rfind("<think>") > text.rfind("</think>"):
        return None
    return text.rpartition("</think>")[2].strip()


def short_answer(prompt: Any, completion: Any) -> str | None:
    """Return the final answer, or None if there is none or it is too long to be one, as degenerate repetition is."""
    answer = final_answer(prompt, completion)
    return answer if answer is None or len(answer) <= _MAX_ANSWER_CHARS else None


def _bare(answer: str) -> str:
    """Strip white space, asterisks, a final period and dollar signs."""
    answer = answer.lstrip(_SPACE + "*").rstrip(_SPACE + "*.")
    return answer.strip("$").strip() if re.fullmatch(r"\$+[^$]+\$+", answer) else answer


def _last_boxed(text: str) -> str | None:
    """Return the content of the last ``\\boxed{...}``, or None if it is not closed."""
    start = text.rindex("\\boxed{") + len("\\boxed{")
    depth = 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0) if text[end - 1] != "\\" else 0
        if depth == 0:
            return text[start:end].strip()
    return None


def _last_number(text: str) -> float | None:
    text = _TIMES.sub(r"e\1", text)
    numbers = _NUMBER.findall(re.sub(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"\1/\2", text))
    if not numbers:
        return None
    numerator, _, denominator = numbers[-1].replace(",", "").partition("/")
    try:
        return float(numerator) / float(denominator or 1)
    except (ZeroDivisionError, OverflowError):
        return None


def _ground_truths(columns: dict[str, Any]) -> list[Any]:
    if "answer" in columns:
        answers = list(columns["answer"])
    elif "reward_model" in columns:
        answers = [row["ground_truth"] for row in columns["reward_model"]]
    elif "solution" in columns:
        answers = list(columns["solution"])
    else:
        raise ValueError(f"no column 'answer', 'reward_model' or 'solution'; the dataset has {sorted(columns)}")
    return [a.rpartition("####")[2] if isinstance(a, str) else a for a in answers]
