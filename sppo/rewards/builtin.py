"""The built-in rewards but for ``unit_tests``. Each is 1.0 for a right final answer and 0.0 for another, but for
reasoning_gym's own scale.

The final answer is what a completion says after its thoughts: the last ``\\boxed{...}``, else the last
``<answer>...</answer>``, else what follows the last ``####``, ``Answer:`` or ``the answer is``, else its last line. A
thought that was opened (``<think>``) and not closed, or a box that was not closed, means that there is no answer.

numeric and math take a final answer of more than 1,000 characters, which is degenerate repetition, for none.

The right answer is the column ``answer`` (as in GSM8K what follows ``####`` there), else
``reward_model["ground_truth"]``, else ``solution``.
"""

from __future__ import annotations

import functools
import json
import math as maths
import re
from collections.abc import Sequence
from typing import Any

_MARKER = re.compile(r"(?:####|\b(?:final\s+)?answer\s*(?:is\b|:|=)[:*\s]*)\s*([^\n]*)", re.IGNORECASE)
# Policies repeat themselves for thousands of characters, so no pattern may take time quadratic in the text: those
# below start where nothing before could have (lookbehind), and do not backtrack (possessive ++ and *+). A possessive
# group inside a group is wrong before Python 3.11.5; the tag does without, since what it repeats ends at the next tag.
_TAG = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL | re.IGNORECASE)
_NUMBER = re.compile(
    r"(?:(?<![\w)])[-+])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))(?:\.\d*)?(?:[eE][-+]?\d+)?(?:\s*/\s*\d+)?"
)
_TIMES = re.compile(r"(?<!\s)\s*+\\times\s*+10\^\{?([-+]?\d+)\}?")
# Exponents of up to 4 digits: of larger ones sympy would work out every digit.
_SCIENTIFIC = re.compile(r"(?<![\w.])(\d++\.?\d*+|\.\d++)[eE]([-+]?\d{1,4}+)(?![\w.])|\\times\s*+10\^(\d)(?!\d)")
_BASE = re.compile(r"\d_\{?\(?([-\d.]++)")
_PROSE = re.compile(r"[A-Za-z]{2}\s++[A-Za-z]{2}")
_SPACE = "".join(filter(str.isspace, map(chr, range(0x3001))))  # what \s matches
_MAX_ANSWER = 1000


