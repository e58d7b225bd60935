"""Tests of what asserts can do with a solution in another process, and of solutions that cheat."""

import sys

import pytest
from sandbox_cases import in_namespaces

from sppo.rewards.sandbox import unit_tests

pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="the sandbox requires Linux"), in_namespaces]


def grade(code, *tests, **options):
    """The share of tests that pass."""
    completion = f"```python\n{code}\n```"
    (score,) = unit_tests(["p"], [completion], tests=[list(tests)], partial=True, **options)
    return score


# Cheats: wrong solutions, which must not pass

CHECK = "def check(got, right):\n    assert got == right\n"
SEARCH = """
import gc, os, sys
found, frame, seen = [], sys._getframe(), set()
todo = list(gc.get_objects())
while frame:
    todo += [frame.f_locals, frame.f_globals]
    frame = frame.f_back
for _ in range(4):
    following = []
    for x in todo:
        if id(x) in seen or len(seen) > 300_000:
            continue
        seen.add(id(x))
        if isinstance(x, (str, bytes, bytearray, int)):
            found.append(x)
        elif isinstance(x, (dict, list, tuple)):
            following += [*x, *(x.values() if isinstance(x, dict) else ())]
    todo = following
"""
CHEATS = {
    "writes all words that it finds to all files": SEARCH
    + """
for word in found:
    data = word.encode(errors="replace") if isinstance(word, str) else word if isinstance(word, bytes) else b""
    if 8 < len(data) < 100:
        for fd in range(3, 20):
            try:
                os.write(fd, data + b"\\n")
            except OSError:
                pass
os._exit(0)
""",
    "finds the tests": SEARCH
    + """
known = any(text in str(x) for x in found for text in (")2(eciwt"[::-1],))
def twice(x):
    return 2 * x if known else x
""",
    "reads the next request, and answers": """
import json, os
for fd in range(3, 20):
    try:
        os.write(fd, b'["returned", true, []]\\n' * 50)
    except OSError:
        pass
os._exit(0)
""",
    "equals everything": """
class Any:
    __eq__ = __lt__ = __gt__ = __le__ = __ge__ = lambda self, other: True
    __ne__ = lambda self, other: False
    __hash__ = lambda self: 4
def twice(x): return Any()
""",
    "equals everything after a calculation": """
class Any:
    __add__ = __radd__ = __sub__ = __rsub__ = __mod__ = __truediv__ = lambda self, other: self
    __abs__ = __float__ = __round__ = __neg__ = lambda self, *args: 0.0
    __eq__ = __lt__ = __le__ = lambda self, other: True
    __bool__ = lambda self: False
    __hash__ = lambda self: 0
def twice(x): return Any()
""",
    "a number that equals everything": """
class Any(int):
    __eq__ = __lt__ = lambda self, other: True
    __hash__ = int.__hash__
    __sub__ = __rsub__ = lambda self, other: 0
def twice(x): return Any(5)
""",
    "defines the functions of the tests": """
all = any = isinstance = callable = lambda *args: True
type = lambda x: int
abs = len = sum = round = lambda x: 0
range = sorted = set = lambda *args: []
def twice(x): return x
""",
    "replaces functions of modules": """
import math, random, unittest
math.isclose = lambda *args, **kwargs: True
random.randrange = lambda *args: 0
unittest.TestCase.assertEqual = unittest.TestCase.assertAlmostEqual = lambda *args: None
def twice(x): return x
""",
    "replaces functions of numpy": """
import numpy, numpy.testing
numpy.allclose = numpy.array_equal = lambda *args, **kwargs: True
numpy.testing.assert_allclose = numpy.testing.assert_equal = lambda *args, **kwargs: None
def twice(x): return x
""",
    "replaces built-in functions": """
import builtins
builtins.all = builtins.isinstance = lambda *args: True
builtins.abs = builtins.len = lambda x: 0
def twice(x): return x
""",
    "imports what equals everything": "from unittest.mock import ANY\ndef twice(x): return ANY",
    "is what equals everything": "from unittest.mock import _ANY as twice",
    "ends the process": "import os\ndef twice(x): os._exit(0)",
    "raises SystemExit": "import sys\ndef twice(x): sys.exit(0)",
    "kills the process of the tests": "import os\nos.kill(os.getppid(), 9)\ndef twice(x): return x",
    "defines the check of the tests": "def check(got, right): pass\ndef twice(x): return x",
}


@pytest.mark.parametrize("cheat", CHEATS.values(), ids=CHEATS)
def test_no_cheat_passes(cheat):
    tests = [
        "import math, random, unittest",
        "assert twice(2) == 4",
        "x = twice(2)\nassert type(x) is int and x == 4",
        "assert isinstance(twice(2), int) and all([twice(1) == 2, twice(3) == 6]) and len([twice(1)]) == 1",
        "assert abs(twice(2) - 4) < 1e-6",
        "assert not twice(2) - 4",
        "assert math.isclose(twice(2), 4) and sum(twice(i) for i in range(3)) == 6",
        "n = random.randrange(5, 9)\nassert twice(n) == 2 * n",
        "unittest.TestCase().assertEqual(twice(2), 4)",
        "import numpy\nassert numpy.allclose([twice(2)], [4])\nnumpy.testing.assert_equal(twice(3), 6)",
        f"{CHECK}check(twice(2), 4)",
        "assert round(twice(2)) == 4 and sorted([twice(2), twice(1)]) == [2, 4] and {twice(2)} == {4}",
    ]
    assert grade("def twice(x): return 2 * x", *tests) == 1.0
    assert grade(cheat, *tests) <= 1 / len(tests), "only the first may pass, which tests nothing"


