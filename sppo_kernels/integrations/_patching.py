"""Replacement of names in another package's modules, now or once they are imported, and their restoration."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Name = tuple[ModuleType | type, str]


class Patch:
    """Replacements in one package, and the original objects.

    With ``package``, a name is replaced and restored in every loaded module of that package that binds the same object
    under it, as ``from a import name`` does. Threads may share a patch.
    """

    def __init__(self, package: str | None = None) -> None:
        self._package = package
        self._originals: dict[Name, Any] = {}
        self._layers: list[Mapping[Name, Any]] = []
        self._lock = threading.RLock()

    def apply(self, replacements: Mapping[Name, Any]) -> ExitStack:
        """Install replacements on top of earlier ones.

        Returns:
            A context manager that removes these replacements on exit. Several may exit in any order.
        """
        with self._lock:
            found = {(owner, name): getattr(owner, name) for owner, name in replacements}
            self._originals = found | self._originals
            self._layers.append(replacements)
            self._install()
        undo = ExitStack()
        undo.callback(self._remove, replacements)
        return undo

    def original(self, owner: ModuleType | type, name: str) -> Any:
        """Return the object that a name had before any replacement; None if there is no such name."""
        with self._lock:
            return self._originals.get((owner, name), getattr(owner, name, None))

    def restore(self) -> None:
        """Remove all replacements and restore the originals, if anything was replaced."""
        with self._lock:
            self._layers.clear()
            self._install()

    def _remove(self, replacements: Mapping[Name, Any]) -> None:
        with self._lock:
            self._layers = [layer for layer in self._layers if layer is not replacements]
            self._install()

    def _install(self) -> None:
        for (owner, name), original in self._originals.items():
            replacements = [layer[owner, name] for layer in self._layers if (owner, name) in layer]
            self._bind(owner, name, replacements[-1] if replacements else original)
        if not self._layers:
            self._originals.clear()

    def _bind(self, owner: ModuleType | type, name: str, new: Any) -> None:
        old = getattr(owner, name)
        setattr(owner, name, new)
        for path, module in list(sys.modules.items()):
            if path.split(".")[0] == self._package and getattr(module, "__dict__", {}).get(name) is old:
                setattr(module, name, new)


def wrapping(function: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that calls ``function(original, ...)`` under the original's name.

    A driver that sends functions to its workers by name, as verl's does, runs the function that has this name there.
    """

    def decorate(original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return function(original, *args, **kwargs)

        return wrapper

    return decorate


class AfterImport(MetaPathFinder):
    """Import hook that calls ``action`` once, after the first import of one of the modules ``names``.

    If one of them has already been imported, ``action`` is called immediately.
    """

    def __init__(self, names: Sequence[str], action: Callable[[], object]) -> None:
        self.names = names
        self._action = action
        if sys.modules.keys().isdisjoint(names):
            sys.meta_path.insert(0, self)
        else:
            action()

    def withdraw(self) -> bool:
        """Remove the hook. Return whether it was still waiting."""
        waiting = self in sys.meta_path
        if waiting:
            sys.meta_path.remove(self)
        return waiting

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.names:
            return None
        finders = (finder for finder in sys.meta_path[sys.meta_path.index(self) + 1 :] if hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in finders)), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if module.__name__ == fullname and self.withdraw():  # before the action, which may import another of them
                try:
                    self._action()
                except BaseException:
                    sys.meta_path.insert(0, self)
                    raise

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
