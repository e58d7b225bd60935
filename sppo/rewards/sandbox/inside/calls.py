"""Calls between the interpreter of tests and that of a solution.

    process of the tests    calls and arguments  ->   process of the solution
    (the jail's child)      <-  results and errors    (an interpreter of its own)

Arguments and results are copied between the processes. The solution can therefore not replace a function or a module
that the tests use, read what they expect, or report that they passed. What cannot be copied, such as an instance of a
class of the solution, stays where it is; the other process has a :class:`Remote` of it.

A ``Remote`` does for its object whatever a test asks for, with two exceptions, so that an object cannot pose as a
correct result. It never equals or precedes a value of the tests, and a calculation with such a value gives no number.

As a program, this file is the process of the solution.
"""

from __future__ import annotations

import base64
import builtins
import collections
import contextlib
import copy
import datetime
import decimal
import fractions
import importlib
import json
import operator
import os
import sys
from collections.abc import Callable
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, NoReturn

_LINE_BYTES = 64 << 20
TESTS_NAME = "tests"  # __name__ of the tests, and __module__ of the classes that they define
# Modules of which each process takes its own copy. None has an object that equals everything, as unittest.mock has.
_STANDARD = {"bisect", "cmath", "collections", "copy", "datetime", "decimal", "fractions", "functools", "heapq"}
_STANDARD |= {"itertools", "json", "math", "numpy", "operator", "random", "re", "statistics", "string", "typing"}
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
_BY_NAME = {kind.__name__: kind for kind in (*_SCALARS, *_COLLECTIONS, *_MAPPINGS)}
_MUTABLE = (list, dict, set, bytearray, collections.deque)
_ARRAY_KINDS = "biufcSUmM"
_PLAIN: dict[type, Callable[[Any], Any]] = {int: int.__pos__, float: float.__pos__, str: str.__str__}

_UNARY = ("neg", "pos", "invert", "abs", "int", "float", "round", "index", "trunc")
_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_", "xor", "lshift", "rshift")
_ORDER = ("lt", "le", "gt", "ge")
_OTHER = (
    "bool",
    "len",
    "iter",
    "next",
    "reversed",
    "str",
    "repr",
    "format",
    "getitem",
    "setitem",
    "delitem",
    "contains",
)


