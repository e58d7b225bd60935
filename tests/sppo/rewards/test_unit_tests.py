"""Tests of what asserts can do with a solution in another process."""

import sys

import pytest
from sandbox_cases import in_namespaces, share_passed

pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="the sandbox requires Linux"), in_namespaces]


OBJECTS = """
import collections, dataclasses, enum, math
Pair = collections.namedtuple("Pair", "left right")

class Full(Exception):
    def __init__(self, size):
        super().__init__(f"holds {size}")
        self.size = size

class Deeper(Full):
    def __init__(self, size, code=0):
        super().__init__(size)
        self.code = code

class Many(list):
    def add(self, x): self.append(x)
    def sorted(self): return sorted(self)

class Length:
    def __init__(self, n): self.n = n
    def __divmod__(self, other): return divmod(self.n, other.n)

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
def pair():
    "A pair."
    return Pair(1, "b")
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
def keys(d): return d.keys()
def group(words):
    found = collections.defaultdict(list)
    for word in words: found[len(word)].append(word)
    return found
def nested(rows): [row.sort() for row in rows]
def calculate(a, b, operation="add", remote=0, self=0): return a - b if operation == "sub" else a + b
def prepend(x, head):
    start = ListNode(x)
    start.next = head
    return start
async def later(x): return 2 * x
def each(xs, f): [f(x) for x in xs]
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

assert (Stack([1]) + [2]).items == [1, 2] and 2 * Stack([1]) == Stack([1, 1]) == Stack([1]) * 2

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

x = Stack([1])
x += [2]
assert x == Stack([1, 2]) and divmod(Length(7), Length(2)) == (3, 1)

x.items.append(5)
assert list(x) == [1, 2, 5] and x.__class__ is Stack and x.items[0] == 1
x.items.clear()
assert len(x) == 0

try:
    raise Deeper("x", code=7)
except Full as e:
    assert e.code == 7 and str(e) == "holds x" and isinstance(e, Deeper)

m = Many([3, 1])
m.add(2)
assert m.sorted() == [1, 2, 3] and len(m) == 3

import threading
threads = [threading.Thread(target=m.add, args=(i,)) for i in range(8)]
[t.start() for t in threads]
[t.join() for t in threads]
assert len(m) == 11

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

assert keys({"a": 1}) == {"a"} and list(keys({"b": 1, "a": 2})) == ["b", "a"] and same({"a": 1}.items()) == {("a", 1)}

assert group(["a", "bc", "d"]) == {1: ["a", "d"], 2: ["bc"]} and group([])[5] == []

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

assert pair.__doc__ == "A pair." and pair.__name__ == "pair"

from solution import *
assert total([1]) == 1

from solution import pair as p, Stack as S
assert p() == (1, "b") and len(S()) == 0
""",
    "arguments": """
x = [0]
grow(x)
assert x == [0, 1]
grow(x, by=[5, 6])
assert x == [0, 1, 5, 6]

x = [[3, 1], [2]]
first = x[0]
nested(x)
assert x == [[1, 3], [2]] and first == [1, 3]

assert calculate(1, 2, operation="sub", remote=1, self=2) == -1

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

class ListNode:
    def __init__(self, val=0, next=None):
        self.val = val
        self.next = next
found = prepend(1, ListNode(3, None))
assert (found.val, found.next.val, found.next.next) == (1, 3, None)

import asyncio
async def both():
    return await later(1) + await later(2)
assert asyncio.run(later(2)) == 4 and asyncio.run(both()) == 6

out = []
each([1, 2], out.append)
assert out == [1, 2]

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
    if share_passed(OBJECTS + FUNCTIONS, *tests) != 1.0:  # find those that fail
        passed = [round(share_passed(OBJECTS + FUNCTIONS, *tests[:i]) * i) for i in range(1, len(tests) + 1)]
        raise AssertionError([test for i, test in enumerate(tests) if passed[i] == (passed[i - 1] if i else 0)])


def test_a_function_may_have_the_name_of_a_builtin():
    assert share_passed("def sum(a, b): return a + b", "assert sum(10, 15) == 25") == 1.0


def test_code_that_forks_reports_once():
    code = "import os\npid = os.fork()\ndef twice(x): return 2 * x"
    assert share_passed(code, "assert twice(1) == 2") == 1.0
    assert share_passed(code, "assert twice(1) == 3") == 0.0
    assert share_passed("import os\ndef twice(x):\n    os.fork()\n    return 2 * x", "assert twice(1) == 2") <= 1.0


def test_a_test_without_calls_needs_a_solution_that_runs():
    assert share_passed("x = 1", "assert True") == 1.0
    for code in ("import os; os._exit(0)", "raise ValueError", "def f(:", "import sys; sys.exit(0)"):
        assert share_passed(code, "assert True") == 0.0


def test_annotations_may_name_classes_of_the_tests():
    code = "def value(node: ListNode, other: list[ListNode] = ()) -> int: return node.val"
    tests = "class ListNode:\n    def __init__(self, val): self.val = val\nassert value(ListNode(3)) == 3"
    assert share_passed(code, tests) == 1.0
