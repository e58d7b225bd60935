"""Tests of programs that are judged by their output."""

import base64
import json
import pickle
import re
import sys
import time
import zlib

import pytest
from sandbox_cases import ISOLATIONS, in_namespaces

from sppo.rewards import score
from sppo.rewards.sandbox import stdin_stdout
from sppo.rewards.sandbox.standard_io import _is_correct, read_tests

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox requires Linux")

ADD = "print(sum(map(int, input().split())))"
APPS = json.dumps({"inputs": ["1 2\n", "4 5\n"], "outputs": ["3\n", "9"]})


def grade(code, tests, *, partial=True, **options):
    columns = tests if isinstance(tests, dict) else {"input_output": tests}
    columns = {name: [cell] for name, cell in columns.items()}
    (reward,) = stdin_stdout(["p"], [f"```python\n{code}\n```"], partial=partial, **options, **columns)
    return reward


def case(given, expected):
    return json.dumps({"inputs": [given], "outputs": [expected]})


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_programs_are_graded(isolation):
    assert grade(ADD, APPS, isolation=isolation) == 1.0
    assert grade("print(3)", APPS, isolation=isolation) == 0.5
    assert grade("print(3)", APPS, isolation=isolation, partial=False) == 0.0
    assert grade("a, b = map(int, input().split())\nassert a == 1\nprint(a + b)", APPS, isolation=isolation) == 0.5


@in_namespaces
@pytest.mark.parametrize(
    ("code", "given", "expected", "is_right"),
    [
        ("print('a  b\\n\\nc ')", "", "a b\nc", True),
        ("print('a b')", "", "a b c", False),
        ("print('A')", "", "a", False),
        ("print(0.33333349)", "", "0.333333", True),
        ("print(0.3334)", "", "0.333333", False),
        ("print(1e20)", "", "100000000000000000000.5", True),
        ("print(10**18 + 1)", "", "1000000000000000000", False),
        ("print('1.0')", "", "1", True),
        ("print('nan')", "", "1.0", False),
        ("print(1.0, 'YES')", "", "1 YES", True),
        ("import sys\nprint(sys.stdin.read()[::-1])", "é\n", "é", True),
        ("print(len(input()))", "x" * 1_000_000, "1000000", True),
        ("print('x' * 2_000_000)", "", "x" * 2_000_000, True),
        ("print('3')\nraise SystemExit(1)", "", "3", False),
        ("print('3')\nraise SystemExit(0)", "", "3", True),
        ("import os\nos.write(1, b'3')\nos._exit(0)", "", "3", True),
        ("def main():\n    print(3)\nif __name__ == '__main__':\n    main()", "", "3", True),
        ("import sys\nsys.setrecursionlimit(10**6)\nimport numpy\nprint(numpy.arange(3).sum())", "", "3", True),
        ("print(3", "", "3", False),
        ("", "", "", True),
        ("print(input() + input())", ["a", "b"], ["ab"], True),
    ],
)
def test_outputs_are_compared_by_words(code, given, expected, is_right):
    assert grade(code, case(given, expected)) == float(is_right)


@in_namespaces
@pytest.mark.parametrize(
    "code",
    [
        "import gc, sys\nprint([x for x in gc.get_objects() if 'outputs' in str(x)[:1000]] or 5)",
        "import os\nfor root in ('/tmp', '/', '.'):\n    for name in os.listdir(root): print(name)",
        "import os\nprint(os.environ, os.getcwd(), open('solution.py').read())",
        "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'[0, \"9\\\\n\"]\\n')\n    except OSError: pass",
        "import os\nos.kill(os.getppid(), 9)\nos.kill(-1, 9)",
        "import os\nos.fork()\nos.fork()\nprint(9)",
        "print(9)\nwhile True: print(9)",
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(0.2)\n    print(9, flush=True)",
    ],
)
def test_cheats_do_not_pass(code):
    assert grade(code, json.dumps({"inputs": ["4 5"] * 2, "outputs": ["9"] * 2}), seconds=1) == 0.0


@in_namespaces
def test_each_input_has_a_time_limit():
    """What follows an input that exceeded it is not tried."""
    tests = json.dumps({"inputs": ["0", "9", "0"], "outputs": ["0", "9", "0"]})
    code = "import time\nn = int(input())\ntime.sleep(n)\nprint(n)"
    start = time.monotonic()
    assert grade(code, tests, seconds=1) == pytest.approx(1 / 3)
    assert time.monotonic() - start < 5
    assert grade("while True: pass", tests, seconds=0.5) == 0.0
    assert grade("import os\nos.close(1)\nos.close(2)\nwhile True: pass", tests, seconds=0.5) == 0.0
    assert grade("x = bytearray(300 << 20)\nprint(input())", tests, memory_mb=256) == 0.0