def _call(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


_OPERATIONS: dict[str, Any] = {
    "call": _call,
    "getattr": getattr,
    "setattr": setattr,
    "delattr": delattr,
    "dir": dir,
    "hash": hash,
    "isinstance": lambda kind, x: isinstance(x, kind),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "enter": lambda x: type(x).__enter__(x),
    "exit": lambda x, *error: type(x).__exit__(x, *error),
    "trunc": lambda x: x.__trunc__(),
} | {name: getattr(operator, name, None) or getattr(builtins, name) for name in (
    "eq", *_UNARY[:-1], *_BINARY, *_ORDER, *_OTHER)}  # fmt: skip


class SolutionEnded(BaseException):
    """The other process has ended, or wrote something that is no message. No test that follows passes."""


class Remote:
    """An object of the other process."""

    __slots__ = ("remote_handle__", "remote_is_mixed__", "remote_peer__")

    def __init__(self, peer: Peer, handle: int) -> None:
        object.__setattr__(self, "remote_peer__", peer)
        object.__setattr__(self, "remote_handle__", handle)
        object.__setattr__(self, "remote_is_mixed__", False)  # a result of this object and a value of this process

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _ask(self, "call", *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return _ask(self, "getattr", name)

    def __setattr__(self, name: str, value: Any) -> None:
        _ask(self, "setattr", name, value)

    def __delattr__(self, name: str) -> None:
        _ask(self, "delattr", name)

    def __eq__(self, other: object) -> Any:
        return _compare(self, "eq", other)

    def __hash__(self) -> int:
        return _ask(self, "hash")

    def __deepcopy__(self, memo: Any) -> Any:
        return _ask(self, "deepcopy")

    def __instancecheck__(self, instance: object) -> bool:
        return _ask(self, "isinstance", instance) is True


def _ask(remote: Remote, operation: str, *args: Any, **kwargs: Any) -> Any:
    return remote.remote_peer__.request(operation, remote, *args, **kwargs)


def _compare(remote: Remote, operation: str, other: object) -> Any:
    if type(other) is Remote or not remote.remote_peer__.is_of_tests:
        return _ask(remote, operation, other)
    return NotImplemented


def _calculate(operation: str, left: Any, right: Any) -> Any:
    remote, other = (left, right) if type(left) is Remote else (right, left)
    peer = remote.remote_peer__
    result = peer.request(operation, left, right)
    if type(other) is not Remote and peer.is_of_tests:
        if type(result) is not Remote:
            raise TypeError(f"{operation} of an object of the solution and a {type(other).__name__} gave no object")
        object.__setattr__(result, "remote_is_mixed__", True)
    return result


def _define_operators() -> None:
    def plain(operation: str) -> Callable[..., Any]:
        return lambda self, *args: _ask(self, operation, *args)

    def unary(operation: str) -> Callable[..., Any]:
        def method(self: Remote, *args: Any) -> Any:
            if self.remote_is_mixed__:
                raise TypeError(f"{operation} of what was calculated from an object of the solution and another value")
            return _ask(self, operation, *args)

        return method

    def binary(operation: str) -> Callable[..., Any]:
        return lambda self, other: _calculate(operation, self, other)

    def reflected(operation: str) -> Callable[..., Any]:
        return lambda self, other: _calculate(operation, other, self)

    def ordered(operation: str) -> Callable[..., Any]:
        return lambda self, other: _compare(self, operation, other)

    for names, made in ((_OTHER, plain), ((*_UNARY, "bool", "len"), unary), (_BINARY, binary), (_ORDER, ordered)):
        for name in names:
            setattr(Remote, f"__{name.rstrip('_')}__", made(name))
    for name in _BINARY:
        setattr(Remote, f"__r{name.rstrip('_')}__", reflected(name))
    for name in ("copy", "enter", "exit", "dir"):
        setattr(Remote, f"__{name}__", plain(name))


_define_operators()


class Peer:
    """One end of the connection: it sends requests, and serves those that arrive while it waits for a reply.

    Args:
        incoming: file descriptor to read from.
        outgoing: file descriptor to write to.
        is_of_tests: whether this is the process of the tests, which does for the solution only what a test's callbacks
            and objects need.
    """

    def __init__(self, incoming: int, outgoing: int, *, is_of_tests: bool) -> None:
        self.is_of_tests = is_of_tests
        self.has_ended = False
        self._reader, self._writer = os.fdopen(incoming, "rb"), os.fdopen(outgoing, "wb")
        self._own: list[Any] = []
        self._handles: dict[int, int] = {}
        self._theirs: dict[int, Any] = {}  # what stands for objects of the other process, by handle
        self._their_handles: dict[int, int] = {}
        self._names: ModuleType | None = None

    def request(self, operation: str, *args: Any, **kwargs: Any) -> Any:
        """Let the other process perform an operation, and return the result or raise the error.

        Raises:
            SolutionEnded: there is no reply.
        """
        given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        self.send(
            "request", operation, [self._encode(x) for x in args], {k: self._encode(x) for k, x in kwargs.items()}
        )
        while (message := self.receive())[0] == "request":
            self._serve(*message[1:])
        if message[0] == "raised":
            raise self._decode_error(*message[1:])
        _, result, changed = message
        for key, value in changed:
            _overwrite(given[key], self._decode(value))
        return given[result["argument"]] if type(result) is dict and "argument" in result else self._decode(result)

    def serve_until_the_end(self, module: ModuleType) -> None:
        """Serve requests, of which ``names`` asks for variables of a module."""
        self._names = module
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
            if operation == "names" and self._names is not None:
                known = vars(self._names)
                reply = "returned", {"dict": [[n, self._encode(known[n])] for n in positional[0] if n in known]}, []
            else:
                if self.is_of_tests:
                    self._check_is_allowed(operation, positional)
                args: dict[Any, Any] = {
                    **dict(enumerate(map(self._decode, positional))),
                    **{k: self._decode(x) for k, x in named.items()},
                }
                result = _OPERATIONS[operation](*list(args.values())[: len(positional)], **{k: args[k] for k in named})
                mutable = {key: x for key, x in args.items() if isinstance(x, _MUTABLE) or _is_array(x)}
                before: dict[Any, Any] = {**dict(enumerate(positional)), **named}
                after = [[key, self._encode(x)] for key, x in mutable.items()]
                same = [key for key, x in mutable.items() if x is result]
                encoded = {"argument": same[0]} if same else self._encode(result)
                reply = "returned", encoded, [[key, new] for key, new in after if new != before[key]]
        except SolutionEnded:
            raise
        except BaseException as error:
            reply = (
                "raised",
                self._encode(type(error)),
                [self._encode(x) for x in error.args],
                self._encode(vars(error)),
            )
        self.send(*reply)

    def _check_is_allowed(self, operation: str, positional: list[Any]) -> None:
        """Refuse what callbacks and objects of the tests do not need, such as a function's ``__globals__``."""
        first = positional[0] if positional else None
        if type(first) is not dict or set(first) != {"yours"}:
            raise PermissionError(f"{operation} of something that the tests did not pass")
        target = self._own[first["yours"]]
        if operation in ("getattr", "setattr", "delattr"):
            if type(target).__module__ != TESTS_NAME or str(positional[1]).startswith("_"):
                raise PermissionError(f"attribute {positional[1]!r} of a {type(target).__name__} of the tests")
        elif operation == "dir":
            raise PermissionError("dir of an object of the tests")

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
        if kind in _COLLECTIONS:
            return {kind.__name__: [self._encode(item) for item in x]}
        if kind in _MAPPINGS or kind is collections.defaultdict:
            name = kind.__name__ if kind in _MAPPINGS else "dict"
            return {name: [[self._encode(key), self._encode(value)] for key, value in x.items()]}
        if _is_array(x):
            shape = list(x.shape) if kind.__name__ == "ndarray" else None
            return {"array": [x.dtype.str, shape, base64.b64encode(x.tobytes()).decode()]}
        for base, plain in _PLAIN.items():
            if isinstance(x, base):  # as members of IntEnum
                return plain(x)
        if isinstance(x, tuple) and hasattr(kind, "_fields"):
            return {"namedtuple": [kind.__name__, list(kind._fields), [self._encode(item) for item in x]]}
        if isinstance(x, ModuleType):
            return {"module": x.__name__} if x.__name__.split(".")[0] in _STANDARD else self._encode_own(x)
        if isinstance(x, (type, FunctionType, BuiltinFunctionType)) or hasattr(x, "__qualname__"):
            return self._encode_named(x)
        return self._encode_own(x)

    def _encode_named(self, x: Any) -> Any:
        """Encode a class or function: by its name where both processes have it."""
        module, name = getattr(x, "__module__", None) or "", getattr(x, "__qualname__", "")
        if module == "builtins" and getattr(builtins, name, None) is x:
            return {"builtin": name}
        root = module.split(".")[0].lstrip("_")
        if (
            root in _STANDARD
            and "." not in name
            and root in sys.modules
            and getattr(sys.modules[root], name, None) is x
        ):
            return {"standard": [root, name]}
        if isinstance(x, type) and issubclass(x, BaseException):
            base = next(base for base in x.__mro__ if base.__module__ == "builtins")
            return {"error": [*self._encode_own(x).values(), x.__name__, base.__name__]}
        return self._encode_own(x)

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
            return self._theirs.setdefault(value, Remote(self, value))
        if tag == "yours":
            return self._own[value]
        if tag == "error":
            handle, name, base = value
            kind = self._theirs.setdefault(handle, type(name, (_builtin(base),), {"__module__": "solution"}))
            self._their_handles[id(kind)] = handle
            return kind
        if tag == "builtin":
            return _builtin(value)
        if tag in ("module", "standard"):
            module, *name = [value] if tag == "module" else value
            if module.split(".")[0] not in _STANDARD:
                raise PermissionError(f"the module {module}")
            found = importlib.import_module(module)
            return getattr(found, name[0]) if name else found
        if tag == "array":
            return _decode_array(*value)
        if tag == "namedtuple":
            name, fields, items = value
            return collections.namedtuple(name, fields)(*map(self._decode, items))
        kind = _BY_NAME[tag]
        if kind in _SCALARS:
            return _SCALARS[kind][1](value)
        if kind in _COLLECTIONS:
            return kind(self._decode(item) for item in value)
        return kind({self._decode(key): self._decode(item) for key, item in value})

    def _decode_error(self, kind: Any, args: list[Any], attributes: Any) -> BaseException:
        cls = self._decode(kind)
        error = cls.__new__(cls, *map(self._decode, args))
        error.args = tuple(map(self._decode, args))
        with contextlib.suppress(AttributeError, TypeError):
            vars(error).update(self._decode(attributes))
        return error


def _builtin(name: str) -> Any:
    found = getattr(builtins, name)
    if not isinstance(found, (type, BuiltinFunctionType)) or name.startswith("_"):
        raise PermissionError(f"the built-in {name}")
    return found


def _is_array(x: Any) -> bool:
    """Whether ``x`` is an array or scalar of numpy, of numbers, dates or text."""
    numpy = sys.modules.get("numpy")
    is_numpy = numpy is not None and (type(x) is numpy.ndarray or isinstance(x, numpy.generic))
    return is_numpy and x.dtype.kind in _ARRAY_KINDS


def _decode_array(dtype: str, shape: list[int] | None, data: str) -> Any:
    import numpy

    kind = numpy.dtype(dtype)
    if kind.kind not in _ARRAY_KINDS:
        raise PermissionError(f"an array of {dtype}")
    array = numpy.frombuffer(base64.b64decode(data), kind)
    return array[0] if shape is None else array.reshape(shape).copy()


def _overwrite(target: Any, value: Any) -> None:
    """Give a container that was passed to the other process the content that it has there."""
    if type(target) is not type(value):
        return
    if isinstance(target, (list, bytearray)):
        target[:] = value
    elif isinstance(target, (dict, set)):
        target.clear()
        target.update(value)
    elif isinstance(target, collections.deque):
        target.clear()
        target.extend(value)
    else:  # an array
        target[...] = value


def serve(incoming: int, outgoing: int) -> None:
    """Run a solution and then its functions as the tests ask, in the process of the solution; does not return."""
    sys.set_int_max_str_digits(0)
    pid = os.getpid()
    for end in (incoming, outgoing):
        os.set_inheritable(end, False)
    peer = Peer(incoming, outgoing, is_of_tests=False)
    try:
        (solution,) = peer.receive()
        module = ModuleType("solution")  # not __main__: code under `if __name__ == "__main__"` would wait for input
        sys.modules["solution"] = module
        exec(compile(solution, "<solution>", "exec"), vars(module))
        if os.getpid() == pid:
            peer.send("ready")
            peer.serve_until_the_end(module)
    finally:
        os._exit(0)


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
