"""Calls between the interpreter of tests and that of a solution.

    process of the tests    calls and arguments  ->   process of the solution
    (the jail's child)      <-  results and errors    (an interpreter of its own)

Arguments and results are copied between the processes. The solution can therefore not replace a function or a module
that the tests use, read what they expect, or report that they passed. What cannot be copied, such as an instance of a
class of the solution, stays where it is; the other process has a :class:`Remote` of it.

The process of the tests trusts nothing that it reads. It makes values of listed types only, and does for the solution
only what a test's own functions and objects are for.

As a program, after ``remote.py``, this file is the process of the solution.
"""

from __future__ import annotations

import base64
import builtins
import collections
import contextlib
import datetime
import decimal
import fractions
import functools
import importlib
import inspect
import json
import operator
import os
import sys
import threading
from collections.abc import Callable
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from sppo.rewards.sandbox.inside.remote import OPERATIONS, Remote

TESTS_NAME = "tests"  # __name__ of the tests, and __module__ of the classes and functions that they define
_LINE_BYTES = 64 << 20
_MOST_BORROWED = 32
_ARRAY_KINDS = "biufcSUmM"
# Modules that each process has its own copy of, and those whose functions cross by their names: none of these executes
# text, reads files or attributes by their names, or returns what equals everything.
_MODULES = {"bisect", "cmath", "collections", "copy", "datetime", "decimal", "fractions", "functools", "heapq"}
_MODULES |= {"itertools", "json", "math", "numpy", "operator", "random", "re", "statistics", "string", "typing"}
_WITH_FUNCTIONS = {"bisect", "cmath", "collections", "datetime", "decimal", "fractions", "heapq", "itertools", "math"}
_WITH_FUNCTIONS |= {"operator", "random", "statistics"}
_REFUSED = {"attrgetter", "methodcaller"}
_FUNCTIONS = {"abs", "all", "any", "ascii", "bin", "callable", "chr", "divmod", "hash", "hex", "isinstance", "iter"}
_FUNCTIONS |= {"issubclass", "len", "max", "min", "next", "oct", "ord", "pow", "repr", "round", "sorted", "sum"}
_CLASSES = {"bool", "bytearray", "bytes", "complex", "dict", "enumerate", "filter", "float", "frozenset", "int", "list"}
_CLASSES |= {"map", "object", "range", "reversed", "set", "slice", "str", "tuple", "zip"}

_SCALARS: dict[type, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    complex: (lambda x: [x.real, x.imag], lambda v: complex(*v)),
    bytes: (lambda x: x.decode("latin-1"), lambda v: v.encode("latin-1")),
    bytearray: (lambda x: x.decode("latin-1"), lambda v: bytearray(v.encode("latin-1"))),
    range: (lambda x: [x.start, x.stop, x.step], lambda v: range(*v)),
    slice: (lambda x: [x.start, x.stop, x.step], lambda v: slice(*v)),
    decimal.Decimal: (str, decimal.Decimal),
    fractions.Fraction: (str, fractions.Fraction),
    datetime.date: (lambda x: x.isoformat(), datetime.date.fromisoformat),
    datetime.datetime: (lambda x: x.isoformat(), datetime.datetime.fromisoformat),
    datetime.time: (lambda x: x.isoformat(), datetime.time.fromisoformat),
    datetime.timedelta: (lambda x: [x.days, x.seconds, x.microseconds], lambda v: datetime.timedelta(*v)),
}
_COLLECTIONS = (tuple, set, frozenset, collections.deque)
_MAPPINGS = (dict, collections.Counter, collections.OrderedDict)
_VIEWS: dict[type, Callable[[list[Any]], Any]] = {
    type({}.keys()): lambda items: dict.fromkeys(items).keys(),
    type({}.values()): lambda items: dict(enumerate(items)).values(),
    type({}.items()): lambda items: dict(items).items(),
}
_BY_NAME = {kind.__name__: kind for kind in (*_SCALARS, *_COLLECTIONS, *_MAPPINGS, *_VIEWS)}
_MUTABLE = (list, dict, set, bytearray, collections.deque, collections.defaultdict, collections.OrderedDict)
_PLAIN: dict[type, Callable[[Any], Any]] = {int: int.__pos__, float: float.__pos__, str: str.__str__}


