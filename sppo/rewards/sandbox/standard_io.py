"""The reward ``stdin_stdout``: programs against pairs of input and output, as in APPS, TACO and LiveCodeBench."""

from __future__ import annotations

import base64
import contextlib
import json
import math
import pickletools
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sppo.rewards.sandbox.asserts import last_code
from sppo.rewards.sandbox.run import Limits, map_concurrently, read_inside, run_program

_NUMBER = re.compile(r"[-+]?(?:\d++(?:\.\d*+)?|\.\d++)(?:[eE][-+]?\d++)?")
_OUTPUT_BYTES = 1 << 16  # more than twice what is expected and this is cut off
_TESTS_BYTES = 1 << 30


def stdin_stdout(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    *,
    tolerance: float = 1e-6,
    seconds: float = 5.0,
    memory_mb: int = 512,
    partial: bool = False,
    isolation: str = "namespaces",
    same_user: bool = False,
    **columns: Any,
) -> list[float | Exception]:
    """Return 1.0 for a completion whose program writes the expected output for each input of its row, else 0.0.

    The program is the last closed block marked ``python`` after the thinking section. It runs once per input, in a
    process that never sees an expected output. It is correct if it ends with exit code 0 and its output has the
    expected words, whatever the white space between them. A number with a decimal point or an exponent may differ by
    ``tolerance``. As many samples run concurrently as this process has cores.

    The tests are read from the columns of one of these layouts:

    - ``input_output``, of APPS and TACO: an object, or its JSON, with lists ``inputs`` and ``outputs``, and ``fn_name``
      where a function is called with the input in place of a program.
    - ``public_test_cases``, ``private_test_cases`` and ``metadata``, of LiveCodeBench: lists, or their JSON, of objects
      with ``input``, ``output`` and ``testtype``, and an object with ``func_name``. Private ones may be compressed
      pickles, whose text is read without loading them.
    - ``test_cases``: as ``public_test_cases``.

    Args:
        prompts: text or chat messages.
        completions: text or chat messages.
        tolerance: largest difference of a number, absolute below 1 and relative above.
        seconds: time limit per input.
        memory_mb: limit on the address space of each process, in MiB.
        partial: return the fraction of inputs with the expected output. Inputs that follow one that exceeded the time
            limit are not tried, and count as wrong.
        isolation: as for :func:`unit_tests`.
        same_user: as for :func:`unit_tests`.
        **columns: the columns with the tests.

    Returns:
        A score per completion, or a ValueError for a row without tests.

    Raises:
        ValueError: there is no column with tests, or another ``isolation``.
        RuntimeError: the sandbox cannot be set up on this machine; nothing was run.
    """
    limits = Limits(seconds=seconds, memory_mb=memory_mb, isolation=isolation, same_user=same_user)
    known = ("input_output", "public_test_cases", "private_test_cases", "test_cases")
    if not any(name in columns for name in known):
        raise ValueError(f"needs one of the columns {', '.join(known)}; the dataset has {', '.join(columns) or 'none'}")

    def grade(i: int) -> float:
        try:
            tests = read_tests({name: column[i] for name, column in columns.items()})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the tests of the row cannot be read: {type(error).__name__}: {error}") from error
        code = last_code(prompts[i], completions[i])
        if code is None:
            return 0.0
        passed = count_correct(code, tests, limits, tolerance=tolerance)
        return passed / len(tests.inputs) if partial else float(passed == len(tests.inputs))

    return map_concurrently(grade, range(len(completions)))


@dataclass(frozen=True)
class ProgramTests:
    """The tests of a row.

    Attributes:
        inputs: text for standard input; for a function, JSON of the list of its arguments.
        outputs: text for standard output; for a function, values that it may return.
        function: the function to call, or None for a program.
    """

    inputs: list[str]
    outputs: list[Any]
    function: str | None = None


def read_tests(row: Mapping[str, Any]) -> ProgramTests:
    """Read the tests of a row in any of the layouts of :func:`stdin_stdout`.

    Raises:
        ValueError: there are none, or they cannot be read.
    """
    if row.get("input_output"):
        return _read_apps(_from_json(row["input_output"], "input_output"))
    cases: list[Any] = []
    for name in ("public_test_cases", "private_test_cases", "test_cases"):
        if row.get(name):
            cases += _from_json(row[name], name)
    if not cases:
        raise ValueError("the row has no test; give inputs and outputs")
    metadata = _from_json(row.get("metadata") or "{}", "metadata")
    function = metadata.get("func_name") if any(case.get("testtype") == "functional" for case in cases) else None
    if function is None:
        return ProgramTests([_text(case["input"]) for case in cases], [_text(case["output"]) for case in cases])
    arguments = ["[" + ",".join(line for line in case["input"].splitlines() if line) + "]" for case in cases]
    return ProgramTests(arguments, [[json.loads(case["output"])] for case in cases], function)


