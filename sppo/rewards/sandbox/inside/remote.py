"""Objects of another process, and what can be asked of them.

A :class:`Remote` does for its object whatever a test asks for, with two exceptions, so that an object cannot pose as a
correct result. It never equals or precedes a value of the tests. What is calculated from it and a number, array or set
of the tests can only be calculated with further, or compared with another ``Remote``.
"""

from __future__ import annotations

import asyncio
import builtins
import copy
import operator
from collections.abc import Callable
from typing import Any

UNARY = ("neg", "pos", "invert", "abs", "int", "float", "round", "index", "trunc")
BINARY: tuple[str, ...] = ("add", "sub", "mul", "truediv", "floordiv", "mod", "divmod", "pow", "matmul", "and_", "or_")
BINARY += ("xor", "lshift", "rshift")
IN_PLACE = tuple(f"i{name.rstrip('_')}" for name in BINARY if name != "divmod")
ORDER = ("lt", "le", "gt", "ge")
OTHER = ("bool", "len", "iter", "next", "reversed", "str", "repr", "format")
ITEMS = ("getitem", "setitem", "delitem", "contains")


_TEXTS = (str, bytes, list, tuple, dict)  # whose difference from an object is no number
# Python and numpy take others for what they are in an honest object: annotations are evaluated, buffers read.
_READABLE = ("__name__", "__qualname__", "__module__", "__dict__", "__wrapped__")


def _call(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def _describe_error(cls: type[BaseException], /, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    error = cls(*args, **kwargs)
    return error.args, vars(error), str(error)


def _builtin_or_operator(name: str) -> Any:
    return getattr(operator, name, None) or getattr(builtins, name)


OPERATIONS: dict[str, Any] = {
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
    "run": asyncio.run,
    "describe_error": _describe_error,
}
for _name in ("eq", *UNARY[:-1], *BINARY, *IN_PLACE, *ORDER, *OTHER, *ITEMS):
    OPERATIONS[_name] = _builtin_or_operator(_name)


class Remote:
    # An object of the other process; __doc__ is that of the object.

    __slots__ = ("remote_handle__", "remote_is_mixed__", "remote_peer__")

    def __init__(self, peer: Any, handle: int) -> None:
        object.__setattr__(self, "remote_peer__", peer)
        object.__setattr__(self, "remote_handle__", handle)
        object.__setattr__(self, "remote_is_mixed__", False)  # calculated from an object and a value of this process

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return _ask(self, "call", *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in _READABLE and self.remote_peer__.is_of_tests:
            raise AttributeError(name)
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

    @property
    def __doc__(self) -> Any:  # type: ignore[override]
        return _ask(self, "getattr", "__doc__")

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # what the object says of itself, but no type of the tests
        kind = _ask(self, "getattr", "__class__")
        return kind if type(kind) is Remote else Remote

    def __exit__(self, *error: Any) -> bool:
        suppresses = _ask(self, "exit", *error) is True
        return suppresses and error[0] is not AssertionError


def _ask(remote: Remote, operation: str, /, *args: Any, **kwargs: Any) -> Any:
    if remote.remote_is_mixed__:
        raise TypeError(f"{operation} of what was calculated from an object of the solution and a value of the tests")
    return remote.remote_peer__.request(operation, remote, *args, **kwargs)


def _compare(remote: Remote, operation: str, other: object) -> Any:
    if type(other) is Remote and other.remote_is_mixed__ and remote.remote_is_mixed__:
        raise TypeError(f"{operation} of two values calculated from objects of the solution and values of the tests")
    if type(other) is Remote or not remote.remote_peer__.is_of_tests:
        return remote.remote_peer__.request(operation, remote, other)
    return NotImplemented


def _calculate(operation: str, left: Any, right: Any) -> Any:
    operands = (left, right)
    peer = next(x for x in operands if type(x) is Remote).remote_peer__
    result = peer.request(operation, left, right)
    if peer.is_of_tests and any(type(x) is not Remote or x.remote_is_mixed__ for x in operands):
        if type(result) is not Remote:
            raise TypeError(f"{operation} of an object of the solution and a value of the tests gave no object")
        if any(x.remote_is_mixed__ if type(x) is Remote else type(x) not in _TEXTS for x in operands):
            object.__setattr__(result, "remote_is_mixed__", True)
    return result


def _define_operators() -> None:
    def asked(operation: str) -> Callable[..., Any]:
        return lambda self, *args: _ask(self, operation, *args)

    def calculated(operation: str) -> Callable[..., Any]:
        return lambda self, other: _calculate(operation, self, other)

    def reflected(operation: str) -> Callable[..., Any]:
        return lambda self, other: _calculate(operation, other, self)

    def compared(operation: str) -> Callable[..., Any]:
        return lambda self, other: _compare(self, operation, other)

    others = ("copy", "enter", "dir")
    for names, made in (
        ((*UNARY, *OTHER, *ITEMS, *others), asked),
        ((*BINARY, *IN_PLACE), calculated),
        (ORDER, compared),
    ):
        for name in names:
            setattr(Remote, f"__{name.rstrip('_')}__", made(name))
    for name in BINARY:
        setattr(Remote, f"__r{name.rstrip('_')}__", reflected(name))


_define_operators()