# What tests can do

OBJECTS = """
import collections, dataclasses, enum, math
Pair = collections.namedtuple("Pair", "left right")

class Full(Exception):
    def __init__(self, size):
        super().__init__(f"holds {size}")
        self.size = size

class Stack:
    limit = 2
    def __init__(self, items=()): self.items = list(items)
    def push(self, x):
        if len(self.items) == self.limit: raise Full(self.limit)
        self.items.append(x)
        return self
    def __len__(self): return len(self.items)
    def __iter__(self): return iter(self.items)
    def __getitem__(self, i): return self.items[i]
    def __contains__(self, x): return x in self.items
    def __eq__(self, other): return isinstance(other, Stack) and self.items == other.items
    def __lt__(self, other): return self.items < other.items
    def __hash__(self): return hash(tuple(self.items))
    def __add__(self, other): return Stack(self.items + list(other))
    def __mul__(self, n): return Stack(self.items * n)
    def __rmul__(self, n): return self * n
    def __enter__(self): return self
    def __exit__(self, *error): self.items.clear(); return bool(error[0])
    def __repr__(self): return f"Stack({self.items})"
    @property
    def top(self): return self.items[-1]
    @staticmethod
    def empty(): return Stack()

class Deep(Stack): pass

@dataclasses.dataclass(order=True)
class Point:
    x: float
    y: float = 0
    def __abs__(self): return math.hypot(self.x, self.y)
    def __sub__(self, other): return Point(self.x - other.x, self.y - other.y)

class Color(enum.IntEnum): RED = 1
"""
FUNCTIONS = """
def same(x): return x
def pair(): return Pair(1, "b")
def grow(x, *, by=[1]): x.extend(by)
def fill(d): d["a"] = [1]
def half(a): a /= 2
def swap(a, b): a[:], b[:] = b[:], a[:]
def apply(f, *xs): return [f(x) for x in xs]
def adder(n): return lambda x: x + n
def count(n):
    for i in range(n): yield i
def fails(kind): raise kind("no")
def visit(node): return node.value + (visit(node.next) if node.next else 0)
def mark(node): node.seen = True
def total(values): return sum(values)
calls = 0
def called():
    global calls
    calls += 1
"""
GOOD = {
    "class": """
s = Stack()
assert len(s) == 0 and not s
s.push(1).push("a")
assert s[1] == "a" and list(s) == [1, "a"]

assert 1 in s and 7 not in s and s.top == "a" and repr(s) == "Stack([1, 'a'])" and f"{s}" == str(s)

assert isinstance(s, Stack) and not isinstance(s, Point) and not isinstance(3, Stack)

assert Stack([1]) == Stack([1]) and Stack([1]) != Stack([2]) and s != 3 and Stack([1]) < Stack([2])

assert (Stack([1]) + [2]).items == [1, 2] and list(2 * Stack([1])) == [1, 1] == list(Stack([1]) * 2)

assert Stack.empty().items == [] and Stack.limit == 2 and isinstance(Deep(), Stack)

with Stack([1]) as t:
    assert t.items == [1]
    raise ValueError
assert t.items == []

try:
    s.push(3)
except Full as e:
    assert e.size == 2 and str(e) == "holds 2"
else:
    raise AssertionError

import copy
t = copy.deepcopy(s)
t.items = [5]
assert s.items == [1, "a"] and t.items == [5]

assert {Stack([1]): 2}[Stack([1])] == 2 and sorted([Stack([2]), Stack([1])])[0].items == [1]

s.limit = 9
assert s.push(3).limit == 9 and hasattr(s, "limit") and not hasattr(s, "missing")
""",
    "data": """
assert same(None) is None and same(True) is True and same(1.5) == 1.5 and same(10**5000) == 10**5000

x = (1, [2, {3}], {4: frozenset([5])}, b"6", 1j, range(7))
assert same(x) == x

import math
assert math.isnan(same(math.nan)) and same(-math.inf) == -math.inf and same(math) is math

from fractions import Fraction
from decimal import Decimal
assert same([Fraction(1, 3), Decimal("1.10")]) == [Fraction(1, 3), Decimal("1.10")]

import datetime as d
x = [d.date(2020, 1, 2), d.datetime(2020, 1, 2, 3), d.timedelta(1, 2, 3)]
assert same(x) == x

import collections as c
assert same(c.Counter("aab")) == c.Counter("aab") and same(c.deque([1])) == c.deque([1])

assert same(c.OrderedDict(a=1)) == c.OrderedDict(a=1) and same(c.defaultdict(list, a=[1])) == {"a": [1]}

assert pair() == (1, "b") and pair().right == "b"

assert Color.RED == 1 and same(Color.RED) == 1 and same("\\ud800") == "\\ud800"

import numpy as np
a = np.arange(6.0).reshape(2, 3)
assert (same(a) == a).all() and same(a).shape == (2, 3)

assert same(np.float32(0.1)) == np.float32(0.1) and type(same(np.int64(3))) is np.int64

assert Point(3, 4).x == 3 and abs(Point(3, 4)) == 5 and Point(1) == Point(1, 0) and Point(1) < Point(2)

assert abs(Point(4, 6) - Point(1, 2)) == 5 and same(int) is int and same(len)([1]) == 1

x = [1]
assert same(x) is x

from solution import pair as p, Stack as S
assert p() == (1, "b") and len(S()) == 0
""",
    "arguments": """
x = [0]
grow(x)
assert x == [0, 1]
grow(x, by=[5, 6])
assert x == [0, 1, 5, 6]

d = {}
assert fill(d) is None and d == {"a": [1]}

import numpy as np
a = np.ones(2)
half(a)
assert a.tolist() == [0.5, 0.5]

x, y = [1], [2]
swap(x, y)
assert (x, y) == ([2], [1])
""",
    "functions": """
assert apply(lambda x: x * x, 1, 2) == [1, 4] and apply(str, 1) == ["1"] and apply(len, "ab") == [2]

assert adder(3)(4) == 7 and list(map(adder(1), [1, 2])) == [2, 3]

g = count(3)
assert next(g) == 0 and list(g) == [1, 2] and sum(count(4)) == 6

for kind in (ValueError, KeyError, ZeroDivisionError):
    try:
        fails(kind)
    except kind as e:
        assert e.args == ("no",)
    else:
        raise AssertionError

class Node:
    def __init__(self, value, next=None):
        self.value, self.next = value, next
assert visit(Node(1, Node(2))) == 3

n = Node(1)
mark(n)
assert n.seen

assert total(i for i in range(4)) == 6 and total(range(4)) == 6 and total(iter([1, 2])) == 3

def bad(x):
    raise OSError("mine")
try:
    apply(bad, 1)
except OSError as e:
    assert str(e) == "mine"
else:
    raise AssertionError

assert apply(lambda f: f(1), adder(2)) == [3]

called()
assert called() is None

assert calls == 2

assert callable(total) and total.__name__ == "total"
""",
    "frameworks": """
import unittest
class T(unittest.TestCase):
    def test(self):
        self.assertEqual(total([2, 2]), 4)
assert unittest.TextTestRunner().run(unittest.defaultTestLoader.loadTestsFromTestCase(T)).wasSuccessful()

def check(candidate):
    assert candidate([2]) == 2
    assert candidate([]) == 0
check(total)

def twice(x): return total([x, x])
assert twice(1) == 2

again = total
total = lambda x: again(x) + 1
assert total([1]) == 2

assert total([1]) == 2
""",
}


