"""Calls a function of ``solution.py`` with the JSON on standard input, and writes the result as a line of JSON.

It is the main program in the process of the solution. The function may be a method of a class ``Solution``.
"""

import json
import sys
from types import ModuleType
from typing import Any

_NAMES = """
import bisect, collections, functools, heapq, itertools, math, operator, random, re, string, sys
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import *
del pow
from typing import *
"""


def main(name: str) -> None:
    """Call the function of that name."""
    arguments = json.load(sys.stdin)
    module = sys.modules["solution"] = ModuleType("solution")
    names: dict[str, Any] = vars(module)
    exec(_NAMES, names)
    with open("solution.py", encoding="utf-8") as file:
        exec(compile(file.read(), "solution.py", "exec", dont_inherit=True), names)
    owner = names.get("Solution")
    function = getattr(owner(), name) if owner is not None and hasattr(owner, name) else names[name]
    print("\n" + json.dumps(function(*arguments), default=lambda x: x.tolist()))  # of numpy


if __name__ == "__main__":
    main(sys.argv[1])
