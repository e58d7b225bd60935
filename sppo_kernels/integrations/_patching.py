"""Names in another package's modules, replaced and put back; at once, or when the package imports them itself."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib import metadata
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

Name = tuple[ModuleType | type, str]


class Patch:
    """What has been replaced in one package, and what stood there before anything was.

    With ``package`` a name is replaced, and put back, in every loaded module of that package which holds the same
    object under it: ``from a import name`` binds it once more.
    """

    def __init__(self, package: str | None = None) -> None:
        self._package = package
        self._originals: dict[Name, Any] = {}

    def apply(self, replacements: Mapping[Name, Any]) -> ExitStack:
        """Put each replacement under its name. As a context manager, what this returns puts back what it found."""
        undo = ExitStack()
        for (owner, name), replacement in replacements.items():
            found = getattr(owner, name)
            self._originals.setdefault((owner, name), found)
            self._put(owner, name, replacement)
            undo.callback(self._put, owner, name, found)
        return undo

    def restore(self) -> None:
        """Put back what stood there before the first of all that was applied; nothing where nothing was."""
        for (owner, name), original in self._originals.items():
            self._put(owner, name, original)
        self._originals.clear()

    def _put(self, owner: ModuleType | type, name: str, new: Any) -> None:
        old = getattr(owner, name)
        setattr(owner, name, new)
        for path, module in list(sys.modules.items()):
            if path.split(".")[0] == self._package and vars(module).get(name) is old:
                setattr(module, name, new)


class AfterImport(MetaPathFinder):
    """Calls ``action`` once, as soon as one of the modules ``names`` has been imported; now, if one has been."""

    def __init__(self, names: Sequence[str], action: Callable[[], object]) -> None:
        self.names = names
        self._action = action
        if sys.modules.keys().isdisjoint(names):
            sys.meta_path.insert(0, self)
        else:
            action()

    def withdraw(self) -> bool:
        """Not to call it any more. Whether it would have."""
        waiting = self in sys.meta_path
        if waiting:
            sys.meta_path.remove(self)
        return waiting

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname in self.names else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if self.withdraw():  # the action may import another of them
                self._action()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def check_version(package: str, tested: str) -> None:
    """``package`` is installed in the version that was tested, or in another release of the same minor version.

    Raises:
        ImportError: it is not installed, or another version is; other versions keep other things under these names.
    """
    remedy = f"pip install '{package}~={tested}'"
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError:
        raise ImportError(f"{package} is not installed: {remedy}") from None
    minor = ".".join(tested.split(".")[:2])
    if ".".join(found.split(".")[:2]) != minor:
        raise ImportError(
            f"{package} must be {minor}.x ({tested} is what this was tested with), got {found}: {remedy}, or call the "
            "operations of sppo_kernels directly"
        )