class SolutionEnded(BaseException):
    """The other process has ended, or wrote something that is no message. No test that follows passes."""


class Peer:
    """One end of the connection: it sends requests, and serves those that arrive while it waits for a reply.

    Args:
        incoming: file descriptor to read from.
        outgoing: file descriptor to write to.
        is_of_tests: whether this is the process of the tests.
        names: variables that the other process may ask for.
    """

    def __init__(self, incoming: int, outgoing: int, *, is_of_tests: bool, names: dict[str, Any]) -> None:
        self.is_of_tests = is_of_tests
        self.has_ended = False
        self.has_failed = False  # an assertion in a function that the tests passed, which the solution may suppress
        self._reader, self._writer = os.fdopen(incoming, "rb"), os.fdopen(outgoing, "wb")
        self._lock = threading.RLock()
        self._names = names
        self._own: list[Any] = []
        self._handles: dict[int, int] = {}
        self._theirs: dict[int, Any] = {}  # what stands for objects of the other process, by handle
        self._their_handles: dict[int, int] = {}
        self._borrowed: list[tuple[Any, Any, str, Any]] = []  # containers that are attributes there, as they were

    def request(self, operation: str, /, *args: Any, **kwargs: Any) -> Any:
        """Let the other process perform an operation, and return the result or raise the error.

        Raises:
            SolutionEnded: there is no reply.
        """
        with self._lock:
            self._give_back()
            result = self._request(operation, args, kwargs)
            if operation == "getattr" and (type(result) in _MUTABLE or _is_array(result)):
                self._borrowed = [*self._borrowed, (result, args[0], args[1], self._encode(result))][-_MOST_BORROWED:]
            return result

    def _give_back(self) -> None:
        """Send the containers that were attributes of objects of the other process and have changed since."""
        for i, (container, owner, name, before) in enumerate(self._borrowed):
            if (now := self._encode(container)) != before:
                self._borrowed[i] = container, owner, name, now
                self._request("overwrite", (owner, name, container), {})

    def _request(self, operation: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        self.send(
            "request", operation, [self._encode(x) for x in args], {k: self._encode(x) for k, x in kwargs.items()}
        )
        while (message := self.receive())[0] == "request":
            self._serve(*message[1:])
        if message[0] == "raised":
            error = self._decode_error(*message[1:])
            if operation != "next" and isinstance(error, (StopIteration, StopAsyncIteration)):
                error = RuntimeError(f"{operation} raised {type(error).__name__}")  # it would end a loop of the tests
            raise error
        _, result, changed = message
        for key, value in changed:
            overwrite(given[key], self._decode(value))
        return given[result["argument"]] if type(result) is dict and "argument" in result else self._decode(result)

    def serve_until_the_end(self) -> None:
        """Serve requests."""
        pid = os.getpid()
        while os.getpid() == pid:  # a process that the solution forked must not reply
            _, *request = self.receive()
            self._serve(*request)

    def send(self, *message: Any) -> None:
        """Send a message."""
        try:
            self._writer.write(json.dumps(message).encode() + b"\n")
            self._writer.flush()
        except OSError:
            self._end()

    def receive(self) -> list[Any]:
        """Wait for a message."""
        line = b"" if self.has_ended else self._reader.readline(_LINE_BYTES)
        try:
            message = json.loads(line)
        except ValueError:
            self._end()
        if type(message) is not list or not message:
            self._end()
        return message

    def _end(self) -> NoReturn:
        self.has_ended = True
        raise SolutionEnded

    def _serve(self, operation: str, positional: list[Any], named: dict[str, Any]) -> None:
        reply: tuple[Any, ...]
        try:
            if operation == "names":
                wanted = [n for n in self._names if not n.startswith("_")] if positional[0] is None else positional[0]
                found = {name: self._names[name] for name in wanted if name in self._names}
                if self.is_of_tests:
                    found = {name: x for name, x in found.items() if _may_be_shared(x)}
                reply = "returned", {"dict": [[name, self._encode(x)] for name, x in found.items()]}, []
            else:
                if self.is_of_tests:
                    self._check_is_allowed(operation, positional)
                reply = self._perform(operation, positional, named)
        except SolutionEnded:
            raise
        except BaseException as error:
            self.has_failed |= isinstance(error, AssertionError)
            attributes = self._encode(dict(vars(error)))
            reply = "raised", self._encode(type(error)), [self._encode(x) for x in error.args], attributes, str(error)
        self.send(*reply)

    def _perform(self, operation: str, positional: list[Any], named: dict[str, Any]) -> tuple[Any, ...]:
        args: list[Any] = [self._decode(x) for x in positional]
        kwargs = {name: self._decode(x) for name, x in named.items()}
        function = overwrite_attribute if operation == "overwrite" else OPERATIONS[operation]
        result = function(*args, **kwargs)
        given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        before: dict[Any, Any] = {**dict(enumerate(positional)), **named}
        mutable = {key: x for key, x in given.items() if type(x) in _MUTABLE or _is_array(x)}
        after = [[key, self._encode(x)] for key, x in mutable.items()]
        same = [key for key, x in mutable.items() if x is result]
        encoded = {"argument": same[0]} if same else self._encode(result)
        return "returned", encoded, [[key, new] for key, new in after if new != before[key]]

    def _check_is_allowed(self, operation: str, positional: list[Any]) -> None:
        """Refuse what the functions and objects of the tests are not for, such as reading a function's globals."""
        first = positional[0] if positional else None
        if type(first) is not dict or set(first) != {"yours"}:
            raise PermissionError(f"{operation} of something that the tests did not pass")
        target = self._own[first["yours"]]
        if operation == "call":
            allowed = _may_be_called(target)
        elif operation in ("iter", "next"):
            allowed = hasattr(type(target), "__next__") or _is_of_tests(type(target))
        elif operation == "isinstance":
            allowed = isinstance(target, type) and _is_of_tests(target)
        elif operation in ("getattr", "setattr", "delattr", "overwrite"):
            name = positional[1]
            allowed = _is_of_tests(type(target)) and type(name) is str and not name.startswith("_")
            allowed &= operation == "getattr" or not callable(getattr(type(target), name, None))
        else:
            allowed = _is_of_tests(type(target)) and operation in OPERATIONS
            allowed &= operation not in ("dir", "run", "copy", "deepcopy", "describe_error")
        if not allowed:
            raise PermissionError(f"{operation} of a {type(target).__name__} of the tests")

    def _encode(self, x: Any) -> Any:
        """Return JSON of a value, or of the handle of an object."""
        kind = type(x)
        if x is None or kind in (bool, int, float, str):
            return x
        if kind is list:
            return [self._encode(item) for item in x]
        if kind is Remote:
            return {"yours": x.remote_handle__}
        if kind in _SCALARS:
            return {kind.__name__: _SCALARS[kind][0](x)}
        if kind in _COLLECTIONS or kind in _VIEWS:
            return {kind.__name__: [self._encode(item) for item in x]}
        if kind in _MAPPINGS:
            return {kind.__name__: [[self._encode(key), self._encode(value)] for key, value in x.items()]}
        if kind is collections.defaultdict:
            return {"defaultdict": [self._encode(x.default_factory), self._encode(dict(x))]}
        if _is_array(x):
            shape = list(x.shape) if kind.__name__ == "ndarray" else None
            return {"array": [x.dtype.str, shape, base64.b64encode(x.tobytes()).decode()]}
        for base, plain in _PLAIN.items():
            if isinstance(x, base):  # as members of IntEnum
                return plain(x)
        if isinstance(x, tuple) and hasattr(kind, "_fields"):
            return {"namedtuple": [kind.__name__, list(kind._fields), [self._encode(item) for item in x]]}
        if isinstance(x, ModuleType) and x.__name__ in _MODULES:
            return {"module": x.__name__}
        if inspect.iscoroutine(x):
            return {"coroutine": self._encode_own(x)}
        return self._encode_named(x) or self._encode_own(x)

    def _encode_named(self, x: Any) -> Any:
        """Encode a class or function by its name, if both processes have it, or a class of errors."""
        name, module = getattr(x, "__name__", None), getattr(x, "__module__", None)
        if _is_ufunc(x):
            return {"standard": ["numpy", name]}
        if type(name) is not str or type(module) is not str:
            return None
        if module == "builtins" and _is_known_builtin(name) and getattr(builtins, name) is x:
            return {"builtin": name}
        root = module.lstrip("_")
        if root in sys.modules and _standard(root, name) is x:
            return {"standard": [root, name]}
        if isinstance(x, type) and issubclass(x, BaseException):
            parent = next(base for base in x.__bases__ if issubclass(base, BaseException))
            return {"error": [self._encode_own(x), name, self._encode(parent)]}
        return None

    def _encode_own(self, x: Any) -> dict[str, int]:
        if id(x) in self._their_handles:
            return {"yours": self._their_handles[id(x)]}
        if id(x) not in self._handles:
            self._handles[id(x)] = len(self._own)
            self._own.append(x)
        return {"mine": self._handles[id(x)]}

    def _decode(self, x: Any) -> Any:
        if type(x) is list:
            return [self._decode(item) for item in x]
        if type(x) is not dict:
            return x
        ((tag, value),) = x.items()
        if tag == "mine":
            return self._theirs.setdefault(int(value), Remote(self, int(value)))
        if tag == "yours":
            return self._own[value]
        if tag == "error":
            return self._decode_error_class(*value)
        if tag == "builtin":
            if not _is_known_builtin(value):
                raise PermissionError(f"the built-in {value}")
            return getattr(builtins, value)
        if tag == "module":
            if value not in _MODULES:
                raise PermissionError(f"the module {value}")
            return importlib.import_module(value)
        if tag == "standard":
            if (found := _standard(*value)) is None:
                raise PermissionError(f"the function {value}")
            return found
        if tag == "array":
            return _decode_array(*value)
        if tag == "coroutine":
            return _run_coroutine(self._decode(value))
        if tag == "namedtuple":
            name, fields, items = value
            return collections.namedtuple(name, fields)(*map(self._decode, items))
        if tag == "defaultdict":
            factory, items = map(self._decode, value)
            return collections.defaultdict(factory, items)
        kind = _BY_NAME[tag]
        if kind in _VIEWS:
            return _VIEWS[kind]([self._decode(item) for item in value])
        if kind in _SCALARS:
            return _SCALARS[kind][1](value)
        if kind in _COLLECTIONS:
            return kind(self._decode(item) for item in value)
        return kind({self._decode(key): self._decode(item) for key, item in value})

    def _decode_error_class(self, own: dict[str, int], name: str, parent: Any) -> Any:
        if "yours" in own:
            return self._own[own["yours"]]
        handle = int(own["mine"])
        if handle not in self._theirs:
            base = self._decode(parent)
            if not (type(base) is type and issubclass(base, BaseException)):
                raise PermissionError(f"errors of the kind {base}")
            remote = Remote(self, handle)

            def fill(error: Any, /, *args: Any, **kwargs: Any) -> None:
                error.args, attributes, text = self.request("describe_error", remote, *args, **kwargs)
                vars(error).update({**attributes, "solution_text__": text})

            def text_of(error: Any) -> str:
                return str(vars(error).get("solution_text__", ""))

            kind = type(str(name), (base,), {"__module__": "solution", "__init__": fill, "__str__": text_of})
            self._theirs[handle] = kind
            self._their_handles[id(kind)] = handle
        return self._theirs[handle]

    def _decode_error(self, kind: Any, args: list[Any], attributes: Any, text: str) -> BaseException:
        cls = self._decode(kind)
        if not (type(cls) is type and issubclass(cls, BaseException)):
            raise PermissionError(f"an error of the kind {cls}")
        error: BaseException = cls.__new__(cls)
        error.args = tuple(map(self._decode, args))
        with contextlib.suppress(AttributeError, TypeError):
            vars(error).update({**self._decode(attributes), "solution_text__": text})
        return error


async def _run_coroutine(remote: Any) -> Any:
    return remote.remote_peer__.request("run", remote)


def _is_of_tests(kind: Any) -> bool:
    return vars(kind).get("__module__") == TESTS_NAME


def _may_be_shared(kind: Any) -> bool:
    """Whether the solution may use a class by its name: one of the tests, but not of a framework, as a TestCase is."""
    return isinstance(kind, type) and all(_is_of_tests(base) for base in kind.__mro__[:-1])


def _may_be_called(target: Any) -> bool:
    """Whether the solution may call something of the tests: what they defined, or a method of a container."""
    if isinstance(target, functools.partial):
        return _may_be_called(target.func)
    if isinstance(target, FunctionType):
        return target.__module__ == TESTS_NAME
    if isinstance(target, MethodType):
        return _is_of_tests(type(target.__self__))
    if isinstance(target, BuiltinFunctionType):
        return type(target.__self__) in _MUTABLE
    if isinstance(target, type):
        return _is_of_tests(target)
    return _is_of_tests(type(target)) or isinstance(target, operator.itemgetter)


def _is_known_builtin(name: str) -> bool:
    found = getattr(builtins, name, None)
    return name in _FUNCTIONS | _CLASSES or (type(found) is type and issubclass(found, BaseException))


def _is_ufunc(x: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and type(x) is numpy.ufunc and getattr(numpy, x.__name__, None) is x


def _standard(module: str, name: str) -> Any:
    """Return a function or class of the standard library, or a ufunc or scalar type of numpy, or None."""
    if module not in _WITH_FUNCTIONS | {"numpy"} or name.startswith("_") or name in _REFUSED:
        return None
    found = getattr(importlib.import_module(module), name, None)
    if module == "numpy":
        is_type = isinstance(found, type) and issubclass(found, sys.modules["numpy"].generic)
        return found if is_type or _is_ufunc(found) else None
    is_known = isinstance(found, (type, FunctionType, BuiltinFunctionType))
    return found if is_known and str(found.__module__).lstrip("_") == module else None


def _is_array(x: Any) -> bool:
    """Whether ``x`` is an array or scalar of numpy, of numbers, dates or text."""
    numpy = sys.modules.get("numpy")
    is_numpy = numpy is not None and (type(x) is numpy.ndarray or issubclass(type(x), numpy.generic))
    return is_numpy and x.dtype.kind in _ARRAY_KINDS


def _decode_array(dtype: str, shape: list[int] | None, data: str) -> Any:
    import numpy

    kind = numpy.dtype(str(dtype))
    if kind.kind not in _ARRAY_KINDS:
        raise PermissionError(f"an array of {dtype}")
    array = numpy.frombuffer(base64.b64decode(data), kind)
    return array[0] if shape is None else array.reshape(shape).copy()


def overwrite_attribute(owner: Any, name: str, value: Any) -> None:
    """Give a container that is an attribute the content that it has in the other process."""
    overwrite(getattr(owner, name), value)


def overwrite(target: Any, value: Any) -> None:
    """Give a container the content of another of its type; containers in it remain the same objects where they can."""
    if type(target) is not type(value):
        return
    if isinstance(target, (list, collections.deque)):
        kept = [_overwritten(x, y) for x, y in zip(target, value, strict=False)] + list(value)[len(target) :]
        target.clear()
        target.extend(kept)
    elif isinstance(target, dict):
        kept_items = {key: _overwritten(target.get(key), y) for key, y in value.items()}
        target.clear()
        target.update(kept_items)
    elif isinstance(target, set):
        target.clear()
        target.update(value)
    else:
        target[...] = value


def _overwritten(target: Any, value: Any) -> Any:
    if type(target) is type(value) and type(value) in (list, dict, set, collections.deque):
        overwrite(target, value)
        return target
    return value


class _Names(dict[str, Any]):
    """Built-in names, and classes that the tests define and the solution expects, as LeetCode's ListNode."""

    def __init__(self, peer: Peer) -> None:
        super().__init__(vars(builtins))
        self.peer, self.is_ready = peer, False

    def __missing__(self, name: str) -> Any:
        if not self.is_ready:
            raise KeyError(name)
        return self.peer.request("names", [name])[name]


def serve(incoming: int, outgoing: int) -> None:
    """Run a solution and then its functions as the tests ask, in the process of the solution; does not return."""
    sys.set_int_max_str_digits(0)
    pid = os.getpid()
    for end in (incoming, outgoing):
        os.set_inheritable(end, False)
    module = ModuleType("solution")  # not __main__: code under `if __name__ == "__main__"` would wait for input
    sys.modules["solution"] = module
    peer = Peer(incoming, outgoing, is_of_tests=False, names=vars(module))
    try:
        solution, tests_define_classes = peer.receive()
        names = _Names(peer)
        if tests_define_classes:
            vars(module)["__builtins__"] = names
        flags = annotations.compiler_flag if tests_define_classes else 0  # they may name classes of the tests
        exec(compile(solution, "<solution>", "exec", flags, dont_inherit=True), vars(module))
        names.is_ready = True
        if os.getpid() == pid:
            peer.send("ready")
            peer.serve_until_the_end()
    finally:
        os._exit(0)


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