def exact(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """The final answer is the right one, letter for letter, but for white space around it."""
    golds = _right_answers(columns, len(completions))
    return [float(final_answer(p, c) == str(g).strip()) for p, c, g in zip(prompts, completions, golds, strict=True)]


def numeric(
    prompts: Sequence[Any], completions: Sequence[Any], *, tolerance: float | None = None, **columns: Any
) -> list[float]:
    """The last number of the final answer is the right one.

    Args:
        tolerance: largest relative error; default 0 for a whole number and 1e-4 for others.
    """
    golds = _right_answers(columns, len(completions))
    return [_numeric(p, c, g, tolerance) for p, c, g in zip(prompts, completions, golds, strict=True)]


def _numeric(prompt: Any, completion: Any, gold: Any, tolerance: float | None) -> float:
    right, given = _last_number(str(gold)), _last_number(_short_answer(prompt, completion) or "")
    if right is None:
        raise ValueError(f"the right answer {gold!r} holds no number")
    if tolerance is None:
        tolerance = 1e-12 if right.is_integer() else 1e-4
    return float(given is not None and maths.isclose(given, right, rel_tol=0, abs_tol=tolerance * abs(right)))


def math(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    *,
    tolerance: float | None = None,
    seconds: int = 5,
    **columns: Any,
) -> list[float]:
    """The final answer equals the right one by math-verify: numbers, expressions, intervals, sets, text.

    Args:
        tolerance: also accept a number with at most this relative error (Minerva's answers need 0.01 or so).
        seconds: the limit for reading an answer, and for comparing two.
    """
    golds = _right_answers(columns, len(completions))
    return [_math(p, c, str(g), tolerance, seconds) for p, c, g in zip(prompts, completions, golds, strict=True)]


def _math(prompt: Any, completion: Any, gold: str, tolerance: float | None, seconds: int) -> float:
    from math_verify import verify
    from math_verify.errors import TimeoutException
    from math_verify.utils import timeout

    right = _read_math(gold, seconds) if gold.count("{") == gold.count("}") else []  # not one that was cut off
    if not right:
        raise ValueError(f"math-verify cannot read the right answer {gold!r}")
    answer = _short_answer(prompt, completion)
    if not answer:
        return 0.0
    if _base(answer) not in (None, _base(gold) or "10"):  # to math-verify 204_5 is 204
        return 0.0
    given = _read_math(answer, seconds)
    size = abs(_value(right) or 1.0)
    # math-verify compares a number of decimals, to which all small numbers are equal: count from the leading digit.
    decimals = max(6, 5 - maths.floor(maths.log10(size)))
    precision = {"float_rounding": decimals, "numeric_precision": max(15, decimals + 6)}
    try:
        equal = verify(right, given, **precision, timeout_seconds=seconds, raise_on_error=True)
    except Exception:  # sympy choked on what the model wrote
        equal = False
    except TimeoutException:  # is no Exception; what cannot be worked out in time, as 9^{9^{9}}, is wrong
        return 0.0
    if not equal and tolerance is not None:
        try:
            ours, theirs = _value(right), timeout(seconds)(_value)(given)
        except TimeoutException:
            return 0.0
        equal = ours is not None and theirs is not None and abs(ours - theirs) <= tolerance * abs(ours)
    return float(equal)


def _read_math(answer: str, seconds: int) -> list[Any]:
    from math_verify import parse
    from math_verify.errors import TimeoutException

    # To math-verify 1e5 is Euler's number times 5.
    text = _SCIENTIFIC.sub(lambda m: rf"{m[1]}\times 10^{{{int(m[2])}}}" if m[1] else rf"\times 10^{{{m[3]}}}", answer)
    if not _PROSE.search(re.sub(r"\\[a-z]+\{[^{}]*\}", "", text)):
        text = rf"\boxed{{{text}}}"  # an answer and nothing else: read all of it, not the first number found in it
    try:
        return parse(text, parsing_timeout=seconds, raise_on_error=True)
    except (Exception, TimeoutException):
        return []


def _base(answer: str) -> str | None:
    """The base that the last number is marked with, as 5 in ``204_{5}``."""
    bases = _BASE.findall(answer)
    return bases[-1] if bases else None


def _value(parsed: list[Any]) -> float | None:
    """The real number that math-verify read, None where it is something else."""
    try:
        return float(parsed[0])
    except (TypeError, ValueError, OverflowError, IndexError):
        return None


def reasoning_gym(prompts: Sequence[Any], completions: Sequence[Any], *, entry: Sequence[str]) -> list[float]:
    """The score of a reasoning-gym task's own verifier, from 0 to 1; some tasks give part marks.

    Args:
        entry: JSON, as :func:`sppo.data.load_prompts` writes it: the task, its options and reasoning-gym's entry.
    """
    return [_reasoning_gym(p, c, e) for p, c, e in zip(prompts, completions, entry, strict=True)]


def _reasoning_gym(prompt: Any, completion: Any, entry: str) -> float:
    record = json.loads(entry, object_hook=_unpack)
    task = reasoning_gym_task(record["task"], json.dumps(record["options"], sort_keys=True))
    answer = final_answer(prompt, completion, whole=True)
    return min(1.0, max(0.0, float(task.score_answer(answer, record["entry"])))) if answer else 0.0


@functools.lru_cache(maxsize=64)
def reasoning_gym_task(task: str, options: str) -> Any:
    """reasoning-gym's dataset of a task; ``options`` in JSON, so that equal ones are made once."""
    from reasoning_gym import create_dataset

    return create_dataset(task, **json.loads(options))


def pack(value: Any) -> Any:
    """Make a reasoning-gym entry JSON without loss: tuples and keys that are not text, which verifiers may rely on."""
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {key: pack(item) for key, item in value.items()}
        return {"__pairs__": [[pack(key), pack(item)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"__tuple__": [pack(item) for item in value]}
    return [pack(item) for item in value] if isinstance(value, list) else value


def _unpack(value: dict[str, Any]) -> Any:
    if "__tuple__" in value:
        return tuple(value["__tuple__"])
    return dict(value["__pairs__"]) if "__pairs__" in value else value


def final_answer(prompt: Any, completion: Any, *, whole: bool = False) -> str | None:
    """What the completion gives as its answer, stripped; None where it gives none.

    Args:
        whole: without a mark, take all that follows the thoughts, not its last line.
    """
    text = after_thoughts(prompt, completion)
    if text is None:
        return None
    if "\\boxed{" in text:
        return _last_box(text)
    if found := _TAG.findall(text):
        return found[-1].strip()
    if found := _MARKER.findall(text):
        return _bare(found[-1])
    return text if whole or not text else _bare(text.splitlines()[-1])


def after_thoughts(prompt: Any, completion: Any) -> str | None:
    """What the completion says after its thoughts, stripped; None where a thought was opened and not closed."""
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    if isinstance(prompt, str) and prompt.rstrip().endswith("<think>"):
        text = "<think>" + text
    if text.rfind("<think>") > text.rfind("</think>"):
        return None
    return text.rpartition("</think>")[2].strip()


def _short_answer(prompt: Any, completion: Any) -> str | None:
    answer = final_answer(prompt, completion)
    return answer if answer is None or len(answer) <= _MAX_ANSWER else None


def _bare(answer: str) -> str:
    answer = answer.lstrip(_SPACE + "*").rstrip(_SPACE + "*.")
    return answer.strip("$").strip() if re.fullmatch(r"\$+[^$]+\$+", answer) else answer


def _last_box(text: str) -> str | None:
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
    top, _, bottom = numbers[-1].replace(",", "").partition("/")
    try:
        return float(top) / float(bottom or 1)
    except (ZeroDivisionError, OverflowError):
        return None


def _right_answers(columns: dict[str, Any], n: int) -> list[Any]:
    if "answer" in columns:
        answers = list(columns["answer"])
    elif "reward_model" in columns:
        answers = [row["ground_truth"] for row in columns["reward_model"]]
    elif "solution" in columns:
        answers = list(columns["solution"])
    else:
        raise ValueError(f"no column 'answer', 'reward_model' or 'solution'; the dataset has {sorted(columns)}")
    return [a.rpartition("####")[2] if isinstance(a, str) else a for a in answers]