@pytest.mark.parametrize("tests", GOOD.values(), ids=GOOD)
def test_right_solutions_pass(tests):
    tests = tests.strip().split("\n\n")
    if grade(OBJECTS + FUNCTIONS, *tests) != 1.0:  # find those that fail
        passed = [round(grade(OBJECTS + FUNCTIONS, *tests[:i]) * i) for i in range(1, len(tests) + 1)]
        raise AssertionError([test for i, test in enumerate(tests) if passed[i] == (passed[i - 1] if i else 0)])


def test_a_function_may_have_the_name_of_a_builtin():
    assert grade("def sum(a, b): return a + b", "assert sum(10, 15) == 25") == 1.0


def test_a_solution_can_ask_nothing_of_the_tests_but_what_they_pass():
    """A callback's globals would contain what is expected."""
    code = """
found = []
def steal(f):
    for name in ("__globals__", "__code__", "__self__", "__class__"):
        try:
            found.append(getattr(f, name).__dict__ if name == "__class__" else getattr(f, name))
        except Exception as error:
            found.append(type(error).__name__)
    return f(1)
"""
    tests = ["right = 5\nassert steal(lambda x: x + right) == 6", "assert set(found[:3]) == {'PermissionError'}"]
    assert grade(code, *tests) == 1.0


def test_code_that_forks_reports_once():
    code = "import os\npid = os.fork()\ndef twice(x): return 2 * x"
    assert grade(code, "assert twice(1) == 2") == 1.0
    assert grade(code, "assert twice(1) == 3") == 0.0
    assert grade("import os\ndef twice(x):\n    os.fork()\n    return 2 * x", "assert twice(1) == 2") <= 1.0


def test_a_test_without_calls_needs_a_solution_that_runs():
    assert grade("x = 1", "assert True") == 1.0
    for code in ("import os; os._exit(0)", "raise ValueError", "def f(:", "import sys; sys.exit(0)"):
        assert grade(code, "assert True") == 0.0
