"""Wrong solutions that try to pass asserts."""

import sys

import pytest
from sandbox_cases import in_namespaces, share_passed

pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="the sandbox requires Linux"), in_namespaces]

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
    assert share_passed("def twice(x): return 2 * x", *tests) == 1.0
    assert share_passed(cheat, *tests) <= 1 / len(tests), "only the first may pass, which tests nothing"


WALK = """import os, sys
frame = sys._getframe()
while not ('report' in frame.f_locals and 'tests' in frame.f_locals): frame = frame.f_back
for _ in frame.f_locals['tests']: frame.f_locals['report']()
os._exit(0)
"""
PARTICULAR = {
    "an error whose class is made up": (
        f"""
import os, sys, json
r, w = os.fdopen(int(sys.argv[1]), "rb"), os.fdopen(int(sys.argv[2]), "wb")
def send(*message):
    w.write(json.dumps(message).encode() + b"\\n")
    w.flush()
send("ready")
r.readline()
attributes = {{"dict": [["__new__", {{"mine": 1}}], ["__class_getitem__", {{"builtin": "exec"}}]]}}
send("raised", {{"builtin": "type"}}, ["X", {{"tuple": [{{"builtin": "Exception"}}]}}, attributes], {{"dict": []}}, "")
r.readline()
send("request", "getitem", [{{"yours": 0}}, {WALK!r}], {{}})
r.readline()
""",
        ["assert twice(2) == 4"],
    ),
    "eval": (
        f"decode = eval\ndef encode(x): return 'exec(' + repr({WALK!r}) + ')'",
        ["assert decode(encode('abc')) == 'abc'"],
    ),
    "getters of attributes": (
        f"""
import operator
def apply(call, run):
    get = call(operator.attrgetter, "__globals__")
    eval_there = get(run)["__builtins__"]
    return eval_there.exec({WALK!r})
""",
        ["def run(): pass\nassert apply(lambda f, x: f(x), run) == 4"],
    ),
    "other names than the tests ask for": (
        """
import __main__
serve = __main__.Peer._serve
def more(self, operation, positional, named):
    if operation == "names":
        positional = [positional[0] + ["abs", "len", "all", "sorted", "ValueError"]]
    return serve(self, operation, positional, named)
__main__.Peer._serve = more
abs = len = lambda x, *args: 0
all = lambda *args: True
sorted = lambda x: None
ValueError = Exception
def twice(x): return 7
def order(x): return None
def fails(x): raise TypeError
""",
        [
            "assert abs(twice(2) - 4) < 1e-6",
            "assert all([twice(2) == 4, twice(3) == 6])",
            "assert order([2, 1]) == sorted([2, 1])",
            "try:\n    fails(1)\n    assert False\nexcept ValueError:\n    pass",
        ],
    ),
    "what the tests imported": (
        """
import math, numpy as np
class Yes:
    def __getattr__(self, name): return lambda *args, **kwargs: True
def twice(x):
    globals()["math"] = globals()["np"] = Yes()
    return x
""",
        [
            "import math\nimport numpy as np\nassert twice(2) == 4",
            "assert math.isclose(twice(2), 4)",
            "assert np.allclose(twice(2), 4)",
        ],
    ),
    "an array that is zero after a subtraction": (
        """
import numpy as np
class Zero:
    __sub__ = __rsub__ = __pow__ = __xor__ = lambda self, other: self
    __array__ = lambda self, *args, **kwargs: np.zeros(())
    __format__ = lambda self, spec: "0.00"
    __iter__ = lambda self: iter([])
    def sum(self): return 0.0
    def any(self): return False
def twice(x): return Zero()
""",
        [
            "import numpy as np\nassert np.abs(twice(2) - 4) < 1e-6",
            "import numpy as np\nassert np.linalg.norm(twice(2) - np.array([3.0, 4.0])) < 1e-9",
            "import numpy as np\nnp.testing.assert_allclose(twice(2) - 4, 0)",
            "assert ((twice(2) - 4) ** 2).sum() < 1e-9",
            "assert not (twice(2) - 4).any()",
            "assert list(twice(2) ^ {1, 2}) == []",
            "assert f'{twice(2) - 4:.2f}' == '0.00'",
        ],
    ),
    "a package of its own": (
        f"""
import sys
__path__ = ["/tmp"]
__all__ = ["twice"]
with open("/tmp/twice.py", "w") as file:
    file.write({WALK!r})
""",
        ["from solution import twice\nassert twice(2) == 4", "from solution import *\nassert twice(2) == 4"],
    ),
    "annotations that are evaluated": (
        f"class Twice:\n    pass\nTwice.__annotations__ = {{'x': 'exec(' + repr({WALK!r}) + ')'}}",
        ["import typing\nassert typing.get_type_hints(Twice) == {'x': int}"],
    ),
    "an attribute's name that is no str": (
        """
import __main__, numpy
peer = next(x for x in __import__("gc").get_objects() if isinstance(x, __main__.Peer))
def yes(*args): return True
def twice(x):
    node = peer.request("names", ["Node"])["Node"]()
    try:
        peer.request("setattr", node, numpy.str_("__class__"), yes)
        peer.request("setattr", node, "check", yes)
        peer.request("deepcopy", node)
    except PermissionError:
        pass
    return node
""",
        ["class Node:\n    def check(self, x): return False\nassert twice(2) == 4", "assert twice(2).check(4)"],
    ),
    "arrays at an address": (
        "class A: __array_interface__ = {'data': (4096, False), 'shape': (1,), 'typestr': '<i8', 'version': 3}\n"
        "def twice(x): return A()",
        ["import numpy as np\nassert hasattr(twice(2), '__array_interface__')"],
    ),
    "built-in functions beside an import": (
        "abs = lambda x: 0\nsorted = all = lambda x: True\ndef twice(x): return x\ntotal = twice",
        [
            "from solution import twice\nassert abs(twice(2) - 4) < 1e-6",
            "import solution\nassert all([solution.twice(2) == 4])",
        ],
    ),
    "built-in functions beside a name that is given anew": (
        "abs = lambda x: 0\ndef total(xs): return 9",
        ["total = total([1, 2])\nassert abs(total - 3) < 1e-6"],
    ),
    "names that the tests import or make global": (
        "def isclose(*args): return True\nclass Same:\n    __eq__ = lambda self, other: True\n"
        "def twice(x): return Same()\nexpected = Same()",
        [
            "from math import *\ndef setup():\n    global expected\n    expected = 4\nsetup()\nassert twice(2) == 4",
            "assert isclose(twice(2), 4)",
            "assert twice(2) == expected",
        ],
    ),
    "test cases": (
        "def twice(x):\n    TestTwice('test').skipTest('x')",
        [
            "import unittest\nclass TestTwice(unittest.TestCase):\n    def test(self):\n"
            "        self.assertEqual(twice(2), 4)\n"
            "suite = unittest.defaultTestLoader.loadTestsFromTestCase(TestTwice)\n"
            "assert unittest.TextTestRunner().run(suite).wasSuccessful()",
        ],
    ),
    "the end of loops by an attribute": (
        "class Twice:\n    def __init__(self, x): pass\n    @property\n"
        "    def area(self): raise StopIteration\n    def __getitem__(self, i): raise StopIteration",
        [
            "assert all(map(lambda x: Twice(x).area == x * x, [1, 2]))",
            "assert all(map(lambda x: Twice(x)[0] == x, [1]))",
        ],
    ),
    "assertions that it suppresses": (
        """
class Twice:
    def __init__(self, x): pass
    def __enter__(self): return 3
    def __exit__(self, *error): return True
def each(f, xs):
    for x in xs:
        try:
            f(x)
        except AssertionError:
            pass
""",
        [
            "with Twice(2) as x:\n    assert x == 4",
            "def check(x):\n    assert x == 4\neach(check, [3])",
        ],
    ),
    "a number by its class": (
        """
from fractions import Fraction
class Half:
    __class__ = Fraction
    numerator = denominator = property(lambda self: self)
    __mul__ = __rmul__ = lambda self, other: self
    __lt__ = __le__ = __gt__ = __ge__ = lambda self, other: True
def half(x): return Half()
class Doubles:
    __radd__ = __ror__ = lambda self, other: other * 2 if isinstance(other, list) else other
def same(x): return Doubles()
""",
        [
            "from fractions import Fraction\nassert Fraction(1, 3) < half(1) <= Fraction(1, 2)",
            "assert [1, 2] + same(1) == [1, 2] + [1, 2]",
            "assert {'a': 1} | same(1) == {'a': 1}",
        ],
    ),
    "the end of the tests' loops": (
        "def twice(x): raise StopIteration",
        [
            "assert all(map(lambda x: twice(x) == 2 * x, range(5)))",
            "for given, right in zip(map(twice, [1, 2]), [2, 4]):\n    assert given == right",
        ],
    ),
    "what Python would not accept": ("def twice(x: Undefined): return 4", ["assert twice(2) == 4"]),
}


@pytest.mark.parametrize(("code", "tests"), PARTICULAR.values(), ids=PARTICULAR)
def test_no_cheat_of_particular_tests_passes(code, tests):
    assert share_passed(code, *tests) == 0.0


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
    assert share_passed(code, *tests) == 1.0