def _read_apps(tests: Any) -> ProgramTests:
    try:
        inputs, outputs, function = list(tests["inputs"]), list(tests["outputs"]), tests.get("fn_name")
    except (KeyError, TypeError, AttributeError):
        raise ValueError("the column 'input_output' has no lists 'inputs' and 'outputs'") from None
    if not inputs or len(inputs) != len(outputs):
        raise ValueError(f"the column 'input_output' has {len(inputs)} inputs and {len(outputs)} outputs")
    if not function:
        return ProgramTests([_text(x) for x in inputs], [_text(x) for x in outputs])
    # APPS stores some values in a list of one, and others as they are.
    values = [[x, x[0]] if isinstance(x, list) and len(x) == 1 else [x] for x in outputs]
    return ProgramTests([json.dumps(list(x)) for x in inputs], values, function)


def _from_json(cell: Any, column: str) -> Any:
    if not isinstance(cell, str):
        return cell
    try:
        return json.loads(cell)
    except ValueError:
        pass
    try:  # LiveCodeBench's private tests: JSON, pickled, compressed
        unpack = zlib.decompressobj()
        pickled = unpack.decompress(base64.b64decode(cell), _TESTS_BYTES)
        texts = [str(x) for operation, x, _ in pickletools.genops(pickled) if operation.name.endswith("UNICODE")]
        return json.loads(texts[0] if texts else "")
    except (ValueError, zlib.error):
        raise ValueError(f"the column {column!r} is not JSON: {cell[:80]!r}") from None


def _text(lines: Any) -> str:
    return lines if isinstance(lines, str) else "\n".join(map(str, lines))


def count_correct(code: str, tests: ProgramTests, limits: Limits, *, tolerance: float) -> int:
    """Run a program once for each input in a new sandbox, and return how many outputs were correct.

    Args:
        code: the program.
        tests: inputs and expected outputs; the latter do not enter the sandbox.
        limits: of the sandbox; ``limits.seconds`` is for each input.
        tolerance: as for :func:`stdin_stdout`.

    Raises:
        RuntimeError: the sandbox cannot be set up on this machine.
        subprocess.TimeoutExpired: the sandbox did not end by itself.
    """
    longest = max(len(json.dumps(output)) for output in tests.outputs)
    arguments = {
        "program": code,
        "driver": None if tests.function is None else read_inside("function_driver.py"),
        "arguments": [] if tests.function is None else [tests.function],
        "inputs": tests.inputs,
        "seconds": limits.seconds,
        "output_bytes": _OUTPUT_BYTES + 2 * longest,
    }
    total = replace(limits, seconds=(limits.seconds + 1) * len(tests.inputs))
    results: dict[int, str | None] = {}
    for line in run_program("programs.py", arguments=arguments, limits=total):
        with contextlib.suppress(ValueError):  # the last line may be cut off
            index, packed = json.loads(line)
            results[index] = packed and zlib.decompress(base64.b64decode(packed)).decode(errors="replace")
    return sum(
        _is_correct(results.get(i), expected, tests.function, tolerance) for i, expected in enumerate(tests.outputs)
    )


def _is_correct(output: str | None, expected: Any, function: str | None, tolerance: float) -> bool:
    if output is None:
        return False
    try:
        if function is None:
            given, words = output.split(), expected.split()
            return len(given) == len(words) and all(map(_is_same_word, given, words, [tolerance] * len(words)))
        value = json.loads(output.rstrip("\n").rpartition("\n")[2])
        return any(_is_same_value(value, x, tolerance) for x in expected)
    except (ValueError, ArithmeticError, RecursionError):  # no JSON, a number that is too large, lists too deep
        return False


def _is_same_word(given: str, expected: str, tolerance: float) -> bool:
    if given == expected:
        return True
    if not (_NUMBER.fullmatch(given) and _NUMBER.fullmatch(expected)):
        return False
    if expected.lstrip("+-").isdigit() and given.lstrip("+-").isdigit():  # floats would round large ones
        return given.lstrip("+") == expected.lstrip("+")
    return _is_same_value(
        float(given), int(expected) if expected.lstrip("+-").isdigit() else float(expected), tolerance
    )


def _is_same_value(given: Any, expected: Any, tolerance: float) -> bool:
    if isinstance(expected, list):
        return (
            isinstance(given, list)
            and len(given) == len(expected)
            and all(_is_same_value(x, y, tolerance) for x, y in zip(given, expected, strict=True))
        )
    if isinstance(expected, dict):
        return (
            isinstance(given, dict)
            and given.keys() == expected.keys()
            and all(_is_same_value(given[key], value, tolerance) for key, value in expected.items())
        )
    if isinstance(expected, float) and isinstance(given, (int, float)) and not isinstance(given, bool):
        return (math.isnan(given) and math.isnan(expected)) or math.isclose(
            given, expected, rel_tol=tolerance, abs_tol=tolerance
        )
    return bool(given == expected) and isinstance(given, bool) == isinstance(expected, bool)