@in_namespaces
def test_functions_are_called_in_place_of_programs():
    """As in APPS and TACO, which may store a value in a list, and LiveCodeBench."""
    method = "class Solution:\n    def add(self, xs: List[int], n: int) -> int:\n        return sum(xs) + n"
    apps = json.dumps({"fn_name": "add", "inputs": [[[1, 2], 3], [[], 1]], "outputs": [6, [1]]})
    assert grade(method, apps) == 1.0
    assert grade("def add(xs, n):\n    print('debug')\n    return sum(xs) + n", apps) == 1.0
    assert grade("def add(xs, n): return 6", apps) == 0.5
    assert grade("def plus(xs, n): return 6", apps) == 0.0
    live = {
        "public_test_cases": json.dumps([{"input": "[1, 2]\n3", "output": "6", "testtype": "functional"}]),
        "private_test_cases": base64.b64encode(
            zlib.compress(pickle.dumps(json.dumps([{"input": "[]\n1", "output": "1", "testtype": "functional"}])))
        ).decode(),
        "metadata": json.dumps({"func_name": "add"}),
    }
    assert grade(method, live) == 1.0
    assert grade("def add(xs, n): return 6", live) == 0.5
    values = json.dumps({"fn_name": "f", "inputs": [[0], [1], [2], [3]], "outputs": [[1.0, 2.0], {"a": 1}, True, None]})
    right = "def f(i): return [(1, 2.0000001), {'a': 1}, True, None][i]"
    assert grade(right, values) == 1.0
    assert grade("def f(i): return [[1.0], {'b': 1}, 1, 0][i]", values) == 0.0
    assert grade("class Any:\n    __eq__ = lambda *a: True\ndef f(i): return Any()", values) == 0.0


@in_namespaces
def test_strange_outputs_are_wrong_and_no_errors():
    one = json.dumps({"fn_name": "f", "inputs": [[]], "outputs": [1.5]})
    assert grade("def f(): return 10**400", one) == 0.0
    assert grade("import os\nos.write(1, b'[' * 60000)\nos._exit(0)", one) == 0.0
    digits = "1" * 5000
    assert grade(f"print('{digits}.0')", case("", "2" * 5000)) == 0.0
    assert grade(f"import sys\nsys.set_int_max_str_digits(0)\nprint(int('{digits}'))", case("", digits)) == 1.0


@in_namespaces
@pytest.mark.slow
def test_long_outputs_of_many_inputs():
    """Together they are longer than a file may be in the sandbox."""
    tests = json.dumps({"inputs": [""] * 36, "outputs": ["é" * 2_000_000] * 36})
    assert grade("print('é' * 2_000_000)", tests) == 1.0


@in_namespaces
def test_functions_may_use_dataclasses_and_numpy():
    one = json.dumps({"fn_name": "f", "inputs": [[]], "outputs": [3]})
    code = "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\n"
    assert grade("def f(): return pow(3, 5, 10)", one) == 1.0
    assert grade(code + "class Solution: pass\ndef f():\n    import numpy\n    return numpy.int64(A(3).x)", one) == 1.0


def test_long_words_are_compared_in_linear_time():
    start = time.monotonic()
    assert not _is_correct("1" * 60_000 + "x", "1", None, 1e-6)
    assert not _is_correct("1" * 60_000, "1" * 59_999, None, 1e-6)
    assert _is_correct("1" * 60_000, "1" * 60_000, None, 1e-6)
    assert time.monotonic() - start < 1


def test_layouts():
    cases = [{"input": "1", "output": "2", "testtype": "stdin"}, {"input": "3", "output": "4", "testtype": "stdin"}]
    expected = read_tests({"test_cases": cases})
    assert (expected.inputs, expected.outputs, expected.function) == (["1", "3"], ["2", "4"], None)
    assert read_tests({"input_output": {"inputs": ["1", "3"], "outputs": ["2", "4"]}}) == expected
    packed = base64.b64encode(zlib.compress(pickle.dumps(json.dumps(cases[1:])))).decode()
    live = {"public_test_cases": json.dumps(cases[:1]), "private_test_cases": packed, "metadata": "{}"}
    assert read_tests(live) == expected


class Payload:
    """Its pickle would execute something."""

    def __reduce__(self):
        return print, ("executed",)


def test_a_pickle_in_a_dataset_is_not_executed(capsys):
    cell = base64.b64encode(zlib.compress(pickle.dumps(Payload()))).decode()
    pickle.loads(zlib.decompress(base64.b64decode(cell)))
    assert capsys.readouterr().out == "executed\n"
    with pytest.raises(ValueError, match="'private_test_cases' is not JSON"):
        read_tests({"private_test_cases": cell})
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "needs one of the columns input_output, .*; the dataset has none"),
        ({"tests": ["assert 1"]}, "needs one of the columns .*; the dataset has tests"),
        ({"input_output": ["{"]}, "the column 'input_output' is not JSON: '{'"),
        ({"input_output": ["[]"]}, "has no lists 'inputs' and 'outputs'"),
        ({"input_output": ['{"inputs": ["1"], "outputs": []}']}, "has 1 inputs and 0 outputs"),
        ({"test_cases": [[]]}, "the row has no test"),
        ({"test_cases": [[{"inp": "1"}]]}, "the tests of the row cannot be read: KeyError: 'input'"),
        ({"test_cases": [["1"]]}, "the tests of the row cannot be read: AttributeError"),
        ({"input_output": ['{"fn_name": "f", "inputs": [1], "outputs": [1]}']}, "the tests of the row cannot be read"),
    ],
)
def test_errors_name_the_column(columns, message):
    (failure,) = score(["stdin_stdout"], ["p"], [f"```python\n{ADD}\n```"], columns).failures
    assert re.search(message, failure), failure
